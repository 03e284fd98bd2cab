//! Attaching and detaching endpoints.

use super::domain::DomainRecord;
use super::space::ReserveError;
use super::{Attachment, DomainKey, EndpointRecord, Engine, Op};
use crate::error::{AttachError, DetachError, DomainError};
use crate::id::EndpointId;
use crate::options::DomainKind;
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
        match self.endpoint(id) {
            Some(endpoint) => Ok(endpoint.is_stale),
            None if self.endpoints.len() < self.limits.endpoints => Ok(true),
            None => Err(AttachError::TooManyEndpoints { limit: self.limits.endpoints }),
        }
    }

    /// Adds an endpoint's record, after its PROBE, or renews it where that was due. The list is lent, and the old one
    /// comes back in it, so that none is freed under the lock.
    pub(crate) fn introduce(&mut self, id: EndpointId, reserved: &mut Arc<[ReservedRegion]>) {
        // So that it cannot be attached by anybody (I10).
        if self.own_endpoint == Some(id) {
            return;
        }
        match self.endpoints.binary_search_by_key(&id, |record| record.id) {
            Ok(at) if self.endpoints[at].is_stale => {
                let endpoint = &mut self.endpoints[at];
                endpoint.is_stale = false;
                endpoint.renew(reserved);
            }
            Err(at) if self.endpoints.len() < self.limits.endpoints => {
                self.endpoints.insert(at, EndpointRecord::new(id, Arc::clone(reserved)));
            }
            _ => {}
        }
    }

    /// Before it is used again an endpoint has to be probed again: it may be another.
    pub(crate) fn mark_stale(&mut self, id: EndpointId) {
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.is_stale = true;
        }
    }

    /// Takes the record of a detached endpoint out, to be dropped outside of the lock.
    pub(crate) fn forget(&mut self, id: EndpointId) -> Option<EndpointRecord> {
        let at = self.endpoints.binary_search_by_key(&id, |record| record.id).ok()?;
        let detached = self.endpoints[at].attachment == Attachment::Detached;
        detached.then(|| self.endpoints.remove(at))
    }

    pub(crate) fn begin_attach(&mut self, id: EndpointId, key: DomainKey) -> Result<AttachPlan, AttachError> {
        let at = self.endpoints.binary_search_by_key(&id, |record| record.id);
        let at = at.map_err(|_| AttachError::TooManyEndpoints { limit: self.limits.endpoints })?;
        if self.endpoints[at].suspended.is_some() {
            return Err(AttachError::Suspended(id));
        }
        if let Some(with) = self.group_elsewhere(at, key) {
            return Err(AttachError::GroupElsewhere { endpoint: id, with });
        }
        let parked = match self.endpoints[at].attachment {
            Attachment::Attached(current) if current == key => return Ok(AttachPlan::Nothing),
            Attachment::Detached => None,
            // Nobody holds that domain, which is empty: the endpoint is there because the device could not
            // detach it.
            Attachment::Attached(current) if self.domain(current).is_some_and(DomainRecord::is_deserted) => {
                Some(current)
            }
            _ => return Err(AttachError::Busy(id)),
        };
        let domain = self.domain(key).ok_or(AttachError::DeadDomain)?;
        // Mappings that the device may still have, or get, or have lost, although no endpoint is known to be there.
        if domain.attached() == 0 && domain.is_in_doubt() {
            return Err(AttachError::DeadDomain);
        }
        self.reserve_for(at, key)?;
        if let Some(parked) = parked {
            return self.adopt_parked(id, parked, key);
        }
        let domain = self.domain_mut(key).ok_or(AttachError::DeadDomain)?;
        domain.possible += 1;
        let request = Request::Attach { domain: domain.id, endpoint: id, kind: domain.kind };
        self.endpoints[at].attachment = Attachment::Attaching(key);
        Ok(AttachPlan::Send(request, Op::Attach { endpoint: id, domain: key }))
    }

    /// Keeps the domain's addresses out of what is reserved for the endpoint in place `at`.
    pub(super) fn reserve_for(&mut self, at: usize, key: DomainKey) -> Result<(), AttachError> {
        let granule = self.geometry.granule;
        // Split borrows: the endpoint's regions are read while the domain's allocator changes.
        let Self { endpoints, domains, .. } = self;
        let domain = domains.get_mut(key.place()).and_then(Option::as_deref_mut);
        let domain = domain.filter(|domain| domain.key == key);
        let domain = domain.ok_or(AttachError::DeadDomain)?;
        if endpoints[at].reserved_in == Some(key) {
            return Ok(());
        }
        let endpoint = endpoints[at].id;
        for region in endpoints[at].reserved.iter() {
            let region = region.range.rounded_out(granule);
            #[cfg(feature = "contexts")]
            if domain.context_mapping_in(region).is_some() {
                return Err(AttachError::ReservedInUse { endpoint, region });
            }
            domain.space.reserve(region).map_err(|error| match error {
                ReserveError::InUse => AttachError::ReservedInUse { endpoint, region },
                ReserveError::ListFull => AttachError::TooManyReserved { endpoint },
            })?;
        }
        endpoints[at].reserved_in = Some(key);
        Ok(())
    }

    /// Lets an empty domain take the place, and the number, of the one that the endpoint cannot leave.
    fn adopt_parked(
        &mut self,
        id: EndpointId,
        parked: DomainKey,
        key: DomainKey,
    ) -> Result<AttachPlan, AttachError> {
        let translated = DomainKind::Translated;
        // With mappings of its own it would seem to have them on the device, where the number is another's.
        let fits =
            |domain: &DomainRecord| domain.possible == 0 && domain.kind == translated && domain.is_empty();
        let empty = self.domain(key).is_some_and(fits);
        // What it is in has to be empty too: an identity domain never is.
        let alone =
            self.domain(parked).is_some_and(|domain| domain.possible == 1 && domain.kind == translated);
        if !(empty && alone) {
            return Err(AttachError::Parked(id));
        }
        let number = |engine: &Self, key| engine.domain(key).map(|domain| domain.id);
        if let (Some(theirs), Some(ours)) = (number(self, parked), number(self, key)) {
            if let Some(domain) = self.domain_mut(parked) {
                (domain.id, domain.possible) = (ours, 0);
                domain.set_attached(0);
            }
            if let Some(domain) = self.domain_mut(key) {
                (domain.id, domain.possible) = (theirs, 1);
                domain.set_attached(1);
            }
        }
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.attachment = Attachment::Attached(key);
        }
        Ok(AttachPlan::Nothing)
    }

    pub(crate) fn begin_detach(&mut self, id: EndpointId) -> Result<(Request, Op), DetachError> {
        let not_attached = DetachError::NotAttached(id);
        let attachment = self.endpoint(id).ok_or(not_attached)?.attachment;
        let (key, was_attached) = match attachment {
            Attachment::Attached(key) => (key, true),
            Attachment::Unknown { domain, in_flight: false } => (domain, false),
            _ => return Err(not_attached),
        };
        let domain = self.domain_mut(key).ok_or(not_attached)?;
        domain.set_attached(domain.attached() - u32::from(was_attached));
        let request = Request::Detach { domain: domain.id, endpoint: id };
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.attachment = Attachment::Detaching { domain: key, was_attached };
            // One that a recovery lost is not to come back any more; one that is attached leaves to be renumbered.
            endpoint.rejoin = endpoint.rejoin.filter(|_| was_attached);
        }
        Ok((request, Op::Detach { endpoint: id, domain: key }))
    }

    /// An endpoint that can be detached, with a number above `after`.
    pub(crate) fn next_attached(&self, after: Option<EndpointId>) -> Option<EndpointId> {
        let attached = |record: &&EndpointRecord| {
            let state = record.attachment;
            Some(record.id) > after
                && matches!(state, Attachment::Attached(_) | Attachment::Unknown { in_flight: false, .. })
        };
        self.endpoints.iter().find(attached).map(|record| record.id)
    }

    /// Begins to give a domain another number: its endpoints are to be detached, and to join it again. Refused
    /// where it has mappings, where something is under way, or where it is done already.
    pub(crate) fn begin_renumber(&mut self, key: DomainKey) -> bool {
        let Some(domain) = self.domain_mut(key) else { return false };
        let quiet = domain.is_empty() && domain.attached() == domain.possible;
        if !quiet || domain.is_in_transition() {
            return false;
        }
        domain.set_in_transition(true);
        for endpoint in &mut self.endpoints {
            let attached = endpoint.attachment == Attachment::Attached(key);
            if attached || endpoint.rejoin == Some(key) {
                endpoint.rejoin = attached.then_some(key);
            }
        }
        true
    }

    /// An endpoint of a domain that is getting another number and is still attached.
    pub(crate) fn next_to_leave(&self, key: DomainKey) -> Option<EndpointId> {
        let attached = Attachment::Attached(key);
        let leaves = |record: &&EndpointRecord| record.rejoin == Some(key) && record.attachment == attached;
        self.endpoints.iter().find(leaves).map(|record| record.id)
    }

    /// Gives the domain its other number, once it has no endpoint. The old one stays taken: an earlier life of
    /// the device still has mappings under it.
    pub(crate) fn renumber(&mut self, key: DomainKey) -> Result<(), DomainError> {
        let limit = self.limits.domains;
        let empty = self.domain(key).filter(|domain| domain.is_idle());
        let old = empty.map(|domain| domain.id.get()).ok_or(DomainError::TooMany { limit })?;
        if self.retired_ids.len() == self.retired_ids.capacity() {
            return Err(DomainError::TooMany { limit });
        }
        let id = self.next_id()?;
        self.retired_ids.push(old);
        if let Some(domain) = self.domain_mut(key) {
            domain.id = id;
        }
        Ok(())
    }

    /// An endpoint that has to join the domain again; it is forgotten that it has to.
    pub(crate) fn next_to_rejoin(&mut self, key: DomainKey) -> Option<EndpointId> {
        let endpoint = self.endpoints.iter_mut().find(|record| record.rejoin == Some(key))?;
        endpoint.rejoin = None;
        Some(endpoint.id)
    }

    /// Ends a renumbering or a replay.
    pub(crate) fn end_transition(&mut self, key: DomainKey) {
        if let Some(domain) = self.domain_mut(key) {
            domain.set_in_transition(false);
        }
    }
}
