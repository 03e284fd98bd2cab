//! Ending the machine with a verdict.

use crate::arch;

/// What the machine ends with.
///
/// On x86_64 the value goes to QEMU's isa-debug-exit device, and QEMU's exit status is twice the value plus one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Every check passed: status 33.
    Pass = 0x10,
    /// A check failed, or the kernel refused to go on: status 35.
    Fail = 0x11,
    /// A panic or a CPU exception: status 37.
    Panic = 0x12,
}

impl ExitCode {
    /// The value that the exit device is given.
    pub const fn value(self) -> u8 {
        self as u8
    }
}

/// Ends the machine with `code`. On a machine without an exit device it turns the machine off, or, where that cannot be
/// done, stops the CPU for good.
pub fn exit(code: ExitCode) -> ! {
    arch::power::exit(code)
}
