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
        // What is deferred is mapped. All by one branch.
        self.is_empty() & !(self.orphaned | self.is_in_transition() | self.reviving)
    }
}

impl EndpointRecord {
    /// Whether it is in no group, and nothing is to be done about it.
    fn is_plain(&self) -> bool {
        let busy = self.rejoin.is_some() | self.suspended.is_some() | self.suspend_due;
        // By one branch.
        !(busy | self.group.is_some() | self.is_stale)
    }
}

impl Engine {
    /// The one that was looked for last is likely to be looked for next.
    #[inline(always)]
    fn place_of(&mut self, id: EndpointId) -> Option<usize> {
        match self.endpoints.get(self.last_place) {
            Some(record) if record.id == id => Some(self.last_place),
            _ => self.search_place(id),
        }
    }

    #[cold]
    fn search_place(&mut self, id: EndpointId) -> Option<usize> {
        self.last_place = self.endpoints.binary_search_by_key(&id, |record| record.id).ok()?;
        Some(self.last_place)
    }

    /// Begins to attach an endpoint that is in no domain. The request for it is then sent in any case.
    pub(crate) fn begin_attach_one(&mut self, id: EndpointId, key: DomainKey) -> Option<Begun<'_>> {
        let at = self.place_of(id)?;
        // What is reserved for it was taken out of the domain's addresses when it came for the first time.
        if self.endpoints.get(at)?.reserved_in != Some(key) {
            self.reserve_first(at, key)?;
        }
        let Self { endpoints, domains, .. } = self;
        let (endpoint, domain) = (endpoints.get_mut(at)?, domains.get_mut(key.place())?.as_deref_mut()?);
        let ready = endpoint.attachment == Attachment::Detached && endpoint.is_plain();
        if !ready || domain.key != key || !domain.is_quiet() {
            return None;
        }
        endpoint.attachment = Attachment::Attaching(key);
        domain.possible += 1;
        let request = Request::Attach { domain: domain.id, endpoint: id, kind: domain.kind };
        Some((request, EndpointPlace(at), domain))
    }

    #[cold]
    fn reserve_first(&mut self, at: usize, key: DomainKey) -> Option<()> {
        let endpoint = &self.endpoints[at];
        let ready = endpoint.attachment == Attachment::Detached && endpoint.is_plain();
        if ready && self.domain(key)?.is_quiet() { self.reserve_for(at, key).ok() } else { None }
    }

    /// The device confirmed an ATTACH that somebody waits for. False where there is more to it.
    pub(crate) fn attached_one(
        &mut self,
        EndpointPlace(at): EndpointPlace,
        id: EndpointId,
        key: DomainKey,
    ) -> bool {
        let Self { endpoints, domains, totals, .. } = self;
        let Some(endpoint) = endpoints.get_mut(at) else { return false };
        let Some(domain) = domains.get_mut(key.place()).and_then(Option::as_deref_mut) else { return false };
        let waits = endpoint.id == id && endpoint.attachment == Attachment::Attaching(key);
        if !waits || domain.key != key || !domain.is_quiet() || !endpoint.is_plain() {
            return false;
        }
        (endpoint.attachment, endpoint.wanted) = (Attachment::Attached(key), true);
        domain.join();
        totals.attaches += 1;
        true
    }

    /// Begins to detach an endpoint from the domain that it is in, which is said too. The request for it is then sent in any
    /// case.
    pub(crate) fn begin_detach_one(&mut self, id: EndpointId) -> Option<(Begun<'_>, DomainKey)> {
        let at = self.place_of(id)?;
        let Self { endpoints, domains, .. } = self;
        let endpoint = endpoints.get_mut(at)?;
        let Attachment::Attached(key) = endpoint.attachment else { return None };
        let domain = domains.get_mut(key.place())?.as_deref_mut()?;
        if !endpoint.is_plain() || domain.key != key || !domain.is_quiet() {
            return None;
        }
        endpoint.attachment = Attachment::Detaching { domain: key, was_attached: true };
        endpoint.wanted = false;
        domain.leave();
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
        let Self { endpoints, domains, totals, .. } = self;
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
        totals.detaches += 1;
        true
    }
}
