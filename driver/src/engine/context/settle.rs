//! What an answer about a context, or its absence, does to the records; and what a device that lost contexts is told again.

use super::{ContextEffect, ContextKey, ContextRecord, ContextState, ToldAgain};
use crate::addr::{Iova, IovaRange};
use crate::contexts::ContextRequest;
use crate::engine::mapping::MappingState;
use crate::engine::{DomainKey, Engine, Op};
use crate::error::RequestError;
use crate::queue::Outcome;
use crate::wire::request::Status;

impl Engine {
    /// Takes note of what became of a request about a context. An abandoned one was given up on before.
    pub(in crate::engine) fn settle_context(
        &mut self,
        key: ContextKey,
        effect: ContextEffect,
        outcome: Outcome,
        abandoned: bool,
    ) {
        let domain = self.domain(key.domain);
        let certain = domain.is_some_and(|domain| domain.possible == domain.attached());
        let alive = domain.is_some_and(|domain| domain.attached() > 0);
        let Some(record) = self.context_mut(key) else { return };
        record.late = record.late.saturating_sub(abandoned.into());
        let known = !outcome.is_err_and(|error| error.outcome_unknown());
        match effect {
            ContextEffect::Add if outcome.is_err() && known => record.state = ContextState::Gone,
            ContextEffect::AddAgain if outcome.is_err() && known && record.state == ContextState::There => {
                record.lose();
            }
            // Also where the domain died meanwhile, and has an endpoint again.
            ContextEffect::Add | ContextEffect::AddAgain
                if alive && record.state != ContextState::Stranded =>
            {
                record.state = ContextState::There;
            }
            ContextEffect::Add | ContextEffect::AddAgain => {}
            ContextEffect::Remove => {
                // It ended with the domain's last endpoint, or with a reset. Unless an endpoint did not come back from that,
                // which may still be in the domain of before.
                let absent = certain && outcome == Err(RequestError::Refused(Status::NoEnt));
                if outcome.is_ok() || absent {
                    record.state = ContextState::Gone;
                }
            }
            ContextEffect::Map(range) => record.settle_map(range, outcome, known),
            ContextEffect::Unmap(range) => record.settle_unmap(range, outcome),
        }
    }

    /// Takes note that nobody waits for the answer any more, which may still come.
    pub(in crate::engine) fn lose_context_op(&mut self, key: ContextKey, effect: ContextEffect) {
        let Some(record) = self.context_mut(key) else { return };
        record.late += 1;
        if let (ContextEffect::Map(range) | ContextEffect::Unmap(range), Some(space)) =
            (effect, &mut record.space)
        {
            space.retain_in(range, None, |record| {
                if is_under_way(record.state) {
                    record.state = MappingState::QuarantinedInFlight;
                }
                true
            });
        }
    }

    /// Whether a domain that has an endpoint again has contexts that the device lost.
    pub(in crate::engine) fn has_contexts_to_tell(&self, key: DomainKey) -> bool {
        self.domain(key).is_some_and(|domain| domain.contexts().any(ContextRecord::needs_telling))
    }

    /// The next thing to tell of the contexts that the device lost: a context before what is mapped in it.
    pub(crate) fn next_to_tell(&mut self, key: DomainKey) -> Option<ToldAgain> {
        let context = self.context_where(key, ContextRecord::needs_telling)?;
        let record = self.context_mut(context)?;
        if record.state == ContextState::Lost {
            return Some(ToldAgain::Context(context));
        }
        let (pasid, space) = (record.pasid?, record.space.as_mut()?);
        let lost = space.iter_from(Iova::new(0)).find(|record| record.needs_replay())?;
        let (range, phys, prot) = (lost.range, lost.phys, lost.prot());
        let handle = space.handle(range.start())?;
        space.change(handle, range.start(), |record| {
            (record.state, record.on_device) = (MappingState::Replaying, true);
        });
        let op = Op::Context { context, effect: ContextEffect::Map(range) };
        Some(ToldAgain::Mapping(ContextRequest::Map { pasid, range, phys, prot }, op))
    }

    /// Begins to add a context again.
    pub(crate) fn begin_context_again(&mut self, key: ContextKey) -> Option<(ContextRequest, Op)> {
        let endpoint = self.member(key.domain)?;
        let record = self.context_mut(key).filter(|record| record.state == ContextState::Lost)?;
        record.state = ContextState::There;
        let request = ContextRequest::AttachTable { endpoint, pasid: record.pasid, table: record.table };
        Some((request, Op::Context { context: key, effect: ContextEffect::AddAgain }))
    }
}

/// Whether the device owes an answer about a mapping.
fn is_under_way(state: MappingState) -> bool {
    use MappingState::{Mapping, QuarantinedInFlight, Replaying, Unmapping};
    matches!(state, Mapping | Replaying | Unmapping | QuarantinedInFlight)
}

impl ContextRecord {
    fn settle_map(&mut self, range: IovaRange, outcome: Outcome, known: bool) {
        let (owned, absent) = (self.owned, self.is_absent());
        let Some(space) = &mut self.space else { return };
        space.retain_in(range, None, |record| {
            if !is_under_way(record.state) {
                return true;
            }
            // One that is told again is somebody's, whatever the device says.
            record.owned = owned && (record.owned || outcome.is_ok());
            record.on_device = !absent && (outcome.is_ok() || !known);
            record.state = match record.owned && (outcome.is_ok() || known) {
                true => MappingState::Live,
                false => MappingState::Quarantined,
            };
            record.owned || record.on_device
        });
    }

    fn settle_unmap(&mut self, range: IovaRange, outcome: Outcome) {
        let absent = self.is_absent();
        let Some(space) = &mut self.space else { return };
        space.retain_in(range, None, |record| {
            if !is_under_way(record.state) {
                return true;
            }
            record.state = MappingState::Quarantined;
            outcome.is_err() && !absent
        });
    }
}
