//! The machine's memory map as firmware states it, and what of it the kernel may use.
//!
//! Regions may come unsorted, overlap or touch: an address is usable only when some region says RAM and none says
//! something else.

use alloc::vec::Vec;
use core::fmt;

use super::frames::FRAME_BYTES;
use crate::range::{PhysRange, RangeSet};

/// What a region of the map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// RAM that may be used.
    Ram,
    /// Reserved: firmware, devices, ECAM.
    Reserved,
    /// ACPI tables, which could be used once they are read. The kernel keeps them.
    AcpiTables,
    /// ACPI memory that the firmware keeps.
    AcpiFirmware,
    /// RAM with errors.
    Unusable,
    /// A kind that this kernel does not know, with firmware's number for it.
    Other(u32),
}

impl RegionKind {
    /// The kind by its number in the ACPI specification's address range types.
    pub const fn from_acpi(number: u32) -> Self {
        match number {
            1 => Self::Ram,
            2 => Self::Reserved,
            3 => Self::AcpiTables,
            4 => Self::AcpiFirmware,
            5 => Self::Unusable,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for RegionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Ram => "RAM",
            Self::Reserved => "reserved",
            Self::AcpiTables => "ACPI tables",
            Self::AcpiFirmware => "ACPI firmware",
            Self::Unusable => "unusable",
            Self::Other(number) => return write!(f, "kind {number}"),
        };
        f.pad(name)
    }
}

/// One region of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its addresses.
    pub range: PhysRange,
    /// What it is.
    pub kind: RegionKind,
}

/// The memory map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryMap {
    regions: Vec<Region>,
}

impl MemoryMap {
    /// Takes over firmware's regions, sorted by address.
    pub fn new(mut regions: Vec<Region>) -> Self {
        regions.sort_by_key(|region| region.range);
        Self { regions }
    }

    /// The regions, by address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// All addresses of RAM, in use or not, as far as no other region claims them.
    pub fn ram(&self) -> RangeSet {
        let is_ram = |region: &&Region| region.kind == RegionKind::Ram;
        let mut set: RangeSet = self.regions.iter().filter(is_ram).map(|region| region.range).collect();
        self.regions.iter().filter(|region| !is_ram(region)).for_each(|region| set.remove(region.range));
        set
    }

    /// The whole frames of RAM that are left without those that touch `taken`.
    pub fn usable(&self, taken: &[PhysRange]) -> RangeSet {
        let mut ram = self.ram();
        taken.iter().for_each(|range| ram.remove(range.grow_to(FRAME_BYTES)));
        ram.iter().filter_map(|range| range.shrink_to(FRAME_BYTES)).collect()
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn region(start: u64, last: u64, kind: RegionKind) -> Region {
        Region { range: PhysRange::new(start, last).expect("a test's region is not empty"), kind }
    }

    #[test]
    fn what_is_taken_or_claimed_otherwise_is_not_usable() {
        let map = MemoryMap::new(vec![
            region(0x10_0000, 0xfff_ffff, RegionKind::Ram),
            region(0, 0x9_fbff, RegionKind::Ram),
            region(0x9_fc00, 0x9_ffff, RegionKind::Reserved),
            // Overlaps RAM, as some firmware's tables do, and is not page-aligned.
            region(0xfe0_0123, 0xfe0_0fff, RegionKind::AcpiTables),
        ]);
        let taken = [PhysRange::new(0, 0xf_ffff), PhysRange::new(0x20_0010, 0x20_0010)]
            .map(|r| r.expect("not empty"));
        let usable: Vec<_> = map.usable(&taken).iter().map(|r| (r.start(), r.last())).collect();
        assert_eq!(usable, [(0x10_0000, 0x1f_ffff), (0x20_1000, 0xfdf_ffff), (0xfe0_1000, 0xfff_ffff)]);
    }

    #[test]
    fn regions_may_overlap_and_touch() {
        let map = MemoryMap::new(vec![
            region(0x2000, 0x4fff, RegionKind::Ram),
            region(0x1000, 0x2fff, RegionKind::Ram),
            region(0x5000, u64::MAX, RegionKind::Ram),
        ]);
        assert_eq!(
            map.ram().iter().collect::<Vec<_>>(),
            [PhysRange::new(0x1000, u64::MAX).expect("not empty")]
        );
    }

    #[test]
    fn unknown_kinds_keep_their_number() {
        assert_eq!(RegionKind::from_acpi(7), RegionKind::Other(7));
        assert_eq!(alloc::format!("{}", RegionKind::Other(7)), "kind 7");
    }
}
