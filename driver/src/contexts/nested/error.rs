//! What can go wrong with nested spaces.

use super::SpaceId;
use crate::addr::{Iova, IovaRange};
use crate::error::{AttachError, DetachError, DomainError, MapError};
use crate::id::EndpointId;
use crate::prot::Prot;
use core::fmt;

/// A nested space was not changed, unless it is [`Stuck`](Self::Stuck).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NestError {
    /// There is no such space.
    NoSpace {
        /// The space.
        space: SpaceId,
    },
    /// Spaces are nested as deep as they can be.
    TooDeep {
        /// The limit.
        limit: usize,
    },
    /// The space maps to another one, not to memory.
    NotARoot {
        /// The space.
        space: SpaceId,
    },
    /// The space maps to memory, not to another one.
    NotAChild {
        /// The space.
        space: SpaceId,
    },
    /// An endpoint is attached to the space, or another one maps to it.
    InUse {
        /// The space.
        space: SpaceId,
    },
    /// The length is 0.
    Empty,
    /// An address or the length is not a multiple of the granule.
    Misaligned {
        /// The value.
        value: u64,
        /// The granule.
        granule: u64,
    },
    /// Addresses, or what they lead to, go beyond 64 bits.
    Wraps {
        /// The first address.
        iova: Iova,
        /// Where it leads.
        target: u64,
        /// The length.
        len: u64,
    },
    /// Nothing that a mapping can allow.
    Prot {
        /// What was asked for.
        prot: Prot,
    },
    /// Something is mapped there.
    Mapped {
        /// The mapping.
        range: IovaRange,
    },
    /// A mapping goes whole or not at all.
    Splits {
        /// The mapping.
        mapping: IovaRange,
    },
    /// A shadow could not be mapped.
    Shadow {
        /// The shadow.
        range: IovaRange,
        /// Why.
        error: MapError,
    },
    /// The device may still have a shadow: what it was composed from counts as mapped.
    Stuck {
        /// The shadow, or the mapping.
        range: IovaRange,
    },
    /// The endpoint is attached to no space.
    NotAttached {
        /// The endpoint.
        endpoint: EndpointId,
    },
    /// No domain could be made for a space.
    Domain(DomainError),
    /// The endpoint could not be attached.
    Attach(AttachError),
    /// The endpoint could not be detached.
    Detach(DetachError),
}

impl fmt::Display for NestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSpace { space } => write!(f, "there is no space {}", space.0),
            Self::TooDeep { limit } => write!(f, "spaces are nested {limit} deep at most"),
            Self::NotARoot { space } => write!(f, "space {} maps to another one, not to memory", space.0),
            Self::NotAChild { space } => write!(f, "space {} maps to memory, not to another one", space.0),
            Self::InUse { space } => write!(f, "space {} is in use", space.0),
            Self::Empty => f.write_str("no bytes to map"),
            Self::Misaligned { value, granule } => {
                write!(f, "{value:#x} is not a multiple of the granule {granule:#x}")
            }
            Self::Wraps { iova, target, len } => {
                write!(f, "{len:#x} bytes at {iova}, from {target:#x}, go beyond 64 bits")
            }
            Self::Prot { prot } => write!(f, "a mapping cannot allow {:#x}", prot.bits()),
            Self::Mapped { range } => write!(f, "{range} is mapped"),
            Self::Splits { mapping } => write!(f, "the mapping {mapping} goes whole or not at all"),
            Self::Shadow { range, error } => write!(f, "shadow {range}: {error}"),
            Self::Stuck { range } => write!(f, "the device may still have {range}"),
            Self::NotAttached { endpoint } => write!(f, "endpoint {endpoint} is attached to no space"),
            Self::Domain(error) => error.fmt(f),
            Self::Attach(error) => error.fmt(f),
            Self::Detach(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for NestError {}
