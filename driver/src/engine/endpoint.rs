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
use crate::fault::FaultWindow;
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
    /// The domain whose addresses these were last taken out of, where they stay.
    pub reserved_in: Option<DomainKey>,
    /// The domain that it joins again when that got another number, or when a recovery succeeds.
    pub rejoin: Option<DomainKey>,
    /// The endpoints that it cannot be isolated from: all that name the same one.
    pub group: Option<EndpointId>,
    /// The device did not know it any more: before it is used again it has to be probed again.
    pub is_stale: bool,
    /// Whether the embedder wants it attached, and not only another one of its group.
    pub wanted: bool,
    /// What the embedder knows it by.
    pub tag: Option<usize>,
    /// Faults that the device reported for it.
    pub faults: u64,
    /// Those of the last while.
    pub recent: FaultWindow,
    /// It faulted too often, and is to be suspended.
    pub suspend_due: bool,
    /// The domain that it comes back to when it is resumed.
    pub suspended: Option<DomainKey>,
}

impl EndpointRecord {
    /// An endpoint that is in no domain.
    pub(crate) fn new(id: EndpointId, reserved: Arc<[ReservedRegion]>) -> Self {
        Self {
            id,
            attachment: Attachment::Detached,
            reserved,
            reserved_in: None,
            rejoin: None,
            group: None,
            is_stale: false,
            wanted: false,
            tag: None,
            faults: 0,
            recent: FaultWindow::default(),
            suspend_due: false,
            suspended: None,
        }
    }

    /// Replaces what is reserved for it by what is in `reserved`, which no domain keeps out of its addresses yet. The old
    /// list comes back, to be dropped outside of the lock.
    pub(crate) fn renew(&mut self, reserved: &mut Arc<[ReservedRegion]>) {
        core::mem::swap(&mut self.reserved, reserved);
        self.reserved_in = None;
    }

    /// The domain that it is in, or may be.
    pub(crate) fn domain(&self) -> Option<DomainKey> {
        match self.attachment {
            Attachment::Detached => None,
            Attachment::Attaching(domain) | Attachment::Attached(domain) => Some(domain),
            Attachment::Detaching { domain, .. } | Attachment::Unknown { domain, .. } => Some(domain),
        }
    }
}
