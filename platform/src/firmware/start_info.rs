//! The PVH start info: command line, memory map, modules and the ACPI root pointer.
//!
//! Everything is copied out, so that the memory it lies in is needed only until then. Counts and lengths are the
//! loader's and are bounded here; the layout is that of Xen's `hvm_start_info`.

use alloc::vec::Vec;
use core::fmt;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::boot::BootInfo;
use crate::command_line::{self, CommandLine};
use crate::memory::map::{MemoryMap, Region, RegionKind};
use crate::memory::physical::PhysicalMemory;
use crate::range::PhysRange;

/// The first four bytes, "xEn3" with the 0x80 bit of the E set.
const MAGIC: u32 = 0x336e_c578;
/// The most regions of a memory map that are read.
const MAX_REGIONS: u32 = 1024;
/// The most modules that are looked at.
const MAX_MODULES: u32 = 64;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StartInfo {
    magic: U32,
    version: U32,
    flags: U32,
    module_count: U32,
    modules: U64,
    command_line: U64,
    rsdp: U64,
}

/// Follows in version 1.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MapPointer {
    regions: U64,
    region_count: U32,
    reserved: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MapEntry {
    start: U64,
    len_bytes: U64,
    kind: U32,
    reserved: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Module {
    start: U64,
    len_bytes: U64,
    command_line: U64,
    reserved: U64,
}

/// A start info that the kernel cannot boot by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartInfoError {
    /// It, or something that it points to, is not in reach.
    Unreachable {
        /// What should be there.
        what: &'static str,
        /// Where.
        phys: u64,
    },
    /// It begins with other bytes.
    Magic {
        /// Where it should be.
        phys: u64,
        /// What is there.
        found: u32,
    },
    /// Its version has no memory map.
    Version {
        /// The version.
        found: u32,
    },
    /// The memory map has no entry, or no usable one.
    NoMemory {
        /// How many entries it has.
        region_count: u32,
    },
}

impl fmt::Display for StartInfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable { what, phys } => {
                write!(f, "the PVH start info's {what} at {phys:#x} cannot be reached")
            }
            Self::Magic { phys, found } => {
                write!(f, "no PVH start info at {phys:#x}: it begins with {found:#x} instead of {MAGIC:#x}")
            }
            Self::Version { found } => {
                write!(
                    f,
                    "the PVH start info has version {found}, without a memory map; version 1 or later is needed"
                )
            }
            Self::NoMemory { region_count } => {
                write!(f, "the PVH start info's memory map has no RAM in its {region_count} entries")
            }
        }
    }
}

impl core::error::Error for StartInfoError {}

/// Reads the start info at `phys`.
///
/// # Errors
///
/// [`StartInfoError`]. A command line or a module that cannot be reached is none: it counts as absent.
pub fn read(memory: &impl PhysicalMemory, phys: u64) -> Result<BootInfo, StartInfoError> {
    let magic: &U32 = get(memory, phys, "first word")?;
    if magic.get() != MAGIC {
        return Err(StartInfoError::Magic { phys, found: magic.get() });
    }
    let info: &StartInfo = get(memory, phys, "content")?;
    if info.version.get() == 0 {
        return Err(StartInfoError::Version { found: 0 });
    }
    let pointer: &MapPointer =
        get(memory, phys.wrapping_add(size_of::<StartInfo>() as u64), "memory map pointer")?;
    let map = read_map(memory, pointer)?;
    Ok(BootInfo {
        command_line: read_command_line(memory, info.command_line.get()),
        rsdp: Some(info.rsdp.get()).filter(|rsdp| *rsdp != 0),
        device_tree: None,
        modules: read_modules(memory, info),
        memory_map: map,
    })
}

fn read_map(memory: &impl PhysicalMemory, pointer: &MapPointer) -> Result<MemoryMap, StartInfoError> {
    let region_count = pointer.region_count.get();
    let mut regions = Vec::new();
    for phys in entries(pointer.regions.get(), region_count) {
        let entry: &MapEntry = get(memory, phys, "memory map")?;
        // An entry that is empty or that passes the end of the address space says nothing.
        if let Some(range) = PhysRange::from_len(entry.start.get(), entry.len_bytes.get()) {
            regions.push(Region { range, kind: RegionKind::from_acpi(entry.kind.get()) });
        }
    }
    let map = MemoryMap::new(regions);
    if map.ram().iter().next().is_none() {
        return Err(StartInfoError::NoMemory { region_count });
    }
    Ok(map)
}

