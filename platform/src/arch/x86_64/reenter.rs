//! Entering the kernel once more, at its ELF entry point with a Linux zero page, as loaders without PVH do: with the word
//! `entry=zero-page` on the command line, so that this way in is tested on a machine whose loader knows the other one.
//!
//! Nothing was written to the image's variables yet, and what the entry clears is not used here: the page tables and the zero
//! page lie below 1 MiB, where a loader would have them too.

use core::arch::asm;

use super::boot::BootMemory;
use crate::firmware::{start_info, zero_page};
use crate::memory::physical::PhysicalMemory;

const WORD: &[u8] = b"entry=zero-page";
/// How much of the command line is looked at.
const COMMAND_LINE_BYTES: usize = 1024;

/// Where the zero page is put, and the page tables: two and four for 4 GiB by pages of 2 MiB.
const ZERO_PAGE: u64 = 0x9000;
const LEVEL_4: u64 = 0x1_0000;
const LEVEL_3: u64 = 0x1_1000;
const LEVEL_2: u64 = 0x1_2000;
const LEVEL_2_TABLES: u64 = 4;
const PAGE: u64 = 4096;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 0x80;
const LARGE_BYTES: u64 = 2 << 20;

unsafe extern "C" {
    fn _start() -> !;
}

/// Does so if the command line says it. To be called before anything else.
pub(super) fn if_asked(start_info_phys: u64) {
    let Some(raw) = start_info::raw(&BootMemory, start_info_phys) else { return };
    let mut line = [0; COMMAND_LINE_BYTES];
    for (at, place) in line.iter_mut().enumerate() {
        let byte =
            raw.command_line.checked_add(at as u64).and_then(|phys| BootMemory.bytes(phys, 1)?.first());
        *place = byte.copied().unwrap_or(0);
        if *place == 0 {
            break;
        }
    }
    if line.windows(WORD.len()).any(|window| window == WORD) {
        let regions = start_info::regions(&BootMemory, &raw);
        let page = zero_page::write(raw.command_line, raw.rsdp, regions);
        // SAFETY: nothing of this boot is used any more.
        unsafe { enter(&page) }
    }
}

/// Enters with this zero page.
///
/// # Safety
///
/// Nothing below 1 MiB may be in use from [`ZERO_PAGE`] on, and nobody may count on coming back.
unsafe fn enter(page: &[u8; zero_page::BYTES]) -> ! {
    // SAFETY: RAM below 1 MiB, mapped by the boot tables, which nobody uses by the caller's promise. The tables map what the
    // boot tables do. The entry takes the address of the zero page in RSI, and no stack.
    unsafe {
        (ZERO_PAGE as *mut u8).copy_from_nonoverlapping(page.as_ptr(), page.len());
        let table = |phys: u64| phys as *mut u64;
        for index in 0..(LEVEL_2 - LEVEL_4) / 8 {
            table(LEVEL_4).add(index as usize).write_volatile(0);
        }
        table(LEVEL_4).write_volatile(LEVEL_3 | PRESENT_WRITABLE);
        for index in 0..LEVEL_2_TABLES {
            let entry = LEVEL_2 + index * PAGE | PRESENT_WRITABLE;
            table(LEVEL_3).add(index as usize).write_volatile(entry);
        }
        for index in 0..LEVEL_2_TABLES * PAGE / 8 {
            let entry = index * LARGE_BYTES | PRESENT_WRITABLE | LARGE;
            table(LEVEL_2).add(index as usize).write_volatile(entry);
        }
        asm!(
            "mov cr3, {tables}", "jmp {entry}",
            tables = in(reg) LEVEL_4, entry = in(reg) _start as *const (), in("rsi") ZERO_PAGE, options(noreturn)
        )
    }
}
