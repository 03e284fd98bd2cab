//! Getting a device back that stopped: one queue by its own reset, or all of it.
//!
//! ```text
//!   reset_queues: queue reset -> what was in flight is of unknown outcome -> queue enabled
//!                 domains and mappings stay; reclaim() unmaps what nobody owns
//!   recover:      device reset -> features and configuration as before, or not at all -> queues -> DRIVER_OK
//!                 -> bypass closed again -> each domain under a fresh number: PROBE and ATTACH of every endpoint
//!                 -> only then is what it had before gone -> its live mappings are replayed
//! ```
//! Meanwhile nothing else is sent: other operations wait.

use crate::barrier;
use crate::engine::{DomainKey, Engine, Op, Revival};
use crate::error::{AttachError, BypassError, RequestError, StartError};
use crate::exchange::{Deadline, EVENT_QUEUE, Need, REQUEST_QUEUE, Shared, Wake};
use crate::id::EndpointId;
use crate::platform::Platform;
use crate::queue::Outcome;
use crate::start::{enable, negotiate, reset, set_running};
use crate::transport::{DeviceStatus, TransportError};
use crate::viommu::Viommu;
use crate::wire::feature::Features;
use crate::wire::request::{Request, Status};
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::Ordering;

/// What a recovery brought back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Endpoints that are in their domains again.
    pub endpoints: usize,
    /// Endpoints that are in no domain any more, since it was not known before whether they were.
    pub detached: usize,
    /// Endpoints that did not come back, and why. Their bus mastering must stay off. What their domains had mapped
    /// stays in quarantine, unless a later recovery brings them back.
    pub lost: Vec<(EndpointId, AttachError)>,
}

/// The device could not be recovered. Nothing is sent to it, and nothing was given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecoverError {
    /// The driver was shut down.
    ShutDown,
    /// Another recovery is under way.
    Busy,
    /// RING_RESET was not negotiated: only [`Viommu::recover`] helps.
    NoRingReset,
    /// The device asks for a reset of all of it, maybe again: [`Viommu::recover`].
    NeedsReset,
    /// A queue could not be reset or enabled again.
    Queue(TransportError),
    /// A queue was not reset before the deadline.
    QueueTimedOut {
        /// The queue.
        queue: u16,
    },
    /// The device could not be started again.
    Start(StartError),
    /// The device has other features than before the reset, or another configuration.
    Changed {
        /// What it would have now.
        features: Features,
    },
    /// The bypass could not be closed again.
    Bypass(BypassError),
}

impl fmt::Display for RecoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ShutDown => f.write_str("the driver was shut down"),
            Self::Busy => f.write_str("a recovery is under way already"),
            Self::NoRingReset => f.write_str("the device, or its transport, cannot reset a queue by itself"),
            Self::NeedsReset => f.write_str("the device asks for a reset of all of it"),
            Self::Queue(error) => error.fmt(f),
            Self::QueueTimedOut { queue } => write!(f, "queue {queue} was not reset before the deadline"),
            Self::Start(error) => error.fmt(f),
            Self::Changed { features } => {
                write!(f, "the device is another one after its reset: features {features}")
            }
            Self::Bypass(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for RecoverError {}

/// As long as it exists all but the recovery wait.
pub(crate) struct Pause<'a, P: Platform>(&'a Shared<P>);

impl<'a, P: Platform> Pause<'a, P> {
    pub(crate) fn new(shared: &'a Shared<P>) -> Result<Self, RecoverError> {
        let mut state = shared.state.lock();
        if state.dead == Some(RequestError::ShutDown) {
            return Err(RecoverError::ShutDown);
        }
        if core::mem::replace(&mut state.paused, true) {
            return Err(RecoverError::Busy);
        }
        drop(state);
        Ok(Self(shared))
    }
}

impl<P: Platform> Drop for Pause<'_, P> {
    fn drop(&mut self) {
        self.0.state.lock().paused = false;
        self.0.wake(Wake::All);
    }
}

