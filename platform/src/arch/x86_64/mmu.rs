//! Page tables: everything is mapped at its physical address.
//!
//! ```text
//! page 0                 not mapped, so that a null pointer faults
//! kernel code            read, execute
//! kernel constants       read
//! kernel data, stacks    read, write; a page below each stack is not mapped
//! other RAM              read, write
//! device registers       read, write, uncached          on demand, by `map_device`
//! firmware tables        read                           on demand, by `map_firmware`
//! ```
//!
//! The identity map reaches 2^47 bytes, or the CPU's physical width if that is less. The tables come from the frame
//! allocator and are never given back.

use core::fmt;

use spin::Mutex;
use x86_64::registers::control::{Cr3, Cr3Flags, Efer, EferFlags};
use x86_64::structures::paging::mapper::{MapToError, MappedFrame, TranslateResult};
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, PageTable, PageTableFlags, PhysFrame, Size2MiB, Size4KiB,
    Translate,
};
use x86_64::{PhysAddr, VirtAddr};

use super::cpuid;
use crate::image;
use crate::memory::frames::{self, FRAME_BYTES};
use crate::memory::map::MemoryMap;
use crate::range::PhysRange;

const LARGE_BYTES: u64 = 2 << 20;
/// The lower half of the 48-bit virtual address space; an identity map reaches no further.
const IDENTITY_BITS: u32 = 47;

/// The level 4 table, once [`init`] made it.
static ROOT: Mutex<Option<PhysFrame>> = Mutex::new(None);

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
    fn flags(self) -> PageTableFlags {
        let no_execute =
            if no_execute_supported() { PageTableFlags::NO_EXECUTE } else { PageTableFlags::empty() };
        let uncached = PageTableFlags::NO_CACHE | PageTableFlags::WRITE_THROUGH;
        PageTableFlags::PRESENT
            | match self {
                Self::Code => PageTableFlags::empty(),
                Self::Constants | Self::Firmware => no_execute,
                Self::Data => PageTableFlags::WRITABLE | no_execute,
                Self::Device => PageTableFlags::WRITABLE | uncached | no_execute,
            }
    }

    /// Whether a page that is mapped with `flags` already can serve this use.
    fn served_by(self, flags: PageTableFlags) -> bool {
        let uncached = flags.contains(PageTableFlags::NO_CACHE);
        match self {
            Self::Device => uncached && flags.contains(PageTableFlags::WRITABLE),
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
    let bits =
        if cpuid::highest(0x8000_0000) >= 0x8000_0008 { cpuid::read(0x8000_0008).eax & 0xff } else { 36 };
    (1 << bits.clamp(32, 52)) - 1
}

/// The highest physical address that the kernel can map.
pub fn highest_reachable_address() -> u64 {
    highest_physical_address().min((1 << IDENTITY_BITS) - 1)
}

fn no_execute_supported() -> bool {
    cpuid::highest(0x8000_0000) >= 0x8000_0001 && cpuid::read(0x8000_0001).edx & (1 << 20) != 0
}

/// Makes the kernel's own page tables, with the RAM of `map`, and switches to them.
///
/// Until then only the first 4 GiB are mapped, so the frame allocator must hold no frame above.
///
/// # Errors
///
/// [`MapError`] when the tables find no memory. The boot tables stay in use then.
pub fn init(map: &MemoryMap) -> Result<(), MapError> {
    if no_execute_supported() {
        // SAFETY: the CPU has the bit, and no table in use sets bit 63, which changes its meaning.
        unsafe { Efer::update(|flags| flags.insert(EferFlags::NO_EXECUTE_ENABLE)) };
    }
    let frame = TableFrames.allocate_frame().ok_or(MapError::OutOfFrames)?;
    let mut root = ROOT.lock();
    let mut tables = tables(frame);
    map_range(&mut tables, image::text(), Use::Code)?;
    map_range(&mut tables, image::rodata(), Use::Constants)?;
    for range in image::writable() {
        map_range(&mut tables, range, Use::Data)?;
    }
    let mut ram = map.ram();
    ram.remove(image::whole().grow_to(FRAME_BYTES));
    ram.remove(null_page());
    for range in ram.iter().filter_map(|range| range.shrink_to(FRAME_BYTES)) {
        map_range(&mut tables, range, Use::Data)?;
    }
    // SAFETY: the tables map the code that runs, its stack and its data at the addresses where they are mapped now.
    unsafe { Cr3::write(frame, Cr3Flags::empty()) };
    *root = Some(frame);
    Ok(())
}

/// What makes a CPU use these page tables: the value of CR3.
pub(super) fn in_use() -> Option<u64> {
    (*ROOT.lock()).map(|frame| frame.start_address().as_u64())
}

/// Whether the page at `phys` is mapped as RAM.
pub(super) fn is_ram(phys: u64) -> bool {
    let root = ROOT.lock();
    let Some(frame) = *root else { return false };
    match tables(frame).translate(VirtAddr::new(phys)) {
        TranslateResult::Mapped { flags, .. } => {
            flags.contains(PageTableFlags::WRITABLE) && !flags.contains(PageTableFlags::NO_CACHE)
        }
        _ => false,
    }
}

/// Maps device registers, uncached, at their physical address, and gives that address.
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
    let frame = (*root).ok_or(MapError::NotReady)?;
    map_range(&mut tables(frame), range, purpose)?;
    Ok(phys)
}

