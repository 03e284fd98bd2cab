//! What can go wrong with contexts.

use super::pasid::Pasid;
use super::table::{ContextTableError, TableMapError, TableUnmapError};
use crate::addr::{IovaRange, PhysAddr};
use crate::error::RequestError;
use crate::prot::Prot;
use core::fmt;

/// A context was not added, or not removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ContextError {
    /// The domain has no endpoint, so that it does not exist for the device.
    NoEndpoint,
    /// The PASID has a context, or had one about which the device owes an answer.
    Taken {
        /// The PASID.
        pasid: Pasid,
    },
    /// As many contexts as the domain can have.
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// The request failed.
    Request {
        /// The context.
        pasid: Pasid,
        /// What came of it.
        error: RequestError,
    },
    /// The domain has a table of context descriptors.
    HasDescriptors,
    /// The guest's table of context descriptors was not changed.
    Descriptors(ContextTableError),
    /// The guest's table of context descriptors was not taken.
    DescriptorsRefused(RequestError),
    /// The format of the table has no place in a table of context descriptors.
    NotArm {
        /// The PASID.
        pasid: Pasid,
    },
}

impl ContextError {
    /// What came of a request about a context; without a PASID it is a table of descriptors.
    pub(crate) fn of(pasid: Option<Pasid>, error: RequestError) -> Self {
        match pasid {
            Some(pasid) => Self::Request { pasid, error },
            None => Self::DescriptorsRefused(error),
        }
    }
}

impl fmt::Display for ContextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoEndpoint => f.write_str("the domain has no endpoint attached"),
            Self::Taken { pasid } => write!(f, "PASID {pasid} has a context"),
            Self::TooMany { limit } => write!(f, "the domain has {limit} contexts, and takes no more"),
            Self::Request { pasid, error } => write!(f, "context {pasid}: {error}"),
            Self::HasDescriptors => f.write_str("the domain has a table of context descriptors"),
            Self::Descriptors(error) => error.fmt(f),
            Self::DescriptorsRefused(error) => write!(f, "table of context descriptors: {error}"),
            Self::NotArm { pasid } => write!(f, "the table for PASID {pasid} is not one of Arm's formats"),
        }
    }
}

impl core::error::Error for ContextError {}

/// Memory was not mapped in a mapped context. Unless it is [`Unknown`](Self::Unknown), nothing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ContextMapError {
    /// The domain has no endpoint attached, so that the context does not exist for the device yet, or any more.
    NoEndpoint,
    /// There are as many mappings as there can be records of.
    NoRecord,
    /// The length is 0.
    Empty,
    /// An address or the length is not a multiple of the granule.
    Misaligned {
        /// The value.
        value: u64,
        /// The granule.
        granule: u64,
    },
    /// The range is not all in the device's input range, or in one that is reserved.
    Unusable {
        /// The range.
        range: IovaRange,
    },
    /// The memory ends beyond 2^64 - 1, or the addresses do.
    Wraps {
        /// The first physical address.
        phys: PhysAddr,
        /// The length.
        len: u64,
    },
    /// Nothing that a mapping can allow.
    Prot {
        /// What was asked for.
        prot: Prot,
    },
    /// Something is mapped there, or may still be.
    InUse {
        /// Where.
        range: IovaRange,
    },
    /// The device refused it, or it was not sent.
    Refused(RequestError),
    /// The device may have mapped it: the memory must not be used again before the range was unmapped with success, or
    /// the context removed.
    Unknown(RequestError),
}

impl fmt::Display for ContextMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoEndpoint => f.write_str("the domain has no endpoint attached"),
            Self::NoRecord => f.write_str("no record for one more mapping"),
            Self::Empty => f.write_str("no bytes to map"),
            Self::Misaligned { value, granule } => {
                write!(f, "{value:#x} is not a multiple of the granule {granule:#x}")
            }
            Self::Unusable { range } => write!(f, "{range} is outside of the input range, or reserved"),
            Self::Wraps { phys, len } => write!(f, "{len:#x} bytes from {phys} go beyond 64 bits"),
            Self::Prot { prot } => write!(f, "a mapping cannot allow {:#x}", prot.bits()),
            Self::InUse { range } => write!(f, "{range} is mapped"),
            Self::Refused(error) => error.fmt(f),
            Self::Unknown(error) => write!(f, "it may be mapped: {error}"),
        }
    }
}

impl core::error::Error for ContextMapError {}

/// Memory was not unmapped in a mapped context, and the device may still have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ContextUnmapError {
    /// The range begins or ends in a mapping, which goes whole or not at all.
    Splits {
        /// The mapping.
        mapping: IovaRange,
    },
    /// The device owes an answer about a mapping in the range, and may still make it or end it.
    InFlight {
        /// The mapping.
        mapping: IovaRange,
    },
    /// The request failed.
    Request(RequestError),
}

impl fmt::Display for ContextUnmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InFlight { mapping } => write!(f, "the device owes an answer about the mapping {mapping}"),
            Self::Splits { mapping } => write!(f, "the mapping {mapping} goes whole or not at all"),
            Self::Request(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for ContextUnmapError {}

/// Memory was not mapped in an owned context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OwnedMapError {
    /// The table does not take it. Nothing was mapped.
    Table(TableMapError),
    /// It is in the table, and the device, which caches that nothing is mapped, may not see it before
    /// [`invalidate`](super::OwnedContext::invalidate) succeeds.
    Invalidate(RequestError),
}

impl fmt::Display for OwnedMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(error) => error.fmt(f),
            Self::Invalidate(error) => write!(f, "mapped, and not invalidated: {error}"),
        }
    }
}

impl core::error::Error for OwnedMapError {}

/// Memory was not unmapped in an owned context, and the device may still reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OwnedUnmapError {
    /// The table does not take it. Nothing was unmapped.
    Table(TableUnmapError),
    /// It is out of the table, and the device may have it cached until [`invalidate`](super::OwnedContext::invalidate)
    /// succeeds.
    Invalidate(RequestError),
}

impl fmt::Display for OwnedUnmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(error) => error.fmt(f),
            Self::Invalidate(error) => write!(f, "unmapped, and perhaps cached: {error}"),
        }
    }
}

impl core::error::Error for OwnedUnmapError {}
