//! The device-tree properties that say which endpoints are behind which IOMMU.
//!
//! ```text
//!   on a PCI host bridge   iommu-map      = < rid-base  phandle  iommu-base  length >, ...
//!                          iommu-map-mask = < mask >
//!   on any other device    iommus         = < phandle  specifier ... >, ...
//! ```
//! Cells are 32 bits, big-endian. A requester ID `r` (for PCI: bus, device, function in 16 bits) with
//! `rid-base <= r & mask < rid-base + length` is the endpoint `(r & mask) - rid-base + iommu-base` of the IOMMU
//! whose node has that `phandle`. A virtio-iommu has `#iommu-cells = <1>`: its specifier is the endpoint's number
//! (bindings *pci-iommu*, *iommu* and *virtio,iommu* of the device-tree schema).
//!
//! The tree itself is for a crate that walks trees: what is here takes the bytes of properties as they are. The
//! kernel looks nodes up by phandle, and picks those that are compatible with `virtio,pci-iommu`, or the
//! `virtio,mmio` ones that turn out to be IOMMUs.
//!
//! A requester that no entry has is behind no IOMMU: QEMU leaves the IOMMU's own function out in this way, but
//! other firmware need not. See [`Options::own_endpoint`](crate::Options::own_endpoint).
//!
//! # Examples
//! ```
//! use virtio_iommu::topology::fdt::{IommuMap, Phandle};
//!
//! // iommu-map = <0x0 0x8005 0x0 0x10>, <0x11 0x8005 0x11 0xffef>
//! let cells = [0u32, 0x8005, 0, 0x10, 0x11, 0x8005, 0x11, 0xffef];
//! let bytes: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
//! let map = IommuMap::new(&bytes, None)?;
//! let (iommu, endpoint) = map.endpoint_of(0x18).expect("00:03.0 is in the second range");
//! assert_eq!((iommu, endpoint.get()), (Phandle::new(0x8005), 0x18));
//! # Ok::<(), virtio_iommu::topology::fdt::FdtError>(())
//! ```

use crate::id::EndpointId;
use core::fmt;

const CELL_LEN: usize = 4;
const ENTRY_LEN: usize = 4 * CELL_LEN;

/// A property is not what its binding says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FdtError {
    /// `iommu-map` is empty, or not made of whole entries of four cells.
    BadMapLength {
        /// Its length in bytes.
        len: usize,
    },
    /// `iommu-map-mask` is not one cell.
    BadMaskLength {
        /// Its length in bytes.
        len: usize,
    },
    /// An entry begins at a requester ID that the mask can never leave.
    MaskHidesBase {
        /// The entry, counted from 0.
        entry: usize,
        /// Its first requester ID.
        rid_base: u32,
        /// The mask.
        mask: u32,
    },
    /// The requester IDs of an entry pass 2^32 - 1.
    RequestersWrap {
        /// The entry, counted from 0.
        entry: usize,
        /// Its first requester ID.
        rid_base: u32,
        /// How many it has.
        length: u32,
    },
    /// The endpoint numbers of an entry pass 2^32 - 1.
    EndpointsWrap {
        /// The entry, counted from 0.
        entry: usize,
        /// Its first number.
        iommu_base: u32,
        /// How many it has.
        length: u32,
    },
    /// `iommus` ends inside an entry, or is empty.
    CutShort {
        /// Where the entry starts, in bytes.
        offset: usize,
        /// The bytes that are left from there.
        len: usize,
        /// The bytes that it takes.
        needed: usize,
    },
    /// `iommus` names a node that has no `#iommu-cells`, so that what follows cannot be read.
    UnknownIommu {
        /// Where the entry starts, in bytes.
        offset: usize,
        /// What it names.
        iommu: Phandle,
    },
}

