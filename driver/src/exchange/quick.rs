//! What most calls come to: one request, answered with success by the time that its doorbell was rung.
//!
//! Each function here is the first step of an operation, without a future: it sends the request and looks at the ring
//! once. Wherever anything is unusual it has done nothing, or what it sent is still to be waited for, and the future takes
//! over, which knows the rare states and the words for what is wrong. What these functions return has no destructor, so
//! that it costs nothing on the way of success.

use super::{InFlight, Shared, State};
use crate::addr::IovaRange;
use crate::dma::HeldMemory;
use crate::engine::{Deferral, DomainKey, ListId, MappingHandle, Op, Purpose, Spot, stamp};
#[cfg(feature = "bench")]
use crate::error::RequestError;
use crate::exchange::Run;
use crate::lock::Guard;
use crate::platform::Platform;
use crate::queue::Batch;
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

/// MAPs of a list that were sent: not all of them, or not all are answered yet with success.
#[derive(Clone, Copy)]
pub(crate) struct SentMap {
    /// The slot of the first one that is not answered, and how many there are. There may be none.
    pub(super) slot: usize,
    pub(super) waiting: u16,
    /// All of the list.
    pub mapped: Mapped,
    pub name: ListId,
    /// Whether its record holds memory.
    pub lent: bool,
    /// How many of its runs were begun, at least one, and the addresses of the others.
    pub begun: usize,
    pub rest: Option<Mapped>,
}

impl SentMap {
    /// The answers, to be waited for.
    pub(super) fn in_flight<P: Platform>(self, shared: &Shared<P>) -> Option<InFlight<'_, P>> {
        shared.in_flight(Batch::of(self.slot, self.waiting))
    }
}

impl<P: Platform> Shared<P> {
    /// Rings for a request that was sent as `slot`, and takes its success, if that is there: then with the lock, for
    /// whatever that does to the records.
    #[inline(always)]
    pub(super) fn answer(&self, slot: usize) -> Option<Guard<'_, P::Lock, State>> {
        self.ring();
        let mut state = self.state.usual()?;
        if state.requests.take_one(slot) { Some(state) } else { None }
    }

    /// The answer of a request that was sent alone as `slot`, to be waited for.
    #[cold]
    pub(crate) fn wait_for(&self, slot: usize) -> InFlight<'_, P> {
        InFlight::new(self, Batch::of(slot, 1))
    }

    /// Sends a request that no record knows, and waits for its answer: what everything else takes below the records.
    #[cfg(feature = "bench")]
    pub(crate) fn exchange_raw(&self, request: &Request) -> Result<(), RequestError> {
        let slot = {
            let Some(mut state) = self.state.usual() else { return Err(RequestError::NoSlot) };
            let Some(slot) = state.requests.free_slot() else { return Err(RequestError::NoSlot) };
            let index = slot.index();
            let wanted = slot.send(request, Op::None);
            state.engine.count_request(None);
            if wanted {
                self.note_doorbell();
            }
            index
        };
        match self.answer(slot) {
            Some(_) => Ok(()),
            None => self.block_on(self.wait_for(slot).outcome()),
        }
    }
}

/// Maps a run where `spot` says, for reading, writing or both. With `held` as for [`map`](super::map), which takes over where
/// it did not succeed, with what was sent.
#[inline(always)]
pub(crate) fn map_first<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    (run, spot): (Run, Spot),
    purpose: Purpose,
    held: &mut Option<HeldMemory>,
) -> Result<Mapped, Option<SentMap>> {
    let lent = held.is_some();
    let sent = {
        let Some(mut state) = shared.state.usual() else { return Err(None) };
        let State { engine, requests, .. } = &mut *state;
        let Some(slot) = requests.free_slot() else { return Err(None) };
        let name = engine.begin_list();
        let begun = engine.begin_one(key, (run, spot), (purpose, name), held);
        let Some((domain, mapped)) = begun else { return Err(None) };
        let Mapped { range, record } = mapped;
        let request = Request::Map { domain: domain.id, range, phys: run.phys, prot: purpose.prot };
        let index = slot.index();
        let wanted = slot.send(&request, Op::Map { domain: key, range, record });
        shared.note_sent(domain, wanted);
        SentMap { slot: index, waiting: 1, mapped, name, lent, begun: 1, rest: None }
    };
    let Some(mut state) = shared.answer(sent.slot) else { return Err(Some(sent)) };
    let Mapped { range, record } = sent.mapped;
    if !state.engine.mapped_one(key, (range, run.len), record) {
        state.succeeded(Op::Map { domain: key, range, record });
    }
    Ok(sent.mapped)
}

/// Unmaps live mappings that touch each other, the first of which `record` may be the record of. Where it did not succeed
/// [`unmap`](super::unmap) takes over, with the slot of what was sent.
#[inline(always)]
pub(crate) fn unmap_first<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    range: IovaRange,
    record: MappingHandle,
) -> Result<(), Option<usize>> {
    let (slot, record) = {
        let Some(mut state) = shared.state.usual() else { return Err(None) };
        let State { engine, requests, .. } = &mut *state;
        let Some(slot) = requests.free_slot() else { return Err(None) };
        let Some((domain, record)) = engine.begin_unmap_one(key, range, record) else { return Err(None) };
        let request = Request::Unmap { domain: domain.id, range };
        let index = slot.index();
        let wanted = slot.send(&request, Op::Unmap { domain: key, range, record });
        shared.note_sent(domain, wanted);
        (index, record)
    };
    let Some(mut state) = shared.answer(slot) else { return Err(Some(slot)) };
    if !state.engine.unmapped_one(key, range, record) {
        unmapped_more(shared, state, key, range, record);
    }
    Ok(())
}

/// The device confirmed an UNMAP of more than one mapping that holds no memory.
#[cold]
fn unmapped_more<P: Platform>(
    shared: &Shared<P>,
    mut state: Guard<'_, P::Lock, State>,
    key: DomainKey,
    range: IovaRange,
    record: MappingHandle,
) {
    if let Some(held) = state.engine.unmapped_held(key, range, record) {
        drop(state);
        shared.release(held);
    } else if !state.engine.unmapped_run(key, range, record) {
        state.succeeded(Op::Unmap { domain: key, range, record });
        drop(state);
        shared.release_unmapped(key, range);
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
    let now_ns = stamp(shared.platform.now_ns());
    let Some(mut state) = shared.state.usual() else { return Deferral::Strict };
    state.engine.defer_one(key, (range, record), now_ns)
}
