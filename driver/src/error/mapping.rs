//! What can go wrong with mappings and buffers.

use super::RequestError;
use crate::addr::{Iova, IovaRange, PhysAddr};
use core::error::Error;
use core::fmt;

/// Memory could not be mapped. Unless it is [`MapError::Quarantined`], nothing is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError {
    /// The domain has no endpoint, so that it does not exist for the device yet, or any more.
    NoEndpoint,
    /// The domain is an identity domain: nothing can or need be mapped (D-18).
    IdentityDomain,
    /// The domain has no default context: map in one of its contexts.
    #[cfg(feature = "contexts")]
    NoDefaultContext,
    /// The length is 0, or a single byte, which no MAP can express.
    Empty,
    /// An address or length is not a multiple of the granule.
    Misaligned {
        /// The address or length.
        value: u64,
        /// The granule in bytes.
        granule: u64,
    },
    /// The physical range would pass 2^64 - 1.
    PhysicalWraps {
        /// Where it starts.
        phys: PhysAddr,
        /// Its length in bytes.
        len: u64,
    },
    /// The range lies outside of the device's input range, or ends at 2^64 - 1, or would pass it.
    OutsideInputRange {
        /// Where it starts.
        start: Iova,
        /// Its length in bytes.
        len: u64,
        /// What is usable.
        usable: IovaRange,
    },
    /// The range overlaps a mapping, a reserved region, or addresses in quarantine.
    InUse(IovaRange),
    /// No free range of this length lies below the limit.
    IovaExhausted {
        /// The length in bytes.
        len: u64,
        /// The highest address that was allowed.
        limit: Iova,
    },
    /// All of the domain's records are in use; [`Domain::reserve`](crate::Domain::reserve) makes more.
    NoRecord {
        /// How many there are.
        capacity: usize,
    },
    /// The MMIO flag, which this device does not offer.
    NoMmioFlag,
    /// Permission bits that do not exist.
    UnknownFlags(u32),
    /// No permission at all: nothing could use the mapping.
    NoPermission,
    /// No request was sent: there was no slot for it in time, or the device is out of order. Nothing changed.
    NotSent(RequestError),
    /// The device refused the MAP request, or not all of a list was sent.
    Request {
        /// What was to be mapped.
        range: IovaRange,
        /// What came of it.
        error: RequestError,
    },
    /// It failed, and the device may have some of it mapped: the memory must not be reused before the
    /// quarantine is empty again.
    Quarantined {
        /// What was to be mapped.
        range: IovaRange,
        /// The last error that made it so.
        error: RequestError,
    },
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoEndpoint => f.write_str("the domain has no endpoint attached"),
            Self::IdentityDomain => f.write_str("nothing can be mapped in an identity domain"),
            #[cfg(feature = "contexts")]
            Self::NoDefaultContext => f.write_str("the domain has no default context to map in"),
            Self::Empty => f.write_str("a mapping needs at least two bytes"),
            Self::Misaligned { value, granule } => {
                write!(f, "{value:#x} is not a multiple of the granule {granule:#x}")
            }
            Self::PhysicalWraps { phys, len } => {
                write!(f, "{len:#x} bytes from physical {phys} pass the end of the address space")
            }
            Self::OutsideInputRange { start, len, usable } => {
                write!(f, "{len:#x} bytes from {start} lie outside of the usable range {usable}")
            }
            Self::InUse(range) => write!(f, "{range} is not free"),
            Self::IovaExhausted { len, limit } => {
                write!(f, "no {len:#x} bytes of IOVA are free up to {limit}")
            }
            Self::NoRecord { capacity } => write!(f, "all {capacity} mapping records are in use"),
            Self::NoMmioFlag => f.write_str("the device does not offer the MMIO flag"),
            Self::UnknownFlags(bits) => write!(f, "permissions {bits:#x} have bits that do not exist"),
            Self::NoPermission => f.write_str("a mapping needs READ or WRITE"),
            Self::NotSent(error) => write!(f, "no MAP was sent: {error}"),
            Self::Request { range, error } => write!(f, "MAP {range}: {error}"),
            Self::Quarantined { range, error } => {
                write!(f, "MAP {range}: {error}; some of it may be mapped and is in quarantine")
            }
        }
    }
}

/// Memory could not be unmapped. It counts as mapped, and must not be reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnmapError {
    /// No mapping starts at this address, or it is in quarantine or being changed.
    NotMapped(Iova),
    /// The range splits a mapping, or has a hole: only whole neighbouring mappings can be unmapped together.
    NotWhole(IovaRange),
    /// Buffers of a pool are out: its memory is in quarantine.
    BuffersOut {
        /// Where the pool is for the endpoint.
        iova: Iova,
        /// How many are out.
        buffers: usize,
    },
    /// The UNMAP request did not succeed. The range and the memory under it are in quarantine.
    Request {
        /// What was to be unmapped.
        range: IovaRange,
        /// What came of it.
        error: RequestError,
    },
}

impl fmt::Display for UnmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMapped(iova) => write!(f, "nothing that can be unmapped starts at {iova}"),
            Self::NotWhole(range) => write!(f, "{range} is not made of whole neighbouring mappings"),
            Self::BuffersOut { iova, buffers } => {
                write!(f, "{buffers} buffers of the pool at {iova} are out")
            }
            Self::Request { range, error } => write!(f, "UNMAP {range}: {error}"),
        }
    }
}

/// A DMA buffer could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DmaError {
    /// The platform has no memory.
    NoMemory {
        /// The bytes that were needed.
        len: usize,
    },
    /// All bounce pages that could hold the buffer are in use.
    NoBounce {
        /// The length of the buffer in bytes.
        len: usize,
    },
    /// A list of segments and the room for its addresses differ in length, or the list is empty.
    ListLength {
        /// The segments.
        segments: usize,
        /// The room for addresses.
        room: usize,
    },
    /// The endpoint was closed: nothing is mapped through its views any more.
    Closed,
    /// A constraint of the endpoint makes no sense: a longest segment of 0 bytes, or a boundary that is no power of
    /// two.
    BadConstraint {
        /// The option.
        option: &'static str,
        /// Its value.
        value: u64,
    },
    /// A buffer is longer than the endpoint's longest segment.
    TooLong {
        /// Its length in bytes.
        len: usize,
        /// The longest segment in bytes.
        max: u64,
    },
    /// An access of the CPU goes past the end of a buffer.
    OutOfBounds {
        /// Where it starts in the buffer.
        offset: usize,
        /// Its length in bytes.
        len: usize,
        /// The buffer's.
        size: usize,
    },
    /// The mapping failed.
    Map(MapError),
}

impl fmt::Display for DmaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMemory { len } => write!(f, "no memory for {len:#x} bytes"),
            Self::NoBounce { len } => write!(f, "no bounce pages are free for {len:#x} bytes"),
            Self::ListLength { segments, room } => {
                write!(f, "{segments} segments do not fit a list of {room} addresses")
            }
            Self::Closed => f.write_str("the endpoint was closed"),
            Self::TooLong { len, max } => write!(f, "{len:#x} bytes are more than a segment takes, {max:#x}"),
            Self::OutOfBounds { offset, len, size } => {
                write!(f, "{len:#x} bytes at offset {offset:#x} of a buffer of {size:#x}")
            }
            Self::BadConstraint { option, value } => write!(f, "{option} cannot be {value:#x}"),
            Self::Map(error) => error.fmt(f),
        }
    }
}

impl From<MapError> for DmaError {
    fn from(error: MapError) -> Self {
        Self::Map(error)
    }
}

impl Error for MapError {}
impl Error for UnmapError {}
impl Error for DmaError {}
