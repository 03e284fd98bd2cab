//! The entry: from the arm64 boot protocol to [`crate::boot::start`].
//!
//! The loader enters with the address of the device tree (entry.s turns the MMU on, at EL1). Until the kernel's own page
//! tables are there, the first 4 GiB are mapped at their physical address: device registers below 1 GiB, RAM above.

use core::arch::global_asm;

use super::{clock, console, exceptions, psci};
use crate::boot::{self, BootInfo};
use crate::console::init_logger;
use crate::firmware::device_tree::{self, DeviceTree, DeviceTreeError};
use crate::memory::heap;
use crate::memory::physical::PhysicalMemory;
use crate::power::{self, ExitCode};
use crate::println;
use crate::range::PhysRange;

global_asm!(include_str!("entry.s"));

/// What the boot page tables map as RAM.
const BOOT_MAPPED_START: u64 = 1 << 30;
const BOOT_MAPPED_LAST: u64 = (4 << 30) - 1;

/// What belongs to firmware and boot loader, whatever the memory map says: nothing.
pub fn firmware_memory() -> Option<PhysRange> {
    None
}

fn boot_mapped() -> PhysRange {
    PhysRange::new(BOOT_MAPPED_START, BOOT_MAPPED_LAST).unwrap_or_else(|| unreachable!("3 GiB are not empty"))
}

/// The first Rust code, called by entry.s with the physical address of the device tree.
#[unsafe(no_mangle)]
extern "C" fn kernel_entry(device_tree_phys: u64) -> ! {
    prepare();
    match read_device_tree(device_tree_phys) {
        Ok(info) => boot::start(info, &BootMemory, boot_mapped()),
        Err(error) => {
            println!("cannot boot: {error}");
            power::exit(ExitCode::Fail)
        }
    }
}

fn prepare() {
    console::init();
    init_logger();
    exceptions::init();
    clock::init();
    heap::init_early();
}

/// Reads what common code needs, and by the way what this architecture does: how firmware is called, and which serial port
/// is the console.
fn read_device_tree(phys: u64) -> Result<BootInfo, DeviceTreeError> {
    let tree = DeviceTree::read(&BootMemory, phys)?;
    psci::find(&tree);
    console::find(&tree);
    device_tree::boot::read(&BootMemory, phys)
}

/// Physical memory as the boot page tables map it.
#[derive(Clone, Copy, Debug)]
pub struct BootMemory;

impl PhysicalMemory for BootMemory {
    fn bytes(&self, phys: u64, len_bytes: usize) -> Option<&[u8]> {
        let range = PhysRange::from_len(phys, len_bytes as u64)?;
        if !boot_mapped().contains(range) {
            return None;
        }
        // SAFETY: the boot page tables map it, and it is read before anything else could own it. What is not RAM there
        // reads as some bytes, or ends with a report; nobody writes firmware's data meanwhile.
        Some(unsafe { core::slice::from_raw_parts(phys as *const u8, len_bytes) })
    }
}
