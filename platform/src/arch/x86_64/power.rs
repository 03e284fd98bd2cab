//! Ending the machine through QEMU's isa-debug-exit device at port 0xf4.

use qemu_exit::{QEMUExit, X86};
use x86_64::instructions::{hlt, interrupts};

use crate::power::ExitCode;

const EXIT_PORT: u16 = 0xf4;

/// Ends the machine with `code`; where the device is missing, stops the CPU with interrupts off.
pub fn exit(code: ExitCode) -> ! {
    interrupts::disable();
    // SAFETY: on QEMU the harness puts the device at this port; on other machines nothing is there, and the write is
    // lost.
    let device = unsafe { X86::new(EXIT_PORT, (ExitCode::Pass as u32) << 1 | 1) };
    device.exit(code.value().into())
}

/// Stops the CPU with interrupts off.
pub fn halt() -> ! {
    interrupts::disable();
    loop {
        hlt();
    }
}
