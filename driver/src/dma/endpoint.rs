//! An endpoint that is attached to a domain.

use super::bounce::BouncePool;
use super::msi::{DOORBELL_LEN, MsiDoorbell, is_in_window};
use super::scatter::{Runs, place, rounded, total_len};
use super::{CoherentMemory, DmaDevice, DmaMapping, HeldMemory, PhysSegment};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::domain::Domain;
use crate::engine::Purpose;
use crate::error::{DetachError, DmaError, MapError, UnmapError};
use crate::exchange::{self, Place, Run, Shared, Started};
use crate::id::EndpointId;
use crate::options::EndpointOptions;
use crate::platform::Platform;
use crate::prot::{Direction, Prot};
use crate::start::Unattached;
use crate::viommu::Viommu;
use crate::wire::feature::Features;
use core::fmt;
use core::future::Future;
use core::iter;
use core::ptr::NonNull;

/// An endpoint's view of the domain that it is attached to.
///
/// Dropping it leaves the endpoint attached, with everything that is mapped, its bounce pages in quarantine, and
/// the address that faults out of use: [`close`](Self::close) ends it in order.
pub struct Endpoint<P: Platform> {
    viommu: Viommu<P>,
    id: EndpointId,
    domain: Domain<P>,
    limit: Iova,
    /// One granule of addresses that is never mapped.
    faulting: IovaRange,
    bounce: Option<(BouncePool, IovaRange)>,
}

impl<P: Platform> Endpoint<P> {
    pub(crate) async fn new(
        viommu: Viommu<P>,
        id: EndpointId,
        domain: Domain<P>,
        options: EndpointOptions,
    ) -> Result<Self, DmaError> {
        let faulting = domain.allocate(viommu.granule(), options.limit, 1)?;
        let mut unused = Unused { domain: domain.clone(), range: Some(faulting) };
        let mut endpoint = Self { viommu, id, domain, limit: options.limit, faulting, bounce: None };
        if options.bounce_bytes > 0 {
            let pages = endpoint.alloc_coherent_async(options.bounce_bytes).await?;
            let (len, range) = (pages.len_bytes(), pages.mapping.range);
            let granule = endpoint.granule() as usize;
            // SAFETY: fresh memory, mapped there, that is not freed before the pool is gone.
            let pool = unsafe { BouncePool::new(pages.ptr, len, range.start(), granule) };
            endpoint.bounce = Some((pool, range));
        }
        unused.range = None;
        Ok(endpoint)
    }

    /// The domain.
    pub fn domain(&self) -> &Domain<P> {
        &self.domain
    }

    /// The addresses that are never mapped.
    #[cfg(feature = "bench")]
    pub(crate) fn faulting(&self) -> IovaRange {
        self.faulting
    }

    /// Detaches the endpoint and frees its bounce pages. Its bus mastering must be off, and its driver's memory
    /// free. An endpoint that was moved to another domain meanwhile stays there.
    ///
    /// # Errors
    /// [`DetachError`]: the endpoint counts as attached, but its bounce pages are unmapped.
    /// [`Viommu::detach`] can be tried later.
    pub fn close(mut self) -> Result<(), DetachError> {
        let bounce = self.bounce.take().map(|(_pool, range)| range);
        let free_bounce = || {
            let Some(range) = bounce else { return };
            if let Err(error) = self.domain.unmap_now(range) {
                log::warn!("the bounce pages of endpoint {} stay in quarantine: {error}", self.id);
            }
        };
        let leave = || {
            let key = self.domain.key();
            let here = { self.domain.shared().state.lock().engine.is_or_was_in(self.id, key) };
            if here { self.viommu.detach(self.id) } else { Ok(()) }
        };
        // Detached first, the pages need no UNMAP. But that holds only where nothing bypasses.
        let detached = if self.viommu.unattached() == Unattached::Blocked {
            let detached = leave();
            free_bounce();
            detached
        } else {
            free_bounce();
            leave()
        };
        self.domain.give_back(self.faulting);
        detached
    }

    fn mapping(&self, range: IovaRange, iova: Iova, len: usize) -> DmaMapping {
        DmaMapping { domain: self.domain.key(), iova, len, range }
    }

    /// Memory of any place in a granule, mapped by whole granules.
    fn mapping_at(&self, range: IovaRange, phys: PhysAddr, len: usize) -> DmaMapping {
        let iova = Iova::new(range.start().get() + (phys.get() & (self.granule() - 1)));
        self.mapping(range, iova, len)
    }

    fn purpose(&self, prot: Prot) -> Purpose {
        Purpose { prot, tag: "" }
    }

