//! Sending requests and waiting for their answers, with the lock held only in between.

use crate::barrier;
use crate::dma::{HeldMemory, Release};
use crate::engine::{AttachPlan, DomainKey, Engine, Op};
use crate::error::{AttachError, DetachError, RequestError};
use crate::fault::FaultBacklog;
use crate::id::EndpointId;
use crate::lock::Mutex;
use crate::options::Options;
use crate::platform::Platform;
use crate::queue::{Batch, EventQueue, Outcome, RequestQueue};
use crate::transport::{DeviceStatus, Transport};
use crate::wire::request::Request;
use alloc::boxed::Box;
use core::sync::atomic::AtomicBool;

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
    /// Doorbells of the request queue.
    pub kicks: u64,
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

    /// Shows the device what was submitted. The doorbell, if due, is counted for the domain.
    #[must_use = "the doorbell is rung by the caller, without the lock"]
    pub(crate) fn publish(&mut self, domain: Option<DomainKey>) -> Doorbell {
        if !self.requests.publish() {
            return Doorbell::NotDue;
        }
        self.kicks += 1;
        if let Some(domain) = domain.and_then(|key| self.engine.domain_mut(key)) {
            domain.stats.kicks += 1;
        }
        Doorbell::Due
    }
}

/// Whether the device wants to be notified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doorbell {
    Due,
    NotDue,
}

/// One IOMMU, shared by all handles.
pub(crate) struct Shared<P: Platform> {
    pub platform: P,
    pub transport: Box<dyn Transport>,
    pub options: Options,
    pub state: Mutex<P::Lock, State>,
    /// Held around register accesses that must not interleave.
    pub control: Mutex<P::Lock, ()>,
    /// Set by an interrupt, cleared by a poll.
    pub interrupted: AtomicBool,
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
            Some(now) => now >= *self.ends_ns.get_or_insert(now.saturating_add(options.timeout_ns)),
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
            if state.requests.can_submit(probe) {
                return Ok(work(&mut state));
            }
            state.drain();
            if state.requests.can_submit(probe) {
                return Ok(work(&mut state));
            }
            drop(state);
            if deadline.passed(&self.platform, &self.options) {
                return Err(RequestError::NoSlot);
            }
            self.platform.relax();
        }
    }

    /// Rings the request queue's doorbell if it is due. Called without the lock.
    pub(crate) fn ring(&self, doorbell: Doorbell) {
        if doorbell == Doorbell::Due {
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
                if state.requests.is_broken() {
                    break;
                }
            }
            if deadline.passed(&self.platform, &self.options) {
                break;
            }
            self.platform.relax();
        }
        let needs_reset = self.transport.status().contains(DeviceStatus::NEEDS_RESET);
        let mut state = self.state.lock();
        // An answer may have come between the last look and now.
        state.drain();
        for _ in 0..batch.len() {
            let Some((op, outcome, lost)) = state.requests.abandon(&mut batch, needs_reset) else { return };
            if lost {
                state.engine.lose(op);
            }
            each(&mut state, op, outcome);
        }
    }

    /// Sends one request and waits for its outcome.
    pub(crate) fn transact(&self, request: Request, op: Op) -> Outcome {
        let probe = matches!(request, Request::Probe { .. });
        let (batch, doorbell) = self.with_slot(probe, |state| {
            let mut batch = Batch::default();
            state.submit(&request, op, &mut batch);
            (batch, state.publish(op.domain()))
        })?;
        self.finish(batch, doorbell)
    }

    /// Rings for a batch of one, and waits for its outcome.
    fn finish(&self, batch: Batch, doorbell: Doorbell) -> Outcome {
        self.ring(doorbell);
        let mut result = Err(RequestError::NoSlot);
        self.wait(batch, |_, _, outcome| result = outcome);
        result
    }

    /// Attaches an endpoint that is known.
    pub(crate) fn attach(&self, endpoint: EndpointId, key: DomainKey) -> Result<(), AttachError> {
        let failed = |error| AttachError::Request { endpoint, error };
        let begun = self.with_slot(false, |state| {
            let mut batch = Batch::default();
            Ok(match state.engine.begin_attach(endpoint, key)? {
                AttachPlan::Nothing => None,
                AttachPlan::Send(request, op) => {
                    state.submit(&request, op, &mut batch);
                    Some((batch, state.publish(Some(key))))
                }
            })
        });
        let Some((batch, doorbell)) = begun.map_err(failed)?? else { return Ok(()) };
        self.finish(batch, doorbell).map_err(failed)
    }

    pub(crate) fn detach(&self, endpoint: EndpointId) -> Result<(), DetachError> {
        let failed = |error| DetachError::Request { endpoint, error };
        let begun = self.with_slot(false, |state| {
            let mut batch = Batch::default();
            let (request, op) = state.engine.begin_detach(endpoint)?;
            state.submit(&request, op, &mut batch);
            Ok((batch, state.publish(op.domain())))
        });
        let (batch, doorbell) = begun.map_err(failed)??;
        self.finish(batch, doorbell).map_err(failed)
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