/// Where the entries of a map are.
fn entries(start: u64, count: u32) -> impl Iterator<Item = u64> {
    let bytes = size_of::<MapEntry>() as u64;
    (0..u64::from(count.min(MAX_REGIONS))).map(move |index| start.wrapping_add(index * bytes))
}

/// What a start info points to, for who has no heap.
#[derive(Clone, Copy, Debug)]
pub struct Raw {
    /// The command line, which ends with a zero.
    pub command_line: u64,
    /// The ACPI root pointer.
    pub rsdp: u64,
    regions: u64,
    region_count: u32,
}

/// Reads only that; `None` where there is no start info with a memory map.
pub fn raw(memory: &impl PhysicalMemory, phys: u64) -> Option<Raw> {
    let info: &StartInfo = get(memory, phys, "content").ok()?;
    let pointer: &MapPointer = get(memory, phys.checked_add(size_of::<StartInfo>() as u64)?, "map").ok()?;
    let good = info.magic.get() == MAGIC && info.version.get() != 0;
    good.then(|| Raw {
        command_line: info.command_line.get(),
        rsdp: info.rsdp.get(),
        regions: pointer.regions.get(),
        region_count: pointer.region_count.get(),
    })
}

/// The memory map's regions, each with the number of its kind, as far as they can be reached.
pub fn regions<'m>(
    memory: &'m impl PhysicalMemory,
    raw: &Raw,
) -> impl Iterator<Item = (PhysRange, u32)> + 'm {
    entries(raw.regions, raw.region_count).filter_map(|phys| {
        let entry: &MapEntry = get(memory, phys, "memory map").ok()?;
        Some((PhysRange::from_len(entry.start.get(), entry.len_bytes.get())?, entry.kind.get()))
    })
}

/// The text at `phys`, up to its first zero; none where it cannot be reached.
pub(super) fn read_command_line(memory: &impl PhysicalMemory, phys: u64) -> CommandLine {
    let mut bytes = Vec::new();
    if phys != 0 {
        let characters = (0..command_line::MAX_LEN_BYTES as u64).map_while(|offset| {
            let byte = *memory.bytes(phys.checked_add(offset)?, 1)?.first()?;
            (byte != 0).then_some(byte)
        });
        bytes.extend(characters);
    }
    CommandLine::from_bytes(&bytes)
}

fn read_modules(memory: &impl PhysicalMemory, info: &StartInfo) -> Vec<PhysRange> {
    let count = info.module_count.get().min(MAX_MODULES);
    (0..u64::from(count))
        .filter_map(|index| {
            let phys = info.modules.get().checked_add(index * size_of::<Module>() as u64)?;
            let module: &Module = get(memory, phys, "module list").ok()?;
            PhysRange::from_len(module.start.get(), module.len_bytes.get())
        })
        .collect()
}

