//! The ACPI Virtual I/O Translation table: which PCI functions and MMIO devices are behind which virtio-iommu.
//!
//! ```text
//!   header, 48 bytes: "VIOT", length at 4, node count at 36, first node at 38
//!   node: type, reserved, length of the whole node (2 bytes), then by type:
//!     1 PCI range            -> endpoint number of its first function, segments, functions, IOMMU node
//!     2 one MMIO endpoint    -> endpoint number, base address, IOMMU node
//!     3 virtio-iommu on PCI  -> segment, function
//!     4 virtio-iommu on MMIO -> base address
//! ```
//! [`Viot::parse`] walks the whole table once, so that what comes after cannot fail. Checksums are the kernel's
//! business, which checked them when it looked for the table.
//!
//! A range usually includes the IOMMU's own function: it has an endpoint number like any other, and must never
//! be attached. Give it to the driver as [`Options::own_endpoint`](crate::Options::own_endpoint).

use crate::id::EndpointId;
use core::fmt;

const HEADER_LEN: usize = 48;
const NODE_HEADER_LEN: usize = 4;

const TYPE_PCI_RANGE: u8 = 1;
const TYPE_MMIO_ENDPOINT: u8 = 2;
const TYPE_IOMMU_PCI: u8 = 3;
const TYPE_IOMMU_MMIO: u8 = 4;

/// The table is not what the specification says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ViotError {
    /// The bytes end before the header does, or before the length that the header gives.
    CutShort {
        /// The bytes that are there.
        len: usize,
        /// The bytes that are needed.
        needed: usize,
    },
    /// The signature is not "VIOT".
    BadSignature([u8; 4]),
    /// A node lies outside of the table.
    NodeOutside {
        /// Where it starts, in bytes.
        offset: usize,
    },
    /// A node's length is too small for its type.
    NodeTooShort {
        /// Where it starts, in bytes.
        offset: usize,
        /// Its type.
        kind: u8,
        /// Its length in bytes.
        len: u16,
    },
    /// A range ends before it starts.
    InvertedRange {
        /// Where the node starts, in bytes.
        offset: usize,
    },
    /// An endpoint node names an IOMMU node that is not one.
    StrayOutput {
        /// Where the endpoint node starts, in bytes.
        offset: usize,
        /// Where it says the IOMMU node is.
        output: u16,
    },
    /// The endpoint numbers of a range pass 2^32 - 1.
    EndpointsWrap {
        /// Where the node starts, in bytes.
        offset: usize,
    },
}

impl fmt::Display for ViotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CutShort { len, needed } => {
                write!(f, "the VIOT has {len:#x} bytes and needs {needed:#x}")
            }
            Self::BadSignature(bytes) => write!(f, "the signature {bytes:02x?} is not VIOT"),
            Self::NodeOutside { offset } => {
                write!(f, "the VIOT node at {offset:#x} lies outside of the table")
            }
            Self::NodeTooShort { offset, kind, len } => {
                write!(f, "the VIOT node at {offset:#x} of type {kind} is only {len:#x} bytes long")
            }
            Self::InvertedRange { offset } => {
                write!(f, "the VIOT range at {offset:#x} ends before it starts")
            }
            Self::StrayOutput { offset, output } => {
                write!(f, "the VIOT node at {offset:#x} names an IOMMU at {output:#x}, where none is")
            }
            Self::EndpointsWrap { offset } => {
                write!(f, "the endpoint numbers of the VIOT range at {offset:#x} pass 32 bits")
            }
        }
    }
}

impl core::error::Error for ViotError {}

/// A PCI function's place: segment, and bus, device and function in 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciFunction {
    /// The segment.
    pub segment: u16,
    /// Bus in bits 15:8, device in 7:3, function in 2:0.
    pub bdf: u16,
}

impl PciFunction {
    /// The function at this place. `device` is 0..=31 and `function` 0..=7; higher bits are cut off.
    pub const fn new(segment: u16, bus: u8, device: u8, function: u8) -> Self {
        let bdf = (bus as u16) << 8 | ((device & 0x1f) as u16) << 3 | (function & 7) as u16;
        Self { segment, bdf }
    }
}

impl fmt::Display for PciFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { segment, bdf } = *self;
        write!(f, "{segment:04x}:{:02x}:{:02x}.{}", bdf >> 8, bdf >> 3 & 0x1f, bdf & 7)
    }
}

