//! The common way of an endpoint into a domain without mappings, and out of it, in one step each.
//!
//! The same as `attach` and `settle` do, for an endpoint that is known and alone. Wherever anything is unusual nothing is
//! done here, and they take over.

use super::domain::DomainRecord;
use super::{Attachment, DomainKey, EndpointRecord, Engine};
use crate::id::EndpointId;
use crate::wire::request::Request;

/// Where an endpoint's record is, for as long as the records stay as they are: who has it looks whether they did.
#[derive(Clone, Copy)]
pub(crate) struct EndpointPlace(usize);

/// A request that was begun, for which endpoint, and the domain that it is counted for.
type Begun<'a> = (Request, EndpointPlace, &'a mut DomainRecord);

impl DomainRecord {
    /// Whether nothing happens when its first endpoint comes or its last one leaves.
    fn is_quiet(&self) -> bool {
        // What is deferred is mapped.
        self.is_empty() && !self.orphaned && !self.is_in_transition() && !self.reviving
    }
}

impl EndpointRecord {
    /// Whether it is in no group, and nothing is to be done about it.
    fn is_plain(&self) -> bool {
        let settled = self.rejoin.is_none() && self.suspended.is_none() && !self.suspend_due;
        settled && self.group.is_none() && !self.is_stale
    }
}

impl Engine {
    /// The one that was looked for last is likely to be looked for next.
    fn place_of(&mut self, id: EndpointId) -> Option<usize> {
        if self.endpoints.get(self.last_place).is_none_or(|record| record.id != id) {
            self.last_place = self.endpoints.binary_search_by_key(&id, |record| record.id).ok()?;
        }
        Some(self.last_place)
    }

    /// Begins to attach an endpoint that is in no domain. The request for it is then sent in any case.
    pub(crate) fn begin_attach_one(&mut self, id: EndpointId, key: DomainKey) -> Option<Begun<'_>> {
        let at = self.place_of(id)?;
        let endpoint = &self.endpoints[at];
        let ready = endpoint.attachment == Attachment::Detached && endpoint.is_plain();
        if !ready || self.own_endpoint == Some(id) || !self.domain(key)?.is_quiet() {
            return None;
        }
        self.reserve_for(at, key).ok()?;
        self.endpoints[at].attachment = Attachment::Attaching(key);
        let domain = self.domain_mut(key)?;
        domain.possible += 1;
        let request = Request::Attach { domain: domain.id, endpoint: id, kind: domain.kind };
        Some((request, EndpointPlace(at), domain))
    }

    /// The device confirmed an ATTACH that somebody waits for. False where there is more to it.
    pub(crate) fn attached_one(
        &mut self,
        EndpointPlace(at): EndpointPlace,
        id: EndpointId,
        key: DomainKey,
    ) -> bool {
        let Self { endpoints, domains, confirmed, .. } = self;
        let Some(endpoint) = endpoints.get_mut(at) else { return false };
        let Some(domain) = domains.get_mut(key.place()).and_then(Option::as_deref_mut) else { return false };
        let waits = endpoint.id == id && endpoint.attachment == Attachment::Attaching(key);
        if !waits || domain.key != key || !domain.is_quiet() || !endpoint.is_plain() {
            return false;
        }
        (endpoint.attachment, endpoint.wanted) = (Attachment::Attached(key), true);
        domain.set_attached(domain.attached() + 1);
        confirmed.attaches += 1;
        true
    }

    /// Begins to detach an endpoint from the domain that it is in, which is said too. The request for it is then sent in any
    /// case.
    pub(crate) fn begin_detach_one(&mut self, id: EndpointId) -> Option<(Begun<'_>, DomainKey)> {
        let at = self.place_of(id)?;
        let endpoint = &self.endpoints[at];
        let Attachment::Attached(key) = endpoint.attachment else { return None };
        if !endpoint.is_plain() || !self.domain(key)?.is_quiet() {
            return None;
        }
        let endpoint = &mut self.endpoints[at];
        endpoint.attachment = Attachment::Detaching { domain: key, was_attached: true };
        endpoint.wanted = false;
        let domain = self.domain_mut(key)?;
        domain.set_attached(domain.attached() - 1);
        let request = Request::Detach { domain: domain.id, endpoint: id };
        Some(((request, EndpointPlace(at), domain), key))
    }

    /// The device confirmed a DETACH that somebody waits for. False where there is more to it.
    pub(crate) fn detached_one(
        &mut self,
        EndpointPlace(at): EndpointPlace,
        id: EndpointId,
        key: DomainKey,
    ) -> bool {
        let Self { endpoints, domains, confirmed, .. } = self;
        let Some(endpoint) = endpoints.get_mut(at) else { return false };
        let Some(domain) = domains.get_mut(key.place()).and_then(Option::as_deref_mut) else { return false };
        let waits = endpoint.id == id
            && endpoint.attachment == Attachment::Detaching { domain: key, was_attached: true };
        // Where it dies with its last endpoint, it has no mappings to lose.
        if !waits || domain.key != key || !domain.is_quiet() {
            return false;
        }
        endpoint.attachment = Attachment::Detached;
        domain.possible -= 1;
        confirmed.detaches += 1;
        true
    }
}
