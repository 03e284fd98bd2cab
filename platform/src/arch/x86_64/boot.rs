//! The entry: from the boot loader to [`crate::boot::start`].
//!
//! A PVH loader enters in 32-bit mode (entry.s goes on to 64 bits) with the address of the start info; others enter at the
//! ELF entry point, in 64-bit mode, with the address of a Linux zero page. Until the kernel's own page tables are there, the
//! first 4 GiB are mapped at their physical address.

use core::arch::global_asm;
use core::fmt::Display;

use super::{clock, console, exceptions, interrupts, power, reenter};
use crate::boot::{self, BootInfo};
use crate::console::init_logger;
use crate::firmware::{start_info, zero_page};
use crate::memory::heap;
use crate::memory::physical::PhysicalMemory;
use crate::power::ExitCode;
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
    reenter::if_asked(start_info_phys);
    prepare();
    go_on(start_info::read(&BootMemory, start_info_phys))
}

/// Called by entry.s when a loader went to the ELF entry point, with the physical address of a Linux zero page.
#[unsafe(no_mangle)]
extern "C" fn kernel_entry_by_zero_page(zero_page_phys: u64) -> ! {
    prepare();
    go_on(zero_page::read(&BootMemory, zero_page_phys))
}

fn go_on(info: Result<BootInfo, impl Display>) -> ! {
    match info {
        Ok(info) => {
            power::find(info.rsdp);
            boot::start(info, &BootMemory, boot_mapped())
        }
        Err(error) => {
            println!("cannot boot: {error}");
            power::exit(ExitCode::Fail)
        }
    }
}

fn prepare() {
    console::init();
    init_logger();
    interrupts::mask_all();
    exceptions::init();
    clock::init();
    heap::init_early();
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
