//! Interrupts: the CPU's flag, the two 8259s, which take the lines of a PC's devices, and the CPU's own controller, which
//! takes messages.
//!
//! ```text
//! 0 to 7      lines of the first 8259; line 0 is the timer, line 2 the second one
//! 8 to 15     lines of the second one
//! 16 to 46    messages, in the order in which they are asked for
//! 47          nothing: the CPU's controller took an interrupt that went away
//! ```
//! Each number is a vector of its own, after those of exceptions. Which of the lines a PCI function's line comes out at firmware wrote into the function's own register. To sleep with a
//! deadline, the interval timer's channel 0 interrupts once; longer sleeps are made of several.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use x86_64::instructions::interrupts;
use x86_64::instructions::port::Port;

use super::apic::{self, Apic};
use crate::acpi::madt;
use crate::interrupts::{InterruptError, Line, Next, dispatch};
use crate::machine::Firmware;
use crate::pci::message::Message;
use crate::time;

const COMMAND_PORTS: [u16; 2] = [0x20, 0xa0];
const DATA_PORTS: [u16; 2] = [0x21, 0xa1];
/// Interrupts come as these vectors, above those of CPU exceptions.
pub(super) const FIRST_VECTOR: u8 = 32;
pub(super) const LINES: u32 = 16;
/// All interrupts, with the last one that is none.
pub(super) const COUNT: usize = 48;
const SPURIOUS: u32 = COUNT as u32 - 1;
const TIMER_LINE: u32 = 0;
/// Where the second 8259 is connected to the first.
const CASCADE_LINE: u32 = 2;

/// Initialisation in four words: edges as the chipset has it, and a fourth word; the first vector; the cascade; 8086 mode.
const INIT: u8 = 0x11;
const MODE_8086: u8 = 1;
const END_OF_INTERRUPT: u8 = 0x20;
/// The next read of the command port gives the lines that are being handled.
const READ_IN_SERVICE: u8 = 0x0b;

/// The timer: its input frequency, the longest time that it can count, and a count once from a value of two bytes.
const PIT_HZ: u64 = 1_193_182;
const LONGEST_COUNT: u64 = 0xffff;
const PIT_ONCE: u8 = 0b0011_0000;

/// The next message.
static NEXT_MESSAGE: AtomicU32 = AtomicU32::new(LINES);
/// Set once the 8259s send vectors that are none of an exception.
static READY: AtomicBool = AtomicBool::new(false);

/// Masks every line of both 8259s, whose reset vectors would look like CPU exceptions.
pub fn mask_all() {
    for port in DATA_PORTS {
        write(port, 0xff);
    }
}

/// Whether the CPU took interrupts at some moment, to be given to [`restore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    enabled: bool,
}

/// Turns the CPU's interrupts off, and says how they were.
pub fn save_and_disable() -> Saved {
    let enabled = interrupts::are_enabled();
    interrupts::disable();
    Saved { enabled }
}

/// Turns the CPU's interrupts on again if they were.
pub fn restore(saved: Saved) {
    if saved.enabled {
        interrupts::enable();
    }
}

/// Sets the 8259s up, with every line off, and lets this CPU take interrupts.
///
/// # Errors
///
/// [`InterruptError::NoController`] on a machine without them.
pub fn init(firmware: &Firmware) -> Result<(), InterruptError> {
    if let Firmware::Acpi(tables) = firmware {
        let madt = tables.find(madt::SIGNATURE).and_then(madt::parse);
        let absent = madt.is_ok_and(|madt| !madt.has_8259s);
        if absent {
            return Err(InterruptError::NoController {
                reason: "the MADT says that there are no 8259s".into(),
            });
        }
    }
    let vectors = [FIRST_VECTOR, FIRST_VECTOR + 8];
    // What each is told of the cascade: which of its lines, and which number it is.
    let cascade = [1 << CASCADE_LINE, CASCADE_LINE as u8];
    for chip in 0..2 {
        write(COMMAND_PORTS[chip], INIT);
        write(DATA_PORTS[chip], vectors[chip]);
        write(DATA_PORTS[chip], cascade[chip]);
        write(DATA_PORTS[chip], MODE_8086);
    }
    mask_all();
    // What is not there reads as all ones whatever it was told.
    write(DATA_PORTS[0], !(1 << CASCADE_LINE));
    if read(DATA_PORTS[0]) != !(1 << CASCADE_LINE) {
        return Err(InterruptError::NoController { reason: "no 8259 is at port 0x20".into() });
    }
    READY.store(true, Ordering::Release);
    interrupts::enable();
    Ok(())
}

