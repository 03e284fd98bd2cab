//! Sending requests and waiting for their answers, with the lock held only in between.

use crate::addr::IovaRange;
use crate::barrier;
use crate::dma::{HeldMemory, Release};
use crate::engine::{AttachPlan, Attachment, DomainKey, Engine, Op};
use crate::error::{AttachError, DetachError, RequestError};
use crate::fault::FaultBacklog;
use crate::id::EndpointId;
use crate::lock::Mutex;
use crate::options::Options;
use crate::platform::Platform;
use crate::queue::{Batch, EventQueue, Outcome, RequestQueue};
use crate::transport::{DeviceStatus, Transport};
use crate::wire::request::{Request, Status};
use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The queues' numbers.
pub(crate) const REQUEST_QUEUE: u16 = 0;
pub(crate) const EVENT_QUEUE: u16 = 1;

/// Everything that the lock protects.
pub(crate) struct State {
    pub engine: Engine,
    pub requests: RequestQueue,
    pub events: EventQueue,
    pub faults: FaultBacklog,
    /// Requests that were put into the ring.
    pub sent: u64,
    /// Why no request can be answered any more, once that is known.
    pub dead: Option<RequestError>,
}

impl State {
    /// Takes in every answer that is there, in time or late.
    pub(crate) fn drain(&mut self) {
        while let Some(completion) = self.requests.complete() {
            self.engine.settle(&completion);
        }
    }

    /// Puts a request into the ring. The caller made sure of a slot.
    pub(crate) fn submit(&mut self, request: &Request, op: Op, batch: &mut Batch) {
        let submitted = self.requests.submit(request, op, batch);
        debug_assert!(submitted, "the caller makes sure of a slot");
        self.sent += 1;
        if let Some(domain) = op.domain().and_then(|key| self.engine.domain_mut(key)) {
            domain.stats.requests += 1;
        }
    }

    /// Shows the device what was submitted. A doorbell that is due is noted in `doorbell`, to be rung by
    /// [`Shared::ring`] when the lock is dropped, and counted for the domain.
    pub(crate) fn publish(&mut self, domain: Option<DomainKey>, doorbell: &AtomicBool) {
        if !self.requests.publish() {
            return;
        }
        doorbell.store(true, Ordering::Release);
        if let Some(domain) = domain.and_then(|key| self.engine.domain_mut(key)) {
            domain.stats.kicks += 1;
        }
    }
}

/// One IOMMU, shared by all handles.
pub(crate) struct Shared<P: Platform> {
    pub platform: P,
    pub transport: Box<dyn Transport>,
    pub options: Options,
    pub state: Mutex<P::Lock, State>,
    /// Whether the request queue's doorbell is due. Rung by whoever comes first, so that requests are not held
    /// up by a submitter that was interrupted before it rang: with EVENT_IDX the device asks only once.
    pub doorbell: AtomicBool,
    /// How often it was rung.
    pub kicks: AtomicUsize,
    /// Whether the bypass was closed, as far as the device has one.
    pub live: AtomicBool,
    /// What the bypass was when the driver started.
    pub bypass_found: Option<u8>,
    /// Whether the device confirmed a reset after which it has no queues.
    pub forgotten: AtomicBool,
    /// Set by an interrupt, cleared by a poll.
    pub interrupted: AtomicBool,
}

/// Polls without an answer after which the doorbell is rung once more: whoever took it upon himself may have been
/// interrupted, by the very code that waits, just before he rang.
const IMPATIENT_POLLS: u64 = 4096;

/// Whether an operation took a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Nothing,
    Request,
}

/// When a wait ends. The clock is first read after a poll found nothing.
pub(crate) struct Deadline {
    ends_ns: Option<u64>,
    polls: u64,
}

impl Deadline {
    pub(crate) fn new() -> Self {
        Self { ends_ns: None, polls: 0 }
    }