impl fmt::Display for FdtError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadMapLength { len } => {
                write!(f, "iommu-map has {len:#x} bytes, which are no entries of {ENTRY_LEN:#x}")
            }
            Self::BadMaskLength { len } => {
                write!(f, "iommu-map-mask has {len:#x} bytes and needs {CELL_LEN:#x}")
            }
            Self::MaskHidesBase { entry, rid_base, mask } => {
                write!(
                    f,
                    "entry {entry} of iommu-map starts at {rid_base:#x}, which the mask {mask:#x} hides"
                )
            }
            Self::RequestersWrap { entry, rid_base, length } => {
                write!(
                    f,
                    "entry {entry} of iommu-map: {length:#x} requesters from {rid_base:#x} pass 32 bits"
                )
            }
            Self::EndpointsWrap { entry, iommu_base, length } => {
                write!(
                    f,
                    "entry {entry} of iommu-map: {length:#x} endpoints from {iommu_base:#x} pass 32 bits"
                )
            }
            Self::CutShort { offset, len, needed } => {
                write!(f, "the entry at {offset:#x} of iommus has {len:#x} bytes and needs {needed:#x}")
            }
            Self::UnknownIommu { offset, iommu } => {
                write!(f, "the entry at {offset:#x} of iommus names {iommu}, which has no #iommu-cells")
            }
        }
    }
}

impl core::error::Error for FdtError {}

/// Names a node of the tree, in its `phandle` property.
///
/// Holding one does not prove that there is such a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Phandle(u32);

impl Phandle {
    /// The name with this number.
    pub const fn new(phandle: u32) -> Self {
        Self(phandle)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Phandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "phandle {:#x}", self.0)
    }
}

/// An entry of `iommu-map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// The first requester ID.
    pub rid_base: u32,
    /// The IOMMU.
    pub iommu: Phandle,
    /// What the first requester is for the IOMMU: for a virtio-iommu, its endpoint's number.
    pub iommu_base: u32,
    /// How many requesters there are. An entry of none is allowed, and means nothing.
    pub length: u32,
}

impl MapEntry {
    fn read(bytes: &[u8; ENTRY_LEN]) -> Self {
        let cell = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { rid_base: cell(0), iommu: Phandle(cell(4)), iommu_base: cell(8), length: cell(12) }
    }

    fn check(&self, entry: usize, mask: u32) -> Result<(), FdtError> {
        let Self { rid_base, iommu_base, length, .. } = *self;
        if rid_base & !mask != 0 {
            return Err(FdtError::MaskHidesBase { entry, rid_base, mask });
        }
        let distance = length.saturating_sub(1);
        rid_base.checked_add(distance).ok_or(FdtError::RequestersWrap { entry, rid_base, length })?;
        iommu_base.checked_add(distance).ok_or(FdtError::EndpointsWrap { entry, iommu_base, length })?;
        Ok(())
    }
}

/// The `iommu-map` of a PCI host bridge, or of another bus whose devices have requester IDs.
///
/// # Invariants
/// No entry's requester IDs or endpoint numbers pass 2^32 - 1.
#[derive(Clone, Copy, Debug)]
pub struct IommuMap<'a> {
    entries: &'a [[u8; ENTRY_LEN]],
    mask: u32,
}

impl<'a> IommuMap<'a> {
    /// Checks the values of `iommu-map` and of `iommu-map-mask`, `None` where the node has no mask.
    ///
    /// # Errors
    /// [`FdtError`], which names what is wrong and where.
    pub fn new(map: &'a [u8], mask: Option<&[u8]>) -> Result<Self, FdtError> {
        let mask = match mask {
            None => u32::MAX,
            Some(bytes) => {
                let cell = bytes.try_into().map_err(|_| FdtError::BadMaskLength { len: bytes.len() })?;
                u32::from_be_bytes(cell)
            }
        };
        let (entries, rest) = map.as_chunks();
        if entries.is_empty() || !rest.is_empty() {
            return Err(FdtError::BadMapLength { len: map.len() });
        }
        let map = Self { entries, mask };
        for (at, entry) in map.entries().enumerate() {
            entry.check(at, mask)?;
        }
        // INVARIANT: every entry passed.
        Ok(map)
    }

