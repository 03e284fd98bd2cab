//! What can go wrong, one enum per operation.
//!
//! The driver's own refusals, which sent nothing, are kept apart from what came of a request that was sent
//! ([`RequestError`]). Messages name the value; nothing here allocates.

mod mapping;

pub use mapping::{DmaError, MapError, UnmapError};

use crate::addr::IovaRange;
use crate::id::EndpointId;
use crate::transport::{DeviceStatus, TransportError};
use crate::wire::feature::Features;
use crate::wire::request::Status;
use core::error::Error;
use core::fmt;

/// A request that was sent did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RequestError {
    /// The device answered with this status.
    Refused(Status),
    /// The device gave the request back without an answer: it does not know it.
    NotHandled,
    /// The device claims success, but wrote fewer bytes than the answer has.
    ShortAnswer {
        /// The bytes that it says it wrote.
        used_len: u32,
        /// The bytes that the answer has.
        expected: u32,
    },
    /// No answer before the deadline. The request still belongs to the device; what it touches is in
    /// quarantine until the device answers.
    TimedOut,
    /// No slot for the request came free before the deadline. Nothing was sent.
    NoSlot,
    /// The device says that it needs a reset.
    NeedsReset,
    /// The driver reset the queue, or the device, before the device answered.
    Reset,
    /// The driver was shut down. Nothing was sent.
    ShutDown,
    /// The device broke the ring: its used index moved further than there were requests.
    RingBroken {
        /// The index that it wrote.
        used_index: u16,
        /// The furthest that was possible.
        expected_at_most: u16,
    },
}

impl RequestError {
    /// Whether the device may still carry the request out, or did so without saying.
    pub fn outcome_unknown(&self) -> bool {
        match self {
            Self::TimedOut | Self::NeedsReset | Self::Reset => true,
            Self::RingBroken { .. } | Self::ShortAnswer { .. } => true,
            // A status that nothing defines says nothing, and an error half-way does not say how far.
            Self::Refused(Status::Other(_) | Status::DevErr | Status::IoErr) => true,
            Self::Refused(_) | Self::NotHandled | Self::NoSlot | Self::ShutDown => false,
        }
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(status) => write!(f, "the device answered {status}"),
            Self::NotHandled => f.write_str("the device returned the request unanswered"),
            Self::ShortAnswer { used_len, expected } => {
                write!(f, "the device wrote {used_len:#x} bytes of an answer of {expected:#x}")
            }
            Self::TimedOut => f.write_str("the device did not answer before the deadline"),
            Self::NoSlot => f.write_str("no request slot came free before the deadline"),
            Self::NeedsReset => f.write_str("the device asks for a reset"),
            Self::Reset => f.write_str("the device was reset before it answered"),
            Self::ShutDown => f.write_str("the driver was shut down"),
            Self::RingBroken { used_index, expected_at_most } => {
                write!(f, "the device moved the used index to {used_index:#x}, past {expected_at_most:#x}")
            }
        }
    }
}

