//! Ending the machine: through QEMU's isa-debug-exit device, which takes a code, or else by ACPI's registers.

use spin::Once;
use x86_64::instructions::port::Port;
use x86_64::instructions::{hlt, interrupts};

use super::boot::BootMemory;
use crate::acpi::fadt::{self, Control, PowerOff};
use crate::acpi::{AcpiError, Tables};
use crate::power::ExitCode;

const EXIT_PORT: u16 = 0xf4;

/// PM1 control: the type of sleep, and going to it.
const PM1_TYPE_SHIFT: u16 = 10;
const PM1_TYPE: u16 = 7 << PM1_TYPE_SHIFT;
const PM1_SLEEP: u16 = 1 << 13;
/// The same of the sleep control register.
const CONTROL_TYPE_SHIFT: u8 = 2;
const CONTROL_SLEEP: u8 = 1 << 5;

static POWER_OFF: Once<PowerOff> = Once::new();

/// Finds out by ACPI's tables how the machine is turned off. Before the kernel's own page tables are there.
pub(super) fn find(rsdp: Option<u64>) {
    let found = || -> Result<PowerOff, AcpiError> {
        let tables = Tables::find_all(&BootMemory, rsdp)?;
        fadt::power_off(&BootMemory, &tables)
    };
    // Where the tables do not say it, the machine goes on until its host ends it.
    if let Ok(power_off) = found() {
        POWER_OFF.call_once(|| power_off);
    }
}

/// Ends the machine with `code`. Without an exit device the machine is turned off, and the verdict is on the console only;
/// where that cannot be done, the CPU stops with interrupts off.
pub fn exit(code: ExitCode) -> ! {
    interrupts::disable();
    // SAFETY: on QEMU the harness puts the device at this port; on other machines nothing is there, and the write is
    // lost.
    unsafe { Port::<u32>::new(EXIT_PORT).write(code.value().into()) };
    match POWER_OFF.get() {
        Some(PowerOff::Pm1 { first, second }) => {
            sleep_by_pm1(*first);
            second.iter().for_each(|control| sleep_by_pm1(*control));
        }
        Some(PowerOff::SleepControl(control)) => {
            let value = control.sleep_type << CONTROL_TYPE_SHIFT | CONTROL_SLEEP;
            // SAFETY: the machine's own tables say that this turns it off.
            unsafe { Port::<u8>::new(control.port).write(value) };
        }
        None => {}
    }
    halt()
}

fn sleep_by_pm1(control: Control) {
    let mut port = Port::<u16>::new(control.port);
    // SAFETY: the machine's own tables say that this turns it off. The register's other bits stay.
    unsafe {
        let others = port.read() & !PM1_TYPE;
        port.write(others | u16::from(control.sleep_type) << PM1_TYPE_SHIFT | PM1_SLEEP);
    }
}

/// Stops the CPU with interrupts off.
pub fn halt() -> ! {
    interrupts::disable();
    loop {
        hlt();
    }
}