impl<P: Platform> Viommu<P> {
    /// Resets the request queue (virtio 1.4, virtqueue reset), and the event queue if it is broken, where the
    /// device keeps requests that it does not answer. Domains, attachments and mappings stay. What was in flight is
    /// of unknown outcome, and in quarantine; [`reclaim`](Self::reclaim) tries to unmap it.
    ///
    /// Waits for the reset; other operations wait meanwhile. Needs [`Features::RING_RESET`].
    ///
    /// # Errors
    /// [`RecoverError`]. After [`RecoverError::QueueTimedOut`] nothing is sent any more: [`recover`](Self::recover).
    pub fn reset_queues(&self) -> Result<(), RecoverError> {
        let shared = &self.shared;
        let pause = Pause::new(shared)?;
        if !self.features().contains(Features::RING_RESET) {
            return Err(RecoverError::NoRingReset);
        }
        let dead = { shared.state.lock().dead };
        let lost = dead.is_some_and(|why| !matches!(why, RequestError::RingBroken { .. }));
        if lost || shared.needs_reset() {
            shared.end_while_paused(RequestError::NeedsReset);
            return Err(RecoverError::NeedsReset);
        }
        self.reset_queue(REQUEST_QUEUE)?;
        shared.forget_requests();
        if shared.state.lock().events.is_broken() {
            self.reset_queue(EVENT_QUEUE).inspect_err(|_| {
                // The other one has no ring now.
                shared.end_while_paused(RequestError::NeedsReset);
            })?;
            shared.state.lock().events.restart();
            self.enable_queue(EVENT_QUEUE)?;
            self.post_events();
        }
        self.enable_queue(REQUEST_QUEUE)?;
        shared.state.lock().dead = None;
        drop(pause);
        self.collect();
        Ok(())
    }

    fn reset_queue(&self, queue: u16) -> Result<(), RecoverError> {
        let shared = &self.shared;
        shared.transport.reset_queue(queue).map_err(RecoverError::Queue)?;
        let mut deadline = Deadline::new();
        loop {
            let error = match shared.transport.queue_is_reset(queue) {
                Ok(true) => return Ok(()),
                Ok(false) if deadline.passed(&shared.platform, &shared.options) => {
                    RecoverError::QueueTimedOut { queue }
                }
                Ok(false) => {
                    shared.platform.relax();
                    continue;
                }
                Err(error) => RecoverError::Queue(error),
            };
            // The device may still have what is in flight, and may not look at the queue.
            shared.end_while_paused(RequestError::NeedsReset);
            return Err(error);
        }
    }

    fn enable_queue(&self, queue: u16) -> Result<(), RecoverError> {
        let shared = &self.shared;
        let (size, addresses) = {
            let state = shared.state.lock();
            let ring = if queue == REQUEST_QUEUE { state.requests.ring() } else { state.events.ring() };
            (ring.size(), ring.addresses())
        };
        let max = shared.transport.max_queue_size(queue);
        let enabled = match max < size {
            true => Err(StartError::QueueTooSmall { queue, size: max }),
            false => enable(&*shared.transport, queue, size, addresses),
        };
        if queue == REQUEST_QUEUE {
            shared.request_doorbell.set(shared.transport.doorbell(queue));
        }
        enabled.map_err(|error| {
            shared.end_while_paused(RequestError::NeedsReset);
            RecoverError::Start(error)
        })
    }

    fn post_events(&self) {
        if self.shared.state.lock().events.publish() {
            barrier::memory_before_doorbell();
            self.shared.transport.notify(EVENT_QUEUE);
        }
    }

    /// Resets the device (virtio 1.4, device initialization) and brings it back as it was: the same features,
    /// bypass and domains, every endpoint in its domain, every live mapping at its address. What was in quarantine
    /// goes back to its owners, as far as all endpoints of its domain came back. What was in flight ends in
    /// [`RequestError::Reset`].
    ///
    /// For a device that asks for a reset ([`RequestError::NeedsReset`]), broke its ring, or does not answer. Waits;
    /// other operations wait meanwhile. Allocates. Futures that are not polled keep their slots: one has to be free.
    ///
    /// # Errors
    /// [`RecoverError`]; it can be tried again. Single endpoints that did not come back are in [`Recovered::lost`].
    ///
    /// # Safety
    /// No endpoint does DMA, nor will before this returned: their bus mastering is off. Between its reset and the
    /// end of this function the device may let them reach all of memory.
    pub unsafe fn recover(&self) -> Result<Recovered, RecoverError> {
        let shared = &self.shared;
        let pause = Pause::new(shared)?;
        // Whoever waits for an answer finds out that none comes.
        shared.end_while_paused(RequestError::NeedsReset);
        self.restart()?;
        self.reintroduce();
        let mut recovered = Recovered::default();
        let mut done = None;
        // Bounded: each round goes to a later place.
        while let Some((place, key)) = { shared.state.lock().engine.next_to_revive(done) } {
            done = Some(place);
            self.revive(key, &mut recovered);
        }
        if shared.needs_reset() || shared.state.lock().dead.is_some() {
            shared.end_while_paused(RequestError::NeedsReset);
            return Err(RecoverError::NeedsReset);
        }
        // What gives memory back may call the driver.
        drop(pause);
        self.collect();
        Ok(recovered)
    }