fn null_page() -> PhysRange {
    PhysRange::from_len(0, FRAME_BYTES).unwrap_or_else(|| unreachable!("a page is not empty"))
}

fn tables(root: PhysFrame) -> OffsetPageTable<'static> {
    let pointer = root.start_address().as_u64() as *mut PageTable;
    // SAFETY: the frame holds a level 4 table, zeroed or filled by this module, and RAM is mapped at its physical
    // address. `ROOT`'s lock, held by every caller, keeps this the only reference.
    unsafe { OffsetPageTable::new(&mut *pointer, VirtAddr::zero()) }
}

fn map_range(tables: &mut OffsetPageTable<'_>, range: PhysRange, purpose: Use) -> Result<(), MapError> {
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
        next += map_one(tables, next, pages.last() - next + 1, purpose)?;
    }
    Ok(())
}

/// Maps the page at `phys`, a large one where it fits in `left` bytes, and gives its size.
fn map_one(tables: &mut OffsetPageTable<'_>, phys: u64, left: u64, purpose: Use) -> Result<u64, MapError> {
    let flags = purpose.flags();
    let address = PhysAddr::new(phys);
    match tables.translate(VirtAddr::new(phys)) {
        TranslateResult::Mapped { frame, offset, flags: present } => {
            let size = match frame {
                MappedFrame::Size4KiB(_) => FRAME_BYTES,
                MappedFrame::Size2MiB(_) => LARGE_BYTES,
                MappedFrame::Size1GiB(_) => 1 << 30,
            };
            return if purpose.served_by(present) {
                Ok(size - offset)
            } else {
                Err(MapError::InUse { phys })
            };
        }
        TranslateResult::NotMapped => {}
        TranslateResult::InvalidFrameAddress(_) => return Err(MapError::InUse { phys }),
    }
    if phys.is_multiple_of(LARGE_BYTES) && left >= LARGE_BYTES {
        let page = PhysFrame::<Size2MiB>::containing_address(address);
        // SAFETY: nothing was mapped at this address, so no reference can point there; the flags of executable pages
        // are given to the kernel's code only.
        match unsafe { tables.identity_map(page, flags, &mut TableFrames) } {
            Ok(flush) => {
                flush.flush();
                return Ok(LARGE_BYTES);
            }
            Err(MapToError::FrameAllocationFailed) => return Err(MapError::OutOfFrames),
            // A table of small pages is there already.
            Err(MapToError::PageAlreadyMapped(_) | MapToError::ParentEntryHugePage) => {}
        }
    }
    let page = PhysFrame::<Size4KiB>::containing_address(address);
    // SAFETY: as for the large page.
    match unsafe { tables.identity_map(page, flags, &mut TableFrames) } {
        Ok(flush) => flush.flush(),
        Err(MapToError::FrameAllocationFailed) => return Err(MapError::OutOfFrames),
        Err(MapToError::PageAlreadyMapped(_) | MapToError::ParentEntryHugePage) => {
            return Err(MapError::InUse { phys });
        }
    }
    Ok(FRAME_BYTES)
}

/// Frames for page tables, from the frame allocator.
struct TableFrames;

// SAFETY: the frame allocator gives each frame once, and page tables are never given back.
unsafe impl FrameAllocator<Size4KiB> for TableFrames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let phys = frames::allocate_permanent().ok()?;
        Some(PhysFrame::containing_address(PhysAddr::new(phys)))
    }
}
