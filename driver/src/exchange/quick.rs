//! What most calls come to: one request, answered with success by the time that its doorbell was rung.
//!
//! Each function here is the first step of an operation, without a future: it sends the request and looks at the ring
//! once. Wherever anything is unusual it has done nothing, or what it sent is still to be waited for, and the future takes
//! over, which knows the rare states and the words for what is wrong.

use super::{InFlight, Shared, State};
use crate::addr::IovaRange;
use crate::dma::HeldMemory;
use crate::engine::{Deferral, DomainKey, ListId, MappingHandle, Op, Placement, Purpose};
use crate::exchange::Run;
use crate::platform::Platform;
use crate::queue::Completion;
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
    /// Rings for a request that was sent as `slot`, and takes its success, if that is there.
    #[inline(always)]
    fn answer<R>(&self, slot: u16, then: impl FnOnce(&mut State) -> R) -> Result<R, InFlight<'_, P>> {
        self.ring();
        if let Some(mut state) = self.state.usual()
            && state.requests.take_one(slot)
        {
            return Ok(then(&mut state));
        }
        Err(self.wait_for(slot))
    }

    #[cold]
    fn wait_for(&self, slot: u16) -> InFlight<'_, P> {
        let batch = self.state.lock().requests.batch_of(slot);
        InFlight::new(self, batch)
    }

    /// Sends a request that no record knows, and waits for its answer: what everything else takes below the records.
    #[cfg(feature = "bench")]
    pub(crate) fn exchange_raw(&self, request: &Request) -> Result<(), crate::error::RequestError> {
        let no_slot = Err(crate::error::RequestError::NoSlot);
        let slot = {
            let Some(mut state) = self.state.usual() else { return no_slot };
            let Some((slot, wanted)) = state.requests.send_one(request, Op::None) else { return no_slot };
            state.sent += 1;
            self.note_doorbell(wanted);
            slot
        };
        match self.answer(slot, |_| ()) {
            Ok(()) => Ok(()),
            Err(in_flight) => self.block_on(in_flight.outcome()),
        }
    }
}

/// Maps a run where `placement` allows. With `held` as for [`map`](super::map).
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
        let name = engine.begin_list();
        let send = |request: &Request, op| requests.send_one(request, op);
        let Some((mapped, slot, wanted)) = engine.begin_one(key, (name, placement), run, purpose, held, send)
        else {
            return First::No;
        };
        *sent += 1;
        shared.note_doorbell(wanted);
        (slot, mapped, name)
    };
    let Mapped { range, record } = mapped;
    let confirm = |state: &mut State| {
        if !state.engine.mapped_one(key, range, record) {
            settle(state, Op::Map { domain: key, range, record });
        }
    };
    match shared.answer(slot, confirm) {
        Ok(()) => First::Done(mapped),
        Err(in_flight) => First::Sent(SentMap { range, name, lent }, in_flight),
    }
}

/// Unmaps one live mapping, which `record` may be the record of.
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
        let send = |request: &Request, op| requests.send_one(request, op);
        let Some((record, slot, wanted)) = engine.begin_unmap_one(key, (range, record), send) else {
            return First::No;
        };
        *sent += 1;
        shared.note_doorbell(wanted);
        (slot, record)
    };
    let confirm = |state: &mut State| {
        let held = state.engine.unmapped_one(key, range, record);
        if held.is_none() {
            settle(state, Op::Unmap { domain: key, range, record });
        }
        held
    };
    match shared.answer(slot, confirm) {
        Ok(Some(None)) => First::Done(()),
        Ok(Some(Some(held))) => {
            shared.release(held);
            First::Done(())
        }
        Ok(None) => {
            shared.release_unmapped(key, range);
            First::Done(())
        }
        Err(in_flight) => First::Sent((), in_flight),
    }
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

/// Does what the answer does to the records where there is more to it.
#[cold]
fn settle(state: &mut State, op: Op) {
    state.engine.settle(&Completion { op, outcome: Ok(()), abandoned: false });
}