    /// Resets and starts the device, with the same queues.
    fn restart(&self) -> Result<(), RecoverError> {
        let shared = &self.shared;
        let transport = &*shared.transport;
        let closed = {
            let mut state = shared.state.lock();
            // Nothing goes back on the strength of a bypass that is not known to be closed (I1).
            state.bypass_due |= core::mem::take(&mut state.engine.bypass_closed);
            state.bypass_due
        };
        if closed {
            shared.live.store(false, Ordering::Release);
        }
        reset(transport, &shared.platform, &shared.options).map_err(RecoverError::Start)?;
        shared.forget_requests();
        shared.state.lock().events.restart();
        let fail = |error| {
            transport.set_status(transport.status() | DeviceStatus::FAILED);
            Err(error)
        };
        match negotiate(transport, &shared.platform, &shared.options) {
            Ok((geometry, features, probe_size)) => {
                if !self.is_same(geometry, features, probe_size) {
                    return fail(RecoverError::Changed { features });
                }
            }
            Err(error) => return fail(RecoverError::Start(error)),
        }
        self.enable_queue(REQUEST_QUEUE)?;
        self.enable_queue(EVENT_QUEUE)?;
        set_running(transport).map_err(RecoverError::Start)?;
        self.post_events();
        if closed {
            self.write_bypass(0).map_err(RecoverError::Bypass)?;
            let mut state = shared.state.lock();
            state.bypass_due = false;
            state.engine.close_bypass();
            drop(state);
            shared.live.store(true, Ordering::Release);
        }
        shared.state.lock().dead = None;
        Ok(())
    }

    /// Probes the endpoints again that are in no domain (D-07). Those of domains are probed when they are readmitted.
    fn reintroduce(&self) {
        let shared = &self.shared;
        let mut done = None;
        // Bounded: each round goes to a higher number.
        while let Some(endpoint) = { shared.state.lock().engine.next_detached(done) } {
            done = Some(endpoint);
            match shared.block_on(self.probe(endpoint, Need::RecoveryProbe)) {
                Ok(mut reserved) => shared.state.lock().engine.reintroduce(endpoint, &mut reserved),
                // Unplugged. Two statements, so that the record is dropped without the lock.
                Err(AttachError::Request { error: RequestError::Refused(Status::NoEnt), .. }) => {
                    let record = shared.state.lock().engine.forget(endpoint);
                    drop(record);
                }
                // What it said before holds. It is not attached now, and a device that is ill is noticed below.
                Err(error) => log::warn!("{error}"),
            }
        }
    }

    /// Puts the endpoints of a domain into it again, and its mappings.
    fn revive(&self, key: DomainKey, recovered: &mut Recovered) {
        let shared = &self.shared;
        let Some(revival) = ({ shared.state.lock().engine.begin_revival(key) }) else { return };
        let failed = |endpoint| move |error| AttachError::Request { endpoint, error };
        if !revival.fresh {
            // There is no other number: the old domain has to die first.
            self.for_each_endpoint(key, |endpoint, _| {
                if let Err(error) = self.leave(endpoint, revival) {
                    recovered.lost.push((endpoint, failed(endpoint)(error)));
                }
            });
        }
        let mut uncertain = Vec::new();
        let hopeless = recovered.lost.len();
        self.for_each_endpoint(key, |endpoint, certain| {
            if recovered.lost[..hopeless].iter().any(|(lost, _)| *lost == endpoint) {
                return;
            }
            match self.readmit(endpoint, key, revival) {
                Ok(()) if certain => recovered.endpoints += 1,
                Ok(()) => uncertain.push(endpoint),
                // Unplugged.
                Err(AttachError::Request { error: RequestError::Refused(Status::NoEnt), .. }) => {}
                Err(error) => recovered.lost.push((endpoint, error)),
            }
        });
        let whole = { shared.state.lock().engine.end_revival(key, revival) };
        let whole = whole && shared.state.lock().engine.has_endpoint(key);
        if whole && let Err(unreplayed) = shared.block_on(shared.replay(key, Need::RecoverySlot)) {
            self.for_each_attached(key, |endpoint| {
                let error = unreplayed.keeps_out(endpoint);
                log::error!("{error}");
                recovered.endpoints = recovered.endpoints.saturating_sub(1);
                recovered.lost.push((endpoint, error));
                uncertain.push(endpoint);
            });
        }
        for endpoint in uncertain {
            match self.request(|engine| engine.begin_detach(endpoint).ok()) {
                Ok(()) | Err(RequestError::Refused(Status::NoEnt)) => recovered.detached += 1,
                Err(error) => recovered.lost.push((endpoint, failed(endpoint)(error))),
            }
        }
    }

