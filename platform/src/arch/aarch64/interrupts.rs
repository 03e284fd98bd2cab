//! Interrupts: the CPU's mask saved and restored. The kernel polls.

use core::arch::asm;

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

/// Called by the vector.
#[unsafe(no_mangle)]
extern "C" fn interrupt_entry() {}