/// Device trees describe no machine of this kind.
pub fn line(_specifier: &[u32]) -> Option<Line> {
    None
}

/// Lets a line come.
///
/// # Errors
///
/// [`InterruptError`] for one that the 8259s do not have for devices, and before [`init`].
pub fn enable(line: Line) -> Result<(), InterruptError> {
    if !READY.load(Ordering::Acquire) {
        return Err(InterruptError::NoController { reason: "it is not set up".into() });
    }
    if line.number >= LINES || matches!(line.number, TIMER_LINE | CASCADE_LINE) {
        return Err(InterruptError::NoLine { number: line.number });
    }
    set_masked(line.number, false);
    Ok(())
}

/// Stops a line.
pub fn disable(number: u32) {
    if number < LINES {
        set_masked(number, true);
    }
}

/// Gives one of a function's events an interrupt of its own: its number, and what the function has to write. It comes to
/// the CPU that asks.
///
/// # Errors
///
/// [`InterruptError::NoController`], or [`InterruptError::NotConnected`] when all are given away.
pub fn message(_segment: u16, _requester: u16, _event: u16) -> Result<(u32, Message), InterruptError> {
    let apic = Apic::find()?;
    let take = |next: u32| (next < SPURIOUS).then_some(next + 1);
    let number = NEXT_MESSAGE.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
    let all_used = |_| InterruptError::NotConnected { reason: "all messages are in use".into() };
    let number = number.map_err(all_used)?;
    apic.enable(vector(SPURIOUS));
    Ok((number, Message { address: apic.message_address(), data: vector(number).into() }))
}

fn vector(number: u32) -> u8 {
    FIRST_VECTOR + number as u8
}

/// Sleeps until an interrupt came, `deadline_ns` has passed, or at some time before. To be called with interrupts off, and
/// returns so; what came since they were turned off ends the sleep at once.
pub fn wait_until(deadline_ns: u64) {
    let left_ns = deadline_ns.saturating_sub(time::now_ns().unwrap_or(deadline_ns));
    let count = (u128::from(left_ns) * u128::from(PIT_HZ) / 1_000_000_000).clamp(1, LONGEST_COUNT.into());
    if READY.load(Ordering::Acquire) {
        write(0x43, PIT_ONCE);
        let [low, high] = (count as u16).to_le_bytes();
        write(0x40, low);
        write(0x40, high);
        set_masked(TIMER_LINE, false);
        // No interrupt comes between the two instructions.
        interrupts::enable_and_hlt();
        interrupts::disable();
        set_masked(TIMER_LINE, true);
    }
}

/// Called by the stubs with the number.
#[unsafe(no_mangle)]
extern "C" fn interrupt_entry(number: u32) {
    match number {
        0..LINES => serve_line(number),
        SPURIOUS => {}
        _ => {
            // A message comes once for each write: there is nothing to turn off.
            dispatch(number);
            apic::end_of_message();
        }
    }
}

fn serve_line(number: u32) {
    let chip = usize::from(number >= 8);
    // A line that went away meanwhile comes as the last one of its chip, and is not being handled.
    let spurious = number % 8 == 7 && {
        write(COMMAND_PORTS[chip], READ_IN_SERVICE);
        read(COMMAND_PORTS[chip]) & 0x80 == 0
    };
    if !spurious && number != TIMER_LINE && dispatch(number) == Next::TurnOff {
        set_masked(number, true);
    }
    if chip == 1 {
        if !spurious {
            write(COMMAND_PORTS[1], END_OF_INTERRUPT);
        }
        write(COMMAND_PORTS[0], END_OF_INTERRUPT);
    } else if !spurious {
        write(COMMAND_PORTS[0], END_OF_INTERRUPT);
    }
}

/// Sets one bit of the masks, with interrupts off.
fn set_masked(number: u32, masked: bool) {
    let saved = save_and_disable();
    let port = DATA_PORTS[usize::from(number >= 8)];
    let bit = 1 << (number % 8);
    let mask = read(port);
    write(port, if masked { mask | bit } else { mask & !bit });
    restore(saved);
}

fn read(port: u16) -> u8 {
    // SAFETY: a register of the 8259s, whose reads have no side effects.
    unsafe { Port::new(port).read() }
}

fn write(port: u16, value: u8) {
    // SAFETY: a register of the 8259s, or of the timer's channel 0, which only this module uses. None has an effect on
    // memory, and a machine without them ignores the write.
    unsafe { Port::new(port).write(value) };
}
