//! The common way of a mapping, from free addresses to free addresses, without a search.

use super::Space;
use super::order::Wanted;
use super::slab::Index;
use crate::addr::{Iova, IovaRange};
use crate::dma::HeldMemory;
use crate::engine::mapping::{Holder, ListId, MappingHandle, MappingState, Purpose, Record};
use crate::exchange::{Mapped, Run};

impl Space {
    /// Takes addresses as [`allocate`](Self::allocate) does, and makes a mapping of them as [`insert`](Self::insert)
    /// does, unless `send` says `None`. Then, and where there is no place, nothing changed.
    #[inline(always)]
    pub(crate) fn make<S>(
        &mut self,
        run: Run,
        (align, limit): (u64, Iova),
        (purpose, list): (Purpose, ListId),
        held: &mut Option<HeldMemory>,
        send: impl FnOnce(IovaRange, MappingHandle) -> Option<S>,
    ) -> Option<(Mapped, S)> {
        if self.room_left() == 0 {
            return None;
        }
        let limit = limit.get();
        // All ranges of a magazine are as long, and only 0 lies below the lowest address.
        let suits = |range: IovaRange| {
            let (start, last) = (range.start().get(), range.last().get());
            start != 0 && last <= limit && start & (align - 1) == 0
        };
        let granules = self.order.page(Iova::new(run.len));
        let (index, record) = match self.magazines.pop(&mut self.order, granules, suits) {
            Some(cached) => cached,
            None => {
                let index =
                    self.search_for_one(Wanted { len: run.len, align, lowest: self.lowest(), limit })?;
                (index, self.order.get_mut(index)?)
            }
        };
        let (range, handle) = (record.range, MappingHandle(index));
        let Some(sent) = send(range, handle) else {
            self.free(index);
            return None;
        };
        record.begin(run.phys, purpose, list, held.take().map(HeldMemory::into_kept));
        self.outside += 1;
        self.mappings += 1;
        self.remember(index, range.start());
        Some((Mapped { range, record: handle }, sent))
    }

    #[cold]
    fn search_for_one(&mut self, wanted: Wanted) -> Option<Index> {
        self.search(wanted).map(|(index, _)| index)
    }

    /// The record of exactly this mapping, if it is in this state on the device. The handle may name it.
    #[inline(always)]
    fn in_state(
        &mut self,
        (range, handle): (IovaRange, MappingHandle),
        state: MappingState,
    ) -> Option<(Index, &mut Record)> {
        let is = |record: &Record| {
            record.holder == Holder::Mapping
                && record.range == range
                && record.state == state
                && record.on_device
        };
        if self.order.get(handle.0).is_some_and(is) {
            return Some((handle.0, self.order.get_mut(handle.0)?));
        }
        let index = self.find(range.start())?;
        let record = self.order.get_mut(index)?;
        is(record).then_some((index, record))
    }

    /// The device confirmed the MAP of a record that waits for that. False where it is not there, or not so.
    #[inline(always)]
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

    /// Marks the one live mapping of exactly this range, which the handle may name, as being unmapped, unless `send` says
    /// `None`.
    #[inline(always)]
    pub(crate) fn begin_unmap<S>(
        &mut self,
        mapping: (IovaRange, MappingHandle),
        send: impl FnOnce(MappingHandle) -> Option<S>,
    ) -> Option<(MappingHandle, S)> {
        let (index, record) = self.in_state(mapping, MappingState::Live)?;
        let sent = send(MappingHandle(index))?;
        // As above.
        (record.state, record.owned) = (MappingState::Unmapping, false);
        Some((MappingHandle(index), sent))
    }

    /// Marks it as deferred. False where it is not there, or not live.
    #[inline(always)]
    pub(crate) fn defer(&mut self, handle: MappingHandle, range: IovaRange) -> bool {
        let Some((_, record)) = self.in_state((range, handle), MappingState::Live) else { return false };
        // As above.
        (record.state, record.owned) = (MappingState::Deferred, false);
        true
    }

    /// The device confirmed the UNMAP of a record that waits for that: its addresses are free. With the memory that was
    /// held for it. `None` where it is not there, or not so.
    #[inline(always)]
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
