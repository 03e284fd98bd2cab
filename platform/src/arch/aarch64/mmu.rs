//! Page tables: everything is mapped at its physical address.
//!
//! ```text
//! page 0                 not mapped, so that a null pointer faults
//! kernel code            read, execute
//! kernel constants       read
//! kernel data, stacks    read, write; a page below each stack is not mapped
//! other RAM              read, write
//! device registers       read, write, device memory     on demand, by `map_device`; the console at once
//! firmware tables        read                           on demand, by `map_firmware`
//! ```
//!
//! Four levels of 4 KiB tables reach 2^48 bytes, or the CPU's physical width if that is less. The tables come from the
//! frame allocator and are never given back. Entries are only ever added, and never changed, so that no CPU has to be told
//! to forget one.

use core::arch::asm;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Mutex;

use super::console;
use crate::image;
use crate::memory::frames::{self, FRAME_BYTES};
use crate::memory::map::MemoryMap;
use crate::range::PhysRange;

/// The level 0 table, once [`init`] made it.
static ROOT: Mutex<Option<u64>> = Mutex::new(None);

/// The address space that the kernel's tables are for. The boot tables' entries belong to 0.
const ADDRESS_SPACE: u64 = 1 << 48;

const ENTRIES: usize = 512;
/// The level whose entries are pages.
const LAST_LEVEL: u32 = 3;
/// What the tables reach.
const IDENTITY_BITS: u32 = 48;

