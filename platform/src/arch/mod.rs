//! What differs between architectures, behind the same names on each.
//!
//! | module | holds |
//! |---|---|
//! | `boot` | the entry from the boot loader, and the memory map and command line it hands over |
//! | `mmu` | page tables: RAM, device registers, firmware tables |
//! | `exceptions` | the exception vectors, which report and end the machine |
//! | `interrupts` | the CPU's mask; the controller: `init` by firmware's word, `line` of a device tree's specifier, `enable`, `disable`; `message` for a function's event; `wait_until` an interrupt comes or a time; calls [`dispatch`](crate::interrupts::dispatch) |
//! | `cpus` | starting the other CPUs, one after the other |
//! | `console` | bytes out of the serial port |
//! | `clock` | the monotonic clock |
//! | `diagnostic` | a port that does nothing, whose writes a trace of the machine shows |
//! | `power` | ending the machine |
//! | `backtrace` | the return addresses on a stack |
//!
//! `host` stands in where the library runs in a process, so that all above compiles and is tested there.

#[cfg(not(target_os = "none"))]
mod host;
#[cfg(not(target_os = "none"))]
pub use host::*;

#[cfg(all(target_os = "none", target_arch = "x86_64"))]
mod x86_64;
#[cfg(all(target_os = "none", target_arch = "x86_64"))]
pub use x86_64::*;

#[cfg(all(target_os = "none", target_arch = "aarch64"))]
mod aarch64;
#[cfg(all(target_os = "none", target_arch = "aarch64"))]
pub use aarch64::*;

#[cfg(all(target_os = "none", target_arch = "riscv64"))]
mod riscv64;
#[cfg(all(target_os = "none", target_arch = "riscv64"))]
pub use riscv64::*;
