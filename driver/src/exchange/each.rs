//! Mapping and unmapping several that have nothing to do with each other: a request each, and one doorbell for as many as
//! the ring takes.

use super::unmap::{Owned, unmap};
use super::{Access, Mapped, Need, Shared, State};
use crate::dma::{DmaMapping, PhysSegment, rounded};
use crate::engine::{DomainKey, ListId, Made, Op, Purpose, Reach, Spot, UnmapPlan};
use crate::error::{MapError, UnmapError};
use crate::platform::Platform;
use crate::queue::Batch;
use crate::rounds;
use crate::wire::request::Request;

/// Mappings on their way to their owner. Where they do not get there they are in quarantine.
struct Each<'a, P: Platform> {
    shared: &'a Shared<P>,
    key: DomainKey,
    /// What is made by the call goes by this name.
    name: Option<ListId>,
    /// What is to be mapped, whole granules around it, and where it may go.
    segments: &'a [PhysSegment],
    reach: &'a Reach,
    made: &'a mut [Option<DmaMapping>],
}

impl<P: Platform> Drop for Each<'_, P> {
    fn drop(&mut self) {
        let Some(name) = self.name else { return };
        for mapping in self.made.iter_mut().filter_map(Option::take) {
            self.shared.state.lock().engine.disown_list(self.key, mapping.range(), name);
        }
    }
}

/// Maps each segment by itself where `reach` allows, and puts what was made into `made`, which is empty and as long. After an
/// error that holds what was mapped all the same.
pub(crate) async fn map_each<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    (segments, reach): (&[PhysSegment], &Reach),
    purpose: Purpose,
    made: &mut [Option<DmaMapping>],
) -> Result<(), MapError> {
    let count = made.len();
    let mut each = Each { shared, key, name: None, segments, reach, made };
    let mut next = 0;
    let mut result = Ok(());
    // Bounded by their number: each round begins one, or ends in an error.
    while next < count && result.is_ok() {
        let first = next;
        let submit = |state: &mut State| -> Batch {
            let mut batch = Batch::default();
            let name = *each.name.get_or_insert_with(|| state.engine.begin_list());
            while next < count && state.requests.has_free_slot() {
                next += each.submit_usual(next, (purpose, name), state, &mut batch);
                if next == count {
                    break;
                }
                match each.submit_next(next, (purpose, name), state, &mut batch) {
                    Ok(submitted) => next += usize::from(submitted),
                    Err(error) => {
                        result = Err(error);
                        break;
                    }
                }
            }
            state.publish(Some(key), &shared.doorbell);
            batch
        };
        let batch = match shared.with_slot(Need::Slot, submit).await {
            Ok(batch) => batch,
            Err(error) => {
                result = Err(MapError::NotSent(error));
                break;
            }
        };
        let in_flight = shared.begin_with(batch, |state, batch| state.take_maps(key, batch));
        let Some(in_flight) = in_flight else { continue };
        let mut failed = None;
        let answer = |_: &mut State, answer| {
            if let Err((Op::Map { range, .. }, error)) = answer {
                failed = failed.or(Some((range, error)));
            }
        };
        in_flight.wait(answer).await;
        if let Some((range, error)) = failed {
            let unknown = each.keep_what_is_there(first, next);
            result = Err(match unknown || error.outcome_unknown() {
                true => MapError::Quarantined { range, error },
                false => MapError::Request { range, error },
            });
        }
    }
    // They are the owner's now.
    each.name = None;
    result
}

