//! Lists, as far as there is nothing special about them: the first step of mapping one, as in [`quick`](super::quick).

use super::quick::{Mapped, SentMap};
use super::{Access, Run, Shared, State};
use crate::engine::{DomainKey, Engine, ListId, Op, Parts, Placement, Purpose};
use crate::id::DomainId;
use crate::platform::Platform;
use crate::prot::Prot;
use crate::queue::{Batch, RequestQueue};
use crate::wire::request::Request;

/// Maps a list of whole runs for reading, writing or both: so many bytes, where this allows, of so many runs at most.
/// [`map`](super::map()) takes over where it did not succeed, with what was sent.
// By itself: inside of its callers there are too few registers for the loops.
#[inline(never)]
pub(crate) fn map_list_first<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    (len, placement, most): (u64, Placement, usize),
    mut runs: impl Iterator<Item = Run> + Clone,
    purpose: Purpose,
) -> Result<Mapped, Option<SentMap>> {
    let Some(mut state) = shared.state.usual() else { return Err(None) };
    let State { engine, requests, .. } = &mut *state;
    let Some(slots) = requests.free_slots().filter(|slots| *slots > 0) else { return Err(None) };
    let (slot, mut batch) = (requests.first_free(), Batch::default());
    let name = engine.begin_list();
    let list = engine.begin_list_of(key, (len, placement), (purpose, name), (most, slots));
    let Some((domain, parts)) = list else { return Err(None) };
    let mapped = parts.whole();
    let (mut begun, mut rest) =
        send_parts(parts, runs.clone(), (key, domain, purpose.prot), requests, &mut batch);
    if rest.is_some() {
        debug_assert!(begun > 0, "there are slots and records");
        runs.nth(begun - 1);
        let more =
            send_more(engine, requests, (key, rest, runs), (purpose, name), (slots - begun, &mut batch));
        (begun, rest) = (begun + more.0, more.1);
    }
    engine.count_requests(Some(key), begun);
    state.publish(Some(key), &shared.doorbell);
    drop(state);
    let sent = |slot, waiting| SentMap { slot, waiting, mapped, name, lent: false, begun, rest };
    shared.ring();
    let Some(mut state) = shared.state.usual() else { return Err(Some(sent(slot, batch.len()))) };
    let _none = state.requests.take_successes(&mut batch, |_| true);
    let whole = batch.is_empty() && rest.is_none();
    if !(whole && state.engine.mapped_list(key, mapped)) {
        state.take_parts(key, (mapped, name), begun - usize::from(batch.len()));
    }
    if state.requests.has_left_any() {
        Access::go_on(state).drain();
    }
    if whole { Ok(mapped) } else { Err(Some(sent(batch.slot(), batch.len()))) }
}

/// Makes mappings of runs, as long as there are addresses and records for them, and puts their requests into the queue, which
/// has slots for as many. How many, and what is left of the addresses.
// By itself: inside of its callers there are too few registers for the loop.
#[inline(never)]
pub(super) fn send_parts(
    parts: Parts<'_>,
    runs: impl Iterator<Item = Run>,
    (key, domain, prot): (DomainKey, DomainId, Prot),
    requests: &mut RequestQueue,
    batch: &mut Batch,
) -> (usize, Option<Mapped>) {
    let mut filling = requests.filling();
    let made = parts.make(runs, |Mapped { range, record }, run| {
        let request = Request::Map { domain, range, phys: run.phys, prot };
        let put = filling.put(&request, Op::Map { domain: key, range, record });
        debug_assert!(put, "there is a slot");
    });
    filling.end(batch);
    made
}

/// Begins and sends more runs of a list, of more than lie behind one record, as long as there are slots for them. How many, and
/// what is left of the addresses.
#[cold]
fn send_more(
    engine: &mut Engine,
    requests: &mut RequestQueue,
    (key, mut rest, mut runs): (DomainKey, Option<Mapped>, impl Iterator<Item = Run> + Clone),
    (purpose, name): (Purpose, ListId),
    (slots, batch): (usize, &mut Batch),
) -> (usize, Option<Mapped>) {
    engine.expect_parts(key, runs.clone().count());
    let mut begun = 0;
    // Bounded by the runs: each round begins one, or is the last.
    while let Some(free) = rest
        && let Some((domain, parts)) = engine.begin_parts(key, free, (purpose, name), slots - begun)
    {
        let count;
        (count, rest) = send_parts(parts, runs.clone(), (key, domain, purpose.prot), requests, batch);
        begun += count;
        let Some(last) = count.checked_sub(1) else { break };
        runs.nth(last);
    }
    (begun, rest)
}
