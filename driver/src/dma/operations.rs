//! The operations of an endpoint's view as futures.

use super::endpoint::View;
use super::scatter::{Extent, is_rounded, rounded};
use super::{CoherentMemory, DmaMapping, Endpoint, HeldMemory, PhysSegment, Unmapped};
use crate::addr::{Iova, PhysAddr};
use crate::engine::{Placement, Purpose, Spot, Wish};
use crate::error::{DmaError, MapError, UnmapError};
use crate::exchange::{self, Mapped, Place, Run, SentMap, Shared};
use crate::platform::Platform;
use crate::prot::{Direction, Prot};
use crate::rounds;
use crate::wire::feature::Features;
use core::future::Future;
use core::iter;
use core::sync::atomic::Ordering;

/// The operations of [`DmaDevice`](super::DmaDevice) as futures. One that is dropped before its end leaves what it sent
/// in quarantine, and gives memory back that it did not send.
impl<P: Platform> Endpoint<P> {
    /// [`DmaDevice::alloc`](super::DmaDevice::alloc) as a future.
    ///
    /// # Errors
    /// As there.
    pub async fn alloc_async(&self, len: usize, direction: Direction) -> Result<CoherentMemory, DmaError> {
        let held = self.memory(len)?;
        self.alloc_in(held, direction).await
    }

    async fn alloc_in(&self, held: HeldMemory, direction: Direction) -> Result<CoherentMemory, DmaError> {
        let memory = held.memory();
        match self.adopt_async(held, direction).await {
            Ok(mapping) => Ok(CoherentMemory { mapping, ptr: memory.ptr }),
            Err((error, held)) => {
                if let Some(held) = held {
                    self.view.domain.shared().release(held);
                }
                Err(error)
            }
        }
    }

    /// The same for whoever blocks.
    pub(super) fn alloc_now(&self, len: usize, direction: Direction) -> Result<CoherentMemory, DmaError> {
        let held = self.memory(len)?;
        let (view, memory) = (&*self.view, held.memory());
        let run = Run { phys: memory.phys, len: memory.len as u64 };
        if !run.is_whole(view.granule) {
            return self.block_on(self.alloc_in(held, direction));
        }
        let (placement, mut held) = (view.reach.placement(run.len), Some(held));
        let purpose = Purpose { prot: direction.prot(), tag: self.tag };
        let (shared, key) = (view.domain.shared(), view.domain.key());
        let first = exchange::map_first(shared, key, (run, Spot::Within(placement)), purpose, &mut held);
        let mapped = match first {
            Ok(mapped) => {
                view.domain.flush_if_overdue();
                mapped
            }
            Err(sent) => {
                let place = Place::Anywhere { len: run.len, placement, parts: 1 };
                let run = iter::once(run);
                let rest = exchange::map(shared, key, place, run, purpose, &mut held, sent);
                let range = self.block_on(rest).inspect_err(|_| {
                    if let Some(held) = held.take() {
                        shared.release(held);
                    }
                })?;
                self.block_on(view.domain.flush_if_overdue_for(range));
                Mapped::of(range)
            }
        };
        let mapping = self.mapping(mapped, mapped.range.start(), memory.len);
        Ok(CoherentMemory { mapping, ptr: memory.ptr })
    }

    /// Memory from the platform, for `len` bytes in whole granules.
    fn memory(&self, len: usize) -> Result<HeldMemory, DmaError> {
        let no_memory = DmaError::NoMemory { len };
        let granule = usize::try_from(self.view.granule).map_err(|_| no_memory)?;
        // At least two bytes, since no MAP can say one.
        let len = len.max(2).checked_next_multiple_of(granule).ok_or(no_memory)?;
        self.check_open()?;
        let memory = self.view.domain.shared().platform.dma_alloc(len, granule).ok_or(no_memory)?;
        Ok(HeldMemory::from_platform(memory, granule))
    }

    /// [`DmaDevice::alloc_coherent`](super::DmaDevice::alloc_coherent) as a future.
    ///
    /// # Errors
    /// As there.
    pub async fn alloc_coherent_async(&self, len: usize) -> Result<CoherentMemory, DmaError> {
        self.alloc_async(len, Direction::Both).await
    }

