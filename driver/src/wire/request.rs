//! The five requests and the answer's tail.
//!
//! A request is a device-readable part, laid out here, and a device-writable part that ends with a [`Tail`].

use crate::addr::{IovaRange, PhysAddr};
use crate::id::{DomainId, EndpointId};
use crate::options::DomainKind;
use crate::prot::Prot;
use core::fmt;
use core::mem::size_of;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What the driver asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Attach { domain: DomainId, endpoint: EndpointId, kind: DomainKind },
    Detach { domain: DomainId, endpoint: EndpointId },
    Map { domain: DomainId, range: IovaRange, phys: PhysAddr, prot: Prot },
    Unmap { domain: DomainId, range: IovaRange },
    Probe { endpoint: EndpointId },
}

/// The longest readable part of any request but PROBE.
pub(crate) const MAX_READABLE: usize = 36;
/// The readable part of PROBE.
pub(crate) const PROBE_READABLE: usize = 72;
/// The writable part of every request but PROBE.
pub(crate) const TAIL_LEN: usize = size_of::<Tail>();

/// The endpoint reaches all of memory by its physical addresses. Needs BYPASS_CONFIG.
#[doc(alias = "VIRTIO_IOMMU_ATTACH_F_BYPASS")]
const ATTACH_BYPASS: u32 = 1 << 0;

/// Words that the readable part of every request fits in. PROBE's is longer, with zeros.
pub(crate) const WORDS: usize = 5;

/// The device-readable part of a request (virtio 1.4, IOMMU device, device operations), in little-endian words: a request
/// is a few stores, without a copy of bytes. The device reads `len` of their bytes; what is beyond is zero.
///
/// ```text
///   byte    0      1..4      4         8             12         16           24           32
///   ATTACH  1      reserved  domain    endpoint      flags      reserved
///   DETACH  2      reserved  domain    endpoint      reserved   reserved
///   MAP     3      reserved  domain    virt_start               virt_end     phys_start   flags
///   UNMAP   4      reserved  domain    virt_start               virt_end     reserved
///   PROBE   5      reserved  endpoint  reserved ...
/// ```
#[doc(alias = "virtio_iommu_req_head")]
pub(crate) struct Encoded {
    pub words: [u64; WORDS],
    pub len: usize,
}

/// Two 32-bit fields of a word.
#[inline(always)]
fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

impl Request {
    /// What the device reads.
    #[inline(always)]
    pub(crate) fn encode(&self) -> Encoded {
        let (words, len) = match *self {
            Self::Attach { domain, endpoint, kind } => {
                let flags = match kind {
                    DomainKind::Translated => 0,
                    DomainKind::Identity => ATTACH_BYPASS,
                    #[cfg(feature = "contexts")]
                    DomainKind::Contexts(anonymous) => anonymous.attach_flags(),
                };
                ([pair(1, domain.get()), pair(endpoint.get(), flags), 0, 0, 0], 20)
            }
            Self::Detach { domain, endpoint } => {
                ([pair(2, domain.get()), pair(endpoint.get(), 0), 0, 0, 0], 20)
            }
            Self::Map { domain, range, phys, prot } => {
                let (start, last) = (range.start().get(), range.last().get());
                ([pair(3, domain.get()), start, last, phys.get(), prot.bits().into()], MAX_READABLE)
            }
            Self::Unmap { domain, range } => {
                ([pair(4, domain.get()), range.start().get(), range.last().get(), 0, 0], 28)
            }
            Self::Probe { endpoint } => ([pair(5, endpoint.get()), 0, 0, 0, 0], PROBE_READABLE),
        };
        Encoded { words: words.map(u64::to_le), len }
    }
}

#[cfg(test)]
impl Encoded {
    /// The bytes that the device reads.
    pub(crate) fn to_bytes(&self) -> alloc::vec::Vec<u8> {
        let mut bytes: alloc::vec::Vec<u8> = self.words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert!(bytes.iter().skip(self.len).all(|byte| *byte == 0), "{bytes:?} has more than {}", self.len);
        bytes.resize(self.len, 0);
        bytes
    }
}

/// The end of every answer. Its reserved bytes are ignored (virtio 1.4, IOMMU device, device operations).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[doc(alias = "virtio_iommu_req_tail")]
pub(crate) struct Tail {
    pub status: u8,
    pub reserved: [u8; 3],
}

/// What the driver writes into a tail before it submits: a device that leaves it there did not answer.
pub(crate) const TAIL_SENTINEL: [u8; TAIL_LEN] = [0xff; TAIL_LEN];