    /// Whether it passed, after one more poll that found nothing.
    pub(crate) fn passed<P: Platform>(&mut self, platform: &P, options: &Options) -> bool {
        self.polls += 1;
        match platform.now_ns() {
            // The polls count even so: a clock may stand still.
            Some(now) => {
                let ends = *self.ends_ns.get_or_insert(now.saturating_add(options.timeout_ns));
                now >= ends || self.polls >= options.max_polls
            }
            None => self.polls >= options.max_polls,
        }
    }
}

impl<P: Platform> Shared<P> {
    /// Runs `work` under the lock once a request (a PROBE, if `probe`) can be submitted.
    pub(crate) fn with_slot<R>(
        &self,
        probe: bool,
        work: impl FnOnce(&mut State) -> R,
    ) -> Result<R, RequestError> {
        let mut deadline = Deadline::new();
        loop {
            let mut state = self.state.lock();
            if let Some(dead) = state.dead {
                return Err(dead);
            }
            if state.requests.can_submit(probe) {
                return Ok(work(&mut state));
            }
            state.drain();
            if state.requests.can_submit(probe) {
                return Ok(work(&mut state));
            }
            if let Some(broken) = state.requests.broken() {
                state.dead = Some(broken);
                return Err(broken);
            }
            drop(state);
            if deadline.passed(&self.platform, &self.options) {
                return Err(RequestError::NoSlot);
            }
            self.platform.relax();
        }
    }

    /// Rings the request queue's doorbell if it is due. Called without the lock.
    pub(crate) fn ring(&self) {
        if self.doorbell.swap(false, Ordering::AcqRel) {
            self.kicks.fetch_add(1, Ordering::Relaxed);
            barrier::memory_before_doorbell();
            self.transport.notify(REQUEST_QUEUE);
        }
    }

    /// Waits for every request of the batch, and hands over each outcome. Requests that the deadline catches in
    /// flight are given up on: they and what they touch stay with the device.
    pub(crate) fn wait(&self, mut batch: Batch, mut each: impl FnMut(&mut State, Op, Outcome)) {
        let mut deadline = Deadline::new();
        loop {
            {
                let mut state = self.state.lock();
                state.drain();
                while let Some((op, outcome)) = state.requests.take(&mut batch) {
                    each(&mut state, op, outcome);
                }
                if batch.is_empty() {
                    return;
                }
                // No answer comes any more; and after a shutdown the doorbell is not ours.
                if state.requests.broken().is_some() || state.dead == Some(RequestError::ShutDown) {
                    break;
                }
            }
            if deadline.passed(&self.platform, &self.options) {
                break;
            }
            if deadline.polls == IMPATIENT_POLLS.min(self.options.max_polls / 2) {
                self.doorbell.store(true, Ordering::Release);
                self.ring();
            }
            self.platform.relax();
        }
        let needs_reset = self.transport.status().contains(DeviceStatus::NEEDS_RESET);
        let mut state = self.state.lock();
        // An answer may have come between the last look and now.
        state.drain();
        let needs_reset = needs_reset.then_some(RequestError::NeedsReset);
        let dead = state.requests.broken().or(needs_reset);
        state.dead = state.dead.or(dead);
        // Not that the driver was shut down meanwhile: these requests were sent, and their outcome is unknown.
        let why = dead.unwrap_or(RequestError::TimedOut);
        for _ in 0..batch.len() {
            if let Some((op, outcome)) = state.requests.take(&mut batch) {
                each(&mut state, op, outcome);
            } else if let Some(op) = state.requests.abandon(&mut batch) {
                state.engine.lose(op);
                each(&mut state, op, Err(why));
            }
        }
    }

    /// Submits one request and publishes it. Called under the lock.
    pub(crate) fn submit_one(&self, state: &mut State, request: &Request, op: Op) -> Batch {
        let mut batch = Batch::default();
        state.submit(request, op, &mut batch);
        state.publish(op.domain(), &self.doorbell);
        batch
    }

