//! Page tables: everything is mapped at its physical address, by Sv39.
//!
//! ```text
//! page 0                 not mapped, so that a null pointer faults
//! kernel code            read, execute
//! kernel constants       read
//! kernel data, stacks    read, write; a page below each stack is not mapped
//! other RAM              read, write
//! device registers       read, write                    on demand, by `map_device`
//! firmware tables        read                           on demand, by `map_firmware`
//! ```
//!
//! Whether memory is cached is the machine's business here, by its address. The identity map reaches the lower half of 39
//! bits: 256 GiB. The tables come from the frame allocator and are never given back.

use core::arch::asm;
use core::fmt;

use spin::Mutex;

use super::{console, power};
use crate::image;
use crate::memory::frames::{self, FRAME_BYTES};
use crate::memory::map::MemoryMap;
use crate::memory::phys_to_virt;
use crate::range::PhysRange;

/// An address of the upper half would have to have its highest 26 bits set.
const IDENTITY_BITS: u32 = 38;
/// A table's entries, and the bits of an address that choose among them.
const ENTRIES: usize = 512;
const INDEX_BITS: u32 = 9;
/// The outermost table's level; one at level 0 maps pages of [`FRAME_BYTES`].
const ROOT_LEVEL: u32 = 2;
/// The mode in `satp`.
const SV39: u64 = 8 << 60;

/// Bits of an entry. One without any of the three rights is a pointer to a table.
const VALID: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const GLOBAL: u64 = 1 << 5;
/// Set from the start, so that the CPU never has to.
const ACCESSED_DIRTY: u64 = 1 << 6 | 1 << 7;
/// For software: the entry maps device registers.
const DEVICE: u64 = 1 << 8;
const FRAME_SHIFT: u32 = 10;
const FRAME_MASK: u64 = ((1 << 44) - 1) << FRAME_SHIFT;

/// The outermost table, once [`init`] made it.
static ROOT: Mutex<Option<u64>> = Mutex::new(None);

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Code,
    Constants,
    Data,
    Device,
    Firmware,
}

impl Use {
    fn flags(self) -> u64 {
        VALID
            | ACCESSED_DIRTY
            | GLOBAL
            | match self {
                Self::Code => READ | EXECUTE,
                Self::Constants | Self::Firmware => READ,
                Self::Data => READ | WRITE,
                Self::Device => READ | WRITE | DEVICE,
            }
    }

    /// Whether a page that is mapped with `flags` already can serve this use.
    fn served_by(self, flags: u64) -> bool {
        match self {
            Self::Device => flags & DEVICE != 0,
            // Reading is all that is wanted.
            Self::Firmware | Self::Constants => true,
            Self::Code | Self::Data => false,
        }
    }
}

/// A mapping that could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError {
    /// No bytes, or an end past the last address.
    Range {
        /// The first address.
        phys: u64,
        /// The length asked for.
        len_bytes: u64,
    },
    /// Past what the identity map reaches.
    OutOfReach {
        /// What was asked for.
        range: PhysRange,
        /// The highest address in reach.
        highest: u64,
    },
    /// The address is mapped for another use.
    InUse {
        /// The address.
        phys: u64,
    },
    /// The first page, which stays unmapped.
    NullPage,
    /// No memory for page tables.
    OutOfFrames,
    /// [`init`] has not run.
    NotReady,
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range { phys, len_bytes } => {
                write!(f, "cannot map {len_bytes:#x} bytes at {phys:#x}: not a range of addresses")
            }
            Self::OutOfReach { range, highest } => {
                write!(f, "cannot map {range}: the highest address in reach is {highest:#x}")
            }
            Self::InUse { phys } => {
                write!(f, "cannot map {phys:#x}: it is mapped for another use, such as RAM")
            }
            Self::NullPage => f.write_str("cannot map page 0: it stays unmapped to catch null pointers"),
            Self::OutOfFrames => f.write_str("no memory left for page tables"),
            Self::NotReady => f.write_str("page tables are not set up yet"),
        }
    }
}

impl core::error::Error for MapError {}

/// The highest physical address that a CPU with Sv39 can have.
pub fn highest_physical_address() -> u64 {
    (1 << 56) - 1
}

/// The highest physical address that the kernel can map.
pub fn highest_reachable_address() -> u64 {
    highest_physical_address().min((1 << IDENTITY_BITS) - 1)
}

/// Makes the kernel's own page tables, with the RAM of `map`, and switches to them.
///
/// # Errors
///
/// [`MapError`] when the tables find no memory. Translation stays off then.
pub fn init(map: &MemoryMap) -> Result<(), MapError> {
    let table = new_table()?;
    let mut root = ROOT.lock();
    map_range(table, image::text(), Use::Code)?;
    map_range(table, image::rodata(), Use::Constants)?;
    for range in image::writable() {
        map_range(table, range, Use::Data)?;
    }
    let mut ram = map.ram();
    ram.remove(image::whole().grow_to(FRAME_BYTES));
    ram.remove(null_page());
    for range in ram.iter().filter_map(|range| range.shrink_to(FRAME_BYTES)) {
        map_range(table, range, Use::Data)?;
    }
    // What is used without asking for it.
    for range in [console::registers(), power::registers()].into_iter().flatten() {
        map_range(table, range, Use::Device)?;
    }
    // SAFETY: the tables map the code that runs, its stack and its data at the addresses where they are now.
    unsafe { switch_to(table) };
    *root = Some(table);
    Ok(())
}

