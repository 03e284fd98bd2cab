//! Mapping lists of segments: what is like most lists first, then any.

use super::scatter::{Pages, Runs, as_one, as_touching, place, place_alike, place_one, survey};
use super::{DmaDevice as _, DmaMapping, Endpoint, PhysSegment};
use crate::addr::Iova;
use crate::engine::{Placement, Purpose};
use crate::error::{DmaError, MapError, UnmapError};
use crate::exchange::{self, Mapped, Run, SentMap};
use crate::platform::Platform;
use crate::prot::{Direction, Prot};
use core::sync::atomic::Ordering;

impl<P: Platform> Endpoint<P> {
    /// [`DmaDevice::map_scatter`](super::DmaDevice::map_scatter) as a future.
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
        self.check_list(segments, iovas)?;
        let (prot, granule) = (direction.prot(), self.view.granule);
        if let Some(PhysSegment { phys, len }) = as_one(segments, granule) {
            let mapping = self.map_in_place_async(phys, len, prot).await?;
            place_one(mapping.range, segments, granule, iovas);
            return Ok(mapping);
        }
        let mapping = match self.map_pages(segments, prot, iovas) {
            Ok(mapping) => mapping,
            Err(sent) => self.map_list(segments, prot, iovas, sent).await?,
        };
        self.view.domain.flush_if_overdue_for(mapping.range).await;
        Ok(mapping)
    }

    /// The same for whoever blocks. The caller promises the memory.
    #[inline(always)]
    pub(super) fn map_scatter_now(
        &self,
        segments: &[PhysSegment],
        direction: Direction,
        iovas: &mut [Iova],
    ) -> Result<DmaMapping, DmaError> {
        let straight = self.view.straight.load(Ordering::Acquire) && segments.len() == iovas.len();
        if straight && let Some(PhysSegment { phys, len }) = as_touching(segments, self.view.granule) {
            let key = self.view.domain.key();
            let mapped = match self.map_straight(Run { phys, len: len as u64 }, direction) {
                Ok(mapped) => mapped,
                Err(sent) => {
                    let DmaMapping { range, record, .. } = self.map_rest(phys, len, direction, sent)?;
                    Mapped { range, record }
                }
            };
            let Mapped { range, record } = mapped;
            return match place_alike((range.start(), len), segments, iovas) {
                true => Ok(DmaMapping { domain: key, iova: range.start(), len, range, record }),
                false => self.place_otherwise((mapped, len), segments, direction, iovas),
            };
        }
        self.map_any_list_now(segments, direction, iovas)
    }

    /// The same for what was mapped as one already, but is no list of segments that are all as long.
    #[cold]
    fn place_otherwise(
        &self,
        (mapped, len): (Mapped, usize),
        segments: &[PhysSegment],
        direction: Direction,
        iovas: &mut [Iova],
    ) -> Result<DmaMapping, DmaError> {
        let (range, granule) = (mapped.range, self.view.granule);
        let mapping = self.mapping(mapped, range.start(), len);
        if as_one(segments, granule).is_some_and(|one| one.len == len) {
            place_one(range, segments, granule, iovas);
            return Ok(mapping);
        }
        // One is empty, or they go round all addresses: there are words for that.
        if let Err(UnmapError::Request { error, .. }) = self.unmap(mapping) {
            return Err(MapError::Quarantined { range, error }.into());
        }
        self.map_any_list_now(segments, direction, iovas)
    }

    /// The same whatever list it is.
    #[inline(never)]
    fn map_any_list_now(
        &self,
        segments: &[PhysSegment],
        direction: Direction,
        iovas: &mut [Iova],
    ) -> Result<DmaMapping, DmaError> {
        self.check_list(segments, iovas)?;
        let (prot, granule) = (direction.prot(), self.view.granule);
        if let Some(PhysSegment { phys, len }) = as_one(segments, granule) {
            let mapping = self.map_in_place(phys, len, direction)?;
            place_one(mapping.range, segments, granule, iovas);
            return Ok(mapping);
        }
        let mapping = match self.map_pages(segments, prot, iovas) {
            Ok(mapping) => mapping,
            Err(sent) => self.block_on(self.map_list(segments, prot, iovas, sent))?,
        };
        self.view.domain.flush_if_overdue();
        Ok(mapping)
    }

    /// Maps a list of pages, as far as the first step gets. The caller promises the memory.
    #[inline(always)]
    fn map_pages(
        &self,
        segments: &[PhysSegment],
        prot: Prot,
        iovas: &mut [Iova],
    ) -> Result<DmaMapping, Option<SentMap>> {
        let view = &*self.view;
        let pages = Pages::of(segments, view.granule).ok_or(None)?;
        let extent = pages.extent().ok_or(None)?;
        let len = usize::try_from(extent.len).map_err(|_| None)?;
        let mapped = match self.revive_list(pages.clone(), extent.len, prot) {
            Some(mapped) => mapped,
            None => {
                let purpose = Purpose { prot, tag: self.tag };
                let (shared, key) = (view.domain.shared(), view.domain.key());
                let wanted = (extent.len, view.reach.placement(extent.len), extent.runs);
                exchange::map_list_first(shared, key, wanted, pages, purpose)?
            }
        };
        let start = mapped.range.start();
        let placed = place_alike((start, len), segments, iovas);
        debug_assert!(placed, "they are pages");
        Ok(self.mapping(mapped, start, len))
    }

    #[inline(always)]
    fn check_list(&self, segments: &[PhysSegment], iovas: &[Iova]) -> Result<(), DmaError> {
        if segments.len() != iovas.len() || segments.is_empty() {
            return Err(DmaError::ListLength { segments: segments.len(), room: iovas.len() });
        }
        self.check_open()
    }

    /// Maps a list again that waits for a flush as it is.
    #[inline(always)]
    fn revive_list(&self, runs: impl Iterator<Item = Run> + Clone, len: u64, prot: Prot) -> Option<Mapped> {
        let view = &*self.view;
        if !view.again.load(Ordering::Acquire) {
            return None;
        }
        let purpose = Purpose { prot, tag: self.tag };
        let (shared, key) = (view.domain.shared(), view.domain.key());
        exchange::revive_list(shared, key, (&view.reach, len), runs, purpose)
    }

    /// Maps a list, of which `first` was sent already. The caller promises the memory.
    async fn map_list(
        &self,
        segments: &[PhysSegment],
        prot: Prot,
        iovas: &mut [Iova],
        first: Option<SentMap>,
    ) -> Result<DmaMapping, DmaError> {
        let granule = self.view.granule;
        let runs = Runs { segments: segments.iter(), granule };
        let extent = match survey(segments, granule, iovas) {
            Ok(extent) => extent,
            Err(error) => {
                debug_assert!(first.is_none(), "it was looked at");
                return Err(error.into());
            }
        };
        let again = if first.is_none() { self.revive_list(runs.clone(), extent.len, prot) } else { None };
        let mapped = match again {
            Some(mapped) => mapped,
            None => {
                let within = Placement::up_to(self.view.reach.limit);
                self.map_runs(extent, runs, prot, within, &mut None, first).await?
            }
        };
        place(mapped.range, iovas);
        Ok(self.mapping(mapped, mapped.range.start(), extent.len as usize))
    }
}
