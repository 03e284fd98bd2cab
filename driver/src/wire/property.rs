//! The properties that PROBE returns for an endpoint.

use crate::addr::{Iova, IovaRange};

/// What a reserved region is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservedKind {
    /// Not usable for mappings.
    #[doc(alias = "VIRTIO_IOMMU_RESV_MEM_T_RESERVED")]
    Reserved,
    /// The doorbell window of message-signalled interrupts: not usable for mappings, and writes to it reach
    /// the interrupt controller without one.
    #[doc(alias = "VIRTIO_IOMMU_RESV_MEM_T_MSI")]
    Msi,
}

/// A range of IOVAs that is not usable for mappings of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "virtio_iommu_probe_resv_mem")]
pub struct ReservedRegion {
    /// The addresses, as the device gave them: not rounded to granules.
    pub range: IovaRange,
    /// What it is for.
    pub kind: ReservedKind,
}

/// One entry of the list, read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Property {
    Reserved(ReservedRegion),
    /// Unknown, or with reserved bits set: to be ignored.
    Ignored,
    /// Cannot be what the standard says: cut short, or an inverted range.
    Malformed,
}

const HEADER_LEN: usize = 4;
const TYPE_RESV_MEM: u16 = 1;
/// The value of RESV_MEM: subtype, three reserved bytes, first address, last address.
const RESV_MEM_LEN: usize = 20;

/// Walks the properties area that a device filled.
///
/// Each step moves on by at least a header, so the walk ends after `area.len() / 4` steps whatever it holds.
/// A value's length comes from its header, never from its type (virtio 1.4, IOMMU device, PROBE properties).
pub(crate) struct Properties<'a> {
    area: &'a [u8],
}

impl<'a> Properties<'a> {
    pub(crate) fn new(area: &'a [u8]) -> Self {
        Self { area }
    }
}

impl Iterator for Properties<'_> {
    type Item = Property;

    fn next(&mut self) -> Option<Property> {
        let (header, rest) = self.area.split_first_chunk::<HEADER_LEN>()?;
        let kind = u16::from_le_bytes([header[0], header[1]]);
        let len = usize::from(u16::from_le_bytes([header[2], header[3]]));
        if kind == 0 {
            self.area = &[];
            return None;
        }
        let Some((value, rest)) = rest.split_at_checked(len) else {
            self.area = &[];
            return Some(Property::Malformed);
        };
        self.area = rest;
        Some(match kind {
            TYPE_RESV_MEM => reserved_region(value),
            _ => Property::Ignored,
        })
    }
}

fn reserved_region(value: &[u8]) -> Property {
    let Some((value, _longer)) = value.split_first_chunk::<RESV_MEM_LEN>() else {
        return Property::Malformed;
    };
    let address = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&value[at..at + 8]);
        Iova::new(u64::from_le_bytes(bytes))
    };
    // An unknown subtype is to be treated as reserved, and the reserved bytes are ignored.
    let kind = if value[0] == 1 { ReservedKind::Msi } else { ReservedKind::Reserved };
    match IovaRange::new(address(4), address(12)) {
        Some(range) => Property::Reserved(ReservedRegion { range, kind }),
        None => Property::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    /// RESV_MEM, subtype MSI, 0xfee00000..=0xfeefffff, with garbage in the reserved bytes.
    const MSI: [u8; 24] = [
        0x01, 0x00, 0x14, 0x00, 0x01, 0xde, 0xad, 0xbe, 0x00, 0x00, 0xe0, 0xfe, 0, 0, 0, 0, 0xff, 0xff, 0xef,
        0xfe, 0, 0, 0, 0,
    ];

    fn region(start: u64, last: u64, kind: ReservedKind) -> Property {
        let range = IovaRange::new(Iova::new(start), Iova::new(last)).unwrap();
        Property::Reserved(ReservedRegion { range, kind })
    }

    fn parse(area: &[u8]) -> Vec<Property> {
        Properties::new(area).collect()
    }

    fn msi() -> Property {
        region(0xfee0_0000, 0xfeef_ffff, ReservedKind::Msi)
    }

    #[test]
    fn msi_window_then_zero_fill() {
        let mut area = vec![0; 512];
        area[..24].copy_from_slice(&MSI);
        assert_eq!(parse(&area), [msi()]);
    }

    #[test]
    fn no_terminator_in_a_full_area() {
        assert_eq!(parse(&MSI), [msi()]);
    }

    #[test]
    fn unknown_type_and_reserved_bits_are_ignored_and_the_walk_goes_on() {
        let mut area = vec![0xff, 0x07, 3, 0, 9, 9, 9]; // type 0x7ff, three bytes
        area.extend([0x01, 0x10, 0, 0]); // RESV_MEM with a reserved bit set, empty
        area.extend(MSI);
        assert_eq!(parse(&area), [Property::Ignored, Property::Ignored, msi()]);
    }

    #[test]
    fn length_comes_from_the_header() {
        let mut area = MSI.to_vec();
        area[2] = 28;
        area.extend([0x55; 8]);
        area.extend(MSI);
        assert_eq!(parse(&area), [msi(), msi()]);
    }

    #[test]
    fn unknown_subtype_is_reserved() {
        let mut area = MSI;
        area[4] = 9;
        assert_eq!(parse(&area), [region(0xfee0_0000, 0xfeef_ffff, ReservedKind::Reserved)]);
    }

    #[test]
    fn malformed_entries_are_named_and_end_or_pass() {
        let mut inverted = MSI;
        inverted[16..24].fill(0);
        let mut area = inverted.to_vec();
        area.extend([1, 0, 4, 0, 0, 0, 0, 0]); // RESV_MEM of four bytes
        area.extend(MSI);
        assert_eq!(parse(&area), [Property::Malformed, Property::Malformed, msi()]);
        assert_eq!(parse(&[1, 0, 0xff, 0xff, 0]), [Property::Malformed]);
    }

    #[test]
    fn type_zero_with_reserved_bits_is_no_end() {
        let mut area = vec![0x00, 0x10, 0, 0];
        area.extend(MSI);
        assert_eq!(parse(&area), [Property::Ignored, msi()]);
    }

    #[test]
    fn left_over_bytes_end_the_list() {
        for len in 0..4 {
            assert_eq!(parse(&[0xff; 3][..len.min(3)]), []);
        }
    }

    #[test]
    fn the_top_of_the_address_space_is_a_region() {
        let mut area = MSI;
        area[8..24].fill(0xff);
        assert_eq!(parse(&area), [region(u64::MAX, u64::MAX, ReservedKind::Msi)]);
    }

    #[test]
    fn zero_length_properties_do_not_stall() {
        let area: Vec<u8> = [2, 0, 0, 0].repeat(128);
        assert_eq!(parse(&area).len(), 128);
    }
}
