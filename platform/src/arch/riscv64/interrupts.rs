//! Interrupts: the CPU's flag, its sources, and the PLIC behind one of them.
//!
//! ```text
//! timer       by the firmware, to sleep with a deadline
//! external    the PLIC: the lines of devices
//! ```
//! There are no messages (MSI): the PLIC has none, and the controller that has is another one, which QEMU has only when it
//! is asked for (`aia=aplic-imsic`).

use core::arch::asm;

use spin::Once;

use super::plic::Plic;
use super::{clock, cpus};
use crate::interrupts::{InterruptError, Line, Next, Trigger, dispatch};
use crate::machine::Firmware;
use crate::pci::message::Message;

/// The bit of `sstatus` that lets S-mode take interrupts.
const ENABLE: u64 = 1 << 1;
/// Sources, as bits of `sie`, and causes.
const TIMER: u64 = 1 << 5;
const EXTERNAL: u64 = 1 << 9;
const TIMER_CAUSE: u64 = 5;
const EXTERNAL_CAUSE: u64 = 9;
/// The most lines that are served for one interrupt: what still waits then comes as the next one.
const MAX_CLAIMS: usize = 64;

static CONTROLLER: Once<Plic> = Once::new();

/// Masks every source of interrupts.
pub fn mask_all() {
    // SAFETY: masking has no effect on memory.
    unsafe { asm!("csrw sie, zero", options(nomem, nostack, preserves_flags)) };
}

/// Whether the CPU took interrupts at some moment, to be given to [`restore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    enabled: bool,
}

/// Turns the CPU's interrupts off, and says how they were.
pub fn save_and_disable() -> Saved {
    let before: u64;
    // SAFETY: turning interrupts off has no effect on memory. Without `nomem`, so that what has to happen with interrupts
    // off is not moved before.
    unsafe { asm!("csrrci {}, sstatus, 2", out(reg) before, options(nostack, preserves_flags)) };
    Saved { enabled: before & ENABLE != 0 }
}

/// Turns the CPU's interrupts on again if they were.
pub fn restore(saved: Saved) {
    if saved.enabled {
        // SAFETY: they were on before, and handlers keep to their own data.
        unsafe { asm!("csrsi sstatus, 2", options(nostack, preserves_flags)) };
    }
}

/// Starts the PLIC that the device tree names, with every line off, and lets this CPU take interrupts: it is the one that
/// does.
///
/// # Errors
///
/// [`InterruptError::NoController`], or [`InterruptError::Registers`].
pub fn init(firmware: &Firmware) -> Result<(), InterruptError> {
    let Firmware::DeviceTree { tree, .. } = firmware else {
        return Err(InterruptError::NoController { reason: "there is no device tree".into() });
    };
    CONTROLLER.try_call_once(|| Plic::start(tree, cpus::own_id()))?;
    // SAFETY: both vectors are set, and the PLIC lets nothing through yet.
    unsafe { asm!("csrs sie, {}", in(reg) EXTERNAL, options(nostack, preserves_flags)) };
    restore(Saved { enabled: true });
    Ok(())
}

/// The line of a specifier in a device tree: its number alone.
pub fn line(specifier: &[u32]) -> Option<Line> {
    match *specifier {
        [number] => Some(Line { number, trigger: Trigger::Level }),
        _ => None,
    }
}

/// Lets a line come.
///
/// # Errors
///
/// [`InterruptError`] for one that the PLIC does not have, and before [`init`].
pub fn enable(line: Line) -> Result<(), InterruptError> {
    let none = || InterruptError::NoController { reason: "it is not started".into() };
    CONTROLLER.get().ok_or_else(none)?.enable(line.number)
}

/// Stops a line.
pub fn disable(number: u32) {
    CONTROLLER.get().into_iter().for_each(|plic| plic.disable(number));
}

/// None: this machine's controller takes no messages.
///
/// # Errors
///
/// Always [`InterruptError::NoController`].
pub fn message(_segment: u16, _requester: u16, _event: u16) -> Result<(u32, Message), InterruptError> {
    Err(InterruptError::NoController { reason: "a PLIC takes no messages".into() })
}

/// Sleeps until an interrupt came, `deadline_ns` has passed, or at some time before. To be called with interrupts off, and
/// returns so; what came since they were turned off ends the sleep at once.
pub fn wait_until(deadline_ns: u64) {
    let Some(ticks) = clock::ticks_at(deadline_ns) else { return };
    // Where the firmware has no timer, the kernel must not sleep.
    if sbi_rt::set_timer(ticks).is_err() {
        return;
    }
    // SAFETY: `wfi` ends with an interrupt that is pending, also while none is taken; the second line takes it. Their
    // handlers keep to their own data.
    unsafe {
        asm!("csrs sie, {timer}", "wfi", "csrsi sstatus, 2", "nop", "csrci sstatus, 2", "csrc sie, {timer}",
            timer = in(reg) TIMER, options(nostack, preserves_flags));
    }
}

/// Called by the stub.
#[unsafe(no_mangle)]
extern "C" fn interrupt_entry(cause: u64) {
    match cause << 1 >> 1 {
        // It goes on being pending until the timer is set anew: off is what ends it.
        // SAFETY: masking has no effect on memory.
        TIMER_CAUSE => unsafe { asm!("csrc sie, {}", in(reg) TIMER, options(nostack, preserves_flags)) },
        EXTERNAL_CAUSE => CONTROLLER.get().into_iter().for_each(serve),
        _ => {}
    }
}

fn serve(plic: &Plic) {
    for _ in 0..MAX_CLAIMS {
        let Some(claimed) = plic.claim() else { return };
        if dispatch(claimed) == Next::TurnOff {
            plic.disable(claimed);
        }
        plic.complete(claimed);
    }
}