    /// Visits those that are to be readmitted, in the order of their numbers.
    fn for_each_endpoint(&self, key: DomainKey, mut visit: impl FnMut(EndpointId, bool)) {
        let mut done = None;
        while let Some((endpoint, certain)) = { self.shared.state.lock().engine.next_to_readmit(key, done) } {
            done = Some(endpoint);
            visit(endpoint, certain);
        }
    }

    fn for_each_attached(&self, key: DomainKey, mut visit: impl FnMut(EndpointId)) {
        let mut done = None;
        while let Some(endpoint) = { self.shared.state.lock().engine.next_attached(done) } {
            done = Some(endpoint);
            if self.shared.is_attached(endpoint, key) {
                visit(endpoint);
            }
        }
    }

    fn readmit(&self, endpoint: EndpointId, key: DomainKey, revival: Revival) -> Result<(), AttachError> {
        let shared = &self.shared;
        let failed = |error| AttachError::Request { endpoint, error };
        if shared.needs_reset() {
            return Err(failed(RequestError::NeedsReset));
        }
        // It was the first life's PROBE that said what is reserved (D-07).
        match shared.block_on(self.probe(endpoint, Need::RecoveryProbe)) {
            Ok(mut reserved) => {
                let renewed = { shared.state.lock().engine.renew_reserved(endpoint, key, &mut reserved) };
                renewed?;
            }
            // Unplugged, if ATTACH says so too: only that takes it out of its domain.
            Err(error) if error == failed(RequestError::Refused(Status::NoEnt)) => {}
            Err(error) => return Err(error),
        }
        let mut outcome = self.request(|engine| engine.begin_readmission(endpoint, key));
        // A device that cannot move endpoints, and kept the old domain.
        if revival.fresh && matches!(outcome, Err(RequestError::Refused(Status::Unsupp | Status::Inval))) {
            self.leave(endpoint, revival).map_err(failed)?;
            outcome = self.request(|engine| engine.begin_readmission(endpoint, key));
        }
        outcome.map_err(failed)
    }

    /// Takes an endpoint out of the domain that it may still be in.
    fn leave(&self, endpoint: EndpointId, revival: Revival) -> Outcome {
        let request = Request::Detach { domain: revival.old, endpoint };
        match self.request(|_| Some((request, Op::None))) {
            // It is in no domain, or in none that has this number.
            Err(RequestError::Refused(Status::Inval | Status::NoEnt)) => Ok(()),
            outcome => outcome,
        }
    }

    fn request(&self, begin: impl FnOnce(&mut Engine) -> Option<(Request, Op)>) -> Outcome {
        let shared = &self.shared;
        let begun = shared.with_slot(Need::RecoverySlot, |state| {
            let (request, op) = begin(&mut state.engine)?;
            Some(shared.submit_one(state, &request, op))
        });
        match shared.block_on(begun)? {
            Some(batch) => shared.block_on(shared.finish(batch)),
            None => Err(RequestError::NoSlot),
        }
    }
}

impl<P: Platform> Shared<P> {
    /// The device forgot the request queue: what it did not answer it never will.
    fn forget_requests(&self) {
        let mut state = self.state.lock();
        // What it answered before counts.
        state.drain();
        // Bounded: each round takes one slot from the device.
        while let Some((op, abandoned)) = state.requests.forget_one() {
            if !abandoned {
                state.engine.lose(op);
            }
        }
        state.engine.nothing_in_flight();
        state.requests.restart();
        self.doorbell.store(false, Ordering::Release);
    }

    /// Nothing is sent any more, but by the recovery that pauses the others.
    fn end_while_paused(&self, why: RequestError) {
        self.state.lock().dead = Some(why);
        self.wake(Wake::All);
    }
}
