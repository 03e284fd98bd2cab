//! riscv64: boot from the SBI firmware in S-mode, Sv39.

/// The architecture's name in the line protocol.
pub const NAME: &str = "riscv64";

pub mod backtrace;
pub mod boot;
pub mod clock;
pub mod console;
pub mod cpus;
pub mod diagnostic;
pub mod exceptions;
pub mod interrupts;
pub mod mmu;
mod plic;
pub mod power;
