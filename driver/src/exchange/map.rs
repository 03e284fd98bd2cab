//! Mapping lists of runs.

use super::flush::flush_all_the_same;
use super::list::send_parts;
use super::quick::SentMap;
use super::unmap::{Owned, unmap};
use super::{InFlight, Mapped, Need, Shared, State};
use crate::addr::{IovaRange, PhysAddr};
use crate::dma::HeldMemory;
use crate::engine::{DomainKey, Engine, ListId, MappingHandle, Op, Placement, Purpose, Unmade};
use crate::error::{MapError, RequestError, UnmapError};
use crate::platform::Platform;
use crate::queue::Batch;
use crate::wire::request::{Request, Status};
use core::future::Future;

/// Physically contiguous bytes, whole granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub phys: PhysAddr,
    pub len: u64,
}

impl Run {
    /// Whether it is what it should be, and ends below 2^64.
    #[inline]
    pub(crate) fn is_whole(self, granule: u64) -> bool {
        let (phys, mask) = (self.phys.get(), granule - 1);
        (phys | self.len) & mask == 0 && self.len >= 2 && self.len - 1 <= u64::MAX - phys
    }
}

/// How many numbers in a row may turn out to be in use by an earlier life of the device, before a refusal is taken
/// for what it says.
const MAX_RENUMBERINGS: usize = 8;

/// Where a list goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// Where the driver likes: so many bytes, for so many mappings, where this allows.
    Anywhere { len: u64, placement: Placement, parts: usize },
    /// Here, in one mapping.
    At(IovaRange),
}

/// A list that is being mapped, or rolled back. Where that ends early, what was mapped of it is in quarantine, and
/// what was not begun is free.
struct List<'a, P: Platform, I: Iterator<Item = Run> + Clone> {
    shared: &'a Shared<P>,
    key: DomainKey,
    /// What is begun goes by this name. There is none before anything is.
    name: Option<ListId>,
    /// All of its addresses, once it has any.
    whole: Option<IovaRange>,
    /// Where its records are. Once one is of unknown outcome, others' may be among them.
    owned: Option<IovaRange>,
    /// What is not begun yet: the next run, those behind it, and the addresses for all of them.
    run: Option<Run>,
    runs: I,
    free: Option<IovaRange>,
    /// Where the record of those addresses is, if that is known.
    free_record: MappingHandle,
}

impl<P: Platform, I: Iterator<Item = Run> + Clone> Drop for List<'_, P, I> {
    fn drop(&mut self) {
        if self.owned.is_some() || self.free.is_some() {
            self.end_early();
        }
    }
}

impl<'a, P: Platform, I: Iterator<Item = Run> + Clone> List<'a, P, I> {
    fn new(shared: &'a Shared<P>, key: DomainKey, mut runs: I) -> Self {
        let (run, free_record) = (runs.next(), MappingHandle::UNKNOWN);
        Self { shared, key, name: None, whole: None, owned: None, run, runs, free: None, free_record }
    }

    #[cold]
    fn end_early(&mut self) {
        let parts = self.run.iter().count() + self.runs.clone().count();
        let mut state = self.shared.state.lock();
        if let (Some(name), Some(owned)) = (self.name, self.owned) {
            state.engine.disown_list(self.key, owned, name);
        }
        if let Some(free) = self.free {
            state.engine.give_back(self.key, free, parts);
        }
    }

    /// Places the list, if it is not yet, and begins and submits runs while there are slots. Called under the lock.
    #[inline]
    fn submit(
        &mut self,
        state: &mut State,
        place: Place,
        purpose: Purpose,
        held: &mut Option<HeldMemory>,
    ) -> (Batch, Result<(), MapError>) {
        let mut batch = Batch::default();
        let name = match self.name {
            Some(name) => name,
            None => {
                let Some(run) = self.run else { return (batch, Err(MapError::Empty)) };
                let (engine, key, prot) = (&mut state.engine, self.key, purpose.prot);
                let range = match place {
                    Place::Anywhere { len, placement, parts } => {
                        let fit = engine.check_run(key, run, prot);
                        fit.and_then(|()| engine.allocate(key, len, placement, parts))
                    }
                    Place::At(range) => {
                        let fit = engine.check_map(key, range.start(), run.len, run.phys, prot);
                        fit.and_then(|range| engine.take(key, range).map(|()| range))
                    }
                };
                let range = match range {
                    Ok(range) => range,
                    Err(error) => return (batch, Err(error)),
                };
                (self.whole, self.owned, self.free) = (Some(range), Some(range), Some(range));
                *self.name.insert(state.engine.begin_list())
            }
        };
        let mut begun = Ok(());
        while self.free.is_some() && begun.is_ok() && state.requests.has_free_slot() {
            if held.is_none() {
                self.submit_parts(state, (purpose, name), &mut batch);
            }
            begun = self.submit_next(state, (purpose, name), held, &mut batch);
        }
        state.publish(Some(self.key), &self.shared.doorbell);
        (batch, begun)
    }