/// The IOMMU could not be started. It is left reset or marked as failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartError {
    /// The device did not finish its reset before the deadline.
    ResetTimedOut {
        /// The status that it shows.
        status: DeviceStatus,
    },
    /// The device does not offer a feature that the driver cannot do without.
    MissingFeatures {
        /// What is missing.
        missing: Features,
        /// All that it offers.
        offered: u64,
    },
    /// The device did not accept the driver's features.
    FeaturesRefused {
        /// What the driver asked for.
        asked: Features,
    },
    /// The configuration space could not be read.
    Config(TransportError),
    /// The bypass could not be closed.
    Bypass(BypassError),
    /// The driver's own limits leave no domain for introducing an endpoint.
    Domain(DomainError),
    /// The configuration kept changing while it was read.
    ConfigUnstable,
    /// A value of the configuration makes no sense.
    BadConfig {
        /// The field.
        field: &'static str,
        /// Its value, or the first of two.
        value: u64,
    },
    /// A queue is missing or too small: two descriptors are the least.
    QueueTooSmall {
        /// The queue.
        queue: u16,
        /// Its size in descriptors.
        size: u16,
    },
    /// A queue could not be enabled.
    Queue(TransportError),
    /// The platform has no memory for a queue.
    NoMemory {
        /// The bytes that were needed.
        len: usize,
    },
    /// The device asks for a reset right after it was started.
    NeedsReset,
    /// A request of the start-up failed for this endpoint.
    Endpoint {
        /// The endpoint.
        endpoint: EndpointId,
        /// What came of the request.
        error: RequestError,
    },
    /// There are more endpoints than [`Options::max_endpoints`](crate::Options::max_endpoints).
    TooManyEndpoints {
        /// The limit.
        limit: usize,
    },
    /// The endpoint is the IOMMU itself, which is never attached.
    OwnEndpoint(EndpointId),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ResetTimedOut { status } => {
                write!(f, "the device did not finish its reset, status {:#x}", status.bits())
            }
            Self::MissingFeatures { missing, offered } => {
                write!(f, "the device does not offer {missing} (it offers {offered:#x}): it cannot be driven")
            }
            Self::FeaturesRefused { asked } => {
                write!(f, "the device refused the features {asked}")
            }
            Self::Config(error) => write!(f, "cannot read the configuration: {error}"),
            Self::Bypass(error) => error.fmt(f),
            Self::Domain(error) => error.fmt(f),
            Self::ConfigUnstable => f.write_str("the configuration kept changing while it was read"),
            Self::BadConfig { field, value } => {
                write!(f, "the device's {field} is {value:#x}, which cannot be")
            }
            Self::QueueTooSmall { queue, size } => {
                write!(f, "queue {queue} has {size} descriptors, two are the least")
            }
            Self::Queue(error) => write!(f, "cannot enable a queue: {error}"),
            Self::NoMemory { len } => write!(f, "no memory for a queue of {len:#x} bytes"),
            Self::NeedsReset => f.write_str("the device asks for a reset right after it was started"),
            Self::Endpoint { endpoint, error } => write!(f, "endpoint {endpoint}: {error}"),
            Self::TooManyEndpoints { limit } => write!(f, "more than {limit} endpoints"),
            Self::OwnEndpoint(endpoint) => write!(f, "endpoint {endpoint} is the IOMMU itself"),
        }
    }
}

/// The device's bypass could not be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BypassError {
    /// The device does not offer BYPASS_CONFIG.
    NoFeature,
    /// The driver was shut down: the device is not its own any more.
    ShutDown,
    /// A recovery, or another change of the bypass, is under way.
    Recovering,
    /// The device is not started: a recovery failed.
    NotStarted,
    /// The field could not be accessed.
    Access(TransportError),
    /// The field did not take the value that was written.
    Stuck {
        /// What was written.
        wrote: u8,
        /// What it reads as.
        reads: u8,
    },
}

impl fmt::Display for BypassError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFeature => f.write_str("the device does not offer BYPASS_CONFIG"),
            Self::ShutDown => f.write_str("the driver was shut down"),
            Self::Recovering => f.write_str("a recovery is under way"),
            Self::NotStarted => f.write_str("the device is not started, since a recovery failed"),
            Self::Access(error) => write!(f, "cannot access bypass: {error}"),
            Self::Stuck { wrote, reads } => {
                write!(f, "bypass reads {reads:#x} after {wrote:#x} was written")
            }
        }
    }
}

/// A domain could not be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DomainError {
    /// All of [`Options::max_domains`](crate::Options::max_domains) are in use.
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// The device does not offer BYPASS_CONFIG, which identity domains need.
    NoIdentity,
    /// The draft's feature bit was not offered, or not accepted: [`Options::accept_contexts`](crate::Options::accept_contexts).
    #[cfg(feature = "contexts")]
    NoContexts,
    /// Every number in the device's domain range is in use.
    IdsExhausted {
        /// How many the range has.
        ids: u64,
    },
}

impl fmt::Display for DomainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany { limit } => write!(f, "all {limit} domains are in use"),
            Self::NoIdentity => f.write_str("the device does not offer BYPASS_CONFIG for identity domains"),
            #[cfg(feature = "contexts")]
            Self::NoContexts => f.write_str("the draft with contexts was not negotiated"),
            Self::IdsExhausted { ids } => write!(f, "all {ids} domain numbers of the device are in use"),
        }
    }
}

