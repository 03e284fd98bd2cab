//! Attaching and detaching endpoints.

use super::{Attachment, DomainKey, EndpointRecord, Engine, Op};
use crate::error::{AttachError, DetachError};
use crate::id::EndpointId;
use crate::wire::property::ReservedRegion;
use crate::wire::request::Request;
use alloc::sync::Arc;

/// What an attachment takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttachPlan {
    /// Nothing: the endpoint is in this domain already (I7).
    Nothing,
    Send(Request, Op),
}

impl Engine {
    pub(crate) fn endpoint(&self, id: EndpointId) -> Option<&EndpointRecord> {
        let at = self.endpoints.binary_search_by_key(&id, |record| record.id).ok()?;
        Some(&self.endpoints[at])
    }

    pub(super) fn endpoint_mut(&mut self, id: EndpointId) -> Option<&mut EndpointRecord> {
        let at = self.endpoints.binary_search_by_key(&id, |record| record.id).ok()?;
        Some(&mut self.endpoints[at])
    }

    /// Whether the endpoint may be attached at all, and still has to be probed first (D-07, I10).
    pub(crate) fn needs_introduction(&self, id: EndpointId) -> Result<bool, AttachError> {
        if self.own_endpoint == Some(id) {
            return Err(AttachError::OwnEndpoint(id));
        }
        let known = self.endpoint(id).is_some();
        if !known && self.endpoints.len() >= self.limits.endpoints {
            return Err(AttachError::TooManyEndpoints { limit: self.limits.endpoints });
        }
        Ok(!known)
    }

    /// Adds an endpoint's record, after its PROBE. Does nothing where there is one already. The list is lent, so
    /// that it is not freed under the lock.
    pub(crate) fn introduce(&mut self, id: EndpointId, reserved: &Arc<[ReservedRegion]>) {
        let at = self.endpoints.binary_search_by_key(&id, |record| record.id);
        if let Err(at) = at
            && self.endpoints.len() < self.limits.endpoints
        {
            let attachment = Attachment::Detached;
            let reserved = Arc::clone(reserved);
            self.endpoints.insert(at, EndpointRecord { id, attachment, reserved, faults: 0 });
        }
    }

    /// Counts a fault for its endpoint.
    pub(crate) fn count_fault(&mut self, id: EndpointId) {
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.faults = endpoint.faults.saturating_add(1);
        }
    }

    pub(crate) fn begin_attach(&mut self, id: EndpointId, key: DomainKey) -> Result<AttachPlan, AttachError> {
        let at = self.endpoints.binary_search_by_key(&id, |record| record.id);
        let at = at.map_err(|_| AttachError::TooManyEndpoints { limit: self.limits.endpoints })?;
        match self.endpoints[at].attachment {
            Attachment::Attached(current) if current == key => return Ok(AttachPlan::Nothing),
            Attachment::Detached => {}
            _ => return Err(AttachError::Busy(id)),
        }
        let granule = self.geometry.granule;
        // Split borrows: the endpoint's regions are read while the domain's allocator changes.
        let Self { endpoints, domains, .. } = self;
        let domain = domains.get_mut(usize::from(key.index)).and_then(Option::as_mut);
        let domain = domain.filter(|domain| domain.generation == key.generation && !domain.revoked);
        let domain = domain.ok_or(AttachError::DeadDomain)?;
        let endpoint = &mut endpoints[at];
        let regions = || endpoint.reserved.iter().map(|region| region.range.rounded_out(granule));
        if let Some(region) = regions().find(|region| domain.mappings.overlaps(*region)) {
            return Err(AttachError::ReservedInUse { endpoint: id, region });
        }
        for region in regions() {
            domain.iova.reserve(region).map_err(|_| AttachError::TooManyReserved { endpoint: id })?;
        }
        endpoint.attachment = Attachment::Attaching(key);
        domain.possible += 1;
        let request = Request::Attach { domain: domain.id, endpoint: id };
        Ok(AttachPlan::Send(request, Op::Attach { endpoint: id, domain: key }))
    }

    pub(crate) fn begin_detach(&mut self, id: EndpointId) -> Result<(Request, Op), DetachError> {
        let not_attached = DetachError::NotAttached(id);
        let key = match self.endpoint(id).ok_or(not_attached)?.attachment {
            Attachment::Attached(key) | Attachment::Unknown { domain: key, in_flight: false } => key,
            _ => return Err(not_attached),
        };
        let domain = self.domain(key).ok_or(not_attached)?.id;
        let was_attached =
            self.endpoint(id).is_some_and(|endpoint| matches!(endpoint.attachment, Attachment::Attached(_)));
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.attachment = Attachment::Detaching(key);
        }
        if let Some(domain) = self.domain_mut(key).filter(|_| was_attached) {
            domain.attached -= 1;
        }
        Ok((Request::Detach { domain, endpoint: id }, Op::Detach { endpoint: id, domain: key }))
    }

    /// An endpoint that is attached to this domain.
    pub(crate) fn attached_to(&self, key: DomainKey) -> Option<EndpointId> {
        let attached = |record: &&EndpointRecord| record.attachment == Attachment::Attached(key);
        self.endpoints.iter().find(attached).map(|record| record.id)
    }

    pub(super) fn attach_failed(&mut self, id: EndpointId, key: DomainKey) {
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.attachment = Attachment::Detached;
        }
        if let Some(domain) = self.domain_mut(key) {
            domain.possible -= 1;
        }
        self.revoke_if_empty(usize::from(key.index));
    }

    pub(super) fn mark_attached(&mut self, id: EndpointId, key: DomainKey) {
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.attachment = Attachment::Attached(key);
        }
        if let Some(domain) = self.domain_mut(key) {
            domain.attached += 1;
        }
    }
}
