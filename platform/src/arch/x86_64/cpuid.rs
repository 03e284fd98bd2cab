//! The CPU's identification leaves.
//!
//! Written out, since the standard library's `__cpuid` is safe in some of the supported compilers and unsafe in others.

use core::arch::asm;

/// The four registers of one leaf.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaf {
    pub(super) eax: u32,
    pub(super) ebx: u32,
    pub(super) ecx: u32,
    pub(super) edx: u32,
}

/// Reads a leaf, subleaf 0.
pub(super) fn read(leaf: u32) -> Leaf {
    let (eax, ebx, ecx, edx): (u32, u64, u32, u32);
    // SAFETY: every x86_64 CPU has the instruction. rbx, which the compiler keeps for itself, is put back.
    unsafe {
        asm!(
            "mov {saved}, rbx",
            "cpuid",
            "xchg {saved}, rbx",
            saved = out(reg) ebx,
            inout("eax") leaf => eax,
            inout("ecx") 0 => ecx,
            out("edx") edx,
            options(nomem, nostack, preserves_flags),
        );
    }
    Leaf { eax, ebx: ebx as u32, ecx, edx }
}

/// The highest leaf of the range that starts at `base`: 0, 0x4000_0000 or 0x8000_0000.
pub(super) fn highest(base: u32) -> u32 {
    read(base).eax
}
