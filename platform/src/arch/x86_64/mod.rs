//! x86_64: boot by PVH or by a Linux zero page, long mode, port I/O.

/// The architecture's name in the line protocol.
pub const NAME: &str = "x86_64";

mod apic;
pub mod backtrace;
pub mod boot;
pub mod clock;
pub mod console;
mod cpuid;
pub mod cpus;
pub mod diagnostic;
pub mod exceptions;
pub mod interrupts;
pub mod mmu;
pub mod power;
mod reenter;
pub mod segments;