impl<P: Platform> Each<'_, P> {
    /// Begins and submits from the one with this number on, as long as there is nothing special about them. How many.
    // By itself: in the future there are too few registers for the loop.
    #[inline(never)]
    fn submit_usual(
        &mut self,
        first: usize,
        (purpose, name): (Purpose, ListId),
        state: &mut State,
        batch: &mut Batch,
    ) -> usize {
        let State { engine, requests, .. } = state;
        let (key, granule) = (self.key, engine.geometry.granule);
        let Some(domain) = engine.usual_domain(key, purpose.prot) else { return 0 };
        // A granule of one byte is no mapping by itself; of any other size what is rounded is one.
        if granule < 2 {
            return 0;
        }
        // Read once: for all that the compiler knows, requests could change them.
        let (id, reach) = (domain.id, *self.reach);
        let mut filling = requests.filling();
        for (place, segment) in self.made[first..].iter_mut().zip(&self.segments[first..]) {
            if !filling.has_room() {
                break;
            }
            let Ok(run) = rounded(*segment, granule) else { break };
            debug_assert!(run.is_whole(granule));
            let spot = Spot::Within(reach.placement(run.len));
            let made = domain.space.make(run, spot, (purpose, name), &mut None);
            let Some(mapped @ Mapped { range, record }) = made else { break };
            let request = Request::Map { domain: id, range, phys: run.phys, prot: purpose.prot };
            filling.put(&request, Op::Map { domain: key, range, record });
            *place = Some(DmaMapping::around(*segment, granule, (key, mapped)));
        }
        let count = filling.len();
        domain.counts.requests += count as u64;
        filling.end(batch);
        count
    }

    /// Begins and submits the one with this number. False where there is no slot.
    fn submit_next(
        &mut self,
        next: usize,
        (purpose, name): (Purpose, ListId),
        state: &mut State,
        batch: &mut Batch,
    ) -> Result<bool, MapError> {
        let State { engine, requests, .. } = state;
        if !requests.has_free_slot() {
            return Ok(false);
        }
        let (key, granule, segment) = (self.key, engine.geometry.granule, self.segments[next]);
        let run = rounded(segment, granule)?;
        let (mapped, domain) =
            engine.begin_anywhere(key, (run, self.reach.placement(run.len)), (purpose, name))?;
        let Mapped { range, record } = mapped;
        let request = Request::Map { domain, range, phys: run.phys, prot: purpose.prot };
        let queued = requests.queue(&request, Op::Map { domain: key, range, record }, batch);
        debug_assert!(queued, "a slot is free");
        self.made[next] = Some(DmaMapping::around(segment, granule, (key, mapped)));
        Ok(true)
    }

    /// Takes those out of the list that the device refused, or may have or not, which is what it returns.
    fn keep_what_is_there(&mut self, first: usize, end: usize) -> bool {
        let Some(name) = self.name else { return false };
        let mut unknown = false;
        for place in &mut self.made[first..end] {
            let Some(range) = place.as_ref().map(DmaMapping::range) else { continue };
            let made = { self.shared.state.lock().engine.made(self.key, (name, range)) };
            match made {
                Made::Live => continue,
                Made::Refused => {}
                Made::Unknown => unknown = true,
            }
            *place = None;
        }
        unknown
    }
}

/// Unmaps each by itself, all of which are of this domain, and takes them out of `mappings`. Memory that was held for them
/// goes back to its owner. The first error; what it is about is in quarantine.
pub(crate) async fn unmap_each<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    mappings: &mut [Option<DmaMapping>],
) -> Result<(), UnmapError> {
    unmap_rest(Rest { shared, key, mappings, next: 0 }, None).await
}

/// The same for whoever blocks.
pub(crate) fn unmap_each_now<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    mappings: &mut [Option<DmaMapping>],
) -> Result<(), UnmapError> {
    let mut rest = Rest { shared, key, mappings, next: 0 };
    match rest.unmap_first() {
        Some(batch) if batch.is_empty() && rest.is_empty() => Ok(()),
        first => shared.block_on(unmap_rest(rest, first)),
    }
}

/// What is left after the first step, of which these requests are not answered yet.
async fn unmap_rest<P: Platform>(mut rest: Rest<'_, P>, mut sent: Option<Batch>) -> Result<(), UnmapError> {
    let (shared, key) = (rest.shared, rest.key);
    let mut result = Ok(());
    // Bounded by the mappings: each round begins one, or is the last.
    while sent.is_some() || !rest.is_empty() {
        let first = if sent.is_some() { 0 } else { rest.next };
        let in_flight = match sent.take() {
            Some(batch) => shared.in_flight(batch),
            None => match shared.with_slot(Need::Slot, |state| rest.submit(state, &mut result)).await {
                Ok(batch) => shared.begin_with(batch, |state, batch| state.take_unmaps(key, batch)),
                // In a dead domain it takes no request, so no slot.
                Err(_) => {
                    while let Some(place) = rest.mappings.get_mut(rest.next) {
                        rest.next += 1;
                        if let Some(mapping) = place.take() {
                            let owned = Owned::new(shared, key, mapping.range());
                            result = result.and(unmap(owned, mapping.range(), None).await);
                        }
                    }
                    return result;
                }
            },
        };
        if let Some(in_flight) = in_flight {
            let answer = |state: &mut State, answer| {
                let Err((op, error)) = answer else { return };
                state.engine.disown_op(op, error);
                if let Op::Unmap { range, .. } = op {
                    result = result.and(Err(UnmapError::Request { range, error }));
                }
            };
            in_flight.wait(answer).await;
        }
        rest.give_back(first);
    }
    result
}

