//! Interrupts: all sources masked, the CPU's flag saved and restored. The kernel polls.

use core::arch::asm;

/// The bit of `sstatus` that lets S-mode take interrupts.
const SIE: u64 = 1 << 1;

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
    // SAFETY: turning interrupts off has no effect on memory; what follows stays behind, since this may touch any.
    unsafe { asm!("csrrci {}, sstatus, 2", out(reg) before, options(nostack, preserves_flags)) };
    Saved { enabled: before & SIE != 0 }
}

/// Turns the CPU's interrupts on again if they were.
pub fn restore(saved: Saved) {
    if saved.enabled {
        // SAFETY: they were on before, and handlers keep to their own data.
        unsafe { asm!("csrsi sstatus, 2", options(nostack, preserves_flags)) };
    }
}
