//! Unmapping later, and many at once: what a domain with the deferred policy does.

use super::unmap::{Owned, reclaim, unmap};
use super::{Access, InFlight, Mapped, Need, Shared, State};
use crate::addr::IovaRange;
use crate::dma::Unmapped;
use crate::engine::{Deferral, DomainKey, MERGED, Op, UnmapPlan, first_run};
use crate::error::{RequestError, UnmapError};
use crate::platform::Platform;
use crate::queue::{Batch, Completion};
use crate::wire::request::Status;
use alloc::vec::Vec;

/// Unmaps whole neighbouring mappings of a domain that may defer it. Sends nothing, unless a bound is reached.
pub(crate) async fn unmap_by_policy<P: Platform>(
    mut owned: Owned<'_, P>,
    range: IovaRange,
) -> Result<Unmapped, UnmapError> {
    let (shared, key) = (owned.shared, owned.key);
    let defer = move || {
        let now_ns = shared.platform.now_ns();
        shared.state.lock().engine.defer(key, range, now_ns)
    };
    let mut deferral = defer();
    if deferral == Deferral::Full {
        flush_all_the_same(shared, key).await;
        deferral = defer();
    }
    match deferral {
        Deferral::Strict | Deferral::Full => unmap(owned, range, None).await.map(|()| Unmapped::Now),
        Deferral::Deferred => {
            owned.settled();
            Ok(Unmapped::AtFlush)
        }
        Deferral::FlushDue => {
            owned.settled();
            Ok(flush_due(shared, key).await)
        }
    }
}

/// Flushes since a bound is reached, and says what became of the unmapping that reached it.
pub(crate) async fn flush_due<P: Platform>(shared: &Shared<P>, key: DomainKey) -> Unmapped {
    match flush_all_the_same(shared, key).await {
        true => Unmapped::Now,
        false => Unmapped::AtFlush,
    }
}

/// Flushes for the sake of a bound, or of room. Whose mappings are in quarantine after a failure is not known here:
/// they find out by a flush of their own.
pub(crate) async fn flush_all_the_same<P: Platform>(shared: &Shared<P>, key: DomainKey) -> bool {
    let flushed = flush(shared, key).await;
    flushed.inspect_err(|error| log::warn!("a flush failed: {error}")).is_ok()
}

/// Unmaps all that a domain deferred before: one request for what touches, one doorbell for as many as the ring
/// takes. Memory that was held for them goes back to its owner. Waits for a flush that is under way.
pub(crate) async fn flush<P: Platform>(shared: &Shared<P>, key: DomainKey) -> Result<(), UnmapError> {
    if shared.state.lock().engine.has_deferred(key) {
        let begun = shared.with_slot(Need::Flush(key), |state| Flush::begin(shared, key, state)).await;
        let flush = begun.map_err(|error| {
            let range = { shared.state.lock().engine.first_deferred(key) };
            UnmapError::Request { range: range.unwrap_or(IovaRange::WHOLE), error }
        })?;
        if let Some(flush) = flush {
            flush.run().await;
        }
    }
    shared.state.lock().engine.flush_result(key)
}

/// A flush that took what waited. Where it ends early, what it did not send is in quarantine.
struct Flush<'a, P: Platform> {
    shared: &'a Shared<P>,
    key: DomainKey,
    ranges: Vec<Mapped>,
    /// The first of them that is not begun yet.
    next: usize,
    failed: Option<RequestError>,
}

impl<P: Platform> Drop for Flush<'_, P> {
    fn drop(&mut self) {
        for unsent in self.ranges[self.next..].chunks(MERGED) {
            self.shared.state.lock().engine.give_up_deferred(self.key, unsent);
        }
        let ranges = core::mem::take(&mut self.ranges);
        let (spare, wake) = {
            let mut state = self.shared.state.lock();
            let spare = state.engine.end_flush(self.key, ranges, self.failed);
            (spare, state.wake_due())
        };
        drop(spare);
        self.shared.wake(wake);
    }
}

impl<'a, P: Platform> Flush<'a, P> {
    /// `None` where nothing waits. Called under the lock.
    fn begin(shared: &'a Shared<P>, key: DomainKey, state: &mut State) -> Option<Self> {
        let ranges = state.engine.begin_flush(key);
        // Until it is done it may have been dropped.
        let failed = Some(RequestError::TimedOut);
        (!ranges.is_empty()).then(|| Self { shared, key, ranges, next: 0, failed })
    }

