//! What an answer, or its absence, does to the records.

use super::domain::{Counts, DomainRecord};
use super::mapping::{MappingHandle, MappingState, Record};
use super::{Attachment, DomainKey, Engine, Op};
use crate::addr::IovaRange;
use crate::error::RequestError;
use crate::id::EndpointId;
use crate::queue::{Completion, Outcome};
use crate::wire::request::Status;

impl Engine {
    /// Takes note of a request's outcome. A completion is abandoned when whoever sent it gave up waiting: then
    /// nobody is there to use what it made.
    pub(crate) fn settle(&mut self, completion: &Completion) {
        let Completion { op, outcome, abandoned } = *completion;
        match op {
            Op::None | Op::Probe => {}
            Op::Attach { endpoint, domain } => self.settle_attach(endpoint, domain, outcome, abandoned),
            Op::Detach { endpoint, domain } => self.settle_detach(endpoint, domain, outcome),
            Op::Readmit { endpoint, domain } => self.settle_readmission(endpoint, domain, outcome),
            Op::Map { domain, range, record } => {
                self.settle_map(domain, (range, record), outcome, abandoned);
            }
            Op::Replay { domain, range, record } => self.settle_replay(domain, (range, record), outcome),
            Op::Unmap { domain, range, record } => {
                self.settle_unmap(domain, (range, record), outcome, abandoned);
            }
            #[cfg(feature = "contexts")]
            Op::Context { context, effect } => self.settle_context(context, effect, outcome, abandoned),
        }
    }

    /// Takes note that nobody waits for a request's answer any more, which may still come.
    pub(crate) fn lose(&mut self, op: Op) {
        match op {
            Op::None | Op::Probe => {}
            Op::Attach { endpoint, domain }
            | Op::Detach { endpoint, domain }
            | Op::Readmit { endpoint, domain } => {
                self.mark_unknown(endpoint, domain, true);
            }
            Op::Map { domain, range, .. }
            | Op::Replay { domain, range, .. }
            | Op::Unmap { domain, range, .. } => {
                self.mark(domain, range, MappingState::QuarantinedInFlight);
            }
            #[cfg(feature = "contexts")]
            Op::Context { context, effect } => self.lose_context_op(context, effect),
        }
    }

    /// Whoever sent it went away after its answer came: what he would have unmapped apart is in quarantine. Where the
    /// answer was another, the addresses may be somebody else's by now. What a MAP made its list knows.
    pub(crate) fn disown_op(&mut self, op: Op, error: RequestError) {
        if let (Op::Unmap { domain, range, .. }, RequestError::Refused(Status::Range)) = (op, error) {
            self.disown_apart(domain, range);
        }
    }

    fn settle_attach(&mut self, id: EndpointId, key: DomainKey, outcome: Outcome, abandoned: bool) {
        let deserted = |domain: &DomainRecord| domain.attached() == 0 && domain.is_in_doubt();
        match outcome {
            Ok(()) => {
                self.totals.attaches += 1;
                // Where all others left meanwhile, the domain may have died and be a new one, without its mappings.
                match abandoned && self.domain(key).is_some_and(deserted) {
                    true => self.mark_unknown(id, key, false),
                    false => self.mark_attached(id, key),
                }
            }
            Err(error) if error.outcome_unknown() => self.mark_unknown(id, key, false),
            Err(_) => self.mark_detached(id, key),
        }
    }

    fn settle_readmission(&mut self, id: EndpointId, key: DomainKey, outcome: Outcome) {
        match outcome {
            Ok(()) => self.settle_attach(id, key, outcome, false),
            Err(RequestError::Refused(Status::NoEnt)) => self.mark_detached(id, key),
            Err(_) => self.mark_unknown(id, key, false),
        }
    }

