//! Port 0x80, where firmware shows how far it got. Writes do nothing, and QEMU's trace of port accesses shows them.

use x86_64::instructions::port::PortWriteOnly;

/// Writes a code.
pub fn write(code: u8) {
    // SAFETY: no machine does more with the port than to show the code.
    unsafe { PortWriteOnly::new(0x80).write(code) };
}
