//! Domains: address spaces that endpoints are attached to.

use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::dma::Unmapped;
use crate::engine::{
    Deferral, DomainKey, DomainRecord, DomainStats, Engine, FlushDue, MappingHandle, Placement, Purpose,
    Spot, Tag,
};
use crate::error::{MapError, UnmapError};
use crate::exchange::{self, Mapped, Owned, Place, Run, SentMap, Shared};
use crate::id::DomainId;
use crate::mappings::{Mappings, Translation};
use crate::options::UnmapPolicy;
use crate::platform::Platform;
use crate::prot::Prot;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;

/// A domain: an address space with its mappings. Clones are handles to the same one.
///
/// When the last handle goes, endpoints that are still attached stay so, and its number stays taken until they
/// are detached.
///
/// The methods here are the raw layer: they let endpoints reach memory on the caller's word. Device drivers use
/// [`DmaDevice`](crate::DmaDevice).
pub struct Domain<P: Platform>(Arc<Handle<P>>);

struct Handle<P: Platform> {
    shared: Arc<Shared<P>>,
    key: DomainKey,
    policy: UnmapPolicy,
    /// When what waits for a flush is due, in a domain that defers unmapping.
    due: Option<FlushDue>,
}

impl<P: Platform> Drop for Handle<P> {
    fn drop(&mut self) {
        // Two statements, so that the record's memory is freed without the lock.
        let record = self.shared.state.lock().engine.release_domain(self.key);
        drop(record);
    }
}

impl<P: Platform> Clone for Domain<P> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<P: Platform> fmt::Debug for Domain<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Domain({})", self.id())
    }
}

impl<P: Platform> Domain<P> {
    pub(crate) fn new(
        shared: Arc<Shared<P>>,
        key: DomainKey,
        policy: UnmapPolicy,
        due: Option<FlushDue>,
    ) -> Self {
        Self(Arc::new(Handle { shared, key, policy, due }))
    }

    pub(crate) fn key(&self) -> DomainKey {
        self.0.key
    }

    fn with<R>(&self, read: impl FnOnce(&mut Engine) -> R) -> R {
        read(&mut self.0.shared.state.lock().engine)
    }

    /// The number that requests carry. It can change before the first mapping succeeded, when the device
    /// still has mappings of an earlier life under it.
    pub fn id(&self) -> DomainId {
        let key = self.0.key;
        self.with(|engine| engine.domain(key).map_or(DomainId::new(0), |domain| domain.id))
    }

    /// What the domain did so far.
    pub fn stats(&self) -> DomainStats {
        let key = self.0.key;
        self.with(|engine| engine.domain(key).map_or(DomainStats::default(), DomainRecord::stats))
    }

    /// Mappings that are recorded, those in quarantine included.
    pub fn mapping_count(&self) -> usize {
        let key = self.0.key;
        self.with(|engine| engine.domain(key).map_or(0, |domain| domain.space.len()))
    }

    /// Where `iova` leads, by the driver's records, quarantined mappings included. Asks nothing of the device.
    pub fn translate(&self, iova: Iova) -> Option<Translation> {
        let key = self.0.key;
        self.with(|engine| Some(Translation::of(engine.domain(key)?.space.containing(iova)?, engine)))
    }

