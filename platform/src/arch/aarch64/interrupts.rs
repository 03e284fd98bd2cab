//! Interrupts: the CPU's mask saved and restored. The kernel polls.

use core::arch::asm;

use crate::interrupts::{InterruptError, Line};
use crate::machine::Firmware;

/// DAIF's bit for interrupts.
const MASKED: u64 = 1 << 7;

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
        // SAFETY: clears the mask's bit for interrupts, whose vector is set.
        unsafe { asm!("msr daifclr, #2", options(nostack, preserves_flags)) };
    }
}

/// Starts no controller yet.
///
/// # Errors
///
/// [`InterruptError::NoController`].
pub fn init(_: &Firmware) -> Result<(), InterruptError> {
    Err(InterruptError::NoController { reason: "the kernel does not drive this machine's".into() })
}

/// None yet.
pub fn line(_specifier: &[u32]) -> Option<Line> {
    None
}

/// Lets a line come.
///
/// # Errors
///
/// [`InterruptError::NoLine`].
pub fn enable(line: Line) -> Result<(), InterruptError> {
    Err(InterruptError::NoLine { number: line.number })
}

/// Stops a line.
pub fn disable(_: u32) {}

/// Does not sleep yet.
pub fn wait_until(_deadline_ns: u64) {}

/// Called by the vector.
#[unsafe(no_mangle)]
extern "C" fn interrupt_entry() {}