    fn settle_detach(&mut self, id: EndpointId, key: DomainKey, outcome: Outcome) {
        match outcome {
            Ok(()) => {
                self.totals.detaches += 1;
                self.mark_detached(id, key);
            }
            // The device does not know it any more: it was unplugged, and what comes back may be another.
            Err(RequestError::Refused(Status::NoEnt)) => {
                self.mark_detached(id, key);
                self.mark_stale(id);
            }
            Err(error) if error.outcome_unknown() => self.mark_unknown(id, key, false),
            // The device said no: the endpoint is where it was, as far as that was known. Where it was not, the device
            // may say now that it is not in the domain of that number.
            Err(error) => {
                let attachment = self.endpoint(id).map(|endpoint| endpoint.attachment);
                let Some(Attachment::Detaching { was_attached, .. }) = attachment else {
                    return self.mark_unknown(id, key, false);
                };
                let elsewhere = error == RequestError::Refused(Status::Inval);
                match was_attached {
                    true => self.mark_attached(id, key),
                    false if elsewhere && !self.is_stranded(key) => self.mark_detached(id, key),
                    false => self.mark_unknown(id, key, false),
                }
            }
        }
    }

    fn settle_map(
        &mut self,
        key: DomainKey,
        (range, record): (IovaRange, MappingHandle),
        outcome: Outcome,
        abandoned: bool,
    ) {
        match outcome {
            Ok(()) => self.mapped(key, (range, record), |record| record.owned = !abandoned),
            Err(error) if error.outcome_unknown() => {
                self.mark(key, range, MappingState::Quarantined);
            }
            // The device said no: nothing was mapped. Whoever sent it takes the record out, in the order of his list.
            Err(_) if abandoned => self.let_go(key, range, Some(record)),
            Err(_) => self.mark(key, range, MappingState::Returned),
        }
    }

    fn settle_replay(&mut self, key: DomainKey, mapping: (IovaRange, MappingHandle), outcome: Outcome) {
        let (range, record) = mapping;
        match outcome {
            Ok(()) => self.mapped(key, mapping, |_| {}),
            Err(error) if error.outcome_unknown() => {
                self.mark(key, range, MappingState::Quarantined);
            }
            // The device said no: as before the replay.
            Err(_) => self.let_go(key, range, Some(record)),
        }
    }

    /// The device confirmed a MAP. It is in quarantine if nobody counts on it any more.
    fn mapped(
        &mut self,
        key: DomainKey,
        (range, record): (IovaRange, MappingHandle),
        own: impl FnOnce(&mut Record),
    ) {
        let Some(domain) = self.domain_mut(key) else { return };
        domain.counts.mapped(1, range.len_bytes().unwrap_or(0));
        domain.space.change(record, range.start(), |record| {
            own(record);
            record.counted = true;
            record.state = match record.owned {
                true => MappingState::Live,
                false => MappingState::Quarantined,
            };
        });
        // A late answer: the domain may have died since.
        self.revoke_if_empty(key.place());
    }

    fn settle_unmap(
        &mut self,
        key: DomainKey,
        (range, record): (IovaRange, MappingHandle),
        outcome: Outcome,
        abandoned: bool,
    ) {
        let closed = self.bypass_closed;
        let dead = self.domain(key).is_some_and(|domain| closed && domain.possible == 0);
        match outcome {
            Ok(()) => {
                if let Some(domain) = self.domain_mut(key) {
                    domain.counts.unmapped(1, 0);
                }
                self.let_go(key, range, Some(record));
            }
            // The domain died meanwhile, and its mappings with it.
            Err(_) if dead => self.let_go(key, range, Some(record)),
            Err(RequestError::Refused(Status::Range)) if !abandoned && !self.is_one(key, range) => {
                self.mark(key, range, MappingState::Apart);
            }
            // Whatever the reason: it counts as mapped.
            Err(_) => self.mark(key, range, MappingState::Quarantined),
        }
    }

    fn is_one(&self, key: DomainKey, range: IovaRange) -> bool {
        let record = self.domain(key).and_then(|domain| domain.space.get(range.start()));
        record.is_some_and(|record| record.range == range)
    }

