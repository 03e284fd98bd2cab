//! What the lock protects, and the two ways to it.

use super::{Mapped, Sleepers};
use crate::addr::IovaRange;
use crate::engine::{DomainKey, Engine, ListId, Op, Space, Sum};
use crate::error::RequestError;
use crate::fault::FaultBacklog;
use crate::lock::{Guard, Mutex, RawLock};
use crate::queue::{Batch, Completion, EventQueue, RequestQueue};
use crate::sync::{AtomicBool, Ordering};
use crate::wire::request::Request;
use core::ops::{Deref, DerefMut};

/// Everything that the lock protects.
pub(crate) struct State {
    pub engine: Engine,
    pub requests: RequestQueue,
    pub events: EventQueue,
    pub faults: FaultBacklog,
    /// Whoever waits for a slot.
    pub sleepers: Sleepers,
    /// Why no request can be answered any more, once that is known.
    pub dead: Option<RequestError>,
    /// All but the recovery wait for its end.
    pub paused: bool,
    /// The bypass was closed, and a recovery that failed did not close it again.
    pub bypass_due: bool,
    /// What [`is_usual`](Self::is_usual) said when the lock was last given back.
    usual: bool,
}

impl State {
    pub(crate) fn new(
        engine: Engine,
        requests: RequestQueue,
        events: EventQueue,
        fault_backlog: usize,
    ) -> Self {
        Self {
            engine,
            requests,
            events,
            faults: FaultBacklog::new(fault_backlog),
            sleepers: Sleepers::new(),
            dead: None,
            paused: false,
            bypass_due: false,
            usual: false,
        }
    }

    /// Whether requests are sent and answered without further ado: the device works, and nobody sleeps.
    fn is_usual(&self) -> bool {
        self.dead.is_none() && !self.paused && self.requests.is_usual() && !self.sleepers.has_waiting()
    }

    /// Takes in every answer that is there, in time or late.
    #[inline]
    pub(crate) fn drain(&mut self) {
        while let Some(completion) = self.requests.complete() {
            self.engine.settle(&completion);
        }
    }

    /// Takes note of a request that succeeded in time.
    #[cold]
    pub(crate) fn succeeded(&mut self, op: Op) {
        self.engine.settle(&Completion { op, outcome: Ok(()), abandoned: false });
    }

    /// Takes the first requests of a batch, where all is [usual](Self::is_usual), as far as their successes are the next in
    /// the ring. Bounded by the batch.
    pub(crate) fn take_successes(&mut self, batch: &mut Batch) {
        let Self { engine, requests, .. } = self;
        while let Some(op) = requests.take_successes(batch, |op| engine.confirmed(op)) {
            engine.settle(&Completion { op, outcome: Ok(()), abandoned: false });
        }
    }

    /// The same for MAPs of one domain.
    // By itself: in a future there are too few registers for the loop.
    #[inline(never)]
    pub(crate) fn take_maps(&mut self, key: DomainKey, batch: &mut Batch) {
        let sum = self.take_all(key, batch, |space, op| match *op {
            Op::Map { range, record, .. } if space.confirm_part(record, range) => Some(range),
            _ => None,
        });
        self.engine.count_mapped(key, sum);
    }

    /// The same for UNMAPs of one domain.
    #[inline(never)]
    pub(crate) fn take_unmaps(&mut self, key: DomainKey, batch: &mut Batch) {
        let sum = self.take_all(key, batch, |space, op| match *op {
            Op::Unmap { range, record, .. } if space.end_unmapped_plain(record, range) => Some(range),
            _ => None,
        });
        self.engine.count_unmapped(key, sum);
    }