/// The status that the device wrote into a request's tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "virtio_iommu_req_tail")]
pub enum Status {
    /// The request succeeded.
    Ok,
    /// Virtio communication error.
    IoErr,
    /// The request is not supported.
    Unsupp,
    /// Internal device error.
    DevErr,
    /// Invalid parameters.
    Inval,
    /// Parameters out of range.
    Range,
    /// No such endpoint or domain.
    NoEnt,
    /// Bad address.
    Fault,
    /// Not enough resources.
    NoMem,
    /// A value that the standard does not define.
    Other(u8),
}

impl Status {
    /// [`Ok`](Self::Ok) as the device writes it.
    pub(crate) const OK: u8 = 0;

    pub(crate) const fn from_wire(byte: u8) -> Self {
        match byte {
            Self::OK => Self::Ok,
            1 => Self::IoErr,
            2 => Self::Unsupp,
            3 => Self::DevErr,
            4 => Self::Inval,
            5 => Self::Range,
            6 => Self::NoEnt,
            7 => Self::Fault,
            8 => Self::NoMem,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "OK",
            Self::IoErr => "IOERR",
            Self::Unsupp => "UNSUPP",
            Self::DevErr => "DEVERR",
            Self::Inval => "INVAL",
            Self::Range => "RANGE",
            Self::NoEnt => "NOENT",
            Self::Fault => "FAULT",
            Self::NoMem => "NOMEM",
            Self::Other(byte) => return write!(f, "undefined status {byte:#x}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Iova;
    use alloc::vec::Vec;

    fn bytes(request: Request) -> Vec<u8> {
        request.encode().to_bytes()
    }

    const DOMAIN: DomainId = DomainId::new(0x0403_0201);
    const ENDPOINT: EndpointId = EndpointId::new(0x0807_0605);

    fn range() -> IovaRange {
        IovaRange::new(Iova::new(0x1716_1514_1312_1110), Iova::new(0x1f1e_1d1c_1b1a_1918)).unwrap()
    }

    // The vectors below were written down from the standard's field lists, not from the code above.

    #[test]
    fn attach() {
        let expected = [1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        let kind = DomainKind::Translated;
        assert_eq!(bytes(Request::Attach { domain: DOMAIN, endpoint: ENDPOINT, kind }), expected);
        let expected = [1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 0, 0, 0, 0, 0, 0, 0];
        let kind = DomainKind::Identity;
        assert_eq!(bytes(Request::Attach { domain: DOMAIN, endpoint: ENDPOINT, kind }), expected);
    }

    #[test]
    fn detach() {
        let expected = [2, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(bytes(Request::Detach { domain: DOMAIN, endpoint: ENDPOINT }), expected);
    }

    #[test]
    fn map() {
        let request = Request::Map {
            domain: DOMAIN,
            range: range(),
            phys: PhysAddr::new(0x2726_2524_2322_2120),
            prot: Prot::READ | Prot::WRITE | Prot::MMIO,
        };
        let expected = [
            3, 0, 0, 0, 1, 2, 3, 4, 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b,
            0x1c, 0x1d, 0x1e, 0x1f, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, 7, 0, 0, 0,
        ];
        assert_eq!(bytes(request), expected);
    }

    #[test]
    fn unmap() {
        let expected = [
            4, 0, 0, 0, 1, 2, 3, 4, 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b,
            0x1c, 0x1d, 0x1e, 0x1f, 0, 0, 0, 0,
        ];
        assert_eq!(bytes(Request::Unmap { domain: DOMAIN, range: range() }), expected);
    }

    #[test]
    fn probe() {
        let mut expected = [0u8; 72];
        expected[..8].copy_from_slice(&[5, 0, 0, 0, 5, 6, 7, 8]);
        assert_eq!(bytes(Request::Probe { endpoint: ENDPOINT }), expected);
    }

    #[test]
    fn flags_have_the_standards_bits() {
        assert_eq!((Prot::READ.bits(), Prot::WRITE.bits(), Prot::MMIO.bits()), (1, 2, 4));
    }

    #[test]
    fn every_status_byte_has_a_meaning() {
        let names: Vec<_> = (0..=9).map(|byte| alloc::format!("{}", Status::from_wire(byte))).collect();
        let expected = [
            "OK",
            "IOERR",
            "UNSUPP",
            "DEVERR",
            "INVAL",
            "RANGE",
            "NOENT",
            "FAULT",
            "NOMEM",
            "undefined status 0x9",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn the_sentinel_is_no_status() {
        assert_eq!(Status::from_wire(TAIL_SENTINEL[0]), Status::Other(0xff));
    }
}
