//! Mapping lists of runs.

use super::unmap::unmap;
use super::{Need, Shared, State};
use crate::addr::{IovaRange, PhysAddr};
use crate::dma::HeldMemory;
use crate::engine::{DomainKey, Engine, ListId, Op, Purpose, Unmade};
use crate::error::{MapError, RequestError, UnmapError};
use crate::platform::Platform;
use crate::queue::Batch;
use crate::wire::request::Status;

/// Physically contiguous bytes, whole granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub phys: PhysAddr,
    pub len: u64,
}

/// How many numbers in a row may turn out to be in use by an earlier life of the device, before a refusal is taken
/// for what it says.
const MAX_RENUMBERINGS: usize = 8;

/// What of a list is not begun yet: runs, and the addresses for them.
struct Rest<I> {
    /// What is begun goes by this name. There is none before anything is.
    list: Option<ListId>,
    runs: I,
    range: Option<IovaRange>,
}

/// A list that is being mapped, or rolled back. Where that ends early, what was mapped of it is in quarantine.
struct List<'a, P: Platform, I: Iterator<Item = Run> + Clone> {
    shared: &'a Shared<P>,
    key: DomainKey,
    /// Where its records are. Once one is of unknown outcome, others' may be among them.
    owned: Option<IovaRange>,
    rest: Rest<I>,
}

impl<P: Platform, I: Iterator<Item = Run> + Clone> Drop for List<'_, P, I> {
    fn drop(&mut self) {
        if self.owned.is_none() && self.rest.range.is_none() {
            return;
        }
        let parts = self.rest.runs.clone().count();
        let mut state = self.shared.state.lock();
        if let (Some(list), Some(owned)) = (self.rest.list, self.owned) {
            state.engine.disown_list(self.key, owned, list);
        }
        if let Some(range) = self.rest.range {
            state.engine.give_back(self.key, range, parts);
        }
    }
}

/// Maps runs into `range`, which was allocated for them or taken and which they fill. All or nothing: on an
/// error no mapping is left, the range is free and `held` is back, except for what is in quarantine.
///
/// When the device refuses the first mapping that the domain ever has, its number may still have mappings
/// of an earlier life: it gets another (I12).
pub(crate) async fn map<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    range: IovaRange,
    runs: impl Iterator<Item = Run> + Clone,
    purpose: Purpose,
    held: &mut Option<HeldMemory>,
) -> Result<(), MapError> {
    let lent = held.is_some();
    let mut result = map_once(shared, key, range, runs.clone(), purpose, held).await;
    for _ in 0..MAX_RENUMBERINGS {
        let inval = RequestError::Refused(Status::Inval);
        let stale = matches!(result, Err(MapError::Request { error, .. }) if error == inval);
        let first = stale && runs.clone().nth(1).is_none() && never_mapped(shared, key);
        if !first || held.is_some() != lent {
            break;
        }
        // Seldom, and nothing that may be left half-way: it blocks.
        if !renumber(shared, key) || shared.state.lock().engine.take(key, range).is_err() {
            break;
        }
        result = map_once(shared, key, range, runs.clone(), purpose, held).await;
    }
    result
}

/// One request for each run, and one doorbell for as many as the ring takes.
async fn map_once<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    range: IovaRange,
    runs: impl Iterator<Item = Run> + Clone,
    purpose: Purpose,
    held: &mut Option<HeldMemory>,
) -> Result<(), MapError> {
    let rest = Rest { list: None, runs, range: Some(range) };
    let mut list = List { shared, key, owned: Some(range), rest };
    let mut result = Ok(());
    let mut unknown = None;
    while result.is_ok() && list.rest.runs.clone().next().is_some() {
        let rest = &mut list.rest;
        let sent =
            shared.with_slot(Need::Slot, |state| submit(shared, key, state, rest, purpose, held)).await;
        let (batch, begun) = match sent {
            Ok(sent) => sent,
            Err(error) => {
                result = Err(MapError::Request { range, error });
                break;
            }
        };
        result = begun;
        let each = |_: &mut State, op, outcome| {
            if let (Op::Map { range, .. }, Err(error)) = (op, outcome) {
                unknown = unknown.or(Some(error).filter(RequestError::outcome_unknown));
                result = result.and(Err(MapError::Request { range, error }));
            }
        };
        shared.wait(batch, each).await;
    }
    if result.is_err() {
        unknown = roll_back(&mut list, held).await.err().or(unknown);
    } else {
        list.owned = None;
    }
    match unknown {
        Some(error) => Err(MapError::Quarantined { range, error }),
        None => result,
    }
}

