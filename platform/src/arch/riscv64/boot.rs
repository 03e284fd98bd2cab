//! The entry: from the SBI firmware to [`crate::boot::start`].
//!
//! The firmware enters with translation off, so that all of memory is in reach until the kernel's own page tables are there.

use core::arch::global_asm;

use super::{clock, console, exceptions, interrupts, mmu, power};
use crate::boot::{self, BootInfo};
use crate::console::init_logger;
use crate::firmware::device_tree::{self, DeviceTree, DeviceTreeError};
use crate::image;
use crate::memory::heap;
use crate::memory::physical::PhysicalMemory;
use crate::power::ExitCode;
use crate::println;
use crate::range::PhysRange;

global_asm!(include_str!("entry.s"));

/// How far the firmware that entered the kernel may reach below it. It says so itself in the device tree, but older ones
/// say less.
const FIRMWARE_BYTES: u64 = 2 << 20;

/// What belongs to firmware and boot loader, whatever the memory map says: what lies just below the kernel.
pub fn firmware_memory() -> Option<PhysRange> {
    let kernel = image::whole().start();
    PhysRange::from_len(kernel.checked_sub(FIRMWARE_BYTES)?, FIRMWARE_BYTES)
}

fn everything() -> PhysRange {
    PhysRange::new(0, mmu::highest_reachable_address()).unwrap_or_else(|| unreachable!("there is memory"))
}

/// The first Rust code, called by entry.s with what the firmware handed over.
#[unsafe(no_mangle)]
extern "C" fn kernel_entry(_hart: u64, device_tree_phys: u64) -> ! {
    prepare();
    match read_device_tree(device_tree_phys) {
        Ok(info) => boot::start(info, &BootMemory, everything()),
        Err(error) => {
            println!("cannot boot: {error}");
            power::exit(ExitCode::Fail)
        }
    }
}

fn prepare() {
    init_logger();
    interrupts::mask_all();
    exceptions::init();
    heap::init_early();
}

/// Reads what common code needs, and by the way what this architecture does: the serial port, the clock's rate, and how
/// the machine ends.
fn read_device_tree(phys: u64) -> Result<BootInfo, DeviceTreeError> {
    let tree = DeviceTree::read(&BootMemory, phys)?;
    console::find(&tree);
    power::find(&tree);
    clock::find(&tree);
    device_tree::boot::read(&BootMemory, phys)
}

/// Physical memory without translation.
#[derive(Clone, Copy, Debug)]
pub struct BootMemory;

impl PhysicalMemory for BootMemory {
    fn bytes(&self, phys: u64, len_bytes: usize) -> Option<&[u8]> {
        let range = PhysRange::from_len(phys, len_bytes as u64)?;
        if phys == 0 || !everything().contains(range) {
            return None;
        }
        // SAFETY: translation is off, and it is read before anything else could own it. Where nothing is the CPU takes an
        // exception, which is reported; nobody writes firmware's data meanwhile.
        Some(unsafe { core::slice::from_raw_parts(phys as *const u8, len_bytes) })
    }
}