    /// Takes requests as far as `take` says what they mapped, or unmapped, and those of which there is more to settle by
    /// their way. What was taken in all, but for those.
    #[inline(always)]
    fn take_all(
        &mut self,
        key: DomainKey,
        batch: &mut Batch,
        take: impl Fn(&mut Space, &Op) -> Option<IovaRange>,
    ) -> Sum {
        let (all, mut bytes, mut others) = (batch.len(), 0, 0);
        loop {
            let Self { engine, requests, .. } = self;
            let rest = match engine.space_of_living(key) {
                Some(space) => requests.take_successes(batch, |op| match take(space, op) {
                    Some(range) => {
                        bytes += range.len_of_mapping();
                        true
                    }
                    None => false,
                }),
                None => requests.take_successes(batch, |_| false),
            };
            match rest {
                // What is counted by itself: a list, or one that holds memory.
                Some(op) if engine.confirmed(&op) => {}
                Some(op) => self.succeeded(op),
                None => return Sum { count: (all - batch.len() - others).into(), bytes },
            }
            others += 1;
        }
    }

    /// Takes note of the first so many parts of a list, whose MAPs succeeded in time, one by one.
    #[cold]
    pub(super) fn take_parts(&mut self, key: DomainKey, (whole, list): (Mapped, ListId), count: usize) {
        let mut next = whole.record;
        for _ in 0..count {
            let Some(space) = self.engine.space_of(key) else { break };
            let Some((Mapped { range, record }, behind)) = space.part(next, list) else { break };
            next = behind;
            let op = Op::Map { domain: key, range, record };
            if !self.engine.confirmed(&op) {
                self.succeeded(op);
            }
        }
    }

    /// Puts a request into the ring. The caller made sure of a slot.
    #[inline(always)]
    pub(crate) fn submit(&mut self, request: &Request, op: Op, batch: &mut Batch) {
        let submitted = self.requests.submit(request, op, batch);
        debug_assert!(submitted, "the caller makes sure of a slot");
        self.engine.count_request(op.domain());
    }

    /// Shows the device what was submitted. A doorbell that is due is noted in `doorbell`, to be rung by
    /// [`Shared::ring`] when the lock is dropped, and counted for the domain.
    #[inline]
    pub(crate) fn publish(&mut self, domain: Option<DomainKey>, doorbell: &AtomicBool) {
        if !self.requests.publish() {
            return;
        }
        doorbell.store(true, Ordering::Release);
        if let Some(domain) = domain.and_then(|key| self.engine.domain_mut(key)) {
            domain.counts.kicks += 1;
        }
    }
}

/// The lock around the [`State`].
pub(crate) struct StateLock<L>(Mutex<L, State>);

impl<L: RawLock> StateLock<L> {
    pub(crate) fn new(state: State) -> Self {
        Self(Mutex::new(state))
    }

    /// Takes the lock, to do anything.
    pub(crate) fn lock(&self) -> Access<'_, L> {
        Access(self.0.lock())
    }

    /// Takes the lock where all is [as usual](State::is_usual), which the caller leaves as it is: he sends requests other
    /// than PROBE, and takes answers that are successes.
    #[inline(always)]
    pub(crate) fn usual(&self) -> Option<Guard<'_, L, State>> {
        let state = self.0.lock();
        if state.usual { Some(state) } else { None }
    }

    pub(crate) fn get_mut(&mut self) -> &mut State {
        self.0.get_mut()
    }
}

/// The state, while the lock is held.
pub(crate) struct Access<'a, L: RawLock>(Guard<'a, L, State>);

impl<'a, L: RawLock> Access<'a, L> {
    /// Goes on where all [was usual](StateLock::usual), to do anything.
    #[cold]
    pub(crate) fn go_on(state: Guard<'a, L, State>) -> Self {
        Self(state)
    }
}

impl<L: RawLock> Drop for Access<'_, L> {
    fn drop(&mut self) {
        self.0.usual = self.0.is_usual();
    }
}

impl<L: RawLock> Deref for Access<'_, L> {
    type Target = State;
    fn deref(&self) -> &State {
        &self.0
    }
}

impl<L: RawLock> DerefMut for Access<'_, L> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.0
    }
}
