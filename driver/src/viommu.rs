//! The handle that a kernel embeds.

use crate::addr::IovaRange;
use crate::barrier;
use crate::domain::Domain;
use crate::engine::{DeferredList, Engine, Geometry, Limits};
use crate::error::{DomainError, RequestError, StartError};
use crate::exchange::{self, EVENT_QUEUE, Shared};
use crate::fault::FaultCounts;
use crate::id::EndpointId;
use crate::options::{DomainKind, DomainOptions, Options, UnmapPolicy};
use crate::platform::Platform;
use crate::queue::Event;
use crate::start::{Staged, Unattached};
use crate::transport::Transport;
use crate::wire::fault::Fault;
use crate::wire::feature::Features;
use crate::wire::property::ReservedRegion;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::future::poll_fn;
use core::sync::atomic::Ordering;
use core::task::Poll;

/// A running virtio-iommu. Clones are handles to the same device; it is `Send` and `Sync` and fits a static cell.
///
/// # Context
/// Operations that send a request wait for the answer, polling, for at most
/// [`Options::timeout_ns`]. They take the platform's lock for short, bounded stretches and never while waiting
/// or ringing. Methods allocate only where they say so.
pub struct Viommu<P: Platform> {
    pub(crate) shared: Arc<Shared<P>>,
    features: Features,
    geometry: Geometry,
    pub(crate) probe_size: usize,
}

impl<P: Platform> Clone for Viommu<P> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), ..*self }
    }
}

/// What the driver and the device did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests that were put into the ring.
    pub requests: u64,
    /// Doorbells of the request queue that were rung.
    pub kicks: u64,
    /// ATTACH requests that the device confirmed.
    pub attaches: u64,
    /// DETACH requests that the device confirmed.
    pub detaches: u64,
    /// MAP requests that the device confirmed.
    pub maps: u64,
    /// UNMAP requests that the device confirmed.
    pub unmaps: u64,
    /// Requests that were given up on and still belong to the device.
    pub abandoned_requests: u64,
    /// Mappings in quarantine: the device may still have them, and nobody uses them.
    pub quarantined_mappings: usize,
    /// The bytes of those mappings.
    pub quarantined_bytes: u64,
    /// Answers that named no request in flight.
    pub stray_answers: u64,
    /// Fault records.
    pub faults: FaultCounts,
}

/// What [`Viommu::on_interrupt`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// The line was pulled by another device.
    NotOurs,
    /// Ours, and [`Viommu::poll`] is due already.
    Handled,
    /// Ours: [`Viommu::poll`] is due now, outside of the handler.
    Wake,
}

impl<P: Platform> Viommu<P> {
    /// Resets and starts the device behind `transport`, without closing its bypass yet.
    ///
    /// Waits for the reset. Allocates, and takes memory for the queues from the platform.
    ///
    /// # Errors
    /// [`StartError`]; the device is then reset or marked as failed.
    pub fn start(
        transport: impl Transport + 'static,
        platform: P,
        options: Options,
    ) -> Result<Staged<P>, StartError> {
        crate::start::start(Box::new(transport), platform, options)
    }

    /// Whether the device, started again, is what it was.
    pub(crate) fn is_same(&self, geometry: Geometry, features: Features, probe_size: u32) -> bool {
        (geometry, features, probe_size as usize) == (self.geometry, self.features, self.probe_size)
    }

    pub(crate) fn new(
        shared: Arc<Shared<P>>,
        features: Features,
        geometry: Geometry,
        probe_size: usize,
    ) -> Self {
        Self { shared, features, geometry, probe_size }
    }

    /// The features in effect.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The smallest mapping in bytes, a power of two. All mappings are multiples of it.
    pub fn granule(&self) -> u64 {
        self.geometry.granule
    }

    /// The IOVAs that can be mapped: the device's input range in whole granules, without the last granule of
    /// the 64-bit space.
    pub fn input_range(&self) -> IovaRange {
        self.geometry.usable
    }

    /// The first and last domain number.
    pub fn domain_range(&self) -> (u32, u32) {
        self.geometry.domain_ids
    }

    /// What an endpoint that is not attached can reach.
    pub fn unattached(&self) -> Unattached {
        match self.shared.live.load(Ordering::Acquire) {
            _ if self.features.contains(Features::BYPASS) => Unattached::Bypasses,
            false => Unattached::Bypasses,
            true if self.features.contains(Features::BYPASS_CONFIG) => Unattached::Blocked,
            true => Unattached::BlockedByDevice,
        }
    }