/// What makes a CPU use these page tables: the value of `satp`.
pub(super) fn in_use() -> Option<u64> {
    (*ROOT.lock()).map(satp)
}

fn satp(table: u64) -> u64 {
    SV39 | table / FRAME_BYTES
}

/// Maps device registers at their physical address, and gives that address.
///
/// # Errors
///
/// [`MapError`]; pages mapped before the one that failed stay mapped.
pub fn map_device(phys: u64, len_bytes: u64) -> Result<u64, MapError> {
    map_on_demand(phys, len_bytes, Use::Device)
}

/// Maps firmware tables, for reading, at their physical address, and gives that address. Tables in RAM stay as mapped.
///
/// # Errors
///
/// [`MapError`]; pages mapped before the one that failed stay mapped.
pub fn map_firmware(phys: u64, len_bytes: u64) -> Result<u64, MapError> {
    map_on_demand(phys, len_bytes, Use::Firmware)
}

fn map_on_demand(phys: u64, len_bytes: u64, purpose: Use) -> Result<u64, MapError> {
    let range = PhysRange::from_len(phys, len_bytes).ok_or(MapError::Range { phys, len_bytes })?;
    let root = ROOT.lock();
    let table = (*root).ok_or(MapError::NotReady)?;
    map_range(table, range, purpose)?;
    flush();
    Ok(phys)
}

fn null_page() -> PhysRange {
    PhysRange::from_len(0, FRAME_BYTES).unwrap_or_else(|| unreachable!("a page is not empty"))
}

fn map_range(root: u64, range: PhysRange, purpose: Use) -> Result<(), MapError> {
    let highest = highest_reachable_address();
    let pages = range.grow_to(FRAME_BYTES);
    if pages.last() > highest {
        return Err(MapError::OutOfReach { range, highest });
    }
    if pages.overlaps(null_page()) {
        return Err(MapError::NullPage);
    }
    let mut next = pages.start();
    while next <= pages.last() {
        next += map_one(root, next, pages.last() - next + 1, purpose)?;
    }
    Ok(())
}

/// Maps the page at `phys`, the largest that fits in `left` bytes, and gives how far it reaches from there.
fn map_one(root: u64, phys: u64, left: u64, purpose: Use) -> Result<u64, MapError> {
    let mut table = root;
    for level in (0..=ROOT_LEVEL).rev() {
        let page_bytes = FRAME_BYTES << (INDEX_BITS * level);
        let entry = entry(table, phys, level);
        // SAFETY: `entry` points into a table of this module, and `ROOT`'s lock, held by every caller, keeps everybody
        // else but the CPU's reads away.
        let value = unsafe { entry.read_volatile() };
        let found = value & FRAME_MASK;
        if value & VALID == 0 {
            let fits = phys.is_multiple_of(page_bytes) && left >= page_bytes;
            let new = if fits {
                phys / FRAME_BYTES << FRAME_SHIFT | purpose.flags()
            } else {
                // The smallest page always fits.
                table = new_table()?;
                table / FRAME_BYTES << FRAME_SHIFT | VALID
            };
            // SAFETY: as above. Nothing was mapped at this address, so no reference can point there; executable pages are
            // the kernel's code only.
            unsafe { entry.write_volatile(new) };
            if fits {
                return Ok(page_bytes);
            }
        } else if value & (READ | WRITE | EXECUTE) != 0 {
            let served = purpose.served_by(value);
            return if served { Ok(page_bytes - phys % page_bytes) } else { Err(MapError::InUse { phys }) };
        } else {
            table = (found >> FRAME_SHIFT) * FRAME_BYTES;
        }
    }
    // A pointer at the last level, which this module never writes.
    Err(MapError::InUse { phys })
}

/// The entry for an address in a table of some level.
fn entry(table: u64, phys: u64, level: u32) -> *mut u64 {
    let index = (phys / FRAME_BYTES >> (INDEX_BITS * level)) as usize % ENTRIES;
    phys_to_virt(table).cast::<u64>().wrapping_add(index)
}

/// A table of no entries.
fn new_table() -> Result<u64, MapError> {
    frames::allocate_permanent().map_err(|_| MapError::OutOfFrames)
}

/// Makes the CPU translate by these tables.
///
/// # Safety
///
/// They must map what the CPU is executing, its stack and its data where they are.
unsafe fn switch_to(table: u64) {
    // SAFETY: by the caller's promise nothing moves.
    unsafe {
        asm!("sfence.vma", "csrw satp, {}", "sfence.vma", in(reg) satp(table), options(nostack));
    }
}

/// Makes every CPU see new entries.
fn flush() {
    // SAFETY: forgetting translations has no effect but time.
    unsafe { asm!("sfence.vma", options(nostack, preserves_flags)) };
    // All harts, all addresses. Firmware without this call starts no other CPU either.
    let _ = sbi_rt::remote_sfence_vma(sbi_rt::HartMask::all(), 0, usize::MAX);
}