    /// Rings for a batch of one, and waits for its outcome.
    pub(crate) fn finish(&self, batch: Batch) -> Outcome {
        self.ring();
        let mut result = Err(RequestError::NoSlot);
        self.wait(batch, |_, _, outcome| result = outcome);
        result
    }

    /// Whether the device confirmed that the endpoint is in this domain.
    pub(crate) fn is_attached(&self, endpoint: EndpointId, key: DomainKey) -> bool {
        let state = self.state.lock();
        let record = state.engine.endpoint(endpoint);
        record.is_some_and(|record| record.attachment == Attachment::Attached(key))
    }

    /// Attaches an endpoint that is known. Says whether that took a request.
    pub(crate) fn attach(&self, endpoint: EndpointId, key: DomainKey) -> Result<Sent, AttachError> {
        let failed = |error| AttachError::Request { endpoint, error };
        if self.is_attached(endpoint, key) {
            return Ok(Sent::Nothing);
        }
        let begun = self.with_slot(false, |state| {
            Ok(match state.engine.begin_attach(endpoint, key)? {
                AttachPlan::Nothing => None,
                AttachPlan::Send(request, op) => Some(self.submit_one(state, &request, op)),
            })
        });
        let Some(batch) = begun.map_err(failed)?? else { return Ok(Sent::Nothing) };
        self.finish(batch).map_err(failed)?;
        if self.state.lock().engine.begin_replay(key) {
            let replayed = self.replay(key);
            self.state.lock().engine.end_transition(key);
            if let Err((range, error)) = replayed {
                if let Err(error) = self.detach(endpoint) {
                    log::error!("endpoint {endpoint} stays attached: {error}");
                }
                return Err(AttachError::Replay { endpoint, range, error });
            }
        }
        Ok(Sent::Request)
    }

    /// Maps again what a domain lost when it died: one request each, one doorbell for as many as the ring takes.
    fn replay(&self, key: DomainKey) -> Result<(), (IovaRange, RequestError)> {
        let everything = IovaRange::WHOLE;
        let mut done = None;
        loop {
            let batch = self.with_slot(false, |state| {
                let mut batch = Batch::default();
                while state.requests.can_submit(false) {
                    let Some((request, op, start)) = state.engine.next_replay(key, done) else { break };
                    state.submit(&request, op, &mut batch);
                    done = Some(start);
                }
                state.publish(Some(key), &self.doorbell);
                batch
            });
            let batch = batch.map_err(|error| (everything, error))?;
            if batch.is_empty() {
                return Ok(());
            }
            self.ring();
            let mut result = Ok(());
            self.wait(batch, |_, op, outcome| {
                if let (Op::Replay { range, .. }, Err(error), Ok(())) = (op, outcome, result) {
                    result = Err((range, error));
                }
            });
            result?;
        }
    }

    pub(crate) fn detach(&self, endpoint: EndpointId) -> Result<(), DetachError> {
        let failed = |error| DetachError::Request { endpoint, error };
        let begun = self.with_slot(false, |state| {
            let (request, op) = state.engine.begin_detach(endpoint)?;
            Ok(self.submit_one(state, &request, op))
        });
        match self.finish(begun.map_err(failed)??) {
            // Unplugged: it is in no domain any more.
            Ok(()) | Err(RequestError::Refused(Status::NoEnt)) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    /// Gives memory back that no device reaches any more. Called without the lock.
    pub(crate) fn release(&self, held: HeldMemory) {
        let (memory, release) = held.into_parts();
        match release {
            // SAFETY: the memory came from `dma_alloc` with this alignment, and its record, which was the only
            // thing that held it, said that the device cannot reach it any more.
            Release::Platform { align } => unsafe { self.platform.dma_free(memory, align) },
            // SAFETY: whoever made the held memory promised that this takes it back, and it is called once.
            Release::Hook(hook) => unsafe { hook(memory) },
        }
    }
}
