//! The common way of a mapping, from free addresses to free addresses, without a search.

use super::Space;
use super::order::Wanted;
use super::slab::Index;
use crate::addr::{Iova, IovaRange};
use crate::dma::HeldMemory;
use crate::engine::mapping::{Holder, ListId, MappingHandle, MappingState, Purpose, Record};
use crate::engine::{Placement, Unheld};
use crate::exchange::{Mapped, Run};

impl Space {
    /// Takes addresses as [`allocate`](Self::allocate) does, and makes a mapping of them as [`insert`](Self::insert)
    /// does. `None`, and nothing changed, where that cannot be.
    #[inline(always)]
    pub(crate) fn make(
        &mut self,
        run: Run,
        Placement { limit, align }: Placement,
        (purpose, list): (Purpose, ListId),
        held: &mut Option<HeldMemory>,
    ) -> Option<Mapped> {
        if self.room_left() == 0 {
            return None;
        }
        // All ranges of a magazine are as long, and only 0 lies below the lowest address.
        let suits = |range: IovaRange| {
            let (start, last) = (range.start().get(), range.last().get());
            start != 0 && last <= limit.get() && start & (align - 1) == 0
        };
        let granules = self.order.page(Iova::new(run.len));
        let (index, record) = match self.magazines.pop(&mut self.order, granules, suits) {
            Some(cached) => cached,
            None => {
                let index = self.search_for_one(run.len, align, limit)?;
                (index, self.order.get_mut(index)?)
            }
        };
        let range = record.range;
        let kept = if held.is_some() { held.take().map(HeldMemory::into_kept) } else { None };
        record.begin(run.phys, purpose, list, kept);
        self.outside += 1;
        self.mappings += 1;
        Some(Mapped { range, record: MappingHandle(index) })
    }

    #[cold]
    fn search_for_one(&mut self, len: u64, align: u64, limit: Iova) -> Option<Index> {
        let granule = self.order.granule();
        let wanted = Wanted { len, align: align.max(granule), lowest: granule, limit: limit.get() };
        let (index, range) = self.search(wanted)?;
        self.remember(index, range.start());
        Some(index)
    }

    /// The device confirmed the MAP of a record that waits for that. False where it is not there, or not so.
    #[inline(always)]
    pub(crate) fn confirm(&mut self, handle: MappingHandle, range: IovaRange) -> bool {
        let Some(record) = self.order.get_mut(handle.0) else { return false };
        let waits = record.holder == Holder::Mapping
            && record.range.start() == range.start()
            && record.state == MappingState::Mapping;
        if waits {
            debug_assert!(record.range == range && record.on_device);
            // Before and after it adds nothing to the tally.
            (record.state, record.counted, record.owned) = (MappingState::Live, true, true);
        }
        waits
    }

    /// Marks the one live mapping of exactly this range, which the handle may name, as being unmapped.
    #[inline(always)]
    pub(crate) fn begin_unmap(&mut self, range: IovaRange, handle: MappingHandle) -> Option<MappingHandle> {
        self.leave(range, handle, MappingState::Unmapping)
    }

    /// Marks it as deferred. False where it is not there, or not live.
    #[inline(always)]
    pub(crate) fn defer(&mut self, handle: MappingHandle, range: IovaRange) -> bool {
        self.leave(range, handle, MappingState::Deferred).is_some()
    }

    #[inline(always)]
    fn leave(
        &mut self,
        range: IovaRange,
        handle: MappingHandle,
        state: MappingState,
    ) -> Option<MappingHandle> {
        if let Some(record) = self.order.get_mut(handle.0)
            && is_live(record, range)
        {
            // As above.
            (record.state, record.owned) = (state, false);
            return Some(handle);
        }
        self.find_and_leave(range, state)
    }

    #[cold]
    fn find_and_leave(&mut self, range: IovaRange, state: MappingState) -> Option<MappingHandle> {
        let index = self.find(range.start())?;
        let record = &mut self.order[index];
        if !is_live(record, range) {
            return None;
        }
        // As above.
        (record.state, record.owned) = (state, false);
        Some(MappingHandle(index))
    }

    /// The device confirmed the UNMAP of a record that waits for that: its addresses are free. With the memory that was
    /// held for it. `None` where it is not there, or not so.
    #[inline(always)]
    pub(crate) fn end_unmapped(&mut self, handle: MappingHandle, range: IovaRange) -> Option<Unheld> {
        let Self { order, magazines, .. } = self;
        let granules = order.granules(range);
        let record = order.get_mut(handle.0)?;
        let waits = record.holder == Holder::Mapping
            && record.range.start() == range.start()
            && record.state == MappingState::Unmapping
            && record.counted;
        if !waits {
            return None;
        }
        debug_assert!(record.range == range && record.on_device && !record.owned);
        self.mappings -= 1;
        self.outside -= 1;
        record.counted = false;
        if record.holds_memory() {
            return Some(self.take_held(handle));
        }
        record.holder = Holder::Taken;
        if !magazines.keep(handle.0, record, granules) {
            self.free(handle.0);
        }
        Some(Unheld::Nothing)
    }

    /// Whether this one record is all of the range, and there is no memory that goes back with it.
    #[inline(always)]
    pub(crate) fn is_all_of(&self, handle: MappingHandle, range: IovaRange) -> bool {
        self.order.get(handle.0).is_some_and(|record| record.range == range && !record.holds_memory())
    }

    #[cold]
    fn take_held(&mut self, handle: MappingHandle) -> Unheld {
        let granule = self.order.granule();
        let record = &mut self.order[handle.0];
        let held = record.take_held(granule);
        record.holder = Holder::Taken;
        self.free(handle.0);
        held.map_or(Unheld::Nothing, Unheld::Memory)
    }
}

/// Whether it is the record of exactly this mapping, live on the device.
#[inline(always)]
fn is_live(record: &Record, range: IovaRange) -> bool {
    record.holder == Holder::Mapping
        && record.range == range
        && record.state == MappingState::Live
        && record.on_device
}