    #[inline]
    fn map_one<'a>(
        &'a self,
        run: Run,
        prot: Prot,
        held: &'a mut Option<HeldMemory>,
    ) -> Started<Result<IovaRange, MapError>, impl Future<Output = Result<IovaRange, MapError>> + Send + 'a>
    {
        let place = Place::Anywhere { len: run.len, limit: self.limit, parts: 1 };
        let (shared, key) = (self.domain.shared(), self.domain.key());
        exchange::map(shared, key, place, iter::once(run), self.purpose(prot), held)
    }

    fn block_on<T>(&self, operation: impl Future<Output = T>) -> T {
        self.domain.shared().block_on(operation)
    }
}

/// The operations of [`DmaDevice`] as futures. One that is dropped before its end leaves what it sent in
/// quarantine, and gives memory back that it did not send.
impl<P: Platform> Endpoint<P> {
    /// [`DmaDevice::alloc_coherent`] as a future.
    ///
    /// # Errors
    /// As there.
    pub async fn alloc_coherent_async(&self, len: usize) -> Result<CoherentMemory, DmaError> {
        let no_memory = DmaError::NoMemory { len };
        let granule = usize::try_from(self.granule()).map_err(|_| no_memory)?;
        // At least two bytes, since no MAP can say one.
        let len = len.max(2).checked_next_multiple_of(granule).ok_or(no_memory)?;
        let memory = self.viommu.shared.platform.dma_alloc(len, granule).ok_or(no_memory)?;
        let held = HeldMemory::from_platform(memory, granule);
        match self.adopt_async(held, Direction::Both).await {
            Ok(mapping) => Ok(CoherentMemory { mapping, ptr: memory.ptr }),
            Err((error, held)) => {
                if let Some(held) = held {
                    self.viommu.shared.release(held);
                }
                Err(error)
            }
        }
    }

    /// [`DmaDevice::free_coherent`] as a future.
    ///
    /// # Errors
    /// As there.
    pub fn free_coherent_async(
        &self,
        memory: CoherentMemory,
    ) -> impl Future<Output = Result<(), UnmapError>> + Send + '_ {
        self.unmap_async(memory.mapping)
    }

    /// [`DmaDevice::adopt`] as a future.
    ///
    /// # Errors
    /// As there.
    pub fn adopt_async(
        &self,
        memory: HeldMemory,
        direction: Direction,
    ) -> impl Future<Output = Result<DmaMapping, (DmaError, Option<HeldMemory>)>> + Send + '_ {
        let place = memory.memory();
        let mut lent = Lent { shared: self.domain.shared(), memory: Some(memory) };
        async move {
            let run = Run { phys: place.phys, len: place.len as u64 };
            match self.map_one(run, direction.prot(), &mut lent.memory).finish().await {
                Ok(range) => Ok(self.mapping(range, range.start(), place.len)),
                Err(error) => Err((error.into(), lent.memory.take())),
            }
        }
    }

    /// [`DmaDevice::map`] as a future.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there, and where the future is dropped until the quarantine is empty again.
    pub async unsafe fn map_async(
        &self,
        phys: PhysAddr,
        len: usize,
        direction: Direction,
    ) -> Result<DmaMapping, DmaError> {
        let run = rounded(PhysSegment { phys, len }, self.granule())?;
        let range = self.map_one(run, direction.prot(), &mut None).finish().await?;
        Ok(self.mapping_at(range, phys, len))
    }

    /// [`DmaDevice::map_scatter`] as a future.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As for [`map_async`](Self::map_async), for each segment.
    pub async unsafe fn map_scatter_async(
        &self,
        segments: &[PhysSegment],
        direction: Direction,
        iovas: &mut [Iova],
    ) -> Result<DmaMapping, DmaError> {
        if segments.is_empty() || segments.len() != iovas.len() {
            return Err(DmaError::ListLength { segments: segments.len(), room: iovas.len() });
        }
        let granule = self.granule();
        let len = total_len(segments, granule)?;
        let runs = Runs { segments, granule };
        let anywhere = Place::Anywhere { len, limit: self.limit, parts: runs.clone().count() };
        let (shared, key) = (self.domain.shared(), self.domain.key());
        let purpose = self.purpose(direction.prot());
        let range = exchange::map(shared, key, anywhere, runs, purpose, &mut None).finish().await?;
        place(segments, granule, range, iovas);
        Ok(self.mapping(range, range.start(), len as usize))
    }

    /// [`DmaDevice::unmap`] as a future.
    ///
    /// # Errors
    /// As there.
    pub fn unmap_async(
        &self,
        mapping: DmaMapping,
    ) -> impl Future<Output = Result<(), UnmapError>> + Send + '_ {
        let foreign = mapping.domain != self.domain.key();
        let unmapping = (!foreign).then(|| self.domain.unmap_range(mapping.range));
        let not_mapped = UnmapError::NotMapped(mapping.iova);
        async move { unmapping.ok_or(not_mapped)?.await }
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

/// Memory on its way into a mapping. It goes back where it does not get there.
struct Lent<'a, P: Platform> {
    shared: &'a Shared<P>,
    memory: Option<HeldMemory>,
}

impl<P: Platform> Drop for Lent<'_, P> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.shared.release(memory);
        }
    }
}

