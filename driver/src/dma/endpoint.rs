//! An endpoint that is attached to a domain.

use super::bounce::BouncePool;
use super::msi::{DOORBELL_LEN, MsiDoorbell, is_in_window};
use super::{CoherentMemory, DmaDevice, DmaMapping, HeldMemory, PhysSegment, Unmapped};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::domain::Domain;
use crate::engine::{MappingHandle, Placement, Reach, Tag};
use crate::error::{DetachError, DmaError, UnmapError};
use crate::id::EndpointId;
use crate::mappings::Translation;
use crate::options::EndpointOptions;
use crate::platform::Platform;
use crate::prot::Direction;
use crate::start::Unattached;
use crate::viommu::Viommu;
use alloc::sync::Arc;
use core::fmt;
use core::future::Future;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering};

/// An endpoint's view of the domain that it is attached to. Clones are the same view, and [`tagged`](Self::tagged) gives
/// one whose mappings go by another name.
///
/// Dropping the last one leaves the endpoint attached, with everything that is mapped, its bounce pages in quarantine,
/// and the address that faults out of use: [`close`](Self::close) ends it in order.
pub struct Endpoint<P: Platform> {
    pub(super) view: Arc<View<P>>,
    pub(super) tag: Tag,
}

/// What all clones of an endpoint share.
pub(super) struct View<P: Platform> {
    pub(super) viommu: Viommu<P>,
    id: EndpointId,
    pub(super) domain: Domain<P>,
    pub(super) reach: Reach,
    pub(super) granule: u64,
    max_segment: u64,
    /// One granule of addresses that is never mapped.
    faulting: IovaRange,
    bounce: Option<(BouncePool, IovaRange)>,
    /// Nothing is mapped, or shared, any more.
    closed: AtomicBool,
    /// It is not closed, has no constraints, and unmaps at once: whole granules are mapped without a look at more than
    /// this.
    pub(super) straight: AtomicBool,
    /// It is not closed, and unmaps later: what waits for that may be mapped again.
    pub(super) again: AtomicBool,
    /// The bounce pages were unmapped, or are in quarantine.
    bounce_gone: AtomicBool,
}

impl<P: Platform> Endpoint<P> {
    pub(crate) async fn new(
        viommu: Viommu<P>,
        id: EndpointId,
        domain: Domain<P>,
        options: EndpointOptions,
    ) -> Result<Self, DmaError> {
        let EndpointOptions { limit, max_segment, boundary, bounce_bytes, tag: _ } = options;
        if max_segment == 0 {
            return Err(DmaError::BadConstraint { option: "max_segment", value: 0 });
        }
        if let Some(value) = boundary.filter(|boundary| !boundary.is_power_of_two()) {
            return Err(DmaError::BadConstraint { option: "boundary", value });
        }
        let granule = viommu.granule();
        let faulting = domain.allocate(granule, Placement::up_to(limit), 1)?;
        let mut unused = Unused { domain: domain.clone(), range: Some(faulting) };
        let (closed, bounce_gone) = (AtomicBool::new(false), AtomicBool::new(false));
        let free = boundary.is_none() && limit >= viommu.input_range().last();
        // A granule of one byte is no mapping by itself.
        let straight = AtomicBool::new(free && granule >= 2 && !domain.defers());
        let again = AtomicBool::new(domain.defers());
        let bounce = None;
        let tag = domain.tag("bounce pages");
        let view = View {
            viommu,
            id,
            domain,
            reach: Reach { limit, boundary },
            granule,
            max_segment,
            faulting,
            bounce,
            closed,
            straight,
            again,
            bounce_gone,
        };
        let mut endpoint = Self { view: Arc::new(view), tag };
        if bounce_bytes > 0 {
            let pages = endpoint.alloc_coherent_async(bounce_bytes).await?;
            let (len, range) = (pages.len_bytes(), pages.mapping.range);
            let granule = endpoint.granule() as usize;
            // SAFETY: fresh memory, mapped there, that is not freed before the pool is retired or gone.
            let pool = unsafe { BouncePool::new(pages.ptr, len, range.start(), granule) };
            // Nobody else has the view yet.
            if let Some(view) = Arc::get_mut(&mut endpoint.view) {
                view.bounce = Some((pool, range));
            }
        }
        unused.range = None;
        endpoint.tag = Tag::NONE;
        Ok(endpoint)
    }