/// Begins and submits runs while there are slots. Called under the lock.
fn submit<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    state: &mut State,
    rest: &mut Rest<impl Iterator<Item = Run> + Clone>,
    purpose: Purpose,
    held: &mut Option<HeldMemory>,
) -> (Batch, Result<(), MapError>) {
    let mut batch = Batch::default();
    let mut begun = Ok(());
    let list = *rest.list.get_or_insert_with(|| state.engine.begin_list());
    while state.requests.can_submit(false) {
        let (Some(run), Some(free)) = (rest.runs.clone().next(), rest.range) else { break };
        let part = IovaRange::from_len(free.start(), run.len).filter(|part| free.contains(*part));
        let request = part.ok_or(MapError::Empty).and_then(|part| {
            let begun = state.engine.begin_map(key, (list, part), run.phys, purpose, held);
            begun.map(|(request, op)| (part, request, op))
        });
        match request {
            Ok((part, request, op)) => {
                state.submit(&request, op, &mut batch);
                rest.runs.next();
                rest.range = free.after(part);
            }
            Err(error) => {
                begun = Err(error);
                break;
            }
        }
    }
    state.publish(Some(key), &shared.doorbell);
    (batch, begun)
}

/// Takes a failed list back, in the order of its addresses: what is behind is not the list's any more, and may be
/// somebody else's already. The last error is why some of it is in quarantine instead.
async fn roll_back<P: Platform>(
    list: &mut List<'_, P, impl Iterator<Item = Run> + Clone>,
    held: &mut Option<HeldMemory>,
) -> Result<(), RequestError> {
    let (shared, key) = (list.shared, list.key);
    let mut result = Ok(());
    // Bounded: each round goes on behind a record.
    while let (Some(id), Some(owned)) = (list.rest.list, list.owned) {
        let unmade = { shared.state.lock().engine.next_unmade(key, (id, owned)) };
        let Some(unmade) = unmade else { break };
        match unmade {
            Unmade::Refused { range, memory } => {
                list.owned = owned.after(range);
                *held = held.take().or(memory);
            }
            Unmade::Live(range) => {
                list.owned = owned.after(range);
                if let Err(UnmapError::Request { error, .. }) = unmap(shared, key, range).await {
                    result = Err(error);
                }
            }
        }
    }
    list.owned = None;
    result
}

fn never_mapped<P: Platform>(shared: &Shared<P>, key: DomainKey) -> bool {
    shared.state.lock().engine.domain(key).is_some_and(|domain| domain.stats.maps == 0)
}

/// Gives the domain another number: detaches its endpoints, and attaches them again. False where that cannot
/// be done, or not all endpoints came back.
fn renumber<P: Platform>(shared: &Shared<P>, key: DomainKey) -> bool {
    let with = |work: &mut dyn FnMut(&mut Engine) -> bool| work(&mut shared.state.lock().engine);
    if !with(&mut |engine| engine.begin_renumber(key)) {
        return false;
    }
    log::warn!("a domain cannot be mapped: an earlier life of the device may use its number");
    let mut done = true;
    // Both loops are bounded by the endpoints: each round takes one out.
    while let Some(endpoint) = { shared.state.lock().engine.next_to_leave(key) }.filter(|_| done) {
        done = shared.block_on(shared.detach(endpoint)).map_err(|error| log::error!("{error}")).is_ok();
    }
    done = done && with(&mut |engine| engine.renumber(key).map_err(|error| log::error!("{error}")).is_ok());
    while let Some(endpoint) = { shared.state.lock().engine.next_to_rejoin(key) } {
        let joined = shared.block_on(shared.attach(endpoint, key));
        done &= joined.map_err(|error| log::error!("{error}")).is_ok();
    }
    shared.state.lock().engine.end_transition(key);
    done
}