    /// The device cannot reach the memory of these records any more. Those that somebody counts on stay live, to be
    /// unmapped without a request, or mapped again; of the others those that hold no memory go, and the rest waits
    /// for it to be taken. `first` may name the first of them.
    pub(super) fn let_go(&mut self, key: DomainKey, range: IovaRange, first: Option<MappingHandle>) {
        let Some(domain) = self.domain_mut(key) else { return };
        let orphaned = domain.orphaned;
        let counts = &mut domain.counts;
        let mut released = 0;
        domain.space.retain_in(range, first, |record| {
            uncount(record, counts);
            if record.owned && !orphaned {
                (record.state, record.on_device) = (MappingState::Live, false);
                return true;
            }
            if record.holds_memory() {
                record.state = MappingState::Released;
                released += 1;
                return true;
            }
            false
        });
        self.released += released;
    }

    fn mark(&mut self, key: DomainKey, range: IovaRange, state: MappingState) {
        if let Some(domain) = self.domain_mut(key) {
            domain.space.retain_in(range, None, |record| {
                record.state = state;
                true
            });
        }
    }

    fn mark_unknown(&mut self, id: EndpointId, key: DomainKey, in_flight: bool) {
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.attachment = Attachment::Unknown { domain: key, in_flight };
        }
    }

    fn mark_attached(&mut self, id: EndpointId, key: DomainKey) {
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.attachment = Attachment::Attached(key);
            endpoint.rejoin = None;
        }
        if let Some(domain) = self.domain_mut(key) {
            domain.set_attached(domain.attached() + 1);
        }
    }

    fn mark_detached(&mut self, id: EndpointId, key: DomainKey) {
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.attachment = Attachment::Detached;
        }
        if let Some(domain) = self.domain_mut(key) {
            domain.possible -= 1;
        }
        self.revoke_if_empty(key.place());
    }

    /// A domain without endpoints is dead, and its mappings with it, if nothing bypasses (I1). Live mappings
    /// stay recorded until their owners unmap them, or an endpoint comes; what was in quarantine is free.
    pub(super) fn revoke_if_empty(&mut self, index: usize) {
        let closed = self.bypass_closed;
        let dead = self.domains[index].as_ref().is_some_and(|domain| closed && domain.possible == 0);
        if dead {
            self.revoke(index);
        }
    }

    /// The device has none of the domain's mappings any more. Those that somebody counts on stay recorded until
    /// their owners unmap them, or they are replayed; what else was in quarantine, or deferred, is free.
    pub(super) fn revoke(&mut self, index: usize) {
        let Some(domain) = self.domains[index].as_mut() else { return };
        #[cfg(feature = "contexts")]
        domain.lose_contexts();
        let deserted = domain.orphaned && domain.possible == 0;
        let counts = &mut domain.counts;
        if let Some(deferred) = &mut domain.deferred {
            deferred.clear();
        }
        let mut released = 0;
        domain.space.retain_all(|record| {
            uncount(record, counts);
            let settled = MappingState::Quarantined;
            let leaving = [settled, MappingState::Stranded, MappingState::Deferred];
            let quarantined = leaving.contains(&record.state);
            if quarantined && record.owned {
                record.state = MappingState::Live;
            }
            record.on_device &= !matches!(record.state, MappingState::Live | MappingState::Apart);
            // Nobody is left who could unmap what is live in a domain without a handle, or use it.
            let unowned = deserted && record.state == MappingState::Live;
            if !(quarantined && !record.owned || unowned) {
                return true;
            }
            if record.holds_memory() {
                record.state = MappingState::Released;
                released += 1;
                return true;
            }
            false
        });
        self.released += released;
    }
}

fn uncount(record: &mut Record, counts: &mut Counts) {
    if core::mem::take(&mut record.counted) {
        counts.unmapped(0, record.range.len_bytes().unwrap_or(0));
    }
}
