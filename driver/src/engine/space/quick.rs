//! The common way of a mapping, from free addresses to free addresses, without a search.

use super::Space;
use super::order::Wanted;
use super::slab::Index;
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::dma::HeldMemory;
use crate::engine::mapping::{Holder, ListId, MappingHandle, MappingState, Purpose, Record, Standing};
use crate::engine::{Placement, Spot};
use crate::exchange::{Mapped, Run};

impl Space {
    /// Takes addresses as [`allocate`](Self::allocate) and [`take`](Self::take) do, and makes a mapping of them as
    /// [`insert`](Self::insert) does. `None`, and nothing changed, where that cannot be; exact addresses only where they are
    /// those of their size that were given back last.
    #[inline(always)]
    pub(crate) fn make(
        &mut self,
        run: Run,
        spot: Spot,
        (purpose, list): (Purpose, ListId),
        held: &mut Option<HeldMemory>,
    ) -> Option<Mapped> {
        if self.mappings >= self.most {
            return None;
        }
        let is_it = |range: IovaRange| match spot {
            Spot::Within(placement) => suits(placement, range),
            Spot::At(wanted) => range == wanted,
        };
        let granules = self.order.page(Iova::new(run.len));
        let (index, record) = match (self.magazines.pop(&mut self.order, granules, is_it), spot) {
            (Some(cached), _) => cached,
            (None, Spot::Within(Placement { limit, align })) => {
                let index = self.search_for_one(run.len, align, limit)?;
                (index, self.order.get_mut(index)?)
            }
            (None, Spot::At(_)) => return None,
        };
        let range = record.range;
        record.begin(Holder::Mapping, run.phys, purpose, list);
        if let Some(held) = held.take() {
            record.hold(held);
        }
        self.mappings += 1;
        Some(Mapped { range, record: MappingHandle(index) })
    }

    #[cold]
    pub(super) fn search_for_one(&mut self, len: u64, align: u64, limit: Iova) -> Option<Index> {
        let granule = self.order.granule();
        let wanted = Wanted { len, align: align.max(granule), lowest: granule, limit: limit.get() };
        let (index, range) = self.search(wanted)?;
        self.remember(index, range.start());
        Some(index)
    }

    /// The device confirmed the MAP of a record that waits for that. False where it is not there, or not so.
    #[inline(always)]
    pub(crate) fn confirm(&mut self, handle: MappingHandle, range: IovaRange) -> bool {
        let Some(record) = self.order.get_mut_alone(handle.0) else { return false };
        // Before and after it adds nothing to the tally.
        if record.range.start() == range.start() && record.standing() == Standing::MAPPING {
            debug_assert!(record.range == range);
            record.make_live(Holder::Mapping);
            return true;
        }
        false
    }

    /// The same for one that may be in a list.
    #[inline(always)]
    pub(crate) fn confirm_part(&mut self, handle: MappingHandle, range: IovaRange) -> bool {
        let Some(record) = self.order.get_mut(handle.0) else { return false };
        let waits = record.holder.is_mapping()
            && record.range.start() == range.start()
            && record.state == MappingState::Mapping;
        if waits {
            debug_assert!(record.range == range && record.on_device);
            // As above.
            record.make_live(record.holder);
        }
        waits
    }

    /// Marks the live mappings of exactly this range, the first of which the handle may name, as being unmapped.
    #[inline(always)]
    pub(crate) fn begin_unmap(&mut self, range: IovaRange, handle: MappingHandle) -> Option<MappingHandle> {
        match self.begin_unmap_named(range, handle) {
            true => Some(handle),
            false => self.begin_unmap_run(range),
        }
    }

    /// The same for the one mapping that the handle names. False, and nothing changed, where it is another.
    #[inline(always)]
    fn begin_unmap_named(&mut self, range: IovaRange, handle: MappingHandle) -> bool {
        let Some(record) = self.order.get_mut_alone(handle.0) else { return false };
        if record.range != range || record.standing() != Standing::LIVE {
            return false;
        }
        // As above.
        (record.state, record.owned) = (MappingState::Unmapping, false);
        true
    }

    /// Marks the one live mapping of exactly this range, which the handle may name, as deferred, or a list of them. Its
    /// record, how many there are, and the memory that the first leads to. `None`, and nothing changed, where they are not
    /// live.
    #[inline(always)]
    pub(crate) fn defer(
        &mut self,
        handle: MappingHandle,
        range: IovaRange,
    ) -> Option<(MappingHandle, (usize, PhysAddr))> {
        if let Some(record) = self.order.get_mut(handle.0)
            && record.range == range
            && record.standing() == Standing::LIVE
        {
            // As above.
            (record.state, record.owned) = (MappingState::Deferred, false);
            return Some((handle, (1, record.phys)));
        }
        let (first, count) = self.defer_list(range)?;
        Some((first, (count, self.phys_of(first))))
    }