    /// The bits of a requester ID that count.
    pub fn mask(&self) -> u32 {
        self.mask
    }

    /// The entries, in the property's order.
    pub fn entries(&self) -> impl Iterator<Item = MapEntry> + use<'a> {
        self.entries.iter().map(MapEntry::read)
    }

    /// The IOMMU that a requester is behind, and its endpoint number there, by the first entry that has it. `None`
    /// for one that is behind no IOMMU.
    ///
    /// For PCI `rid` is the [`bdf`](super::viot::PciFunction::bdf) of the function whose number its DMA carries: of
    /// the bridge, where it is behind one that leads from PCIe to PCI.
    pub fn endpoint_of(&self, rid: u32) -> Option<(Phandle, EndpointId)> {
        let rid = rid & self.mask;
        self.entries().find_map(|entry| {
            let distance = rid.checked_sub(entry.rid_base).filter(|distance| *distance < entry.length)?;
            Some((entry.iommu, EndpointId::new(entry.iommu_base.checked_add(distance)?)))
        })
    }
}

/// An entry of `iommus`: one endpoint of one IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Specifier<'a> {
    /// The IOMMU.
    pub iommu: Phandle,
    /// What names the endpoint to the IOMMU: as many cells as its `#iommu-cells` says, as bytes.
    pub cells: &'a [u8],
}

impl Specifier<'_> {
    /// The endpoint's number, or `None` where there is not one cell: then it is not a virtio-iommu's.
    pub fn endpoint(&self) -> Option<EndpointId> {
        let cell = self.cells.try_into().ok()?;
        Some(EndpointId::new(u32::from_be_bytes(cell)))
    }
}

/// Walks the `iommus` property of a device. A device that does DMA under several numbers has several entries.
///
/// Each step moves on by at least a cell, so the walk ends after `len / 4` steps whatever the property holds. It ends
/// with the first error.
///
/// `cells_of` gives the `#iommu-cells` of a node: entries are of different lengths where there are different IOMMUs. A
/// kernel that knows only virtio-iommus gives `|_| Some(1)`.
///
/// # Examples
/// ```
/// use virtio_iommu::topology::fdt::Iommus;
///
/// let property = [0, 0, 0, 7, 0, 0, 0x40, 9];
/// for specifier in Iommus::new(&property, |_| Some(1)) {
///     assert_eq!(specifier?.endpoint().map(|id| id.get()), Some(0x4009));
/// }
/// # Ok::<(), virtio_iommu::topology::fdt::FdtError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Iommus<'a, F> {
    rest: &'a [u8],
    offset: usize,
    cells_of: F,
    ended: bool,
}

impl<'a, F: FnMut(Phandle) -> Option<u32>> Iommus<'a, F> {
    /// Begins at the first entry.
    pub fn new(property: &'a [u8], cells_of: F) -> Self {
        Self { rest: property, offset: 0, cells_of, ended: false }
    }

    fn read(&mut self) -> Result<Specifier<'a>, FdtError> {
        let (offset, len) = (self.offset, self.rest.len());
        let cut = |needed| FdtError::CutShort { offset, len, needed };
        let (phandle, after) = self.rest.split_first_chunk().ok_or(cut(CELL_LEN))?;
        let iommu = Phandle(u32::from_be_bytes(*phandle));
        let count = (self.cells_of)(iommu).ok_or(FdtError::UnknownIommu { offset, iommu })?;
        let cells_len = (count as usize).saturating_mul(CELL_LEN);
        let needed = cells_len.saturating_add(CELL_LEN);
        let (cells, rest) = after.split_at_checked(cells_len).ok_or(cut(needed))?;
        (self.rest, self.offset) = (rest, offset + needed);
        Ok(Specifier { iommu, cells })
    }
}

impl<'a, F: FnMut(Phandle) -> Option<u32>> Iterator for Iommus<'a, F> {
    type Item = Result<Specifier<'a>, FdtError>;

