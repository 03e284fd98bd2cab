//! Interrupts: the CPU's mask, and the GIC, which takes the lines of devices and their messages.
//!
//! To sleep with a deadline the generic timer's virtual counter interrupts once.

use alloc::string::ToString;
use core::arch::asm;

use spin::Once;

use super::gic::{self, Gic, GicError};
use super::timer;
use crate::firmware::device_tree::DeviceTree;
use crate::firmware::device_tree::pci::HostBridge;
use crate::interrupts::{InterruptError, Line, Next, Trigger, dispatch};
use crate::machine::Firmware;
use crate::pci::message::Message;

/// DAIF's bit for interrupts.
const MASKED: u64 = 1 << 7;

/// The most interrupts that one entry takes; more come by another.
const MAX_PER_ENTRY: usize = 64;

/// In a device tree's specifier: what kind of an interrupt it is, and where the kind's numbers begin.
const SPECIFIER_SHARED: u32 = 0;
const SPECIFIER_OWN: u32 = 1;
const FIRST_SHARED: u32 = 32;
const FIRST_OWN: u32 = 16;
/// Its flags: an edge, either one.
const FLAG_EDGES: u32 = 3;

/// The controller, once [`init`] found it.
static GIC: Once<Gic> = Once::new();

/// Whether the CPU took interrupts at some moment, to be given to [`restore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    enabled: bool,
}

/// Turns the CPU's interrupts off, and says how they were.
pub fn save_and_disable() -> Saved {
    let daif: u64;
    // SAFETY: reads the mask and sets its bit for interrupts. Without `nomem`, so that what has to happen with
    // interrupts off is not moved before.
    unsafe { asm!("mrs {}, daif", "msr daifset, #2", out(reg) daif, options(nostack, preserves_flags)) };
    Saved { enabled: daif & MASKED == 0 }
}

/// Turns the CPU's interrupts on again if they were.
pub fn restore(saved: Saved) {
    if saved.enabled {
        // SAFETY: they were on before, and handlers keep to their own data.
        unsafe { asm!("msr daifclr, #2", options(nostack, preserves_flags)) };
    }
}

/// Starts the GIC that the device tree names, with every line off. This CPU is the one that takes interrupts.
///
/// # Errors
///
/// [`InterruptError::NoController`].
pub fn init(firmware: &Firmware) -> Result<(), InterruptError> {
    let Firmware::DeviceTree { tree, bridges } = firmware else {
        return Err(InterruptError::NoController { reason: "there is no device tree that names one".into() });
    };
    GIC.try_call_once(|| start(tree, bridges)).map_err(no_controller)?;
    Ok(())
}

fn start(tree: &DeviceTree<'_>, bridges: &[HostBridge<'static>]) -> Result<Gic, GicError> {
    let gic = Gic::start(tree, bridges)?;
    // Without the timer, who sleeps looks again and again.
    if let Some(line) = timer::line(tree) {
        gic.enable(line)?;
        timer::use_interrupt(line.number);
    }
    Ok(gic)
}

fn no_controller(error: GicError) -> InterruptError {
    InterruptError::NoController { reason: error.to_string() }
}

fn controller() -> Result<&'static Gic, InterruptError> {
    GIC.get().ok_or_else(|| InterruptError::NoController { reason: "it is not set up".into() })
}

/// Reads three cells: the kind, the number among its kind, and flags, whose first four bits are the trigger.
pub fn line(specifier: &[u32]) -> Option<Line> {
    let [kind, number, flags] = *specifier else { return None };
    let first = match kind {
        SPECIFIER_SHARED => FIRST_SHARED,
        SPECIFIER_OWN => FIRST_OWN,
        _ => return None,
    };
    let trigger = if flags & FLAG_EDGES != 0 { Trigger::Edge } else { Trigger::Level };
    Some(Line { number: first.checked_add(number)?, trigger })
}

/// Lets a line come.
///
/// # Errors
///
/// [`InterruptError::NoLine`], or [`InterruptError::NoController`] before [`init`].
pub fn enable(line: Line) -> Result<(), InterruptError> {
    controller()?.enable(line).map_err(|_| InterruptError::NoLine { number: line.number })
}

/// Stops a line.
pub fn disable(number: u32) {
    if let Some(gic) = GIC.get() {
        gic.disable(number);
    }
}

/// Gives one of a function's events an interrupt of its own: its number, and what the function has to write.
///
/// # Errors
///
/// [`InterruptError::NotConnected`], or [`InterruptError::NoController`] before [`init`].
pub fn message(segment: u16, requester: u16, event: u16) -> Result<(u32, Message), InterruptError> {
    let message = controller()?.message(segment, requester, event.into());
    message.map_err(|error| InterruptError::NotConnected { reason: error.to_string() })
}

/// Sleeps until an interrupt came, `deadline_ns` has passed, or at some time before. To be called with interrupts off, and
/// returns so; what came since they were turned off ends the sleep at once.
pub fn wait_until(deadline_ns: u64) {
    // Nothing wakes another CPU than the one that takes interrupts.
    if !GIC.get().is_some_and(Gic::is_own_cpu) || !timer::start(deadline_ns) {
        return;
    }
    // SAFETY: sleeps until something is pending, masked or not; then takes it, between the two writes of the mask. Handlers
    // keep to their own data.
    unsafe {
        asm!("dsb sy", "wfi", "msr daifclr, #2", "isb", "msr daifset, #2", options(nostack, preserves_flags))
    };
    timer::stop();
}

/// Called by the vector, with interrupts off.
#[unsafe(no_mangle)]
extern "C" fn interrupt_entry() {
    for number in (0..MAX_PER_ENTRY).map_while(|_| gic::acknowledge()) {
        if timer::is_own(number) {
            timer::stop();
        } else if dispatch(number) == Next::TurnOff {
            disable(number);
        }
        gic::end(number);
    }
}
