//! What most calls come to: one request, answered with success by the time that its doorbell was rung.
//!
//! Each function here is the first step of an operation, without a future: it sends the request and looks at the ring
//! once. Wherever anything is unusual it has done nothing, or what it sent is still to be waited for, and the future takes
//! over, which knows the rare states and the words for what is wrong.

use super::{InFlight, Shared, State};
use crate::addr::IovaRange;
use crate::dma::HeldMemory;
use crate::engine::{Deferral, DomainKey, ListId, MappingHandle, Op, Placement, Purpose, Unheld};
#[cfg(feature = "bench")]
use crate::error::RequestError;
use crate::exchange::Run;
use crate::lock::Guard;
use crate::platform::Platform;
use crate::wire::request::Request;

/// A mapping, and where its record is.
#[derive(Clone, Copy)]
pub(crate) struct Mapped {
    pub range: IovaRange,
    pub record: MappingHandle,
}

impl Mapped {
    /// A mapping whose record has to be looked for.
    pub(crate) fn of(range: IovaRange) -> Self {
        Self { range, record: MappingHandle::UNKNOWN }
    }
}

/// What became of an operation's first step.
pub(crate) enum First<'a, P: Platform, T, S> {
    Done(T),
    /// The request was sent, and is not answered yet, or not with success.
    Sent(S, InFlight<'a, P>),
    /// Nothing was done.
    No,
}

/// What became of the first step of mapping one run.
pub(crate) type FirstMap<'a, P> = First<'a, P, Mapped, SentMap>;
/// The same of unmapping.
pub(crate) type FirstUnmap<'a, P> = First<'a, P, (), ()>;

/// A MAP that is not answered yet.
pub(crate) struct SentMap {
    pub range: IovaRange,
    pub name: ListId,
    /// Whether its record holds memory.
    pub lent: bool,
}

impl<P: Platform> Shared<P> {
    /// Rings for a request that was sent as `slot`, and takes its success, if that is there: then with the lock, for
    /// whatever that does to the records.
    #[inline(always)]
    pub(super) fn answer(&self, slot: u16) -> Option<Guard<'_, P::Lock, State>> {
        self.ring();
        let mut state = self.state.usual()?;
        if state.requests.take_one(slot) { Some(state) } else { None }
    }

    #[cold]
    pub(super) fn wait_for(&self, slot: u16) -> InFlight<'_, P> {
        let batch = { self.state.lock().requests.batch_of(slot) };
        InFlight::new(self, batch)
    }

    /// Sends a request that no record knows, and waits for its answer: what everything else takes below the records.
    #[cfg(feature = "bench")]
    pub(crate) fn exchange_raw(&self, request: &Request) -> Result<(), RequestError> {
        let slot = {
            let Some(mut state) = self.state.usual() else { return Err(RequestError::NoSlot) };
            let Some(slot) = state.requests.free_slot() else { return Err(RequestError::NoSlot) };
            let wanted = state.requests.send_one(slot, request, Op::None);
            state.sent += 1;
            if wanted {
                self.note_doorbell();
            }
            slot
        };
        match self.answer(slot) {
            Some(_) => Ok(()),
            None => self.block_on(self.wait_for(slot).outcome()),
        }
    }
}

/// Maps a run where `placement` allows, for reading, writing or both. With `held` as for [`map`](super::map).
#[inline(always)]
pub(crate) fn map_first<'a, P: Platform>(
    shared: &'a Shared<P>,
    key: DomainKey,
    run: Run,
    placement: Placement,
    purpose: Purpose,
    held: &mut Option<HeldMemory>,
) -> FirstMap<'a, P> {
    let lent = held.is_some();
    let (slot, mapped, name) = {
        let Some(mut state) = shared.state.usual() else { return First::No };
        let State { engine, requests, sent, .. } = &mut *state;
        let Some(slot) = requests.free_slot() else { return First::No };
        let name = engine.begin_list();
        let begun = engine.begin_one(key, (run, placement), (purpose, name), held);
        let Some((domain, mapped)) = begun else { return First::No };
        let Mapped { range, record } = mapped;
        let request = Request::Map { domain: domain.id, range, phys: run.phys, prot: purpose.prot };
        let wanted = requests.send_one(slot, &request, Op::Map { domain: key, range, record });
        *sent += 1;
        shared.note_sent(domain, wanted);
        (slot, mapped, name)
    };
    let Mapped { range, record } = mapped;
    let Some(mut state) = shared.answer(slot) else {
        return First::Sent(SentMap { range, name, lent }, shared.wait_for(slot));
    };
    if !state.engine.mapped_one(key, range, record) {
        state.succeeded(Op::Map { domain: key, range, record });
    }
    First::Done(mapped)
}

/// Unmaps live mappings that touch each other, the first of which `record` may be the record of.
#[inline(always)]
pub(crate) fn unmap_first<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    range: IovaRange,
    record: MappingHandle,
) -> FirstUnmap<'_, P> {
    let (slot, record) = {
        let Some(mut state) = shared.state.usual() else { return First::No };
        let State { engine, requests, sent, .. } = &mut *state;
        let Some(slot) = requests.free_slot() else { return First::No };
        let Some((domain, record)) = engine.begin_unmap_one(key, range, record) else { return First::No };
        let request = Request::Unmap { domain: domain.id, range };
        let wanted = requests.send_one(slot, &request, Op::Unmap { domain: key, range, record });
        *sent += 1;
        shared.note_sent(domain, wanted);
        (slot, record)
    };
    let Some(mut state) = shared.answer(slot) else { return First::Sent((), shared.wait_for(slot)) };
    match state.engine.unmapped_one(key, range, record) {
        Some(Unheld::Nothing) => {}
        Some(Unheld::Memory(held)) => {
            drop(state);
            shared.release(held);
        }
        None if state.engine.unmapped_run(key, range, record) => {}
        None => {
            state.succeeded(Op::Unmap { domain: key, range, record });
            drop(state);
            shared.release_unmapped(key, range);
        }
    }
    First::Done(())
}

/// Defers the unmapping of one live mapping, which `record` may be the record of. [`Deferral::Strict`] where nothing was
/// done. Sends nothing.
#[inline(always)]
pub(crate) fn defer_first<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    range: IovaRange,
    record: MappingHandle,
) -> Deferral {
    let now_ns = shared.platform.now_ns();
    let Some(mut state) = shared.state.usual() else { return Deferral::Strict };
    state.engine.defer_one(key, (range, record), now_ns)
}
