//! Requests as they are decoded from the readable part of a chain (PROTOCOL 1.5).
//!
//! Decoding checks nothing but lengths; `iommu` judges the values.

use crate::bytes::{array_at, u32_at, u64_at};
use crate::number::{
    HEAD_LEN, TYPE_ATTACH, TYPE_ATTACH_TABLE, TYPE_DETACH, TYPE_INVALIDATE, TYPE_MAP, TYPE_MAP_CONTEXT,
    TYPE_PAGE_RESP, TYPE_PROBE, TYPE_UNMAP, TYPE_UNMAP_CONTEXT,
};

/// One decoded request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Request {
    /// ATTACH an endpoint to a domain.
    Attach {
        /// Domain ID.
        domain: u32,
        /// Endpoint ID.
        endpoint: u32,
        /// Flag bits.
        flags: u32,
        /// Reserved bytes, which must be 0.
        reserved: u32,
    },
    /// DETACH an endpoint from a domain.
    Detach {
        /// Domain ID.
        domain: u32,
        /// Endpoint ID.
        endpoint: u32,
        /// Reserved bytes, which the device ignores.
        reserved: u64,
    },
    /// MAP a range of IOVAs.
    Map {
        /// Domain ID.
        domain: u32,
        /// First IOVA.
        virt_start: u64,
        /// Last IOVA.
        virt_end: u64,
        /// Guest-physical address of the first byte.
        phys_start: u64,
        /// Flag bits.
        flags: u32,
    },
    /// UNMAP all mappings in a range of IOVAs.
    Unmap {
        /// Domain ID.
        domain: u32,
        /// First IOVA.
        virt_start: u64,
        /// Last IOVA.
        virt_end: u64,
        /// Reserved bytes.
        reserved: u32,
    },
    /// PROBE an endpoint's properties.
    Probe {
        /// Endpoint ID.
        endpoint: u32,
        /// Whether all reserved bytes are 0.
        reserved_zero: bool,
    },
    /// Draft: adds a context to a domain, or gives it a table of context descriptors.
    AttachTable {
        /// Domain ID.
        domain: u32,
        /// An endpoint of the domain.
        endpoint: u32,
        /// Flag bits.
        flags: u32,
        /// Format of the table; 0 for a context that is mapped.
        format: u16,
        /// What the format makes of bytes 18 to 83.
        body: [u8; 66],
    },
    /// Draft: forgets what is cached.
    Invalidate {
        /// How much: bits for the domain, a PASID, a range of addresses.
        granularity: u16,
        /// What: bits for translations, those cached by endpoints, context descriptors.
        caches: u16,
        /// Flag bits.
        flags: u16,
        /// Domain ID.
        domain: u32,
        /// PASID, with its flag.
        pasid: u32,
        /// ASID, with its flag.
        archid: u64,
        /// First address.
        virt_start: u64,
        /// Pages.
        pages: u64,
        /// Size of a page as a power of two.
        granule: u8,
        /// Whether all reserved bytes are 0.
        reserved_zero: bool,
    },
    /// Draft: answers a group of page requests.
    PageResponse {
        /// Endpoint ID.
        endpoint: u32,
        /// Flag bits.
        flags: u32,
        /// PASID, with its flag.
        pasid: u32,
        /// The group.
        group: u16,
        /// 0 success, 1 invalid, 2 failure.
        code: u16,
        /// Reserved bytes, which must be 0.
        reserved: u64,
    },
    /// Draft: MAP in a context.
    MapContext {
        /// Domain ID.
        domain: u32,
        /// PASID.
        pasid: u32,
        /// First IOVA.
        virt_start: u64,
        /// Last IOVA.
        virt_end: u64,
        /// Guest-physical address of the first byte.
        phys_start: u64,
        /// Flag bits.
        flags: u32,
    },
    /// Draft: UNMAP in a context.
    UnmapContext {
        /// Domain ID.
        domain: u32,
        /// PASID.
        pasid: u32,
        /// First IOVA.
        virt_start: u64,
        /// Last IOVA.
        virt_end: u64,
        /// Reserved bytes.
        reserved: u32,
    },
    /// A known type with too few readable bytes.
    Truncated {
        /// Type byte.
        kind: u8,
        /// Bytes there were.
        len_bytes: u64,
    },
    /// A type that this device does not know, or whose feature is off.
    Unknown {
        /// Type byte.
        kind: u8,
    },
    /// Too short to have a head, or a tail.
    Malformed,
}

/// Bytes of the readable part of a known type.
fn readable_len(kind: u8) -> Option<u64> {
    match kind {
        TYPE_ATTACH | TYPE_DETACH => Some(20),
        TYPE_MAP => Some(36),
        TYPE_UNMAP => Some(28),
        TYPE_PROBE => Some(72),
        TYPE_ATTACH_TABLE => Some(84),
        TYPE_INVALIDATE => Some(60),
        TYPE_PAGE_RESP => Some(28),
        TYPE_MAP_CONTEXT => Some(40),
        TYPE_UNMAP_CONTEXT => Some(32),
        _ => None,
    }
}