/// Mappings of which those from `next` on are not begun yet.
struct Rest<'a, P: Platform> {
    shared: &'a Shared<P>,
    key: DomainKey,
    mappings: &'a mut [Option<DmaMapping>],
    next: usize,
}

impl<P: Platform> Drop for Rest<'_, P> {
    fn drop(&mut self) {
        // The records say what became of those that were begun.
        rounds::change(&mut self.mappings[..self.next], |mapping| *mapping = None);
    }
}

impl<P: Platform> Rest<'_, P> {
    /// Whether all are begun.
    fn is_empty(&self) -> bool {
        self.next >= self.mappings.len()
    }

    /// The first step, without a future: sends as many as there are slots for, as long as there is nothing special about them,
    /// and looks at the ring once. What is not answered yet with success; `None` where nothing was done.
    #[inline(always)]
    fn unmap_first(&mut self) -> Option<Batch> {
        let (shared, key) = (self.shared, self.key);
        let mut batch = Batch::default();
        {
            let mut state = shared.state.usual()?;
            self.submit_usual(&mut state, &mut batch);
            state.publish(Some(key), &shared.doorbell);
        }
        shared.ring();
        let mut state = shared.state.usual();
        if let Some(state) = &mut state {
            state.take_unmaps(key, &mut batch);
        }
        let released = match state {
            Some(state) if state.requests.has_left_any() => {
                let mut state = Access::go_on(state);
                state.drain();
                state.engine.has_released()
            }
            Some(state) => state.engine.has_released(),
            None => false,
        };
        if released {
            self.give_back(0);
        }
        Some(batch)
    }

    /// Gives memory back that was held for those from `first` to the next one, and is out of the device's reach.
    #[cold]
    fn give_back(&self, first: usize) {
        if !{ self.shared.state.lock().engine.has_released() } {
            return;
        }
        for mapping in self.mappings[first..self.next].iter().flatten() {
            self.shared.release_unmapped(self.key, mapping.range());
        }
    }

    /// Begins and submits as long as they are live mappings.
    // By itself, as above.
    #[inline(never)]
    fn submit_usual(&mut self, state: &mut State, batch: &mut Batch) {
        let State { engine, requests, .. } = state;
        let Some(domain) = engine.domain_mut(self.key) else { return };
        // Read once: for all that the compiler knows, requests could change them.
        let (id, key, mut next) = (domain.id, self.key, self.next);
        let mut filling = requests.filling();
        for place in &self.mappings[next..] {
            if !filling.has_room() {
                break;
            }
            if let Some(mapping) = place {
                let range = mapping.range();
                let Some(record) = domain.space.begin_unmap(range, mapping.record()) else { break };
                filling.put(&Request::Unmap { domain: id, range }, Op::Unmap { domain: key, range, record });
            }
            next += 1;
        }
        self.next = next;
        domain.counts.requests += filling.len() as u64;
        filling.end(batch);
    }

    /// Begins and submits while there are slots. Called under the lock.
    fn submit(&mut self, state: &mut State, result: &mut Result<(), UnmapError>) -> Batch {
        let mut batch = Batch::default();
        while self.next < self.mappings.len() && state.requests.has_free_slot() {
            self.submit_usual(state, &mut batch);
            let State { engine, requests, .. } = &mut *state;
            if !requests.has_free_slot() {
                break;
            }
            let Some(place) = self.mappings.get(self.next) else { break };
            self.next += 1;
            let Some(range) = place.as_ref().map(DmaMapping::range) else { continue };
            match engine.begin_unmap(self.key, range) {
                Ok(UnmapPlan::Send(request, op)) => {
                    engine.count_request(Some(self.key));
                    let queued = requests.queue(&request, op, &mut batch);
                    debug_assert!(queued, "a slot is free");
                }
                Ok(UnmapPlan::Nothing) => {}
                Err(error) => *result = result.and(Err(error)),
            }
        }
        state.publish(Some(self.key), &self.shared.doorbell);
        batch
    }
}