    /// The reserved regions of an endpoint that is known, as its PROBE gave them (virtio 1.4, IOMMU device, RESV_MEM
    /// property).
    pub fn reserved_regions(&self, endpoint: EndpointId) -> Option<Arc<[ReservedRegion]>> {
        let state = self.shared.state.lock();
        state.engine.endpoint(endpoint).map(|record| Arc::clone(&record.reserved))
    }

    /// Faults that the device reported for an endpoint.
    pub fn fault_count(&self, endpoint: EndpointId) -> u64 {
        self.shared.state.lock().engine.endpoint(endpoint).map_or(0, |record| record.faults)
    }

    /// Creates a domain, which exists for the device once an endpoint is attached. Allocates its records.
    ///
    /// # Errors
    /// [`DomainError`], when all domains or all numbers are in use, or the device has no identity domains.
    pub fn create_domain(&self, options: DomainOptions) -> Result<Domain<P>, DomainError> {
        if options.kind == DomainKind::Identity && !self.features.contains(Features::BYPASS_CONFIG) {
            return Err(DomainError::NoIdentity);
        }
        #[cfg(feature = "contexts")]
        if matches!(options.kind, DomainKind::Contexts(_)) && !self.features.contains(Features::CONTEXTS) {
            return Err(DomainError::NoContexts);
        }
        let limits = Limits::new(&self.shared.options);
        let deferred = match options.unmap {
            UnmapPolicy::Strict => None,
            UnmapPolicy::Deferred(bounds) => Some(DeferredList::new(bounds)),
        };
        let due = deferred.as_ref().map(DeferredList::due);
        let (mappings, kind) = (options.mappings, options.kind);
        let mut prepared = Some(Engine::prepare_domain(&self.geometry, limits, mappings, kind, deferred));
        let key = self.shared.state.lock().engine.create_domain(&mut prepared)?;
        Ok(Domain::new(Arc::clone(&self.shared), key, options.unmap, due))
    }