    /// The domain.
    pub fn domain(&self) -> &Domain<P> {
        &self.view.domain
    }

    /// The same view, whose mappings go by this name from now on ([`Translation::tag`](crate::Translation::tag)): for
    /// people who look for whoever forgot to unmap. An IOMMU keeps 254 names; further ones all become `(other)`.
    #[must_use]
    pub fn tagged(&self, tag: &'static str) -> Self {
        Self { view: Arc::clone(&self.view), tag: self.view.domain.tag(tag) }
    }

    /// The addresses that are never mapped.
    #[cfg(feature = "bench")]
    pub(crate) fn faulting(&self) -> IovaRange {
        self.view.faulting
    }

    /// Detaches the endpoint and frees its bounce pages. Its bus mastering must be off, and its driver's memory
    /// free. An endpoint that was moved to another domain meanwhile stays there.
    ///
    /// Ends all clones of the view: they map and share nothing any more ([`DmaError::Closed`]), but can unmap what
    /// they mapped. Bounce pages with a buffer that is still shared are kept until the last clone is dropped; nothing
    /// is copied out of them any more. Where the endpoint could not be detached, it can be tried again.
    ///
    /// # Errors
    /// [`DetachError`]: the endpoint counts as attached, but its bounce pages are unmapped.
    /// [`Viommu::detach`] can be tried later.
    pub fn close(&self) -> Result<(), DetachError> {
        let view = &*self.view;
        view.straight.store(false, Ordering::Release);
        view.again.store(false, Ordering::Release);
        let first = !view.closed.swap(true, Ordering::AcqRel);
        let retired = view.bounce.as_ref().filter(|(pool, _)| first && pool.retire());
        let free_bounce = || {
            let Some((_, range)) = retired else { return };
            view.bounce_gone.store(true, Ordering::Relaxed);
            if let Err(error) = view.domain.unmap_now(*range) {
                log::warn!("the bounce pages of endpoint {} stay in quarantine: {error}", view.id);
            }
        };
        let leave = || {
            let key = view.domain.key();
            let here = { view.domain.shared().state.lock().engine.is_or_was_in(view.id, key) };
            if here { view.viommu.detach(view.id) } else { Ok(()) }
        };
        // Detached first, the pages need no UNMAP. But that holds only where nothing bypasses.
        let detached = if view.viommu.unattached() == Unattached::Blocked {
            let detached = leave();
            free_bounce();
            detached
        } else {
            free_bounce();
            leave()
        };
        if first {
            view.domain.give_back(view.faulting);
        }
        detached
    }

    pub(super) fn check_open(&self) -> Result<(), DmaError> {
        if self.view.closed.load(Ordering::Acquire) { Err(DmaError::Closed) } else { Ok(()) }
    }

    /// The bounce pages of a buffer that is shared, and the first chunk of it.
    fn bounce_chunk(&self, iova: Iova, len: usize) -> Option<(&BouncePool, usize)> {
        let (pool, _) = self.view.bounce.as_ref()?;
        let first = pool.chunk_of(iova, len)?;
        // After the look at the chunks: a retired pool, whose pages are gone, seems to have all of them out.
        self.check_open().ok().map(|()| (pool, first))
    }

    pub(crate) fn block_on<T>(&self, operation: impl Future<Output = T>) -> T {
        self.view.domain.shared().block_on(operation)
    }
}

