//! Records of endpoints.
//!
//! ```text
//!              begin attach            ATTACH ok            begin detach
//!   Detached ---------------> Attaching ---------> Attached ------------> Detaching
//!      ^                          |  unknown                 DETACH failed: back |  unknown
//!      |--- ATTACH failed --------'------> Unknown <----------------------------'
//!      '--- DETACH ok -----------------------------------------------------------
//! ```
//! An endpoint of unknown state counts as attached: what it can reach is not given back.

use super::DomainKey;
use crate::id::EndpointId;
use crate::wire::property::ReservedRegion;
use alloc::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attachment {
    Detached,
    Attaching(DomainKey),
    Attached(DomainKey),
    /// DETACH was sent; a refusal leads back to where it came from.
    Detaching {
        domain: DomainKey,
        was_attached: bool,
    },
    /// An ATTACH or DETACH went unanswered, or was answered in a way that says nothing.
    Unknown {
        domain: DomainKey,
        in_flight: bool,
    },
}

pub(crate) struct EndpointRecord {
    pub id: EndpointId,
    pub attachment: Attachment,
    pub reserved: Arc<[ReservedRegion]>,
    /// The domain that it joins again when that got another number.
    pub rejoin: Option<DomainKey>,
    /// Faults that the device reported for it.
    pub faults: u64,
}

impl EndpointRecord {
    /// The domain that it is in, or may be.
    pub(crate) fn domain(&self) -> Option<DomainKey> {
        match self.attachment {
            Attachment::Detached => None,
            Attachment::Attaching(domain) | Attachment::Attached(domain) => Some(domain),
            Attachment::Detaching { domain, .. } | Attachment::Unknown { domain, .. } => Some(domain),
        }
    }
}
