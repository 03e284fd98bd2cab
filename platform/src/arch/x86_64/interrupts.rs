//! Interrupts: all sources masked, the CPU's flag saved and restored. The kernel polls.

use x86_64::instructions::interrupts;
use x86_64::instructions::port::Port;

const PIC_MASK_PORTS: [u16; 2] = [0x21, 0xa1];

/// Masks every line of both 8259s, whose reset vectors would look like CPU exceptions.
pub fn mask_all() {
    for port in PIC_MASK_PORTS {
        // SAFETY: the interrupt mask registers of the two 8259s; masking has no effect on memory. A machine without
        // them ignores the write.
        unsafe { Port::<u8>::new(port).write(0xff) };
    }
}

/// Whether the CPU took interrupts at some moment, to be given to [`restore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    enabled: bool,
}

/// Turns the CPU's interrupts off, and says how they were.
pub fn save_and_disable() -> Saved {
    let enabled = interrupts::are_enabled();
    interrupts::disable();
    Saved { enabled }
}

/// Turns the CPU's interrupts on again if they were.
pub fn restore(saved: Saved) {
    if saved.enabled {
        interrupts::enable();
    }
}