/// Where a virtio-iommu is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommuPlace {
    /// A PCI function.
    Pci(PciFunction),
    /// A virtio-mmio device with its registers at this physical address.
    Mmio(u64),
}

/// An IOMMU of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Iommu {
    /// Where its node starts in the table: what endpoint nodes call it.
    pub node: u16,
    /// Where the device is.
    pub place: IommuPlace,
}

/// What an endpoint node says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoints {
    /// PCI functions from `first` to `last`, over all segments from the one to the other.
    PciRange {
        /// The number of `first`.
        start: EndpointId,
        /// The first segment and function.
        first: PciFunction,
        /// The last segment and function.
        last: PciFunction,
        /// The IOMMU's node.
        iommu: u16,
    },
    /// One device that is not on PCI.
    Mmio {
        /// Its number.
        id: EndpointId,
        /// Its base address.
        base: u64,
        /// The IOMMU's node.
        iommu: u16,
    },
}

/// A VIOT that was checked.
///
/// # Invariants
/// `table` is as long as its header says, and every node lies inside it, is as long as its type needs, and
/// names an IOMMU node if it names one.
#[derive(Clone, Copy, Debug)]
pub struct Viot<'a> {
    table: &'a [u8],
}

/// A node: where it starts, its type, and all its bytes.
#[derive(Clone, Copy)]
struct Node<'a> {
    offset: usize,
    kind: u8,
    bytes: &'a [u8],
}

impl Node<'_> {
    fn u16(&self, at: usize) -> u16 {
        u16_at(self.bytes, at).unwrap_or(0)
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }

    fn min_len(kind: u8) -> u16 {
        match kind {
            TYPE_PCI_RANGE | TYPE_MMIO_ENDPOINT => 24,
            TYPE_IOMMU_PCI | TYPE_IOMMU_MMIO => 16,
            _ => NODE_HEADER_LEN as u16,
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

impl<'a> Viot<'a> {
    /// Checks a table. Bytes after its own length are ignored; unknown node types are passed over.
    ///
    /// # Errors
    /// [`ViotError`], which names what is wrong and where.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ViotError> {
        let cut = |needed| ViotError::CutShort { len: bytes.len(), needed };
        let header = bytes.get(..HEADER_LEN).ok_or(cut(HEADER_LEN))?;
        let signature = [header[0], header[1], header[2], header[3]];
        if signature != *b"VIOT" {
            return Err(ViotError::BadSignature(signature));
        }
        let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        if len < HEADER_LEN {
            return Err(ViotError::CutShort { len, needed: HEADER_LEN });
        }
        let viot = Self { table: bytes.get(..len).ok_or(cut(len))? };
        for node in viot.walk() {
            viot.check(node?)?;
        }
        // INVARIANT: every node passed.
        Ok(viot)
    }

    fn check(&self, node: Node<'_>) -> Result<(), ViotError> {
        let offset = node.offset;
        let output = match node.kind {
            TYPE_PCI_RANGE => {
                let segments = node.u16(10).checked_sub(node.u16(8));
                let functions = node.u16(14).checked_sub(node.u16(12));
                let (Some(segments), Some(functions)) = (segments, functions) else {
                    return Err(ViotError::InvertedRange { offset });
                };
                let span = u32::from(segments) << 16 | u32::from(functions);
                node.u32(4).checked_add(span).ok_or(ViotError::EndpointsWrap { offset })?;
                node.u16(16)
            }
            TYPE_MMIO_ENDPOINT => node.u16(16),
            _ => return Ok(()),
        };
        let is_iommu = self.iommu(output).is_some();
        if is_iommu { Ok(()) } else { Err(ViotError::StrayOutput { offset, output }) }
    }

    /// The nodes in order, as far as they lie inside the table: the count is a `u16`, so the walk is bounded.
    fn walk(&self) -> impl Iterator<Item = Result<Node<'a>, ViotError>> + use<'a> {
        let table = self.table;
        let count = u16_at(table, 36).unwrap_or(0);
        let mut offset = usize::from(u16_at(table, 38).unwrap_or(0));
        let mut left = count;
        core::iter::from_fn(move || {
            left = left.checked_sub(1)?;
            let node = node_at(table, offset);
            match &node {
                Ok(node) => offset += node.bytes.len(),
                Err(_) => left = 0,
            }
            Some(node)
        })
    }

    fn nodes(&self) -> impl Iterator<Item = Node<'a>> + use<'a> {
        self.walk().flatten()
    }

    /// The IOMMU whose node starts at this offset.
    pub fn iommu(&self, node: u16) -> Option<Iommu> {
        self.iommus().find(|iommu| iommu.node == node)
    }

    /// The IOMMUs.
    pub fn iommus(&self) -> impl Iterator<Item = Iommu> + use<'a> {
        self.nodes().filter_map(|node| {
            let place = match node.kind {
                TYPE_IOMMU_PCI => IommuPlace::Pci(PciFunction { segment: node.u16(4), bdf: node.u16(6) }),
                TYPE_IOMMU_MMIO => IommuPlace::Mmio(node.u64(8)),
                _ => return None,
            };
            // An IOMMU beyond 64 KiB cannot be named by any node.
            Some(Iommu { node: u16::try_from(node.offset).ok()?, place })
        })
    }

    /// The endpoints, in the table's order.
    pub fn endpoints(&self) -> impl Iterator<Item = Endpoints> + use<'a> {
        self.nodes().filter_map(|node| match node.kind {
            TYPE_PCI_RANGE => Some(Endpoints::PciRange {
                start: EndpointId::new(node.u32(4)),
                first: PciFunction { segment: node.u16(8), bdf: node.u16(12) },
                last: PciFunction { segment: node.u16(10), bdf: node.u16(14) },
                iommu: node.u16(16),
            }),
            TYPE_MMIO_ENDPOINT => Some(Endpoints::Mmio {
                id: EndpointId::new(node.u32(4)),
                base: node.u64(8),
                iommu: node.u16(16),
            }),
            _ => None,
        })
    }

    /// The endpoint number of a PCI function and the IOMMU it is behind, by the first range that has it.
    /// `None` for a function that is behind no IOMMU.
    pub fn pci_endpoint(&self, function: PciFunction) -> Option<(EndpointId, Iommu)> {
        self.endpoints().find_map(|endpoints| {
            let Endpoints::PciRange { start, first, last, iommu } = endpoints else { return None };
            let inside = (first.segment..=last.segment).contains(&function.segment)
                && (first.bdf..=last.bdf).contains(&function.bdf);
            if !inside {
                return None;
            }
            let distance =
                u32::from(function.segment - first.segment) << 16 | u32::from(function.bdf - first.bdf);
            Some((EndpointId::new(start.get().checked_add(distance)?), self.iommu(iommu)?))
        })
    }
}