/// An endpoint could not be attached.
///
/// After a failure its bus mastering must stay off, or be turned off: what it can reach is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttachError {
    /// It is the IOMMU itself.
    OwnEndpoint(EndpointId),
    /// It is attached already, or a request for it is under way or of unknown outcome.
    Busy(EndpointId),
    /// There are more endpoints than [`Options::max_endpoints`](crate::Options::max_endpoints).
    TooManyEndpoints {
        /// The limit.
        limit: usize,
    },
    /// The domain has a mapping where the endpoint has a reserved region.
    ReservedInUse {
        /// The endpoint.
        endpoint: EndpointId,
        /// The region.
        region: IovaRange,
    },
    /// The endpoint has more reserved regions than the driver or the domain has room for.
    TooManyReserved {
        /// The endpoint.
        endpoint: EndpointId,
    },
    /// The domain lost its endpoints while it had mappings, and it is not known that the device forgot them, or it
    /// owes an answer about one: they have to be unmapped, or answered, first.
    DeadDomain,
    /// The domain had mappings before it lost its last endpoint, and one of them could not be mapped again. The
    /// endpoint was detached.
    Replay {
        /// The endpoint.
        endpoint: EndpointId,
        /// The mapping.
        range: IovaRange,
        /// What came of its MAP request.
        error: RequestError,
    },
    /// The domain had contexts before it lost its last endpoint, and one of them, or what is mapped in one, could not be
    /// added again. The endpoint was detached.
    #[cfg(feature = "contexts")]
    Contexts {
        /// The endpoint.
        endpoint: EndpointId,
        /// What came of the request.
        error: RequestError,
    },
    /// It was suspended: [`Viommu::resume`](crate::Viommu::resume) attaches it again.
    Suspended(EndpointId),
    /// An endpoint that it cannot be isolated from is in another domain (D-13).
    GroupElsewhere {
        /// The endpoint.
        endpoint: EndpointId,
        /// The other one.
        with: EndpointId,
    },
    /// The device cannot detach the endpoint from where it is, so that it needs a domain of its own, which has
    /// neither endpoints nor mappings yet.
    Parked(EndpointId),
    /// The PROBE or ATTACH request did not succeed.
    Request {
        /// The endpoint.
        endpoint: EndpointId,
        /// What came of it.
        error: RequestError,
    },
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OwnEndpoint(endpoint) => write!(f, "endpoint {endpoint} is the IOMMU itself"),
            Self::Busy(endpoint) => write!(f, "endpoint {endpoint} is attached or being attached"),
            Self::TooManyEndpoints { limit } => write!(f, "more than {limit} endpoints"),
            Self::ReservedInUse { endpoint, region } => {
                write!(f, "the domain has a mapping in {region}, which is reserved for endpoint {endpoint}")
            }
            Self::TooManyReserved { endpoint } => {
                write!(f, "no room in the domain for the reserved regions of endpoint {endpoint}")
            }
            Self::DeadDomain => f.write_str("the domain lost its endpoints while it had mappings"),
            Self::Replay { endpoint, range, error } => {
                write!(f, "endpoint {endpoint}: mapping {range} again: {error}")
            }
            #[cfg(feature = "contexts")]
            Self::Contexts { endpoint, error } => {
                write!(f, "the domain's contexts cannot be added again for endpoint {endpoint}: {error}")
            }
            Self::Suspended(endpoint) => write!(f, "endpoint {endpoint} is suspended"),
            Self::GroupElsewhere { endpoint, with } => {
                write!(f, "endpoint {endpoint} is of one group with {with}, which is in another domain")
            }
            Self::Parked(endpoint) => {
                write!(f, "the device cannot move endpoint {endpoint}: it needs an empty domain of its own")
            }
            Self::Request { endpoint, error } => write!(f, "endpoint {endpoint}: {error}"),
        }
    }
}

/// Endpoints could not be made a group. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupError {
    /// The driver does not know it: [`Staged::introduce`](crate::Staged::introduce) or
    /// [`Viommu::attach`](crate::Viommu::attach) make it known.
    Unknown(EndpointId),
    /// It is in a domain, or may be, or is suspended.
    Attached(EndpointId),
    /// It is of a group already.
    Grouped(EndpointId),
}

impl fmt::Display for GroupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(endpoint) => write!(f, "endpoint {endpoint} is not known"),
            Self::Attached(endpoint) => write!(f, "endpoint {endpoint} is in a domain already"),
            Self::Grouped(endpoint) => write!(f, "endpoint {endpoint} is of a group already"),
        }
    }
}

impl Error for GroupError {}

/// An endpoint could not be detached. It counts as attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DetachError {
    /// It is not attached, or a request for it is under way.
    NotAttached(EndpointId),
    /// The DETACH request did not succeed.
    Request {
        /// The endpoint.
        endpoint: EndpointId,
        /// What came of it.
        error: RequestError,
    },
}

impl fmt::Display for DetachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAttached(endpoint) => write!(f, "endpoint {endpoint} is not attached"),
            Self::Request { endpoint, error } => write!(f, "endpoint {endpoint}: {error}"),
        }
    }
}

impl Error for RequestError {}
impl Error for StartError {}
impl Error for BypassError {}
impl Error for DomainError {}
impl Error for AttachError {}
impl Error for DetachError {}
