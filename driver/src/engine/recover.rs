//! What a reset of the device does to the records.
//!
//! A reset by itself proves nothing: on several devices domains survive it (I3). A domain's mappings are gone for
//! certain when each of its endpoints was attached, with success, to a number that has none.

use super::mapping::MappingState;
use super::{Attachment, DomainKey, EndpointRecord, Engine, Op};
use crate::error::{AttachError, RequestError};
use crate::id::{DomainId, EndpointId};
use crate::wire::property::ReservedRegion;
use crate::wire::request::Request;
use alloc::sync::Arc;

/// A domain that gets its endpoints again after a reset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Revival {
    /// The number that the device may still know it by.
    pub old: DomainId,
    /// Whether it has another one now. Where there was none left its endpoints have to be detached first.
    pub fresh: bool,
}

impl Engine {
    /// No request is in flight any more: the device forgot the queue, and what it still had was lost.
    pub(crate) fn nothing_in_flight(&mut self) {
        for endpoint in &mut self.endpoints {
            if let Attachment::Unknown { in_flight, .. } = &mut endpoint.attachment {
                *in_flight = false;
            }
        }
        for index in 0..self.domains.len() {
            let Some(domain) = self.domains[index].as_mut() else { continue };
            #[cfg(feature = "contexts")]
            domain.no_contexts_in_flight();
            domain.space.retain_all(|record| {
                if record.state == MappingState::QuarantinedInFlight {
                    record.state = MappingState::Quarantined;
                }
                true
            });
            self.revoke_if_empty(index);
        }
    }

    /// The next domain after the one in place `after` that endpoints may be in, and its place.
    pub(crate) fn next_to_revive(&self, after: Option<u32>) -> Option<(u32, DomainKey)> {
        self.domains.iter().enumerate().find_map(|(index, domain)| {
            let (index, domain) = (index as u32, domain.as_ref()?);
            (Some(index) > after && domain.possible > 0).then_some((index, domain.key))
        })
    }

    /// Gives the domain another number, if there is one. Its endpoints count as anywhere until they are
    /// readmitted.
    pub(crate) fn begin_revival(&mut self, key: DomainKey) -> Option<Revival> {
        self.domain(key)?;
        let room = self.retired_ids.len() < self.retired_ids.capacity();
        let fresh = if room { self.next_id().ok() } else { None };
        let domain = self.domain_mut(key)?;
        let old = domain.id;
        domain.id = fresh.unwrap_or(old);
        domain.set_attached(0);
        domain.reviving = true;
        for endpoint in self.endpoints.iter_mut().filter(|endpoint| endpoint.domain() == Some(key)) {
            let attached = endpoint.attachment == Attachment::Attached(key);
            // Or it was, before a recovery that lost it.
            let lost = endpoint.rejoin == Some(key);
            endpoint.rejoin = (attached || lost).then_some(key);
            endpoint.attachment = Attachment::Unknown { domain: key, in_flight: false };
        }
        Some(Revival { old, fresh: fresh.is_some() })
    }

    /// An endpoint with a number above `after` that is to be readmitted, and whether it was attached for certain
    /// before.
    pub(crate) fn next_to_readmit(
        &self,
        key: DomainKey,
        after: Option<EndpointId>,
    ) -> Option<(EndpointId, bool)> {
        let waits = |record: &&EndpointRecord| {
            let unknown = matches!(record.attachment, Attachment::Unknown { domain, .. } if domain == key);
            Some(record.id) > after && unknown
        };
        self.endpoints.iter().find(waits).map(|record| (record.id, record.rejoin == Some(key)))
    }

    /// An endpoint with a number above `after` that is in no domain.
    pub(crate) fn next_detached(&self, after: Option<EndpointId>) -> Option<EndpointId> {
        let detached =
            |record: &&EndpointRecord| Some(record.id) > after && record.attachment == Attachment::Detached;
        self.endpoints.iter().find(detached).map(|record| record.id)
    }

    /// Replaces what is reserved for an endpoint that is in no domain by what is in `reserved`, to be dropped outside
    /// of the lock.
    pub(crate) fn reintroduce(&mut self, id: EndpointId, reserved: &mut Arc<[ReservedRegion]>) {
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.renew(reserved);
        }
    }

    /// Replaces what is reserved for an endpoint by what is in `reserved`, to be dropped outside of the lock, and
    /// reserves it in its domain.
    pub(crate) fn renew_reserved(
        &mut self,
        id: EndpointId,
        key: DomainKey,
        reserved: &mut Arc<[ReservedRegion]>,
    ) -> Result<(), AttachError> {
        let at = self.endpoints.binary_search_by_key(&id, |record| record.id);
        let Ok(at) = at else { return Ok(()) };
        self.endpoints[at].renew(reserved);
        self.reserve_for(at, key)
    }

    /// The request that puts an endpoint into its domain again.
    pub(crate) fn begin_readmission(&mut self, id: EndpointId, key: DomainKey) -> Option<(Request, Op)> {
        let domain = self.domain(key)?;
        let request = Request::Attach { domain: domain.id, endpoint: id, kind: domain.kind };
        self.endpoint_mut(id)?.attachment = Attachment::Attaching(key);
        Some((request, Op::Readmit { endpoint: id, domain: key }))
    }

    /// Whether an endpoint is attached for certain, so that the domain exists for the device.
    pub(crate) fn has_endpoint(&self, key: DomainKey) -> bool {
        self.domain(key).is_some_and(|domain| domain.attached() > 0)
    }

    /// Whether an endpoint may be in what the device knows by a number that the domain had before.
    pub(super) fn is_stranded(&self, key: DomainKey) -> bool {
        self.domain(key).is_some_and(|domain| {
            #[cfg(feature = "contexts")]
            if domain.has_stranded_contexts() {
                return true;
            }
            domain.space.tally().stranded > 0
        })
    }

    /// Ends a revival. True if every endpoint was readmitted: what the domain had before is gone then, and its live
    /// mappings are to be replayed. Else an endpoint may still reach it by the old number, and nothing of it is
    /// given back, unless a later recovery succeeds, or the domain's last endpoint leaves.
    pub(crate) fn end_revival(&mut self, key: DomainKey, revival: Revival) -> bool {
        let lost = self.next_to_readmit(key, None).is_some();
        let Some(domain) = self.domain_mut(key) else { return false };
        domain.reviving = false;
        #[cfg(feature = "contexts")]
        if lost {
            domain.strand_contexts();
        }
        if let Some(deferred) = &mut domain.deferred {
            deferred.clear();
        }
        let mut unflushed = false;
        domain.space.retain_all(|record| {
            let usual = [MappingState::Live, MappingState::Apart, MappingState::Deferred];
            let there = usual.contains(&record.state) || record.is_stuck();
            if lost && there && record.on_device {
                unflushed |= record.state == MappingState::Deferred;
                record.state = MappingState::Stranded;
            }
            true
        });
        if let Some(deferred) = domain.deferred.as_mut().filter(|_| unflushed) {
            deferred.fail(RequestError::Reset);
        }
        if !lost {
            self.revoke(key.place());
        } else if revival.fresh {
            // There is room: `begin_revival` looked.
            self.retired_ids.push(revival.old.get());
        }
        !lost
    }
}
