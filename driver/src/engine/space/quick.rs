//! The common way of a mapping, from free addresses to free addresses, without a search.

use super::Space;
use super::order::Wanted;
use crate::addr::{Iova, IovaRange};
use crate::dma::HeldMemory;
use crate::engine::mapping::{Holder, ListId, MappingHandle, MappingState, Purpose};
use crate::exchange::Run;

impl Space {
    /// Takes addresses as [`allocate`](Self::allocate) does, and makes a mapping of them as [`insert`](Self::insert)
    /// does. `None`, and nothing changed, where that cannot be.
    #[inline]
    pub(crate) fn make(
        &mut self,
        run: Run,
        (align, (lowest, limit)): (u64, (Iova, Iova)),
        (purpose, list): (Purpose, ListId),
        held: &mut Option<HeldMemory>,
    ) -> Option<(MappingHandle, IovaRange)> {
        if self.room_left() == 0 {
            return None;
        }
        let (len, lowest, limit) = (run.len, lowest.get(), limit.get());
        let suits = |range: IovaRange| {
            let (start, last) = (range.start().get(), range.last().get());
            let there = start >= lowest && last <= limit && start & (align - 1) == 0;
            there && last - start == len - 1
        };
        let granules = self.order.page(Iova::new(len));
        let (index, record) = match self.magazines.pop(&mut self.order, granules, suits) {
            Some(cached) => cached,
            None => {
                let (index, _) = self.search(Wanted { len, align, lowest, limit })?;
                (index, self.order.get_mut(index)?)
            }
        };
        let range = record.range;
        record.begin(run.phys, purpose, list, held.take().map(HeldMemory::into_kept));
        self.outside += 1;
        self.mappings += 1;
        self.remember(index, range.start());
        Some((MappingHandle(index), range))
    }

    /// The device confirmed the MAP of a record that waits for that. False where it is not there, or not so.
    #[inline]
    pub(crate) fn confirm(&mut self, handle: MappingHandle, range: IovaRange) -> bool {
        let Some(record) = self.order.get_mut(handle.0) else { return false };
        let waits = record.holder == Holder::Mapping
            && record.range == range
            && record.state == MappingState::Mapping
            && record.on_device;
        if waits {
            // Before and after it adds nothing to the tally.
            (record.state, record.counted, record.owned) = (MappingState::Live, true, true);
        }
        waits
    }

    /// Marks the one live mapping of exactly this range as being unmapped.
    #[inline]
    pub(crate) fn begin_unmap(&mut self, range: IovaRange) -> Option<MappingHandle> {
        let index = self.find(range.start())?;
        let record = &mut self.order[index];
        let live = record.holder == Holder::Mapping
            && record.range == range
            && record.state == MappingState::Live
            && record.on_device;
        if !live {
            return None;
        }
        // As above.
        (record.state, record.owned) = (MappingState::Unmapping, false);
        Some(MappingHandle(index))
    }

    /// The device confirmed the UNMAP of a record that waits for that: its addresses are free. With the memory that was
    /// held for it. `None` where it is not there, or not so.
    #[inline]
    pub(crate) fn end_unmapped(
        &mut self,
        handle: MappingHandle,
        range: IovaRange,
    ) -> Option<Option<HeldMemory>> {
        let granule = self.order.granule();
        let record = self.order.get_mut(handle.0)?;
        let waits = record.holder == Holder::Mapping
            && record.range == range
            && record.state == MappingState::Unmapping
            && record.on_device
            && record.counted
            && !record.owned;
        if !waits {
            return None;
        }
        let held = if record.holds_memory() { record.take_held(granule) } else { None };
        (record.holder, record.counted) = (Holder::Taken, false);
        self.mappings -= 1;
        self.outside -= 1;
        self.free(handle.0);
        Some(held)
    }
}
