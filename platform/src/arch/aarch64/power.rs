//! Ending the machine: by semihosting, which carries a code, or else by PSCI, which carries none.

use core::arch::asm;

use super::psci;
use crate::power::ExitCode;

/// Semihosting's operation that ends the program with a code.
const SYS_EXIT_EXTENDED: u32 = 0x20;
/// The reason it is given: the program ended by itself.
const APPLICATION_EXIT: u64 = 0x2_0026;

unsafe extern "C" {
    fn semihosting_call(operation: u32, parameters: *const u64);
    static semihosting_trap: u8;
}

/// Ends the machine with `code`: with QEMU's `-semihosting` that is its exit status. Without it the machine is turned
/// off, and its verdict stands on the console alone.
pub fn exit(code: ExitCode) -> ! {
    mask_interrupts();
    let parameters = [APPLICATION_EXIT, code.value().into()];
    // SAFETY: reads the two parameters and returns only where nobody listens.
    unsafe { semihosting_call(SYS_EXIT_EXTENDED, parameters.as_ptr()) };
    off()
}

/// Whether an exception came from the instruction that calls semihosting, since nobody listens.
pub(super) fn is_semihosting_trap(elr: u64) -> bool {
    elr == (&raw const semihosting_trap).addr() as u64
}

/// Turns the machine off by PSCI; where that does not work, stops the CPU with interrupts off.
pub(super) fn off() -> ! {
    psci::system_off();
    halt()
}

/// Stops the CPU with interrupts off.
pub fn halt() -> ! {
    mask_interrupts();
    loop {
        // SAFETY: waits, for nothing.
        unsafe { asm!("wfi", options(nomem, nostack, preserves_flags)) };
    }
}

fn mask_interrupts() {
    // SAFETY: only sets bits of the mask.
    unsafe { asm!("msr daifset, #0xf", options(nostack, preserves_flags)) };
}