    /// All mappings that are recorded, those in quarantine included, in the order of their addresses: to find what
    /// somebody forgot to unmap. Asks nothing of the device. The lock is not held between two.
    pub fn mappings(&self) -> Mappings<'_, P> {
        Mappings::new(self)
    }

    /// The first mapping that starts at or above `from`.
    pub(crate) fn next_mapping(&self, from: Iova) -> Option<Translation> {
        let key = self.0.key;
        self.with(|engine| Some(Translation::of(engine.domain(key)?.space.iter_from(from).next()?, engine)))
    }

    /// Makes room for `mappings` mappings in all. Allocates; mapping and unmapping never do.
    pub fn reserve(&self, mappings: usize) {
        let lacking = self.with(|engine| engine.lacks(self.0.key, mappings));
        let spare = Vec::with_capacity(lacking);
        // Two statements, so that what is not needed, since another thread was faster, is freed without the lock.
        let unused = self.with(|engine| engine.grow_domain(self.0.key, mappings, spare));
        drop(unused);
    }

    /// Maps `len` bytes from `phys` at an address of the driver's choice up to `limit` (virtio 1.4, IOMMU device, MAP
    /// request).
    ///
    /// `phys` and `len` are multiples of the granule. Waits for the answer; allocates nothing.
    ///
    /// # Errors
    /// [`MapError`]. With [`MapError::Quarantined`] the device may have the mapping, and the memory must not be
    /// reused before the quarantine is empty again; else nothing is mapped.
    ///
    /// # Safety
    /// Until the mapping is unmapped with success the memory is one that the domain's endpoints may access at
    /// any time as `prot` says: no Rust reference depends on it, and it is not given to anyone else.
    pub unsafe fn map(&self, phys: PhysAddr, len: u64, prot: Prot, limit: Iova) -> Result<Iova, MapError> {
        let place = Place::Anywhere { len, placement: Placement::up_to(limit), parts: 1 };
        self.map_run_now(place, Run { phys, len }, prot).map(IovaRange::start)
    }

    /// [`map`](Self::map) as a future. Dropped before its end it leaves the mapping, if it was sent, in quarantine.
    ///
    /// # Errors
    /// As for [`map`](Self::map).
    ///
    /// # Safety
    /// As for [`map`](Self::map), and where the future is dropped until the quarantine is empty again.
    pub async unsafe fn map_async(
        &self,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
        limit: Iova,
    ) -> Result<Iova, MapError> {
        let place = Place::Anywhere { len, placement: Placement::up_to(limit), parts: 1 };
        self.map_run(place, Run { phys, len }, prot).await.map(IovaRange::start)
    }

    /// Maps `len` bytes from `phys` at `iova` (virtio 1.4, IOMMU device, MAP request). All three are multiples of
    /// the granule.
    ///
    /// Waits for the answer; allocates nothing.
    ///
    /// # Errors
    /// As for [`map`](Self::map), and [`MapError::InUse`] where not all of the range is free.
    ///
    /// # Safety
    /// As for [`map`](Self::map).
    pub unsafe fn map_at(&self, iova: Iova, phys: PhysAddr, len: u64, prot: Prot) -> Result<(), MapError> {
        let range = self.place_at(iova, phys, len, prot)?;
        self.map_run_now(Place::At(range), Run { phys, len }, prot).map(drop)
    }

    /// [`map_at`](Self::map_at) as a future. Dropped before its end it leaves the mapping, if it was sent, in
    /// quarantine.
    ///
    /// # Errors
    /// As for [`map_at`](Self::map_at).
    ///
    /// # Safety
    /// As for [`map_async`](Self::map_async).
    pub async unsafe fn map_at_async(
        &self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
    ) -> Result<(), MapError> {
        let range = self.place_at(iova, phys, len, prot)?;
        self.map_run(Place::At(range), Run { phys, len }, prot).await.map(drop)
    }

    fn place_at(&self, iova: Iova, phys: PhysAddr, len: u64, prot: Prot) -> Result<IovaRange, MapError> {
        match IovaRange::from_len(iova, len) {
            Some(range) => Ok(range),
            // Whatever else is wrong comes first.
            None => self.with(|engine| engine.check_map(self.0.key, iova, len, phys, prot)),
        }
    }

    async fn map_run(&self, place: Place, run: Run, prot: Prot) -> Result<IovaRange, MapError> {
        let first = self.map_first(place, run, prot);
        self.map_rest(place, run, prot, first).await
    }

    fn map_run_now(&self, place: Place, run: Run, prot: Prot) -> Result<IovaRange, MapError> {
        match self.map_first(place, run, prot) {
            Ok(mapped) if !self.may_be_overdue() => Ok(mapped.range),
            first => self.0.shared.block_on(self.map_rest(place, run, prot, first)),
        }
    }

    /// The first step, without a future.
    fn map_first(&self, place: Place, run: Run, prot: Prot) -> Result<Mapped, Option<SentMap>> {
        let (shared, key, purpose) = (&self.0.shared, self.0.key, Purpose { prot, tag: Tag::NONE });
        if !(prot.is_plain() && run.is_whole(shared.granule)) {
            return Err(None);
        }
        let spot = match place {
            Place::Anywhere { placement, .. } => Spot::Within(placement),
            Place::At(range) => Spot::At(range),
        };
        exchange::map_first(shared, key, (run, spot), purpose, &mut None)
    }

    /// What is left after the first step.
    async fn map_rest(
        &self,
        place: Place,
        run: Run,
        prot: Prot,
        first: Result<Mapped, Option<SentMap>>,
    ) -> Result<IovaRange, MapError> {
        let (shared, key, purpose) = (&self.0.shared, self.0.key, Purpose { prot, tag: Tag::NONE });
        let range = match first {
            Ok(mapped) => mapped.range,
            Err(sent) => {
                exchange::map(shared, key, place, core::iter::once(run), purpose, &mut None, sent).await?
            }
        };
        self.flush_if_overdue_for(range).await;
        Ok(range)
    }

    /// Maps `len` bytes from `start` at their own addresses, around what is reserved for the domain's endpoints: what
    /// an identity domain is where the device has none. One mapping for each stretch between reserved regions.
    ///
    /// Waits for the answers; allocates nothing.
    ///
    /// # Errors
    /// As for [`map_at`](Self::map_at). The stretches before the one that failed stay mapped.
    ///
    /// # Safety
    /// As for [`map`](Self::map): the endpoints may access all of it at any time.
    pub unsafe fn map_identity(&self, start: PhysAddr, len: u64, prot: Prot) -> Result<(), MapError> {
        let mut next = IovaRange::from_len(Iova::new(start.get()), len);
        if next.is_none() {
            return Err(MapError::PhysicalWraps { phys: start, len });
        }
        // Bounded by the reserved regions: each round passes a whole stretch between two of them.
        while let Some(rest) = next {
            let Some(stretch) = self.with(|engine| engine.unreserved_in(self.0.key, rest)) else { break };
            let (at, len) = (stretch.start(), stretch.len_bytes().unwrap_or(0));
            // SAFETY: the caller's promise.
            unsafe { self.map_at(at, PhysAddr::new(at.get()), len, prot) }?;
            next = stretch.last().checked_add(1).and_then(|at| IovaRange::new(at, rest.last()));
        }
        Ok(())
    }

    /// Unmaps `len` bytes at `iova`: one mapping, or several whole ones that touch each other, by one request
    /// (virtio 1.4, IOMMU device, UNMAP request). When this returns `Ok`, no endpoint reaches the memory through
    /// them any more.
    ///
    /// Waits for the answer; allocates nothing.
    ///
    /// # Errors
    /// [`UnmapError`]. The memory must not be reused: with [`UnmapError::Request`] the mappings are in
    /// quarantine, else nothing changed.
    ///
    /// # Safety
    /// The caller made these mappings, by [`map`](Self::map) or [`map_at`](Self::map_at): another owner's
    /// device may be using them, and would reach whatever is mapped at the address next.
    pub unsafe fn unmap(&self, iova: Iova, len: u64) -> Result<(), UnmapError> {
        self.unmap_now(IovaRange::from_len(iova, len).ok_or(UnmapError::NotMapped(iova))?)
    }

    /// [`unmap`](Self::unmap) as a future. Dropped before its end it leaves the mappings in quarantine.
    ///
    /// # Errors
    /// As for [`unmap`](Self::unmap).
    ///
    /// # Safety
    /// As for [`unmap`](Self::unmap).
    pub unsafe fn unmap_async(
        &self,
        iova: Iova,
        len: u64,
    ) -> impl Future<Output = Result<(), UnmapError>> + Send + '_ {
        let range = IovaRange::from_len(iova, len).ok_or(UnmapError::NotMapped(iova));
        let unmapping = range.map(|range| self.unmap_range(range));
        async { unmapping?.await }
    }

    /// Makes sure that everything that was unmapped before, and not mapped again since, is out of the endpoints' reach.
    /// Nothing to do where unmapping is strict.
    ///
    /// One UNMAP for all that touch each other, one doorbell for as many as the ring takes; waits for the answers, and
    /// for a flush that is under way. Allocates nothing.
    ///
    /// # Errors
    /// [`UnmapError::Request`], as long as anything is in quarantine since a flush failed.
    pub fn flush(&self) -> Result<(), UnmapError> {
        self.0.shared.block_on(self.flush_async())
    }

    /// [`flush`](Self::flush) as a future. Dropped before its end it leaves what it did not finish in quarantine.
    ///
    /// # Errors
    /// As for [`flush`](Self::flush).
    pub async fn flush_async(&self) -> Result<(), UnmapError> {
        exchange::flush(&self.0.shared, self.0.key).await
    }

    /// A look without the lock.
    #[inline]
    fn may_be_overdue(&self) -> bool {
        let Some(due) = &self.0.due else { return false };
        due.is_set() && self.0.shared.platform.now_ns().is_some_and(|now_ns| due.may_be_past(now_ns))
    }

    /// Whether something waits for a flush for longer than it should.
    #[inline]
    fn is_overdue(&self) -> bool {
        self.may_be_overdue() && {
            let now_ns = self.0.shared.platform.now_ns();
            self.with(|engine| engine.look_if_overdue(self.0.key, now_ns))
        }
    }

    /// Flushes what waits for longer than it should.
    #[inline]
    pub(crate) fn flush_if_overdue(&self) {
        if self.is_overdue() {
            let shared = &self.0.shared;
            shared.block_on(exchange::flush_all_the_same(shared, self.0.key));
        }
    }

    /// The same as a future.
    pub(crate) async fn flush_if_overdue_async(&self) {
        if self.is_overdue() {
            exchange::flush_all_the_same(&self.0.shared, self.0.key).await;
        }
    }

    /// The same for a mapping on its way to its owner, which is in quarantine where it does not get there.
    pub(crate) async fn flush_if_overdue_for(&self, made: IovaRange) {
        if self.is_overdue() {
            let mut owned = Owned::new(&self.0.shared, self.0.key, made);
            exchange::flush_all_the_same(&self.0.shared, self.0.key).await;
            owned.settled();
        }
    }

    /// Whether unmapping may be deferred.
    #[inline]
    pub(crate) fn defers(&self) -> bool {
        self.0.policy != UnmapPolicy::Strict
    }

    /// Unmaps whole neighbouring mappings, as the domain's policy says.
    pub(crate) fn unmap_by_policy(
        &self,
        range: IovaRange,
    ) -> impl Future<Output = Result<Unmapped, UnmapError>> + Send + '_ {
        // Also when it is dropped before it is polled.
        exchange::unmap_by_policy(self.owned(range), range)
    }

    /// The same for whoever blocks. `record` may be the record of the mapping, where it is one.
    #[inline(always)]
    pub(crate) fn unmap_by_policy_now(
        &self,
        range: IovaRange,
        record: MappingHandle,
    ) -> Result<Unmapped, UnmapError> {
        if self.defers() {
            return self.defer_now(range, record);
        }
        match exchange::unmap_first(&self.0.shared, self.0.key, range, record) {
            Ok(()) => Ok(Unmapped::Now),
            Err(sent) => self.unmap_rest(range, sent).map(|()| Unmapped::Now),
        }
    }

    /// The same where unmapping is deferred.
    #[inline(always)]
    fn defer_now(&self, range: IovaRange, record: MappingHandle) -> Result<Unmapped, UnmapError> {
        match exchange::defer_first(&self.0.shared, self.0.key, range, record) {
            Deferral::Deferred => Ok(Unmapped::AtFlush),
            deferral => self.defer_rest(range, deferral),
        }
    }

    #[cold]
    fn defer_rest(&self, range: IovaRange, deferral: Deferral) -> Result<Unmapped, UnmapError> {
        let (shared, key) = (&self.0.shared, self.0.key);
        match deferral {
            Deferral::Deferred => Ok(Unmapped::AtFlush),
            Deferral::FlushDue => Ok(shared.block_on(exchange::flush_due(shared, key))),
            Deferral::Strict | Deferral::Full => shared.block_on(self.unmap_by_policy(range)),
        }
    }

    /// Unmaps whole neighbouring mappings. Memory that was held for them goes back to its owner.
    pub(crate) fn unmap_range(
        &self,
        range: IovaRange,
    ) -> impl Future<Output = Result<(), UnmapError>> + Send + '_ {
        // Also when it is dropped before it is polled.
        exchange::unmap(self.owned(range), range, None)
    }

    /// The same for whoever blocks.
    pub(crate) fn unmap_now(&self, range: IovaRange) -> Result<(), UnmapError> {
        match exchange::unmap_first(&self.0.shared, self.0.key, range, MappingHandle::UNKNOWN) {
            Ok(()) => Ok(()),
            Err(sent) => self.unmap_rest(range, sent),
        }
    }

    #[cold]
    fn unmap_rest(&self, range: IovaRange, sent: Option<usize>) -> Result<(), UnmapError> {
        let shared = &self.0.shared;
        let first = sent.map(|slot| shared.wait_for(slot));
        shared.block_on(exchange::unmap(self.owned(range), range, first))
    }

    fn owned(&self, range: IovaRange) -> Owned<'_, P> {
        Owned::new(&self.0.shared, self.0.key, range)
    }

    pub(crate) fn shared(&self) -> &Shared<P> {
        &self.0.shared
    }

    /// Takes `len` bytes of IOVA out of the free ones, for as many mappings as `parts` says.
    pub(crate) fn allocate(
        &self,
        len: u64,
        placement: Placement,
        parts: usize,
    ) -> Result<IovaRange, MapError> {
        self.with(|engine| engine.allocate(self.0.key, len, placement, parts))
    }

    /// The tag of this name.
    pub(crate) fn tag(&self, name: &'static str) -> Tag {
        self.with(|engine| engine.tag(name))
    }

    /// Gives back what was allocated for one mapping and not mapped.
    pub(crate) fn give_back(&self, range: IovaRange) {
        self.with(|engine| engine.give_back(self.0.key, range, 1));
    }

    /// Puts a live mapping into quarantine, whose owner goes away without unmapping it. Where the device does not have
    /// it any more, since the domain died, it is gone at once, and memory that was held for it is back.
    pub(crate) fn quarantine(&self, range: IovaRange) {
        let key = self.0.key;
        self.with(|engine| match engine.is_gone(key, range) {
            // Sends nothing then.
            true => drop(engine.begin_unmap(key, range)),
            false => engine.disown(key, range),
        });
        self.0.shared.release_unmapped(key, range);
    }
}