    /// Begins and submits runs as long as there is nothing special about them.
    #[inline]
    fn submit_parts(&mut self, state: &mut State, (purpose, name): (Purpose, ListId), batch: &mut Batch) {
        let State { engine, requests, .. } = state;
        let (key, granule) = (self.key, engine.geometry.granule);
        let (Some(range), Some(slots)) = (self.free, requests.free_slots()) else { return };
        let rest = Mapped { range, record: self.free_record };
        let parts = engine.begin_parts(key, rest, (purpose, name), slots);
        let Some((domain, parts)) = parts else { return };
        let runs = self.run.into_iter().chain(self.runs.clone());
        let runs = runs.take_while(|run| run.is_whole(granule));
        let (count, rest) = send_parts(parts, runs, (key, domain, purpose.prot), requests, batch);
        engine.count_requests(Some(key), count);
        for _ in 0..count {
            self.run = self.runs.next();
        }
        self.free = rest.map(|rest| rest.range);
        self.free_record = rest.map_or(MappingHandle::UNKNOWN, |rest| rest.record);
    }

    /// Begins and submits the next run, if there is a slot for it.
    fn submit_next(
        &mut self,
        state: &mut State,
        (purpose, name): (Purpose, ListId),
        held: &mut Option<HeldMemory>,
        batch: &mut Batch,
    ) -> Result<(), MapError> {
        let State { engine, requests, .. } = state;
        let Some(free) = self.free.filter(|_| requests.has_free_slot()) else { return Ok(()) };
        let Some(Run { phys, len }) = self.run else { return Err(MapError::Empty) };
        let range = IovaRange::from_len(free.start(), len).filter(|part| free.contains(*part));
        let range = range.ok_or(MapError::Empty)?;
        let (record, domain) = engine.begin_map(self.key, (name, range), phys, purpose, held)?;
        let request = Request::Map { domain, range, phys, prot: purpose.prot };
        let queued = requests.queue(&request, Op::Map { domain: self.key, range, record }, batch);
        debug_assert!(queued, "a slot is free");
        (self.run, self.free, self.free_record) =
            (self.runs.next(), free.after(range), MappingHandle::UNKNOWN);
        Ok(())
    }
}

/// Maps runs, which fill the place that they go to. All or nothing: on an error no mapping is left, their addresses are
/// free and `held` is back, except for what is in quarantine. `first` is what was sent already.
///
/// When the device refuses the first mapping that the domain ever has, its number may still have mappings
/// of an earlier life: it gets another (I12).
pub(crate) fn map<'a, P: Platform>(
    shared: &'a Shared<P>,
    key: DomainKey,
    place: Place,
    runs: impl Iterator<Item = Run> + Clone + Send + 'a,
    purpose: Purpose,
    held: &'a mut Option<HeldMemory>,
    first: Option<SentMap>,
) -> impl Future<Output = Result<IovaRange, MapError>> + Send + 'a {
    let mut lent = held.is_some();
    let mut list = List::new(shared, key, runs.clone());
    let mut sent = None;
    if let Some(first) = first {
        let (range, in_flight) = (first.mapped.range, first.in_flight(shared));
        lent = first.lent;
        (list.name, list.whole, list.owned) = (Some(first.name), Some(range), Some(range));
        // The first of those that were not begun: one was taken out of them already.
        list.run = list.runs.nth(first.begun - 1);
        if let Some(Mapped { range, record }) = first.rest {
            (list.free, list.free_record) = (Some(range), record);
        }
        sent = Some((in_flight, Ok(())));
    }
    async move {
        // Named in this order, in which they end where this is never polled: what is in flight, then the list.
        let (sent, list) = (sent, list);
        let mut result = go_on(list, sent, place, purpose, held).await;
        if make_room(shared, key, &result).await {
            result = go_on(List::new(shared, key, runs.clone()), None, place, purpose, held).await;
        }
        for _ in 0..MAX_RENUMBERINGS {
            let Err(MapError::Request { range, error: RequestError::Refused(Status::Inval) }) = result else {
                break;
            };
            let first = runs.clone().nth(1).is_none() && never_mapped(shared, key);
            // Seldom, and nothing that may be left half-way: it blocks.
            if !first || held.is_some() != lent || !renumber(shared, key) {
                break;
            }
            let again = List::new(shared, key, runs.clone());
            result = go_on(again, None, Place::At(range), purpose, held).await;
        }
        result
    }
}

