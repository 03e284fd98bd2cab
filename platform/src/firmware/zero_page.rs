//! The Linux zero page (`boot_params`), by which loaders without PVH enter a 64-bit kernel: command line, memory map, the
//! ACPI root pointer, a first disk.
//!
//! ```text
//! 0x070  root pointer, 64 bits; 0 where it is not said       0x202  "HdrS"
//! 0x0c0  first disk, its length, command line: upper halves  0x218  first disk, its length: lower halves
//! 0x1e8  how many entries the memory map has, 8 bits         0x228  command line: lower half
//! 0x1fe  0xaa55                                              0x2d0  the memory map: 128 entries of 20 bytes
//! ```
//! (Linux, Documentation/arch/x86/zero-page.rst and boot.rst)

use alloc::vec::Vec;
use core::fmt;

use super::start_info::read_command_line;
use crate::boot::BootInfo;
use crate::memory::map::{MemoryMap, Region, RegionKind};
use crate::memory::physical::PhysicalMemory;
use crate::range::PhysRange;

/// Its length.
pub const BYTES: usize = 4096;

const RSDP: usize = 0x070;
const DISK_UPPER: usize = 0x0c0;
const DISK_LENGTH_UPPER: usize = 0x0c4;
const COMMAND_LINE_UPPER: usize = 0x0c8;
const REGION_COUNT: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const DISK: usize = 0x218;
const DISK_LENGTH: usize = 0x21c;
const COMMAND_LINE: usize = 0x228;
const REGIONS: usize = 0x2d0;
const REGION_BYTES: usize = 20;
const MAX_REGIONS: usize = 128;

const BOOT_FLAG_VALUE: u16 = 0xaa55;
const HEADER_VALUE: [u8; 4] = *b"HdrS";

/// A zero page that the kernel cannot boot by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ZeroPageError {
    /// It is not in reach.
    Unreachable {
        /// Where it should be.
        phys: u64,
    },
    /// It has neither of its marks.
    Marks {
        /// Where it should be.
        phys: u64,
        /// What is in the place of the header's.
        found: [u8; 4],
    },
    /// The memory map has no entry, or no usable one.
    NoMemory {
        /// How many entries it has.
        region_count: usize,
    },
}

impl fmt::Display for ZeroPageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable { phys } => write!(f, "no Linux zero page can be reached at {phys:#x}"),
            Self::Marks { phys, found } => write!(
                f,
                "no Linux zero page at {phys:#x}: its header begins with {found:x?}; this kernel is entered by its PVH note \
                 (ELF note 18), or at the ELF entry point with a zero page in RSI"
            ),
            Self::NoMemory { region_count } => {
                write!(f, "the zero page's memory map has no RAM in its {region_count} entries")
            }
        }
    }
}

impl core::error::Error for ZeroPageError {}