    /// [`DmaDevice::free_coherent`](super::DmaDevice::free_coherent) as a future.
    ///
    /// # Errors
    /// As there.
    pub fn free_coherent_async(
        &self,
        memory: CoherentMemory,
    ) -> impl Future<Output = Result<Unmapped, UnmapError>> + Send + '_ {
        self.unmap_async(memory.mapping)
    }

    /// [`DmaDevice::adopt`](super::DmaDevice::adopt) as a future.
    ///
    /// # Errors
    /// As there.
    pub fn adopt_async(
        &self,
        memory: HeldMemory,
        direction: Direction,
    ) -> impl Future<Output = Result<DmaMapping, (DmaError, Option<HeldMemory>)>> + Send + '_ {
        self.adopt_within(memory, direction, Placement::up_to(self.view.reach.limit))
    }

    /// [`adopt_async`](Self::adopt_async) where both the endpoint's constraints and `within` allow.
    pub(crate) fn adopt_within(
        &self,
        memory: HeldMemory,
        direction: Direction,
        within: Placement,
    ) -> impl Future<Output = Result<DmaMapping, (DmaError, Option<HeldMemory>)>> + Send + '_ {
        let place = memory.memory();
        let mut lent = Lent { shared: self.view.domain.shared(), memory: Some(memory) };
        async move {
            if let Err(closed) = self.check_open() {
                return Err((closed, lent.memory.take()));
            }
            let run = Run { phys: place.phys, len: place.len as u64 };
            let (runs, prot) = (iter::once(run), direction.prot());
            let extent = Extent { len: run.len, runs: 1 };
            match self.map_runs(extent, runs, prot, within, &mut lent.memory, None).await {
                Ok(mapped) => {
                    self.view.domain.flush_if_overdue_for(mapped.range).await;
                    Ok(self.mapping(mapped, mapped.range.start(), place.len))
                }
                Err(error) => Err((error.into(), lent.memory.take())),
            }
        }
    }

    /// [`DmaDevice::map`](super::DmaDevice::map) as a future.
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
        self.map_in_place_async(phys, len, direction.prot()).await
    }

    /// [`DmaDevice::map_resource`](super::DmaDevice::map_resource) as a future.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there, and where the future is dropped until the quarantine is empty again.
    pub async unsafe fn map_resource_async(
        &self,
        phys: PhysAddr,
        len: usize,
        direction: Direction,
    ) -> Result<DmaMapping, DmaError> {
        let has_flag = self.view.viommu.features().contains(Features::MMIO);
        let flag = if has_flag { Prot::MMIO } else { Prot::empty() };
        self.map_in_place_async(phys, len, direction.prot() | flag).await
    }

    /// [`DmaDevice::map_each`](super::DmaDevice::map_each) as a future. Dropped before its end it leaves what it sent in
    /// quarantine, and the list empty.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As for [`map_async`](Self::map_async), for each segment.
    pub async unsafe fn map_each_async(
        &self,
        segments: &[PhysSegment],
        direction: Direction,
        mappings: &mut [Option<DmaMapping>],
    ) -> Result<(), DmaError> {
        let full = mappings.iter().any(Option::is_some);
        if segments.is_empty() || segments.len() != mappings.len() || full {
            return Err(DmaError::ListLength { segments: segments.len(), room: mappings.len() });
        }
        self.check_open()?;
        let (view, purpose) = (&*self.view, Purpose { prot: direction.prot(), tag: self.tag });
        // Before there is anything that would have to be kept meanwhile.
        view.domain.flush_if_overdue_async().await;
        let (shared, key) = (view.domain.shared(), view.domain.key());
        Ok(exchange::map_each(shared, key, (segments, &view.reach), purpose, mappings).await?)
    }

    /// The same as [`unmap_each_async`](Self::unmap_each_async) for whoever blocks.
    pub(super) fn unmap_each_now(&self, mappings: &mut [Option<DmaMapping>]) -> Result<Unmapped, UnmapError> {
        let domain = &self.view.domain;
        if domain.defers() {
            return self.block_on(self.unmap_each_async(mappings));
        }
        self.check_ours(mappings)?;
        exchange::unmap_each_now(domain.shared(), domain.key(), mappings).map(|()| Unmapped::Now)
    }

    /// Refuses handles of other domains.
    #[inline(always)]
    fn check_ours(&self, mappings: &[Option<DmaMapping>]) -> Result<(), UnmapError> {
        let key = self.view.domain.key();
        let is_ours = |mapping: &Option<DmaMapping>| match mapping {
            Some(mapping) => mapping.domain == key,
            None => true,
        };
        if rounds::all(mappings, is_ours) {
            return Ok(());
        }
        let foreign = mappings.iter().flatten().find(|mapping| mapping.domain != key);
        foreign.map_or(Ok(()), |foreign| Err(UnmapError::NotMapped(foreign.iova)))
    }

    /// [`DmaDevice::unmap_each`](super::DmaDevice::unmap_each) as a future. Dropped before its end it leaves what it sent
    /// in quarantine, and what it did not send in the list.
    ///
    /// # Errors
    /// As there.
    pub async fn unmap_each_async(
        &self,
        mappings: &mut [Option<DmaMapping>],
    ) -> Result<Unmapped, UnmapError> {
        let domain = &self.view.domain;
        self.check_ours(mappings)?;
        if !domain.defers() {
            let unmapped = exchange::unmap_each(domain.shared(), domain.key(), mappings).await;
            return unmapped.map(|()| Unmapped::Now);
        }
        let mut result = Ok(Unmapped::Now);
        for mapping in mappings.iter_mut().filter_map(Option::take) {
            let unmapped = domain.unmap_by_policy(mapping.range).await;
            result = match (result, unmapped) {
                (Err(error), _) | (Ok(_), Err(error)) => Err(error),
                (Ok(Unmapped::AtFlush), _) | (_, Ok(Unmapped::AtFlush)) => Ok(Unmapped::AtFlush),
                (Ok(Unmapped::Now), Ok(Unmapped::Now)) => Ok(Unmapped::Now),
            };
        }
        result
    }

    /// [`DmaDevice::flush`](super::DmaDevice::flush) as a future.
    ///
    /// # Errors
    /// As there.
    pub async fn flush_async(&self) -> Result<(), UnmapError> {
        self.view.domain.flush_async().await
    }

    /// [`DmaDevice::unmap`](super::DmaDevice::unmap) as a future.
    ///
    /// # Errors
    /// As there.
    pub fn unmap_async(
        &self,
        mapping: DmaMapping,
    ) -> impl Future<Output = Result<Unmapped, UnmapError>> + Send + '_ {
        let domain = &self.view.domain;
        let foreign = mapping.domain != domain.key();
        let unmapping = (!foreign).then(|| domain.unmap_by_policy(mapping.range));
        let not_mapped = UnmapError::NotMapped(mapping.iova);
        async move { unmapping.ok_or(not_mapped)?.await }
    }

    /// Maps a buffer again whose mapping waits for a flush, where the domain defers unmapping. `None` where none does. The
    /// caller promises the memory.
    #[inline(always)]
    fn map_again(&self, phys: PhysAddr, len: usize, prot: Prot) -> Option<DmaMapping> {
        let view = &*self.view;
        if !view.again.load(Ordering::Acquire) {
            return None;
        }
        let (shared, key) = (view.domain.shared(), view.domain.key());
        let wish = Wish { buffer: PhysSegment { phys, len }, prot, tag: self.tag, reach: &view.reach };
        let mapped = exchange::revive_one(shared, key, wish)?;
        Some(DmaMapping::around(wish.buffer, view.granule, (key, mapped)))
    }

    /// Whole granules around what is asked for. The caller promises the memory.
    #[inline(always)]
    pub(super) fn map_in_place(
        &self,
        phys: PhysAddr,
        len: usize,
        direction: Direction,
    ) -> Result<DmaMapping, DmaError> {
        let (view, run) = (&*self.view, Run { phys, len: len as u64 });
        if !view.straight.load(Ordering::Acquire) || !is_rounded(run, view.granule) {
            return self.map_crooked(phys, len, direction);
        }
        let key = view.domain.key();
        match self.map_straight(run, direction) {
            Ok(Mapped { range, record }) => {
                Ok(DmaMapping { domain: key, iova: range.start(), len, range, record })
            }
            Err(sent) => self.map_rest(phys, len, direction, sent),
        }
    }

    /// The first step with whole granules, where there is nothing else to be looked at.
    #[inline(always)]
    pub(super) fn map_straight(&self, run: Run, direction: Direction) -> Result<Mapped, Option<SentMap>> {
        let view = &*self.view;
        let purpose = Purpose { prot: direction.prot(), tag: self.tag };
        let (shared, key, placement) = (view.domain.shared(), view.domain.key(), Placement::ANYWHERE);
        exchange::map_first(shared, key, (run, Spot::Within(placement)), purpose, &mut None)
    }

    /// All other ways.
    #[inline(always)]
    fn map_crooked(&self, phys: PhysAddr, len: usize, direction: Direction) -> Result<DmaMapping, DmaError> {
        match self.map_again(phys, len, direction.prot()) {
            Some(mapping) => Ok(mapping),
            None => self.map_with_constraints(phys, len, direction),
        }
    }

    /// The same whatever is asked for.
    fn map_with_constraints(
        &self,
        phys: PhysAddr,
        len: usize,
        direction: Direction,
    ) -> Result<DmaMapping, DmaError> {
        self.check_open()?;
        let view = &*self.view;
        let run = rounded(PhysSegment { phys, len }, view.granule)?;
        let placement = view.reach.placement(run.len);
        let purpose = Purpose { prot: direction.prot(), tag: self.tag };
        let (shared, key) = (view.domain.shared(), view.domain.key());
        // A granule of one byte is no mapping by itself.
        let first = match run.len >= 2 {
            true => exchange::map_first(shared, key, (run, Spot::Within(placement)), purpose, &mut None),
            false => Err(None),
        };
        match first {
            Ok(mapped) => {
                view.domain.flush_if_overdue();
                Ok(self.mapping_within(mapped, phys, len))
            }
            Err(sent) => self.map_rest(phys, len, direction, sent),
        }
    }

    #[cold]
    pub(super) fn map_rest(
        &self,
        phys: PhysAddr,
        len: usize,
        direction: Direction,
        sent: Option<SentMap>,
    ) -> Result<DmaMapping, DmaError> {
        let run = rounded(PhysSegment { phys, len }, self.view.granule)?;
        let purpose = Purpose { prot: direction.prot(), tag: self.tag };
        let wanted = (run, self.view.reach.placement(run.len), purpose);
        self.block_on(self.map_rest_async(phys, len, wanted, Err(sent)))
    }

    pub(super) async fn map_in_place_async(
        &self,
        phys: PhysAddr,
        len: usize,
        prot: Prot,
    ) -> Result<DmaMapping, DmaError> {
        if let Some(mapping) = self.map_again(phys, len, prot) {
            return Ok(mapping);
        }
        self.check_open()?;
        let view = &*self.view;
        let run = rounded(PhysSegment { phys, len }, view.granule)?;
        let (placement, purpose) = (view.reach.placement(run.len), Purpose { prot, tag: self.tag });
        let (shared, key) = (view.domain.shared(), view.domain.key());
        let first = match prot.is_plain() && run.len >= 2 {
            true => exchange::map_first(shared, key, (run, Spot::Within(placement)), purpose, &mut None),
            false => Err(None),
        };
        self.map_rest_async(phys, len, (run, placement, purpose), first).await
    }

    /// What is left after the first step.
    async fn map_rest_async(
        &self,
        phys: PhysAddr,
        len: usize,
        (run, placement, purpose): (Run, Placement, Purpose),
        first: Result<Mapped, Option<SentMap>>,
    ) -> Result<DmaMapping, DmaError> {
        let domain = &self.view.domain;
        let mapped = match first {
            Ok(mapped) => mapped,
            Err(sent) => {
                let place = Place::Anywhere { len: run.len, placement, parts: 1 };
                let (shared, key, run) = (domain.shared(), domain.key(), iter::once(run));
                Mapped::of(exchange::map(shared, key, place, run, purpose, &mut None, sent).await?)
            }
        };
        domain.flush_if_overdue_for(mapped.range).await;
        Ok(self.mapping_within(mapped, phys, len))
    }

    /// Maps runs, of which `first` was sent already, where both the endpoint's constraints and `within` allow.
    pub(super) async fn map_runs(
        &self,
        Extent { len, runs: parts }: Extent,
        runs: impl Iterator<Item = Run> + Clone + Send,
        prot: Prot,
        within: Placement,
        held: &mut Option<HeldMemory>,
        first: Option<SentMap>,
    ) -> Result<Mapped, MapError> {
        let (view, purpose) = (&*self.view, Purpose { prot, tag: self.tag });
        let Placement { limit, align } = view.reach.placement(len);
        let placement = Placement { limit: limit.min(within.limit), align: align.max(within.align) };
        let (shared, key) = (view.domain.shared(), view.domain.key());
        let one = if parts == 1 && first.is_none() { runs.clone().next() } else { None };
        let first = match one.filter(|run| run.is_whole(view.granule)) {
            Some(run) => exchange::map_first(shared, key, (run, Spot::Within(placement)), purpose, held),
            None => Err(first),
        };
        match first {
            Ok(mapped) => Ok(mapped),
            Err(sent) => {
                let place = Place::Anywhere { len, placement, parts };
                exchange::map(shared, key, place, runs, purpose, held, sent).await.map(Mapped::of)
            }
        }
    }

    /// Memory of any place in a granule, mapped by whole granules.
    #[inline]
    fn mapping_within(&self, mapped: Mapped, phys: PhysAddr, len: usize) -> DmaMapping {
        let View { domain, granule, .. } = &*self.view;
        DmaMapping::around(PhysSegment { phys, len }, *granule, (domain.key(), mapped))
    }

    #[inline]
    pub(super) fn mapping(&self, Mapped { range, record }: Mapped, iova: Iova, len: usize) -> DmaMapping {
        DmaMapping { domain: self.view.domain.key(), iova, len, range, record }
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