/// The requests of a list that were sent together, if not all of them succeeded at once, and whether others could not be.
type Sent<'a, P> = (Option<InFlight<'a, P>>, Result<(), MapError>);

/// The rest of a list's way: one request for each run, and one doorbell for as many as the ring takes.
async fn go_on<'a, P: Platform>(
    mut list: List<'a, P, impl Iterator<Item = Run> + Clone>,
    mut sent: Option<Sent<'a, P>>,
    place: Place,
    purpose: Purpose,
    held: &mut Option<HeldMemory>,
) -> Result<IovaRange, MapError> {
    let shared = list.shared;
    let mut result;
    let mut unknown = None;
    // Bounded by the runs: each round begins one, or ends in an error.
    loop {
        let (in_flight, begun) = match sent.take() {
            Some(sent) => sent,
            None => {
                let submit = |state: &mut State| list.submit(state, place, purpose, held);
                match shared.with_slot(Need::Slot, submit).await {
                    Ok((batch, begun)) => {
                        let key = list.key;
                        (shared.begin_with(batch, |state, batch| state.take_maps(key, batch)), begun)
                    }
                    Err(error) => {
                        let request = |range| MapError::Request { range, error };
                        result = Err(list.whole.map_or(MapError::NotSent(error), request));
                        break;
                    }
                }
            }
        };
        result = begun;
        if let Some(in_flight) = in_flight {
            let each = |_: &mut State, answer| {
                if let Err((Op::Map { range, .. }, error)) = answer {
                    unknown = unknown.or(Some(error).filter(RequestError::outcome_unknown));
                    result = result.and(Err(MapError::Request { range, error }));
                }
            };
            in_flight.wait(each).await;
        }
        if result.is_err() || list.free.is_none() {
            break;
        }
    }
    let Some(range) = list.whole else {
        return Err(result.err().unwrap_or(MapError::Empty));
    };
    if result.is_err() {
        unknown = roll_back(&mut list, held).await.err().or(unknown);
    } else {
        list.owned = None;
    }
    match unknown {
        Some(error) => Err(MapError::Quarantined { range, error }),
        None => result.map(|()| range),
    }
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
    while let (Some(name), Some(owned)) = (list.name, list.owned) {
        let unmade = { shared.state.lock().engine.next_unmade(key, (name, owned)) };
        let Some(unmade) = unmade else { break };
        match unmade {
            Unmade::Refused { range, memory } => {
                list.owned = owned.after(range);
                *held = held.take().or(memory);
            }
            Unmade::Live(range) => {
                list.owned = owned.after(range);
                if let Err(UnmapError::Request { error, .. }) =
                    unmap(Owned::new(shared, key, range), range, None).await
                {
                    result = Err(error);
                }
            }
        }
    }
    list.owned = None;
    result
}

/// Whether a mapping that failed for want of room is worth another try, since what was deferred was flushed.
async fn make_room<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    result: &Result<IovaRange, MapError>,
) -> bool {
    let room = matches!(result, Err(MapError::IovaExhausted { .. } | MapError::NoRecord { .. }));
    let deferred = room && shared.state.lock().engine.has_deferred(key);
    if deferred {
        flush_all_the_same(shared, key).await;
    }
    deferred
}

fn never_mapped<P: Platform>(shared: &Shared<P>, key: DomainKey) -> bool {
    shared.state.lock().engine.domain(key).is_some_and(|domain| domain.counts.maps == 0)
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