/// For the bridge that copies by itself.
#[cfg(feature = "dma-api-0_10")]
impl<P: Platform> Endpoint<P> {
    /// Takes bounce pages for `len` bytes, which are zeroed: where they are for the endpoint and for the driver.
    pub(crate) fn take_bounce(&self, len: usize) -> Option<(Iova, NonNull<u8>)> {
        self.check_open().ok()?;
        let (pool, _) = self.view.bounce.as_ref()?;
        let first = pool.take(len)?;
        pool.zero(first, len);
        Some((pool.iova(first), pool.ptr(first)))
    }

    /// Gives back what [`take_bounce`](Self::take_bounce) gave. Returns whether the address was one of those.
    pub(crate) fn give_back_bounce(&self, iova: Iova, len: usize) -> bool {
        let Some((_, range)) = self.view.bounce.as_ref() else { return false };
        let inside = range.start() <= iova && iova <= range.last();
        if inside && let Some((pool, first)) = self.bounce_chunk(iova, len) {
            pool.give_back(first, len);
        }
        inside
    }
}

/// Addresses on their way into an endpoint. They are free again where they do not get there.
struct Unused<P: Platform> {
    domain: Domain<P>,
    range: Option<IovaRange>,
}

impl<P: Platform> Drop for Unused<P> {
    fn drop(&mut self) {
        if let Some(range) = self.range {
            self.domain.give_back(range);
        }
    }
}

impl<P: Platform> Drop for View<P> {
    fn drop(&mut self) {
        if let Some((_pool, range)) = self.bounce.take()
            && !*self.bounce_gone.get_mut()
        {
            self.domain.quarantine(range);
        }
    }
}

impl<P: Platform> Clone for Endpoint<P> {
    fn clone(&self) -> Self {
        Self { view: Arc::clone(&self.view), tag: self.tag }
    }
}

impl<P: Platform> fmt::Debug for Endpoint<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({} in {:?})", self.view.id, self.view.domain)
    }
}

impl<P: Platform> DmaDevice for Endpoint<P> {
    fn endpoint(&self) -> EndpointId {
        self.view.id
    }

    fn granule(&self) -> u64 {
        self.view.granule
    }

    fn limit(&self) -> Iova {
        self.view.reach.limit
    }

    fn max_segment(&self) -> u64 {
        self.view.max_segment
    }

    fn boundary(&self) -> Option<u64> {
        self.view.reach.boundary
    }

    fn translate(&self, iova: Iova) -> Option<Translation> {
        self.view.domain.translate(iova)
    }

    fn alloc(&self, len: usize, direction: Direction) -> Result<CoherentMemory, DmaError> {
        self.alloc_now(len, direction)
    }

    fn adopt(
        &self,
        memory: HeldMemory,
        direction: Direction,
    ) -> Result<DmaMapping, (DmaError, Option<HeldMemory>)> {
        self.block_on(self.adopt_async(memory, direction))
    }

    unsafe fn map(&self, phys: PhysAddr, len: usize, direction: Direction) -> Result<DmaMapping, DmaError> {
        self.map_in_place(phys, len, direction)
    }

    unsafe fn map_each(
        &self,
        segments: &[PhysSegment],
        direction: Direction,
        mappings: &mut [Option<DmaMapping>],
    ) -> Result<(), DmaError> {
        // SAFETY: the caller's promise.
        self.block_on(unsafe { self.map_each_async(segments, direction, mappings) })
    }

    fn unmap_each(&self, mappings: &mut [Option<DmaMapping>]) -> Result<Unmapped, UnmapError> {
        self.unmap_each_now(mappings)
    }

    unsafe fn map_scatter(
        &self,
        segments: &[PhysSegment],
        direction: Direction,
        iovas: &mut [Iova],
    ) -> Result<DmaMapping, DmaError> {
        self.map_scatter_now(segments, direction, iovas)
    }

    unsafe fn map_resource(
        &self,
        phys: PhysAddr,
        len: usize,
        direction: Direction,
    ) -> Result<DmaMapping, DmaError> {
        // SAFETY: the caller's promise.
        self.block_on(unsafe { self.map_resource_async(phys, len, direction) })
    }