fn node_at(table: &[u8], offset: usize) -> Result<Node<'_>, ViotError> {
    let outside = ViotError::NodeOutside { offset };
    if offset < HEADER_LEN {
        return Err(outside);
    }
    let header = table.get(offset..).and_then(|rest| rest.get(..NODE_HEADER_LEN)).ok_or(outside)?;
    let (kind, len) = (header[0], u16::from_le_bytes([header[2], header[3]]));
    if len < Node::min_len(kind) {
        return Err(ViotError::NodeTooShort { offset, kind, len });
    }
    let bytes = table.get(offset..offset + usize::from(len)).ok_or(outside)?;
    Ok(Node { offset, kind, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    /// QEMU's table, written down from a dump: the IOMMU at 00:04.0, the root bus, and an expander at bus 0x40.
    fn sample() -> Vec<u8> {
        let mut table = Vec::new();
        table.extend(b"VIOT");
        table.extend(112u32.to_le_bytes());
        table.extend([0; 28]);
        table.extend([3, 0, 48, 0]);
        table.extend([0; 8]);
        table.extend([0x03, 0, 0x10, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        table.extend([0x01, 0, 0x18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0, 0x30, 0, 0, 0, 0, 0, 0, 0]);
        table.extend([
            0x01, 0, 0x18, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0x40, 0xff, 0x40, 0x30, 0, 0, 0, 0, 0, 0, 0,
        ]);
        assert_eq!(table.len(), 112);
        table
    }

    #[test]
    fn endpoints_of_a_real_table() {
        let table = sample();
        let viot = Viot::parse(&table).unwrap();
        let iommus: Vec<_> = viot.iommus().collect();
        let own = PciFunction::new(0, 0, 4, 0);
        assert_eq!(iommus, [Iommu { node: 48, place: IommuPlace::Pci(own) }]);
        let id = |function| viot.pci_endpoint(function).map(|(id, _)| id.get());
        assert_eq!(id(PciFunction::new(0, 0, 2, 0)), Some(0x10));
        assert_eq!(id(PciFunction::new(0, 0x40, 1, 1)), Some(0x4009));
        assert_eq!(id(PciFunction::new(0, 1, 0, 0)), None);
        assert_eq!(id(PciFunction::new(1, 0, 2, 0)), None);
        assert_eq!(id(own), Some(0x20), "the range includes the IOMMU: the driver has to leave it out");
    }

    #[test]
    fn endpoint_numbers_count_over_segments() {
        let mut table = sample();
        table[64 + 4] = 0x07; // first number 7
        table[64 + 10] = 2; // segments 0 to 2
        let viot = Viot::parse(&table).unwrap();
        let (id, _) = viot.pci_endpoint(PciFunction { segment: 2, bdf: 0x10 }).unwrap();
        assert_eq!(id.get(), 7 + 0x2_0010);
    }

    #[test]
    fn mmio_nodes() {
        let mut table = sample();
        table[48] = TYPE_IOMMU_MMIO;
        table[56..64].copy_from_slice(&0xa00_3e00u64.to_le_bytes());
        table[64] = TYPE_MMIO_ENDPOINT;
        table[72..80].copy_from_slice(&0x1234u64.to_le_bytes());
        let viot = Viot::parse(&table).unwrap();
        assert_eq!(viot.iommu(48).unwrap().place, IommuPlace::Mmio(0xa00_3e00));
        let first = viot.endpoints().next();
        assert_eq!(first, Some(Endpoints::Mmio { id: EndpointId::new(0), base: 0x1234, iommu: 48 }));
    }

    #[test]
    fn a_table_cut_anywhere_is_an_error() {
        let table = sample();
        for len in 0..table.len() {
            let error = Viot::parse(&table[..len]).unwrap_err();
            assert!(matches!(error, ViotError::CutShort { .. }), "{len}: {error}");
        }
    }

    #[test]
    fn every_broken_field_is_named() {
        let broken = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut table = sample();
            change(&mut table);
            Viot::parse(&table).unwrap_err()
        };
        assert_eq!(broken(&|t| t[0] = b'X'), ViotError::BadSignature(*b"XIOT"));
        assert_eq!(broken(&|t| t[4] = 40), ViotError::CutShort { len: 40, needed: 48 });
        assert_eq!(broken(&|t| t[36] = 4), ViotError::NodeOutside { offset: 112 });
        assert_eq!(broken(&|t| t[38] = 4), ViotError::NodeOutside { offset: 4 });
        assert_eq!(broken(&|t| t[39] = 0xff), ViotError::NodeOutside { offset: 0xff30 });
        let short = ViotError::NodeTooShort { offset: 48, kind: 3, len: 0 };
        assert_eq!(broken(&|t| t[50] = 0), short);
        assert_eq!(broken(&|t| t[91] = 0xff), ViotError::NodeOutside { offset: 88 });
        let stray = ViotError::StrayOutput { offset: 64, output: 64 };
        assert_eq!(broken(&|t| t[64 + 16] = 64), stray);
        assert_eq!(broken(&|t| t[64 + 17] = 0xff), ViotError::StrayOutput { offset: 64, output: 0xff30 });
        assert_eq!(broken(&|t| t[64 + 13] = 1), ViotError::InvertedRange { offset: 64 });
        assert_eq!(broken(&|t| t[64 + 4..64 + 8].fill(0xff)), ViotError::EndpointsWrap { offset: 64 });
    }

    #[test]
    fn unknown_nodes_are_passed_over() {
        let mut table = sample();
        table[64] = 0x77;
        let viot = Viot::parse(&table).unwrap();
        assert_eq!(viot.endpoints().count(), 1);
        assert_eq!(viot.pci_endpoint(PciFunction::new(0, 0, 2, 0)), None);
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut seed = 1u64;
        for _ in 0..20_000 {
            let mut table = sample();
            for _ in 0..4 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (seed >> 33) as usize % table.len();
                table[at] = (seed >> 24) as u8;
            }
            if let Ok(viot) = Viot::parse(&table) {
                let _ = viot.endpoints().count();
                let _ = viot.pci_endpoint(PciFunction { segment: seed as u16, bdf: (seed >> 16) as u16 });
            }
        }
    }
}
