//! aarch64: flat image with the arm64 header, device tree, EL1.
//!
//! A kernel that is entered at EL2 goes down to EL1: it has no use for virtualisation, and one exception level is one set
//! of registers.

/// The architecture's name in the line protocol.
pub const NAME: &str = "aarch64";

pub mod backtrace;
pub mod boot;
pub mod clock;
pub mod console;
pub mod cpus;
pub mod diagnostic;
pub mod exceptions;
pub mod gic;
pub mod interrupts;
pub mod mmu;
pub mod power;
pub mod psci;
mod timer;