    fn unmap(&self, mapping: DmaMapping) -> Result<Unmapped, UnmapError> {
        let domain = &self.view.domain;
        if mapping.domain != domain.key() {
            return Err(UnmapError::NotMapped(mapping.iova));
        }
        domain.unmap_by_policy_now(mapping.range, mapping.record)
    }

    unsafe fn unmap_at(&self, iova: Iova) -> Result<Unmapped, UnmapError> {
        let domain = &self.view.domain;
        let mapping = domain.translate(iova).filter(|mapping| mapping.range.start() == iova);
        let range = mapping.ok_or(UnmapError::NotMapped(iova))?.range;
        self.unmap(DmaMapping { domain: domain.key(), iova, len: 0, range, record: MappingHandle::UNKNOWN })
    }

    fn abandon(&self, mapping: DmaMapping) {
        let domain = &self.view.domain;
        if mapping.domain == domain.key() {
            domain.quarantine(mapping.range);
        }
    }

    unsafe fn share(&self, buffer: NonNull<[u8]>, direction: Direction) -> Result<Iova, DmaError> {
        let none = DmaError::NoBounce { len: buffer.len() };
        self.check_open()?;
        let (pool, _) = self.view.bounce.as_ref().ok_or(none)?;
        let first = pool.take(buffer.len()).ok_or(none)?;
        match direction {
            Direction::FromDevice => pool.zero(first, buffer.len()),
            // SAFETY: the chunks were just taken, and the caller promises the buffer.
            Direction::ToDevice | Direction::Both => unsafe { pool.copy_in(first, buffer) },
        }
        Ok(pool.iova(first))
    }

    unsafe fn sync_for_cpu(&self, iova: Iova, buffer: NonNull<[u8]>) {
        if let Some((pool, first)) = self.bounce_chunk(iova, buffer.len()) {
            // SAFETY: the chunks are taken, by the caller's `share`, and the caller promises the buffer.
            unsafe { pool.copy_out(first, buffer) };
        }
    }

    unsafe fn sync_for_device(&self, iova: Iova, buffer: NonNull<[u8]>) {
        if let Some((pool, first)) = self.bounce_chunk(iova, buffer.len()) {
            // SAFETY: as above.
            unsafe { pool.copy_in(first, buffer) };
        }
    }

    unsafe fn unshare(&self, iova: Iova, buffer: NonNull<[u8]>, direction: Direction) {
        let Some((pool, first)) = self.bounce_chunk(iova, buffer.len()) else { return };
        if direction != Direction::ToDevice {
            // SAFETY: the chunks are taken, by the caller's `share`, and the caller promises the buffer.
            unsafe { pool.copy_out(first, buffer) };
        }
        pool.give_back(first, buffer.len());
    }

    unsafe fn map_msi(&self, doorbell: PhysAddr) -> Result<MsiDoorbell, DmaError> {
        let regions = self.view.viommu.reserved_regions(self.view.id);
        if regions.is_some_and(|regions| is_in_window(&regions, doorbell)) {
            return Ok(MsiDoorbell { iova: Iova::new(doorbell.get()), mapping: None });
        }
        // SAFETY: the caller's promise.
        let mapping = unsafe { self.map_resource(doorbell, DOORBELL_LEN as usize, Direction::FromDevice) }?;
        Ok(MsiDoorbell { iova: mapping.iova, mapping: Some(mapping) })
    }

    fn unmap_msi(&self, doorbell: MsiDoorbell) -> Result<Unmapped, UnmapError> {
        doorbell.mapping.map_or(Ok(Unmapped::Now), |mapping| self.unmap(mapping))
    }

    fn faulting_iova(&self) -> Iova {
        self.view.faulting.start()
    }

    fn flush(&self) -> Result<(), UnmapError> {
        self.view.domain.flush()
    }
}