/// Reads the zero page at `phys`.
///
/// # Errors
///
/// [`ZeroPageError`]. A command line that cannot be reached counts as absent.
pub fn read(memory: &impl PhysicalMemory, phys: u64) -> Result<BootInfo, ZeroPageError> {
    let page = memory.bytes(phys, BYTES).ok_or(ZeroPageError::Unreachable { phys })?;
    let u32_at = |at: usize| page[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    let halves = |lower: usize, upper: usize| u64::from(u32_at(lower)) | u64::from(u32_at(upper)) << 32;

    let found = u32_at(HEADER).to_le_bytes();
    if found != HEADER_VALUE && u32_at(BOOT_FLAG) as u16 != BOOT_FLAG_VALUE {
        return Err(ZeroPageError::Marks { phys, found });
    }
    let region_count = usize::from(page[REGION_COUNT]);
    let entries = (0..region_count.min(MAX_REGIONS)).map(|index| REGIONS + index * REGION_BYTES);
    let regions: Vec<Region> = entries
        .filter_map(|at| {
            let range = PhysRange::from_len(u64_at(at), u64_at(at + 8))?;
            Some(Region { range, kind: RegionKind::from_acpi(u32_at(at + 16)) })
        })
        .collect();
    let memory_map = MemoryMap::new(regions);
    if memory_map.ram().iter().next().is_none() {
        return Err(ZeroPageError::NoMemory { region_count });
    }
    let disk = PhysRange::from_len(halves(DISK, DISK_UPPER), halves(DISK_LENGTH, DISK_LENGTH_UPPER));
    Ok(BootInfo {
        command_line: read_command_line(memory, halves(COMMAND_LINE, COMMAND_LINE_UPPER)),
        memory_map,
        rsdp: Some(u64_at(RSDP)).filter(|rsdp| *rsdp != 0),
        device_tree: None,
        modules: disk.into_iter().collect(),
    })
}

/// Makes a zero page with a command line at some address, a root pointer and as many regions as fit. Allocates nothing.
pub fn write(command_line: u64, rsdp: u64, regions: impl Iterator<Item = (PhysRange, u32)>) -> [u8; BYTES] {
    let mut page = [0; BYTES];
    let mut put = |at: usize, bytes: &[u8]| page[at..][..bytes.len()].copy_from_slice(bytes);
    put(RSDP, &rsdp.to_le_bytes());
    put(BOOT_FLAG, &BOOT_FLAG_VALUE.to_le_bytes());
    put(HEADER, &HEADER_VALUE);
    let [lower, upper] = [command_line as u32, (command_line >> 32) as u32];
    put(COMMAND_LINE, &lower.to_le_bytes());
    put(COMMAND_LINE_UPPER, &upper.to_le_bytes());
    let mut count = 0u8;
    for (range, kind) in regions.take(MAX_REGIONS) {
        let at = REGIONS + usize::from(count) * REGION_BYTES;
        put(at, &range.start().to_le_bytes());
        put(at + 8, &range.len_bytes().to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
        count += 1;
    }
    put(REGION_COUNT, &[count]);
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::physical::Image;

    const AT: u64 = 0x7000;

    fn range(start: u64, len_bytes: u64) -> PhysRange {
        PhysRange::from_len(start, len_bytes).expect("a test's range is not empty")
    }

    fn page() -> [u8; BYTES] {
        write(0x2_0000, 0xe_0010, [(range(0, 0xa_0000), 1), (range(0xf400_0000, 0x400_0000), 2)].into_iter())
    }

    fn image(page: &[u8]) -> Image {
        let mut image = Image::default();
        image.put(AT, page);
        image.put(0x2_0000, b"scenario=default\0garbage");
        image
    }

    #[test]
    fn everything_is_read() {
        let mut page = page();
        page[DISK..][..4].copy_from_slice(&0x50_0000u32.to_le_bytes());
        page[DISK_UPPER..][..4].copy_from_slice(&1u32.to_le_bytes());
        page[DISK_LENGTH..][..4].copy_from_slice(&0x1000u32.to_le_bytes());
        let info = read(&image(&page), AT).expect("a good zero page");
        assert_eq!(info.command_line.as_str(), "scenario=default");
        assert_eq!(info.rsdp, Some(0xe_0010));
        assert_eq!(info.modules, [range(0x1_0050_0000, 0x1000)]);
        assert_eq!(info.memory_map.regions().len(), 2);
        assert_eq!(info.memory_map.ram().len_bytes(), 0xa_0000);
        assert_eq!(info.device_tree, None);
    }

    #[test]
    fn crosvm_says_no_root_pointer_and_has_one_mark() {
        let mut page = page();
        page[RSDP..][..8].fill(0);
        page[HEADER..][..4].fill(0);
        assert_eq!(read(&image(&page), AT).expect("one mark is enough").rsdp, None);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        assert_eq!(read(&Image::default(), AT), Err(ZeroPageError::Unreachable { phys: AT }));
        let mut unmarked = page();
        unmarked[BOOT_FLAG..HEADER + 4].fill(7);
        assert_eq!(read(&image(&unmarked), AT), Err(ZeroPageError::Marks { phys: AT, found: [7; 4] }));
        let empty = write(0, 0, core::iter::empty());
        assert_eq!(read(&image(&empty), AT), Err(ZeroPageError::NoMemory { region_count: 0 }));
        let mut lying = page();
        lying[REGION_COUNT] = 255;
        assert_eq!(read(&image(&lying), AT).expect("the others are empty").memory_map.regions().len(), 2);
        let many = write(0, 0, (0..200).map(|index| (range(index << 20, 1 << 20), 1)));
        let info = read(&image(&many), AT).expect("as many as fit");
        assert_eq!(info.memory_map.regions().len(), MAX_REGIONS);
    }
}
