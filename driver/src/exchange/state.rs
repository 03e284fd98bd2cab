//! What the lock protects, and the two ways to it.

use super::Sleepers;
use crate::engine::{DomainKey, Engine, Op};
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
    #[inline]
    pub(crate) fn take_successes(&mut self, batch: &mut Batch) {
        let Self { engine, requests, .. } = self;
        while let Some(op) = requests.next_op(batch) {
            let mut confirming = op.domain().and_then(|key| engine.confirming(key));
            // Why it ends: what more there is to do.
            let rest = loop {
                let Some(op) = requests.take_next(batch) else { break None };
                let done = confirming.as_mut().is_some_and(|confirming| confirming.take(op));
                if !done {
                    break Some(*op);
                }
            };
            if let Some(confirming) = confirming {
                confirming.end();
            }
            match rest {
                Some(op) => engine.settle(&Completion { op, outcome: Ok(()), abandoned: false }),
                None => return,
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