    /// Takes in what the device sent: answers, late ones too, and faults. Wakes futures whose answer is there, or whose
    /// deadline passed. Gives back memory whose quarantine ended. Flushes domains whose deferred mappings are older than
    /// their bound, and waits for that.
    ///
    /// A kernel calls it after [`Interrupt::Wake`], and, for the deadlines of futures, from time to time: without a
    /// clock each call counts as one of their [`Options::max_polls`]. Bounded by the sizes of the queues. Returns
    /// how many fault records it took in.
    pub fn poll(&self) -> u64 {
        // Before the queues are looked at: an interrupt after this wakes again.
        self.shared.interrupted.swap(false, Ordering::AcqRel);
        if self.shared.changed.swap(false, Ordering::AcqRel) {
            self.shared.look_at_status();
        }
        let now = self.shared.platform.now_ns();
        let mut records = 0;
        let (doorbell, wake, waker) = {
            let mut guard = self.shared.state.lock();
            let state = &mut *guard;
            state.drain();
            for _ in 0..state.events.ring().size() {
                let Some(event) = state.events.next() else { break };
                records += 1;
                match event {
                    Event::Malformed => state.faults.counts.malformed += 1,
                    Event::Fault(mut fault) => {
                        let kept = state.engine.take_fault(&mut fault, now, &self.shared.options);
                        state.faults.push(fault, kept);
                    }
                }
            }
            // After a shutdown the queue is nobody's, and until the end of a recovery that succeeds the recovery's.
            let ended = matches!(state.dead, Some(RequestError::ShutDown | RequestError::NeedsReset));
            let gone = state.events.is_broken() || state.paused || ended;
            let waker = if state.faults.is_empty() { None } else { state.faults.waker.take() };
            (!gone && state.events.publish(), state.wake_due_at(now), waker)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        self.shared.wake(wake);
        if doorbell {
            barrier::memory_before_doorbell();
            self.shared.transport.notify(EVENT_QUEUE);
        }
        self.suspend_due();
        self.flush_overdue(now);
        self.collect();
        records
    }

    /// The oldest fault that was not fetched yet (virtio 1.4, IOMMU device, fault reporting). Call
    /// [`poll`](Self::poll) before.
    pub fn next_fault(&self) -> Option<Fault> {
        let clock = self.shared.platform.now_ns().is_some();
        let mut state = self.shared.state.lock();
        let fault = state.faults.pop();
        if fault.is_none() && !clock {
            state.engine.end_fault_windows();
        }
        fault
    }

    /// Waits for the next fault, which [`poll`](Self::poll) takes in, called after an interrupt. `None` when the driver
    /// was shut down. For one task at a time: a second one wakes the first, again and again.
    pub async fn next_fault_async(&self) -> Option<Fault> {
        poll_fn(|context| {
            if let Some(fault) = self.next_fault() {
                return Poll::Ready(Some(fault));
            }
            let waker = context.waker().clone();
            let (other, ready) = {
                let mut state = self.shared.state.lock();
                let down = state.dead == Some(RequestError::ShutDown);
                let ready = down || !state.faults.is_empty();
                (state.faults.waker.replace(waker), ready)
            };
            if let Some(other) = other.filter(|other| !other.will_wake(context.waker())) {
                other.wake();
            }
            match ready {
                true => Poll::Ready(self.next_fault()),
                false => Poll::Pending,
            }
        })
        .await
    }

    /// Tries to UNMAP what is in quarantine and not in flight, each mapping once. Returns how many it freed.
    pub fn reclaim(&self) -> usize {
        let mut freed = 0;
        let mut done = None;
        // Bounded: each round goes on to a later one.
        while let Some((key, range)) = { self.shared.state.lock().engine.reclaimable(done) } {
            let reclaimed = self.shared.block_on(exchange::reclaim(&self.shared, key, range));
            // One that somebody counts on is his still, to be mapped again.
            let kept = { self.shared.state.lock().engine.is_owned(key, range) };
            freed += usize::from(reclaimed.is_ok() && !kept);
            done = Some((key, range));
        }
        self.collect();
        freed
    }

    /// Acknowledges an interrupt. Takes no lock of the driver's, waits for nothing, and runs anywhere, as far as
    /// the transport does: the adapter for `virtio-drivers` has a lock of its own.
    pub fn on_interrupt(&self) -> Interrupt {
        let cause = self.shared.transport.acknowledge_interrupt();
        if !cause.queue && !cause.config {
            return Interrupt::NotOurs;
        }
        if cause.config {
            self.shared.changed.store(true, Ordering::Release);
        }
        match self.shared.interrupted.swap(true, Ordering::AcqRel) {
            true => Interrupt::Handled,
            false => Interrupt::Wake,
        }
    }

    /// Counts of what was done so far. Walks the records of all domains.
    pub fn stats(&self) -> Stats {
        let state = self.shared.state.lock();
        let (quarantined_mappings, quarantined_bytes) = state.engine.quarantined();
        let totals = state.engine.totals();
        Stats {
            requests: totals.requests,
            kicks: self.shared.kicks.load(Ordering::Relaxed) as u64,
            attaches: totals.attaches,
            detaches: totals.detaches,
            maps: totals.maps,
            unmaps: totals.unmaps,
            abandoned_requests: state.requests.abandoned().into(),
            quarantined_mappings,
            quarantined_bytes,
            stray_answers: state.requests.stray(),
            faults: state.faults.counts,
        }
    }

    /// Flushes domains with something that waits for longer than it should. Not while nothing can be sent.
    fn flush_overdue(&self, now_ns: Option<u64>) {
        let mut done = None;
        // Bounded by the domains: each round goes to a later place.
        loop {
            let next = {
                let state = self.shared.state.lock();
                let able = state.dead.is_none() && !state.paused;
                able.then(|| state.engine.next_overdue(done, now_ns)).flatten()
            };
            let Some((place, key)) = next else { break };
            done = Some(place);
            self.shared.block_on(exchange::flush_all_the_same(&self.shared, key));
        }
    }

    /// Gives back memory, and drops domain records, that nothing depends on any more.
    pub(crate) fn collect(&self) {
        // Two statements, so that the lock is not held while the memory goes back.
        while let Some(held) = { self.shared.state.lock().engine.take_any_released() } {
            self.shared.release(held);
        }
        while let Some(record) = { self.shared.state.lock().engine.take_orphan() } {
            drop(record);
        }
    }
}

impl<P: Platform> fmt::Debug for Viommu<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Viommu").field("features", &self.features).finish_non_exhaustive()
    }
}