impl<P: Platform> Drop for Endpoint<P> {
    fn drop(&mut self) {
        if let Some((_pool, range)) = self.bounce.take() {
            self.domain.quarantine(range);
        }
    }
}

impl<P: Platform> fmt::Debug for Endpoint<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({} in {:?})", self.id, self.domain)
    }
}

impl<P: Platform> DmaDevice for Endpoint<P> {
    fn endpoint(&self) -> EndpointId {
        self.id
    }

    fn granule(&self) -> u64 {
        self.viommu.granule()
    }

    fn limit(&self) -> Iova {
        self.limit
    }

    fn alloc_coherent(&self, len: usize) -> Result<CoherentMemory, DmaError> {
        self.block_on(self.alloc_coherent_async(len))
    }

    fn free_coherent(&self, memory: CoherentMemory) -> Result<(), UnmapError> {
        self.block_on(self.free_coherent_async(memory))
    }

    fn adopt(
        &self,
        memory: HeldMemory,
        direction: Direction,
    ) -> Result<DmaMapping, (DmaError, Option<HeldMemory>)> {
        self.block_on(self.adopt_async(memory, direction))
    }

    unsafe fn map(&self, phys: PhysAddr, len: usize, direction: Direction) -> Result<DmaMapping, DmaError> {
        let run = rounded(PhysSegment { phys, len }, self.granule())?;
        let range = self.domain.shared().end_of(self.map_one(run, direction.prot(), &mut None))?;
        Ok(self.mapping_at(range, phys, len))
    }

    unsafe fn map_scatter(
        &self,
        segments: &[PhysSegment],
        direction: Direction,
        iovas: &mut [Iova],
    ) -> Result<DmaMapping, DmaError> {
        // SAFETY: the caller's promise.
        self.block_on(unsafe { self.map_scatter_async(segments, direction, iovas) })
    }

    fn unmap(&self, mapping: DmaMapping) -> Result<(), UnmapError> {
        if mapping.domain != self.domain.key() {
            return Err(UnmapError::NotMapped(mapping.iova));
        }
        self.domain.unmap_now(mapping.range)
    }

    unsafe fn unmap_at(&self, iova: Iova) -> Result<(), UnmapError> {
        let mapping = self.domain.translate(iova).filter(|mapping| mapping.range.start() == iova);
        let range = mapping.ok_or(UnmapError::NotMapped(iova))?.range;
        self.domain.unmap_now(range)
    }

    unsafe fn share(&self, buffer: NonNull<[u8]>, direction: Direction) -> Result<Iova, DmaError> {
        let none = DmaError::NoBounce { len: buffer.len() };
        let (pool, _) = self.bounce.as_ref().ok_or(none)?;
        let first = pool.take(buffer.len()).ok_or(none)?;
        match direction {
            Direction::FromDevice => pool.zero(first, buffer.len()),
            // SAFETY: the chunks were just taken, and the caller promises the buffer.
            Direction::ToDevice | Direction::Both => unsafe { pool.copy_in(first, buffer) },
        }
        Ok(pool.iova(first))
    }

    unsafe fn unshare(&self, iova: Iova, buffer: NonNull<[u8]>, direction: Direction) {
        let Some((pool, _)) = self.bounce.as_ref() else { return };
        let Some(first) = pool.chunk_of(iova, buffer.len()) else { return };
        if direction != Direction::ToDevice {
            // SAFETY: the chunks are taken, by the caller's `share`, and the caller promises the buffer.
            unsafe { pool.copy_out(first, buffer) };
        }
        pool.give_back(first, buffer.len());
    }

    unsafe fn map_msi(&self, doorbell: PhysAddr) -> Result<MsiDoorbell, DmaError> {
        let iova = Iova::new(doorbell.get());
        let regions = self.viommu.reserved_regions(self.id);
        let passes = regions.is_some_and(|regions| is_in_window(&regions, doorbell));
        if passes {
            return Ok(MsiDoorbell { iova, mapping: None });
        }
        let run = rounded(PhysSegment { phys: doorbell, len: DOORBELL_LEN as usize }, self.granule())?;
        let mmio = if self.viommu.features().contains(Features::MMIO) { Prot::MMIO } else { Prot::empty() };
        let range = self.viommu.shared.end_of(self.map_one(run, Prot::WRITE | mmio, &mut None))?;
        let iova = Iova::new(range.start().get() + (doorbell.get() - run.phys.get()));
        Ok(MsiDoorbell { iova, mapping: Some(self.mapping(range, iova, DOORBELL_LEN as usize)) })
    }

    fn unmap_msi(&self, doorbell: MsiDoorbell) -> Result<(), UnmapError> {
        doorbell.mapping.map_or(Ok(()), |mapping| self.unmap(mapping))
    }

    fn faulting_iova(&self) -> Iova {
        self.faulting.start()
    }

    fn flush(&self) -> Result<(), UnmapError> {
        Ok(())
    }
}
