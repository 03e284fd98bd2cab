//! MCFG: where the PCI configuration space of each segment lies in memory (PCI Firmware Specification 3.3, 4.1.2).

use alloc::vec::Vec;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{AcpiError, HEADER_BYTES, Signature};
use crate::pci::ecam::{BUS_BYTES, EcamArea};
use crate::range::PhysRange;

/// The table's name.
pub const SIGNATURE: Signature = Signature(*b"MCFG");

/// The header is followed by this many reserved bytes.
const RESERVED_BYTES: usize = 8;
/// The most entries that are taken; each is a segment or a part of one.
const MAX_ENTRIES: usize = 256;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    base: U64,
    segment: U16,
    first_bus: u8,
    last_bus: u8,
    reserved: U32,
}

/// Reads the table.
///
/// # Errors
///
/// [`AcpiError::Content`] when it has no good entry. Of several, one that is broken is left out.
pub fn parse(table: &[u8]) -> Result<Vec<EcamArea>, AcpiError> {
    let wrong = |reason| AcpiError::Content { signature: SIGNATURE, len_bytes: table.len(), reason };
    let entries =
        table.get(HEADER_BYTES + RESERVED_BYTES..).ok_or(wrong("is too short for its reserved field"))?;
    let areas: Vec<_> =
        entries.chunks_exact(size_of::<RawEntry>()).take(MAX_ENTRIES).filter_map(parse_entry).collect();
    if areas.is_empty() { Err(wrong("has no usable entry")) } else { Ok(areas) }
}

fn parse_entry(bytes: &[u8]) -> Option<EcamArea> {
    let raw = RawEntry::ref_from_bytes(bytes).ok()?;
    let buses = u64::from(raw.last_bus.checked_sub(raw.first_bus)?) + 1;
    // The base is that of bus 0, whether the entry begins there or not.
    let start = raw.base.get().checked_add(u64::from(raw.first_bus) * BUS_BYTES)?;
    let range = PhysRange::from_len(start, buses * BUS_BYTES)?;
    let aligned = raw.base.get().is_multiple_of(BUS_BYTES) && raw.base.get() != 0;
    aligned.then_some(EcamArea {
        segment: raw.segment.get(),
        first_bus: raw.first_bus,
        last_bus: raw.last_bus,
        range,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: &[(u64, u16, u8, u8)]) -> Vec<u8> {
        let mut bytes = alloc::vec![0; HEADER_BYTES + RESERVED_BYTES];
        for (base, segment, first, last) in entries {
            bytes.extend(base.to_le_bytes());
            bytes.extend(segment.to_le_bytes());
            bytes.extend([*first, *last, 0, 0, 0, 0]);
        }
        bytes
    }

    #[test]
    fn every_segment_is_found() {
        let areas = parse(&table(&[(0xb000_0000, 0, 0, 255), (0xe800_0000, 1, 2, 3)])).expect("good entries");
        assert_eq!(areas[0].range, PhysRange::new(0xb000_0000, 0xbfff_ffff).expect("not empty"));
        assert_eq!((areas[1].segment, areas[1].first_bus, areas[1].last_bus), (1, 2, 3));
        assert_eq!(areas[1].range, PhysRange::new(0xe820_0000, 0xe83f_ffff).expect("not empty"));
    }

    #[test]
    fn broken_entries_and_tails_are_left_out() {
        let mut bytes = table(&[
            (0, 0, 0, 1),
            (0x1000, 0, 0, 1),
            (u64::MAX << 20, 0, 0, 255),
            (1 << 30, 0, 5, 4),
            (1 << 30, 7, 0, 0),
        ]);
        bytes.push(1);
        let areas = parse(&bytes).expect("the last entry is good");
        assert_eq!(areas.iter().map(|area| area.segment).collect::<Vec<_>>(), [7]);
        assert!(parse(&table(&[])).is_err());
        assert!(parse(&[0; HEADER_BYTES]).is_err());
    }
}
