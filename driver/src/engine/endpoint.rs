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
    Detaching(DomainKey),
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
    /// Faults that the device reported for it.
    pub faults: u64,
}