/// Bits of an entry.
mod bits {
    pub(super) const VALID: u64 = 1;
    /// At the last level: a page. Above: a table; without it a block.
    pub(super) const TABLE_OR_PAGE: u64 = 1 << 1;
    /// Index 1 of the boot code's MAIR_EL1: memory. Index 0 is device memory, nGnRnE: no access is merged, moved or
    /// answered before the device did, which configuration space needs.
    pub(super) const MEMORY: u64 = 1 << 2;
    pub(super) const READ_ONLY: u64 = 1 << 7;
    pub(super) const INNER_SHAREABLE: u64 = 3 << 8;
    pub(super) const ACCESSED: u64 = 1 << 10;
    pub(super) const PRIVILEGED_NEVER_EXECUTES: u64 = 1 << 53;
    pub(super) const USER_NEVER_EXECUTES: u64 = 1 << 54;
    pub(super) const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
}

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
    fn attributes(self) -> u64 {
        use bits::{
            ACCESSED, INNER_SHAREABLE, MEMORY, PRIVILEGED_NEVER_EXECUTES, READ_ONLY, USER_NEVER_EXECUTES,
            VALID,
        };
        let cached = MEMORY | INNER_SHAREABLE;
        VALID
            | ACCESSED
            | USER_NEVER_EXECUTES
            | match self {
                Self::Code => cached | READ_ONLY,
                Self::Constants | Self::Firmware => cached | READ_ONLY | PRIVILEGED_NEVER_EXECUTES,
                Self::Data => cached | PRIVILEGED_NEVER_EXECUTES,
                Self::Device => PRIVILEGED_NEVER_EXECUTES,
            }
    }

    /// Whether a page that is mapped by `entry` already can serve this use.
    fn served_by(self, entry: u64) -> bool {
        match self {
            Self::Device => entry & (bits::MEMORY | bits::READ_ONLY) == 0,
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
    /// Past what the CPU can address, or past what the identity map reaches.
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

/// The highest physical address that the CPU can have, by its own word.
pub fn highest_physical_address() -> u64 {
    let features: u64;
    // SAFETY: reads an identification register that every CPU has.
    unsafe { asm!("mrs {}, id_aa64mmfr0_el1", out(reg) features, options(nomem, nostack, preserves_flags)) };
    let bits = match features & 0xf {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        // Wider ones need another format of the tables.
        _ => 48,
    };
    (1 << bits) - 1
}

/// The highest physical address that the kernel can map.
pub fn highest_reachable_address() -> u64 {
    highest_physical_address().min((1 << IDENTITY_BITS) - 1)
}

/// Makes the kernel's own page tables, with the RAM of `map`, and switches to them.
///
/// Until then only what the boot tables map can be reached, so the frame allocator must hold no other frame.
///
/// # Errors
///
/// [`MapError`] when the tables find no memory. The boot tables stay in use then.
pub fn init(map: &MemoryMap) -> Result<(), MapError> {
    let mut root = ROOT.lock();
    let tables = new_table()?;
    map_range(tables, image::text(), Use::Code)?;
    map_range(tables, image::rodata(), Use::Constants)?;
    for range in image::writable() {
        map_range(tables, range, Use::Data)?;
    }
    let mut ram = map.ram();
    ram.remove(image::whole().grow_to(FRAME_BYTES));
    ram.remove(null_page());
    for range in ram.iter().filter_map(|range| range.shrink_to(FRAME_BYTES)) {
        map_range(tables, range, Use::Data)?;
    }
    map_range(tables, console::registers(), Use::Device)?;
    // SAFETY: the tables map the code that runs, its stack and its data at the addresses where they are mapped now.
    unsafe { activate(tables) };
    *root = Some(tables);
    Ok(())
}

/// Switches this CPU to the tables, and forbids to execute what can be written, whatever an entry says.
///
/// # Safety
///
/// The tables must map the code that runs, its stack and its data where they are mapped now.
unsafe fn activate(root: u64) {
    // SAFETY: the caller's promise. The address space changes with the tables, so that no translation of the old ones
    // meets the new; then the old are dropped.
    unsafe {
        asm!(
            "dsb ishst",
            "msr ttbr0_el1, {tables}",
            "isb",
            "tlbi vmalle1",
            "dsb nsh",
            "mrs {control}, sctlr_el1",
            "orr {control}, {control}, #(1 << 19)",
            "msr sctlr_el1, {control}",
            "isb",
            tables = in(reg) root | ADDRESS_SPACE,
            control = out(reg) _,
            options(nostack, preserves_flags),
        );
    }
}

/// What another CPU sets to use the same tables: TTBR0_EL1 and SCTLR_EL1. `None` before [`init`].
pub(super) fn in_use() -> Option<(u64, u64)> {
    let root = (*ROOT.lock())?;
    let control: u64;
    // SAFETY: reads this CPU's own settings.
    unsafe { asm!("mrs {}, sctlr_el1", out(reg) control, options(nomem, nostack, preserves_flags)) };
    Some((root | ADDRESS_SPACE, control))
}

/// Maps device registers as device memory at their physical address, and gives that address.
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
    map_range((*root).ok_or(MapError::NotReady)?, range, purpose)?;
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
    // Entries that were not valid are in no translation cache; they only have to arrive before the first use.
    // SAFETY: barriers.
    unsafe { asm!("dsb ishst", "isb", options(nostack, preserves_flags)) };
    Ok(())
}

/// Maps the page at `phys`, or the largest block there that fits in `left` bytes, and gives its size.
fn map_one(root: u64, phys: u64, left: u64, purpose: Use) -> Result<u64, MapError> {
    let mut entries = table(root);
    let mut level = 0;
    loop {
        let size = FRAME_BYTES << (9 * (LAST_LEVEL - level));
        let entry = &entries[(phys / size) as usize % ENTRIES];
        let value = entry.load(Ordering::Relaxed);
        let whole = phys.is_multiple_of(size) && size <= left;
        if value & bits::VALID == 0 {
            if level == LAST_LEVEL {
                entry.store(phys | purpose.attributes() | bits::TABLE_OR_PAGE, Ordering::Relaxed);
                return Ok(size);
            }
            // There are no blocks at level 0.
            if level > 0 && whole {
                entry.store(phys | purpose.attributes(), Ordering::Relaxed);
                return Ok(size);
            }
            entry.store(new_table()? | bits::VALID | bits::TABLE_OR_PAGE, Ordering::Relaxed);
        } else if level == LAST_LEVEL || value & bits::TABLE_OR_PAGE == 0 {
            let served = purpose.served_by(value);
            return if served { Ok(size - phys % size) } else { Err(MapError::InUse { phys }) };
        }
        entries = table(entry.load(Ordering::Relaxed) & bits::ADDRESS);
        level += 1;
    }
}

/// A new, empty table, which every table walk sees as such.
fn new_table() -> Result<u64, MapError> {
    let phys = frames::allocate_permanent().map_err(|_| MapError::OutOfFrames)?;
    // SAFETY: a barrier.
    unsafe { asm!("dsb ishst", options(nostack, preserves_flags)) };
    Ok(phys)
}

/// The entries of a table.
fn table(phys: u64) -> &'static [AtomicU64; ENTRIES] {
    let pointer = phys as *const [AtomicU64; ENTRIES];
    // SAFETY: a frame of `new_table`, which is zeroed, mapped at its physical address, never given back and used as a
    // table only. The CPU reads it too, and writes nothing, since entries are made with their access flag set.
    unsafe { &*pointer }
}