    async fn run(mut self) {
        let shared = self.shared;
        self.ranges.sort_unstable_by_key(|deferred| deferred.range.start());
        let mut failed = None;
        // Bounded: each round goes on behind a range.
        while self.next < self.ranges.len() {
            let first = self.next;
            let batch = match shared.with_slot(Need::Slot, |state| self.submit(state)).await {
                Ok(batch) => batch,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            };
            let mut apart = false;
            let each = |state: &mut State, answer| {
                let Err((op, error)) = answer else { return };
                failed = Some(error);
                if let (Op::Unmap { domain, range, .. }, RequestError::Refused(Status::Range)) = (op, error) {
                    state.engine.disown_apart(domain, range);
                    apart = true;
                }
            };
            if let Some(in_flight) = self.begin_waiting(batch, first) {
                in_flight.wait(each).await;
            }
            self.give_back(first);
            if apart {
                self.unmap_apart(first).await;
            }
        }
        self.failed = failed;
    }

    /// Begins and submits ranges while there are slots, and not too many in one stretch. Called under the lock.
    fn submit(&mut self, state: &mut State) -> Batch {
        let mut batch = Batch::default();
        let first = self.next;
        while state.requests.can_submit(false) && self.next < self.ranges.len() && self.next - first < MERGED
        {
            let (count, plan) = state.engine.begin_flush_of(self.key, &self.ranges[self.next..]);
            self.next += count;
            if let Some(UnmapPlan::Send(request, op)) = plan {
                state.submit(&request, op, &mut batch);
            }
        }
        state.publish(Some(self.key), &self.shared.doorbell);
        batch
    }

    /// Rings for the ranges that were sent since `first`, and looks once, as [`Shared::begin`] does.
    fn begin_waiting(&self, mut batch: Batch, first: usize) -> Option<InFlight<'a, P>> {
        let (shared, mut rest) = (self.shared, &self.ranges[first..self.next]);
        shared.ring();
        if let Some(mut state) = shared.state.usual() {
            let State { engine, requests, .. } = &mut *state;
            // Answered in the order in which they were sent. Bounded by the batch.
            while let Some(op) = requests.take_successes(&mut batch, |op| match *op {
                Op::Unmap { range, .. } => engine.flushed(self.key, range, run_of(&mut rest, range)),
                _ => false,
            }) {
                engine.settle(&Completion { op, outcome: Ok(()), abandoned: false });
            }
            if requests.has_left_any() {
                Access::go_on(state).drain();
            }
        }
        shared.in_flight(batch)
    }

    /// Gives memory back that was held for the ranges that were sent since `first`, and is out of the device's reach.
    fn give_back(&self, first: usize) {
        let (shared, key) = (self.shared, self.key);
        if !shared.state.lock().engine.has_released() {
            return;
        }
        let mut rest = &self.ranges[first..self.next];
        while let Some((count, run)) = first_run(rest) {
            rest = &rest[count..];
            while let Some(held) = { shared.state.lock().engine.take_released(key, run) } {
                shared.release(held);
            }
        }
    }

    /// A device that refuses to unmap several mappings at once may have removed some: each is unmapped by itself, and
    /// what the device does not have any more it confirms (I6).
    async fn unmap_apart(&self, first: usize) {
        let (shared, key) = (self.shared, self.key);
        for deferred in &self.ranges[first..self.next] {
            let mut done = None;
            // Bounded: each round goes on behind a mapping.
            while let Some(part) = { shared.state.lock().engine.next_given_up(key, deferred.range, done) } {
                done = Some(part);
                if let Err(error) = reclaim(shared, key, part).await {
                    log::warn!("a mapping stays in quarantine: {error}");
                }
            }
        }
    }
}

/// Takes what one request unmaps off sorted ranges, and what lies before it.
fn run_of<'r>(rest: &mut &'r [Mapped], range: IovaRange) -> &'r [Mapped] {
    let before = rest.iter().take_while(|deferred| deferred.range.start() < range.start()).count();
    let run = &rest[before..];
    let count = run.iter().take_while(|deferred| deferred.range.last() <= range.last()).count();
    let (run, behind) = run.split_at(count);
    *rest = behind;
    run
}