impl Request {
    /// Decodes the first bytes of a readable part that is `len_bytes` long in all. Excess bytes are ignored.
    pub(crate) fn decode(bytes: &[u8], len_bytes: u64) -> Self {
        if len_bytes < HEAD_LEN || bytes.is_empty() {
            return Self::Malformed;
        }
        let kind = bytes[0];
        let Some(needed) = readable_len(kind) else {
            return Self::Unknown { kind };
        };
        if len_bytes < needed || (bytes.len() as u64) < needed {
            return Self::Truncated { kind, len_bytes };
        }
        let half = |offset| u16::from_le_bytes(array_at(bytes, offset));
        let word = |offset| u32_at(bytes, offset);
        let long = |offset| u64_at(bytes, offset);
        match kind {
            TYPE_ATTACH => {
                Self::Attach { domain: word(4), endpoint: word(8), flags: word(12), reserved: word(16) }
            }
            TYPE_DETACH => Self::Detach { domain: word(4), endpoint: word(8), reserved: long(12) },
            TYPE_MAP => Self::Map {
                domain: word(4),
                virt_start: long(8),
                virt_end: long(16),
                phys_start: long(24),
                flags: word(32),
            },
            TYPE_UNMAP => {
                Self::Unmap { domain: word(4), virt_start: long(8), virt_end: long(16), reserved: word(24) }
            }
            TYPE_ATTACH_TABLE => Self::AttachTable {
                domain: word(4),
                endpoint: word(8),
                flags: word(12),
                format: half(16),
                body: array_at(bytes, 18),
            },
            TYPE_INVALIDATE => Self::Invalidate {
                granularity: half(4),
                caches: half(6),
                flags: half(8),
                domain: word(12),
                pasid: word(16),
                archid: long(24),
                virt_start: long(32),
                pages: long(40),
                granule: bytes[48],
                reserved_zero: half(10) == 0 && word(20) == 0 && array_at::<11>(bytes, 49) == [0; 11],
            },
            TYPE_PAGE_RESP => Self::PageResponse {
                endpoint: word(4),
                flags: word(8),
                pasid: word(12),
                group: half(16),
                code: half(18),
                reserved: long(20),
            },
            TYPE_MAP_CONTEXT => Self::MapContext {
                domain: word(4),
                pasid: word(8),
                virt_start: long(16),
                virt_end: long(24),
                phys_start: long(32),
                flags: word(12),
            },
            TYPE_UNMAP_CONTEXT => Self::UnmapContext {
                domain: word(4),
                pasid: word(8),
                virt_start: long(16),
                virt_end: long(24),
                reserved: word(12),
            },
            _ => Self::Probe { endpoint: word(4), reserved_zero: array_at::<64>(bytes, 8) == [0; 64] },
        }
    }

    /// Domain that the request names, if its type has one.
    pub fn domain(&self) -> Option<u32> {
        match *self {
            Self::Attach { domain, .. }
            | Self::Detach { domain, .. }
            | Self::Map { domain, .. }
            | Self::Unmap { domain, .. }
            | Self::AttachTable { domain, .. }
            | Self::Invalidate { domain, .. }
            | Self::MapContext { domain, .. }
            | Self::UnmapContext { domain, .. } => Some(domain),
            _ => None,
        }
    }

    /// Endpoint that the request names, if its type has one.
    pub fn endpoint(&self) -> Option<u32> {
        match *self {
            Self::Attach { endpoint, .. }
            | Self::Detach { endpoint, .. }
            | Self::Probe { endpoint, .. }
            | Self::AttachTable { endpoint, .. }
            | Self::PageResponse { endpoint, .. } => Some(endpoint),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_fields_are_at_their_offsets() {
        let mut bytes = [0; 36];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = index as u8;
        }
        bytes[0] = 3;
        let request = Request::decode(&bytes, 36);
        let expected = Request::Map {
            domain: 0x0706_0504,
            virt_start: 0x0f0e_0d0c_0b0a_0908,
            virt_end: 0x1716_1514_1312_1110,
            phys_start: 0x1f1e_1d1c_1b1a_1918,
            flags: 0x2322_2120,
        };
        assert_eq!(request, expected);
    }

    #[test]
    fn every_short_length_is_told_apart() {
        let bytes = [4; 28];
        assert_eq!(Request::decode(&bytes[..3], 3), Request::Malformed);
        assert_eq!(Request::decode(&bytes[..4], 4), Request::Truncated { kind: 4, len_bytes: 4 });
        assert_eq!(Request::decode(&bytes[..27], 27), Request::Truncated { kind: 4, len_bytes: 27 });
        assert!(matches!(Request::decode(&bytes, 28), Request::Unmap { .. }));
        assert_eq!(Request::decode(&[9, 0, 0, 0], 4), Request::Unknown { kind: 9 });
    }
}
