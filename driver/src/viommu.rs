//! The handle that a kernel embeds.

use crate::addr::IovaRange;
use crate::barrier;
use crate::dma::Endpoint;
use crate::domain::Domain;
use crate::engine::{Engine, Geometry, Limits};
use crate::error::{AttachError, DetachError, DmaError, DomainError, RequestError, StartError};
use crate::exchange::{self, EVENT_QUEUE, Need, Sent, Shared};
use crate::fault::FaultCounts;
use crate::id::EndpointId;
use crate::options::{DomainKind, DomainOptions, EndpointOptions, Options};
use crate::platform::Platform;
use crate::start::{Staged, Unattached};
use crate::transport::Transport;
use crate::wire::fault::Fault;
use crate::wire::feature::Features;
use crate::wire::property::ReservedRegion;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::Ordering;

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
            false => Unattached::Bypasses,
            true if self.features.contains(Features::BYPASS_CONFIG) => Unattached::Blocked,
            true => Unattached::BlockedByDevice,
        }
    }

    /// The reserved regions of an endpoint that is known, as its PROBE gave them.
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
        let limits = Limits::new(&self.shared.options);
        let mut parts = Some(Engine::prepare_domain(&self.geometry, limits, options.mappings));
        let key = self.shared.state.lock().engine.create_domain(&mut parts, options.kind)?;
        Ok(Domain::new(Arc::clone(&self.shared), key))
    }

    /// Attaches an endpoint to a domain. [`open`](Self::open) does, and gives the view that a device driver wants.
    ///
    /// An endpoint that the driver does not know yet is probed first. Attaching it again to its own domain sends
    /// nothing. What the domain had mapped before it lost its last endpoint is mapped again. Its reserved regions stay out of the domain's addresses, also after it left. Turn its bus mastering on only after this succeeded. Allocates when it probes.
    ///
    /// # Errors
    /// [`AttachError`]. The endpoint's bus mastering must then stay off.
    pub fn attach(&self, endpoint: EndpointId, domain: &Domain<P>) -> Result<(), AttachError> {
        self.shared.block_on(self.attach_async(endpoint, domain))
    }

    /// [`attach`](Self::attach) as a future. Dropped before its end it leaves the endpoint attached, or in a state that
    /// is unknown until the device answers.
    ///
    /// # Errors
    /// As for [`attach`](Self::attach).
    pub async fn attach_async(&self, endpoint: EndpointId, domain: &Domain<P>) -> Result<(), AttachError> {
        self.attach_known(endpoint, domain).await.map(|_| ())
    }

    async fn attach_known(&self, endpoint: EndpointId, domain: &Domain<P>) -> Result<Sent, AttachError> {
        let needed = self.shared.state.lock().engine.needs_introduction(endpoint)?;
        if needed {
            let reserved = self.probe(endpoint, Need::Probe).await?;
            self.shared.state.lock().engine.introduce(endpoint, &reserved);
        }
        self.shared.attach(endpoint, domain.key()).await
    }

    /// Attaches an endpoint to a domain and gives its view of it, with bounce pages if asked for: what the
    /// endpoint's driver maps its memory through. There may be several views; closing one detaches for all.
    /// Allocates.
    ///
    /// # Errors
    /// [`OpenError`]. Where only the bounce pages failed, the endpoint is detached again if this attached it.
    pub fn open(
        &self,
        endpoint: EndpointId,
        domain: &Domain<P>,
        options: EndpointOptions,
    ) -> Result<Endpoint<P>, OpenError> {
        self.shared.block_on(self.open_async(endpoint, domain, options))
    }

    /// [`open`](Self::open) as a future. Dropped before its end it leaves the endpoint as
    /// [`attach_async`](Self::attach_async) does.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub async fn open_async(
        &self,
        endpoint: EndpointId,
        domain: &Domain<P>,
        options: EndpointOptions,
    ) -> Result<Endpoint<P>, OpenError> {
        let sent = self.attach_known(endpoint, domain).await.map_err(OpenError::Attach)?;
        let opened = Endpoint::new(self.clone(), endpoint, domain.clone(), options).await;
        if opened.is_err()
            && sent == Sent::Request
            && let Err(error) = self.detach_async(endpoint).await
        {
            log::error!("endpoint {endpoint} stays attached: {error}");
        }
        opened.map_err(OpenError::Dma)
    }

    /// Detaches an endpoint from its domain. One that the device does not know any more, since it was unplugged,
    /// is detached.
    ///
    /// If it was the last one and the bypass is known to be closed, the domain is dead: what was in quarantine is
    /// free, and live mappings stay recorded. Unmapping them takes no request then, and attaching an endpoint
    /// maps them again. Where the bypass is not known to be closed, unmap first.
    ///
    /// # Errors
    /// [`DetachError`]. The endpoint then counts as attached.
    pub fn detach(&self, endpoint: EndpointId) -> Result<(), DetachError> {
        self.shared.block_on(self.detach_async(endpoint))
    }

    /// [`detach`](Self::detach) as a future. Dropped before its end it leaves the endpoint in a state that is unknown until
    /// the device answers, if the request was sent.
    ///
    /// # Errors
    /// As for [`detach`](Self::detach).
    pub async fn detach_async(&self, endpoint: EndpointId) -> Result<(), DetachError> {
        let detached = self.shared.detach(endpoint).await;
        self.collect();
        detached
    }

    /// Moves an endpoint to another domain: detaches it, and attaches it there. In between it reaches nothing, if
    /// the bypass is closed. Its old domain keeps its mappings for its other endpoints, and for when it gets one
    /// again.
    ///
    /// # Errors
    /// [`MoveError`], which says whether the endpoint is where it was, or nowhere.
    pub fn move_endpoint(&self, endpoint: EndpointId, to: &Domain<P>) -> Result<(), MoveError> {
        self.shared.block_on(self.move_endpoint_async(endpoint, to))
    }

    /// [`move_endpoint`](Self::move_endpoint) as a future. Dropped before its end it leaves the endpoint in either domain,
    /// or in none.
    ///
    /// # Errors
    /// As for [`move_endpoint`](Self::move_endpoint).
    pub async fn move_endpoint_async(&self, endpoint: EndpointId, to: &Domain<P>) -> Result<(), MoveError> {
        if self.shared.is_attached(endpoint, to.key()) {
            return Ok(());
        }
        self.detach_async(endpoint).await.map_err(MoveError::Detach)?;
        self.attach_async(endpoint, to).await.map_err(MoveError::Attach)
    }

    /// Takes in what the device sent: answers, late ones too, and faults. Wakes futures whose answer is there, or whose
    /// deadline passed. Gives back memory whose quarantine ended.
    ///
    /// A kernel calls it after [`Interrupt::Wake`], and, for the deadlines of futures, from time to time: without a
    /// clock each call counts as one of their [`Options::max_polls`]. Bounded by the sizes of the queues. Returns how many fault records it took in.
    pub fn poll(&self) -> u64 {
        // Before the queues are looked at: an interrupt after this wakes again.
        self.shared.interrupted.swap(false, Ordering::AcqRel);
        if self.shared.changed.swap(false, Ordering::AcqRel) {
            self.shared.look_at_status();
        }
        let now = self.shared.platform.now_ns();
        let mut records = 0;
        let (doorbell, wake) = {
            let mut guard = self.shared.state.lock();
            let state = &mut *guard;
            state.drain();
            for _ in 0..state.events.ring().size() {
                let Some(event) = state.events.next() else { break };
                records += 1;
                if let Some(fault) = state.faults.push(event) {
                    state.engine.count_fault(fault.endpoint);
                }
            }
            // After a shutdown the queue is nobody's.
            let gone = state.events.is_broken() || state.dead == Some(RequestError::ShutDown);
            (!gone && state.events.publish(), state.wake_due_at(now))
        };
        self.shared.wake(wake);
        if doorbell {
            barrier::memory_before_doorbell();
            self.shared.transport.notify(EVENT_QUEUE);
        }
        self.collect();
        records
    }

    /// The oldest fault that was not fetched yet. Call [`poll`](Self::poll) before.
    pub fn next_fault(&self) -> Option<Fault> {
        self.shared.state.lock().faults.pop()
    }

    /// Tries to UNMAP what is in quarantine and not in flight, each mapping once. Returns how many it freed.
    pub fn reclaim(&self) -> usize {
        let mut freed = 0;
        let mut done = None;
        // Bounded: each round goes on to a later one.
        while let Some((key, range)) = { self.shared.state.lock().engine.reclaimable(done) } {
            let reclaimed = self.shared.block_on(exchange::reclaim(&self.shared, key, range));
            freed += usize::from(reclaimed.is_ok());
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
        let confirmed = state.engine.confirmed;
        Stats {
            requests: state.sent,
            kicks: self.shared.kicks.load(Ordering::Relaxed) as u64,
            attaches: confirmed.attaches,
            detaches: confirmed.detaches,
            maps: confirmed.maps,
            unmaps: confirmed.unmaps,
            abandoned_requests: state.requests.abandoned().into(),
            quarantined_mappings,
            quarantined_bytes,
            stray_answers: state.requests.stray(),
            faults: state.faults.counts,
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

/// An endpoint could not be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MoveError {
    /// It could not be detached, and is where it was.
    Detach(DetachError),
    /// It was detached, and could not be attached: it is in no domain.
    Attach(AttachError),
}

impl fmt::Display for MoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Detach(error) => write!(f, "not moved: {error}"),
            Self::Attach(error) => write!(f, "left its domain, and did not get into the other: {error}"),
        }
    }
}

impl core::error::Error for MoveError {}

/// An endpoint could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenError {
    /// It could not be attached.
    Attach(AttachError),
    /// Its bounce pages could not be had.
    Dma(DmaError),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attach(error) => error.fmt(f),
            Self::Dma(error) => write!(f, "bounce pages: {error}"),
        }
    }
}

impl core::error::Error for OpenError {}