    #[cold]
    fn begin_unmap_run(&mut self, range: IovaRange) -> Option<MappingHandle> {
        let first = self.find(range.start())?;
        if self.begin_unmap_named(range, MappingHandle(first)) {
            return Some(MappingHandle(first));
        }
        if self.mark_list(first, range, MappingState::Live, MappingState::Unmapping).is_some() {
            return Some(MappingHandle(first));
        }
        let mut index = first;
        // Bounded by the records in the range, as below.
        loop {
            let record = self.order.get(index)?;
            if !is_live(record) || record.range.last() > range.last() {
                return None;
            }
            if record.range.last() == range.last() {
                break;
            }
            let next = self.order.get(record.next)?;
            if record.range.last().checked_add(1) != Some(next.range.start()) {
                return None;
            }
            index = record.next;
        }
        let (last, mut index) = (index, first);
        loop {
            let record = &mut self.order[index];
            Self::touch(&mut self.touched, record.holder);
            // As above.
            (record.state, record.owned) = (MappingState::Unmapping, false);
            if index == last {
                return Some(MappingHandle(first));
            }
            index = record.next;
        }
    }

    /// The device confirmed the UNMAP of records that wait for that, touch each other and hold no memory: their addresses are
    /// free. False, and nothing changed, where it is not so.
    pub(crate) fn end_unmapped_run(&mut self, first: MappingHandle, range: IovaRange) -> bool {
        if self.end_unmapped_list(first.0, range) {
            return true;
        }
        let Some(count) = self.count_unmapped(first, range) else { return false };
        self.mappings -= count;
        let mut index = first.0;
        for _ in 0..count {
            // What was made together is freed as one range: from here to there.
            let (group, mut last) = (index, index);
            let mut record = &self.order[index];
            while record.range.last() < range.last() {
                let next = &self.order[record.next];
                if !(next.rank < 0 || record.is_beside(next)) {
                    break;
                }
                last = record.next;
                record = next;
            }
            let (end, next) = (record.range.last(), record.next);
            if group != last {
                self.order.merge(group, last);
            }
            let Self { order, magazines, .. } = self;
            let granules = order.granules(order[group].range);
            let record = &mut order[group];
            (record.holder, record.counted) = (Holder::Taken, false);
            if !magazines.keep(group, record, granules) {
                self.free(group);
            }
            if end == range.last() {
                break;
            }
            index = next;
        }
        true
    }

    /// How many records that is.
    fn count_unmapped(&self, first: MappingHandle, range: IovaRange) -> Option<usize> {
        let waits = |record: &Record| {
            record.holder.is_mapping()
                && record.state == MappingState::Unmapping
                && record.on_device
                && record.counted
                && !record.owned
                && !record.holds_memory()
        };
        let mut record = self.order.get(first.0).filter(|record| waits(record))?;
        let mut count = 1;
        if record.range.start() != range.start() {
            return None;
        }
        // Bounded by the records in the range.
        while record.range.last() < range.last() {
            let next = self.order.get(record.next).filter(|next| waits(next))?;
            // What lies behind another touches it.
            if next.rank >= 0 && record.range.last().checked_add(1) != Some(next.range.start()) {
                return None;
            }
            record = next;
            count += 1;
        }
        (record.range.last() == range.last()).then_some(count)
    }

    /// The device confirmed the UNMAP of a record that waits for that, and holds no memory: its addresses are free. False
    /// where it is not there, or not so.
    #[inline(always)]
    pub(crate) fn end_unmapped_plain(&mut self, handle: MappingHandle, range: IovaRange) -> bool {
        let Self { order, magazines, .. } = self;
        let granules = order.page(Iova::new(range.len_of_mapping()));
        let Some(record) = order.get_mut_alone(handle.0) else { return false };
        if !was_unmapped(record, range) || record.holds_memory() {
            return false;
        }
        self.mappings -= 1;
        if !magazines.keep(handle.0, record, granules) {
            self.free_unmapped(handle.0);
        }
        true
    }

    /// The same for a record that holds memory, which is returned.
    pub(crate) fn end_unmapped_held(
        &mut self,
        handle: MappingHandle,
        range: IovaRange,
    ) -> Option<HeldMemory> {
        let Self { order, magazines, .. } = self;
        let (granule, granules) = (order.granule(), order.granules(range));
        let record = order.get_mut(handle.0).filter(|record| was_unmapped(record, range))?;
        let held = record.take_held(granule)?;
        self.mappings -= 1;
        if !magazines.keep(handle.0, record, granules) {
            self.free_unmapped(handle.0);
        }
        Some(held)
    }

    /// Frees what no magazine keeps.
    #[cold]
    fn free_unmapped(&mut self, index: Index) {
        self.order[index].holder = Holder::Taken;
        self.free(index);
    }
}

/// Whether a range of a magazine, all of which are as long, is one that this allows: only 0 lies below the lowest address.
#[inline(always)]
pub(super) fn suits(Placement { limit, align }: Placement, range: IovaRange) -> bool {
    let (start, last) = (range.start().get(), range.last().get());
    start != 0 && last <= limit.get() && start & (align - 1) == 0
}

/// Whether it is the record of exactly this range, and no more, and waited for an UNMAP's answer.
#[inline(always)]
fn was_unmapped(record: &Record, range: IovaRange) -> bool {
    let waited = record.range == range && record.standing() == Standing::UNMAPPING;
    debug_assert!(!waited || !record.owned);
    waited
}

/// Whether it is the record of a mapping that is live on the device, in a list or not.
fn is_live(record: &Record) -> bool {
    record.holder.is_mapping() && record.state == MappingState::Live && record.on_device
}
