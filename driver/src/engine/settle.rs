//! What an answer, or its absence, does to the records.

use super::mapping::MappingState;
use super::{Attachment, DomainKey, Engine, Op};
use crate::addr::IovaRange;
use crate::id::EndpointId;
use crate::queue::{Completion, Outcome};

impl Engine {
    /// Takes note of a request's outcome. `abandoned` when whoever sent it gave up waiting: then nobody is there
    /// to use what it made.
    pub(crate) fn settle(&mut self, completion: &Completion) {
        let Completion { op, outcome, abandoned } = *completion;
        match op {
            Op::None | Op::Probe => {}
            Op::SweepAttach => self.confirmed.attaches += u64::from(outcome.is_ok()),
            Op::SweepDetach => self.confirmed.detaches += u64::from(outcome.is_ok()),
            Op::Attach { endpoint, domain } => self.settle_attach(endpoint, domain, outcome),
            Op::Detach { endpoint, domain } => self.settle_detach(endpoint, domain, outcome),
            Op::Map { domain, range } => self.settle_map(domain, range, outcome, abandoned),
            Op::Unmap { domain, range } => self.settle_unmap(domain, range, outcome),
        }
    }

    /// Takes note that nobody waits for a request's answer any more, which may still come.
    pub(crate) fn lose(&mut self, op: Op) {
        match op {
            Op::None | Op::Probe | Op::SweepAttach | Op::SweepDetach => {}
            Op::Attach { endpoint, domain } | Op::Detach { endpoint, domain } => {
                self.mark_unknown(endpoint, domain, true);
            }
            Op::Map { domain, range } | Op::Unmap { domain, range } => {
                self.mark_quarantined(domain, range, true);
            }
        }
    }

    fn settle_attach(&mut self, id: EndpointId, key: DomainKey, outcome: Outcome) {
        match outcome {
            Ok(()) => {
                self.confirmed.attaches += 1;
                self.mark_attached(id, key);
            }
            Err(error) if error.outcome_unknown() => self.mark_unknown(id, key, false),
            Err(_) => self.attach_failed(id, key),
        }
    }

    fn settle_detach(&mut self, id: EndpointId, key: DomainKey, outcome: Outcome) {
        match outcome {
            Ok(()) => {
                self.confirmed.detaches += 1;
                if let Some(endpoint) = self.endpoint_mut(id) {
                    endpoint.attachment = Attachment::Detached;
                }
                if let Some(domain) = self.domain_mut(key) {
                    domain.possible -= 1;
                }
                self.revoke_if_empty(usize::from(key.index));
            }
            Err(error) if error.outcome_unknown() => self.mark_unknown(id, key, false),
            Err(_) => self.mark_attached(id, key),
        }
    }

    fn settle_map(&mut self, key: DomainKey, range: IovaRange, outcome: Outcome, abandoned: bool) {
        match outcome {
            Ok(()) => {
                self.confirmed.maps += 1;
                let Some(domain) = self.domain_mut(key) else { return };
                domain.stats.maps += 1;
                domain.stats.mapped_bytes += range.len_bytes().unwrap_or(0);
                domain.stats.peak_bytes = domain.stats.peak_bytes.max(domain.stats.mapped_bytes);
                if let Some(record) = domain.mappings.get_mut(range.start()) {
                    record.state = match abandoned {
                        false => MappingState::Live,
                        true => MappingState::Quarantined { in_flight: false },
                    };
                }
            }
            Err(error) if error.outcome_unknown() => self.mark_quarantined(key, range, false),
            // The device said no: nothing was mapped.
            Err(_) => self.let_go(key, range),
        }
    }

    fn settle_unmap(&mut self, key: DomainKey, range: IovaRange, outcome: Outcome) {
        if outcome.is_err() {
            // Whatever the reason: it counts as mapped.
            return self.mark_quarantined(key, range, false);
        }
        self.confirmed.unmaps += 1;
        if let Some(domain) = self.domain_mut(key) {
            domain.stats.unmaps += 1;
            let len = range.len_bytes().unwrap_or(0);
            domain.stats.mapped_bytes = domain.stats.mapped_bytes.saturating_sub(len);
        }
        self.let_go(key, range);
    }

    /// The device cannot reach the memory of these records any more. Those that hold none go; the others wait
    /// for someone to take it.
    pub(super) fn let_go(&mut self, key: DomainKey, range: IovaRange) {
        let mut released = 0;
        if let Some(domain) = self.domain_mut(key) {
            let iova = &mut domain.iova;
            domain.mappings.retain_in(range, |record| {
                if record.held.is_some() {
                    released += usize::from(record.state != MappingState::Released);
                    record.state = MappingState::Released;
                    return true;
                }
                iova.release(record.range);
                false
            });
            domain.revoked &= !domain.mappings.is_empty();
        }
        self.released += released;
    }

    fn mark_quarantined(&mut self, key: DomainKey, range: IovaRange, in_flight: bool) {
        if let Some(domain) = self.domain_mut(key) {
            domain.mappings.retain_in(range, |record| {
                record.state = MappingState::Quarantined { in_flight };
                true
            });
        }
    }

    fn mark_unknown(&mut self, id: EndpointId, key: DomainKey, in_flight: bool) {
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.attachment = Attachment::Unknown { domain: key, in_flight };
        }
    }

    /// A domain without endpoints is dead, and its mappings with it, if nothing bypasses (I1). Live mappings
    /// stay recorded until their owners unmap them; what was in quarantine is free.
    pub(super) fn revoke_if_empty(&mut self, index: usize) {
        let closed = self.bypass_closed;
        let Some(domain) = self.domains[index].as_mut() else { return };
        if !closed || domain.possible > 0 || domain.mappings.is_empty() {
            return;
        }
        domain.stats.mapped_bytes = 0;
        let iova = &mut domain.iova;
        let mut released = 0;
        domain.mappings.retain_all(|record| {
            if record.state != (MappingState::Quarantined { in_flight: false }) {
                return true;
            }
            if record.held.is_some() {
                record.state = MappingState::Released;
                released += 1;
                return true;
            }
            iova.release(record.range);
            false
        });
        domain.revoked = !domain.mappings.is_empty();
        self.released += released;
    }
}