    fn next(&mut self) -> Option<Self::Item> {
        let begins = self.offset == 0;
        if self.ended || (self.rest.is_empty() && !begins) {
            return None;
        }
        let entry = self.read();
        self.ended = entry.is_err();
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec::Vec;

    fn cells(cells: &[u32]) -> Vec<u8> {
        cells.iter().flat_map(|cell| cell.to_be_bytes()).collect()
    }

    fn endpoint(map: &IommuMap<'_>, rid: u32) -> Option<(u32, u32)> {
        map.endpoint_of(rid).map(|(iommu, id)| (iommu.get(), id.get()))
    }

    /// QEMU's property on arm virt, as bytes of its blob: the IOMMU at 00:02.0 is left out by two ranges.
    const QEMU: [u8; 32] = [
        0, 0, 0, 0, 0, 0, 0x80, 0x05, 0, 0, 0, 0, 0, 0, 0, 0x10, //
        0, 0, 0, 0x11, 0, 0, 0x80, 0x05, 0, 0, 0, 0x11, 0, 0, 0xff, 0xef,
    ];

    #[test]
    fn two_ranges_around_the_iommu_itself() {
        let map = IommuMap::new(&QEMU, None).unwrap();
        assert_eq!(map.entries().count(), 2);
        for rid in [0, 0x08, 0x0f, 0x11, 0x18, 0x300, 0xffff] {
            assert_eq!(endpoint(&map, rid), Some((0x8005, rid)), "{rid:#x}");
        }
        assert_eq!(endpoint(&map, 0x10), None, "the IOMMU's own function");
        assert_eq!(endpoint(&map, 0x1_0000), None, "the first that is past the last range");
    }

    #[test]
    fn numbers_count_from_the_iommus_base() {
        let bytes = cells(&[0x100, 7, 0x4000, 0x80, 0x400, 8, 0, 2]);
        let map = IommuMap::new(&bytes, None).unwrap();
        assert_eq!(endpoint(&map, 0x100), Some((7, 0x4000)));
        assert_eq!(endpoint(&map, 0x17f), Some((7, 0x407f)));
        assert_eq!(endpoint(&map, 0x401), Some((8, 1)));
        for outside in [0, 0xff, 0x180, 0x3ff, 0x402, u32::MAX] {
            assert_eq!(endpoint(&map, outside), None, "{outside:#x}");
        }
        let first = map.entries().next();
        let expected = MapEntry { rid_base: 0x100, iommu: Phandle(7), iommu_base: 0x4000, length: 0x80 };
        assert_eq!(first, Some(expected));
    }

    /// A mask that makes all functions of a device one endpoint.
    #[test]
    fn the_mask_comes_before_the_ranges() {
        let bytes = cells(&[0, 7, 0, 0x1_0000]);
        let mask = cells(&[0xfff8]);
        let map = IommuMap::new(&bytes, Some(&mask)).unwrap();
        assert_eq!(endpoint(&map, 0x1b), Some((7, 0x18)));
        assert_eq!(endpoint(&map, 0xdead_001b), Some((7, 0x18)));
        assert_eq!(map.mask(), 0xfff8);
    }

    #[test]
    fn the_first_entry_that_has_it_counts() {
        let bytes = cells(&[8, 1, 0x100, 0, 8, 2, 0x200, 8, 0, 3, 0x300, 0x100]);
        let map = IommuMap::new(&bytes, None).unwrap();
        assert_eq!(endpoint(&map, 8), Some((2, 0x200)), "an entry of no requesters is passed over");
        assert_eq!(endpoint(&map, 7), Some((3, 0x307)));
        assert_eq!(endpoint(&map, 16), Some((3, 0x310)));
    }

    #[test]
    fn ranges_may_end_at_the_last_number_and_not_pass_it() {
        let top = cells(&[u32::MAX, 7, 0xffff_fff0, 1, 0, 7, 1, u32::MAX]);
        let map = IommuMap::new(&top, None).unwrap();
        assert_eq!(endpoint(&map, u32::MAX), Some((7, 0xffff_fff0)));
        assert_eq!(endpoint(&map, u32::MAX - 1), Some((7, u32::MAX)));

        let wrong = |entry: [u32; 4]| {
            let bytes = cells(&[&[0, 7, 0, 1], &entry[..]].concat());
            IommuMap::new(&bytes, None).unwrap_err()
        };
        let rids = FdtError::RequestersWrap { entry: 1, rid_base: u32::MAX, length: 2 };
        assert_eq!(wrong([u32::MAX, 7, 0, 2]), rids);
        let endpoints = FdtError::EndpointsWrap { entry: 1, iommu_base: 2, length: u32::MAX };
        assert_eq!(wrong([0, 7, 2, u32::MAX]), endpoints);
        assert!(endpoints.to_string().contains("0xffffffff endpoints from 0x2"), "{endpoints}");
    }

    #[test]
    fn a_map_of_any_other_length_is_an_error() {
        for len in (0..QEMU.len()).filter(|len| *len != ENTRY_LEN) {
            let error = IommuMap::new(&QEMU[..len], None).unwrap_err();
            assert_eq!(error, FdtError::BadMapLength { len });
        }
        for len in [0, 1, 3, 5, 8] {
            let error = IommuMap::new(&QEMU, Some(&QEMU[..len])).unwrap_err();
            assert_eq!(error, FdtError::BadMaskLength { len });
        }
    }

    #[test]
    fn an_entry_that_the_mask_hides_is_an_error() {
        let mask = cells(&[0xff00]);
        let error = IommuMap::new(&QEMU, Some(&mask)).unwrap_err();
        assert_eq!(error, FdtError::MaskHidesBase { entry: 1, rid_base: 0x11, mask: 0xff00 });
    }

    #[test]
    fn specifiers_of_different_iommus() {
        let property = cells(&[5, 0x18, 6, 5, 0x19, 9, 1, 2]);
        let cells_of =
            |iommu: Phandle| [(5, 1), (6, 0), (9, 2)].into_iter().find(|(of, _)| *of == iommu.get());
        let found: Result<Vec<_>, _> =
            Iommus::new(&property, |iommu| cells_of(iommu).map(|(_, cells)| cells)).collect();
        let found: Vec<_> = found
            .unwrap()
            .iter()
            .map(|specifier| (specifier.iommu.get(), specifier.endpoint().map(EndpointId::get)))
            .collect();
        assert_eq!(found, [(5, Some(0x18)), (6, None), (5, Some(0x19)), (9, None)]);
    }

    #[test]
    fn a_walk_ends_with_its_first_error() {
        let property = cells(&[5, 0x18, 5, 0x19]);
        for len in [0, 1, 3, 5, 7, 9, 12, 15] {
            let entries: Vec<_> = Iommus::new(&property[..len], |_| Some(1)).collect();
            let (last, whole) = entries.split_last().unwrap();
            let offset = 8 * whole.len();
            let needed = if len - offset < CELL_LEN { 4 } else { 8 };
            assert_eq!(*last, Err(FdtError::CutShort { offset, len: len - offset, needed }), "{len}");
            assert!(whole.iter().all(Result::is_ok));
        }
        let unknown = FdtError::UnknownIommu { offset: 0, iommu: Phandle(5) };
        let entries: Vec<_> = Iommus::new(&property, |_| None).collect();
        assert_eq!(entries, [Err(unknown)]);
        assert_eq!(
            unknown.to_string(),
            "the entry at 0x0 of iommus names phandle 0x5, which has no #iommu-cells"
        );
        let entries: Vec<_> = Iommus::new(&property, |_| Some(u32::MAX)).collect();
        assert!(matches!(entries[..], [Err(FdtError::CutShort { offset: 0, len: 16, .. })]));
    }
}