fn get<'m, T: FromBytes + Immutable + KnownLayout + Unaligned>(
    memory: &'m impl PhysicalMemory,
    phys: u64,
    what: &'static str,
) -> Result<&'m T, StartInfoError> {
    let bytes = memory.bytes(phys, size_of::<T>()).and_then(|bytes| T::ref_from_bytes(bytes).ok());
    bytes.ok_or(StartInfoError::Unreachable { what, phys })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::physical::Image;

    const AT: u64 = 0x6000;

    fn start_info(version: u32, map: u64, region_count: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        [MAGIC, version, 0, 1].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        [0x9000u64, 0x8000, 0xf_5250, map].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        [region_count, 0].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes
    }

    fn entry(start: u64, len: u64, kind: u32) -> Vec<u8> {
        [&start.to_le_bytes()[..], &len.to_le_bytes(), &kind.to_le_bytes(), &[0; 4]].concat()
    }

    /// Three entries, as cloud-hypervisor gives them.
    fn image() -> Image {
        let mut image = Image::default();
        image.put(AT, &start_info(1, 0x7001, 3));
        let map =
            [entry(0, 0xa_0000, 1), entry(0x10_0000, 0xff0_0000, 1), entry(0xe800_0000, 0x1000_0000, 2)];
        image.put(0x7001, &map.concat());
        image.put(0x8000, b"scenario=default\0garbage");
        image.put(0x9000, &[&0x50_0000u64.to_le_bytes()[..], &0x1000u64.to_le_bytes(), &[0; 16]].concat());
        image
    }

    #[test]
    fn everything_is_read() {
        let info = read(&image(), AT).expect("a good start info");
        assert_eq!(info.command_line.as_str(), "scenario=default");
        assert_eq!(info.rsdp, Some(0xf_5250));
        assert_eq!(info.modules, [PhysRange::new(0x50_0000, 0x50_0fff).expect("not empty")]);
        assert_eq!(info.memory_map.regions().len(), 3);
        assert_eq!(info.memory_map.ram().len_bytes(), 0xffa_0000);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        assert_eq!(
            read(&Image::default(), AT),
            Err(StartInfoError::Unreachable { what: "first word", phys: AT })
        );
        let mut wrong = Image::default();
        wrong.put(AT, &[0x11; 64]);
        assert_eq!(read(&wrong, AT), Err(StartInfoError::Magic { phys: AT, found: 0x1111_1111 }));
        let mut old = Image::default();
        old.put(AT, &start_info(0, 0, 0));
        assert_eq!(read(&old, AT), Err(StartInfoError::Version { found: 0 }));
        let mut empty = Image::default();
        empty.put(AT, &start_info(1, 0x7000, 0));
        assert_eq!(read(&empty, AT), Err(StartInfoError::NoMemory { region_count: 0 }));
        let mut cut = Image::default();
        cut.put(AT, &start_info(1, 0x7000, u32::MAX));
        cut.put(0x7000, &entry(0, 0x1000, 1));
        assert_eq!(read(&cut, AT), Err(StartInfoError::Unreachable { what: "memory map", phys: 0x7018 }));
        let mut reserved_only = Image::default();
        reserved_only.put(AT, &start_info(1, 0x7000, 2));
        reserved_only.put(0x7000, &[entry(0, 0x1000, 2), entry(u64::MAX, 0x1000, 1)].concat());
        assert_eq!(read(&reserved_only, AT), Err(StartInfoError::NoMemory { region_count: 2 }));
    }

    #[test]
    fn an_unreachable_command_line_or_module_counts_as_absent() {
        let mut image = Image::default();
        image.put(AT, &start_info(1, 0x7000, 1));
        image.put(0x7000, &entry(0, 0x1000, 1));
        let info = read(&image, AT).expect("only the map is needed");
        assert_eq!(info.command_line.as_str(), "");
        assert_eq!(info.modules, []);
    }

    /// The layout against the `pvh` crate's, which is another reading of the same header.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_layout_is_that_of_the_pvh_crate() {
        use core::mem::offset_of;
        use pvh::start_info as theirs;
        assert_eq!(MAGIC, theirs::START_MAGIC_VALUE);
        assert_eq!(size_of::<StartInfo>() + size_of::<MapPointer>(), size_of::<theirs::StartInfo>());
        assert_eq!(offset_of!(StartInfo, modules), offset_of!(theirs::StartInfo, modlist_paddr));
        assert_eq!(offset_of!(StartInfo, command_line), offset_of!(theirs::StartInfo, cmdline_paddr));
        assert_eq!(offset_of!(StartInfo, rsdp), offset_of!(theirs::StartInfo, rsdp_paddr));
        assert_eq!(size_of::<StartInfo>(), offset_of!(theirs::StartInfo, memmap_paddr));
        assert_eq!(size_of::<MapEntry>(), size_of::<theirs::MemmapTableEntry>());
        assert_eq!(offset_of!(MapEntry, kind), offset_of!(theirs::MemmapTableEntry, ty));
        assert_eq!(size_of::<Module>(), size_of::<theirs::ModlistEntry>());
    }
}
