//! The entry: from the PVH boot loader to [`crate::boot::start`].
//!
//! The loader enters in 32-bit mode (entry.s goes on to 64 bits) with the address of the start info. Until the kernel's
//! own page tables are there, the first 4 GiB are mapped at their physical address.

use core::arch::global_asm;

use super::{clock, console, exceptions, interrupts};
use crate::boot::{self, BootInfo};
use crate::console::init_logger;
use crate::firmware::start_info;
use crate::memory::heap;
use crate::memory::physical::PhysicalMemory;
use crate::power::{self, ExitCode};
use crate::println;
use crate::range::PhysRange;

global_asm!(include_str!("entry.s"));

unsafe extern "C" {
    fn pvh_start() -> !;
}

pvh::xen_elfnote_phys32_entry!(pvh_start);

/// What the boot page tables map.
const BOOT_MAPPED_BYTES: u64 = 4 << 30;

/// What belongs to firmware and boot loader, whatever the memory map says: the first MiB.
pub fn firmware_memory() -> Option<PhysRange> {
    PhysRange::from_len(0, 1 << 20)
}

fn boot_mapped() -> PhysRange {
    PhysRange::from_len(0, BOOT_MAPPED_BYTES).unwrap_or_else(|| unreachable!("4 GiB are not empty"))
}

/// The first Rust code, called by entry.s with the physical address of the start info.
#[unsafe(no_mangle)]
extern "C" fn kernel_entry(start_info_phys: u64) -> ! {
    prepare();
    match read_start_info(start_info_phys) {
        Ok(info) => boot::start(info, &BootMemory, boot_mapped()),
        Err(error) => {
            println!("cannot boot: {error}");
            power::exit(ExitCode::Fail)
        }
    }
}

/// Called by entry.s when a loader went to the ELF entry point.
#[unsafe(no_mangle)]
extern "C" fn kernel_entry_without_pvh() -> ! {
    console::init();
    println!("cannot boot: this kernel is entered by its PVH note (ELF note 18), not at the ELF entry point");
    power::exit(ExitCode::Fail)
}

fn prepare() {
    console::init();
    init_logger();
    interrupts::mask_all();
    exceptions::init();
    clock::init();
    heap::init_early();
}

fn read_start_info(phys: u64) -> Result<BootInfo, start_info::StartInfoError> {
    start_info::read(&BootMemory, phys)
}

/// Physical memory as the boot page tables map it.
#[derive(Clone, Copy, Debug)]
pub struct BootMemory;

impl PhysicalMemory for BootMemory {
    fn bytes(&self, phys: u64, len_bytes: usize) -> Option<&[u8]> {
        let range = PhysRange::from_len(phys, len_bytes as u64)?;
        if phys == 0 || range.last() >= BOOT_MAPPED_BYTES {
            return None;
        }
        // SAFETY: the boot page tables map it, and it is read before anything else could own it. What is not RAM there
        // reads as some bytes; nobody writes firmware's data meanwhile.
        Some(unsafe { core::slice::from_raw_parts(phys as *const u8, len_bytes) })
    }
}
