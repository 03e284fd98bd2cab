//! Mappings: making them of addresses that were taken, finding and ending them.

use super::Space;
use super::slab::{Index, NIL};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::dma::HeldMemory;
use crate::engine::mapping::{Holder, ListId, MappingHandle, Purpose, Record};

impl Space {
    /// Makes a mapping of addresses that were taken: all, or the first of them. `held` is taken, which is the memory
    /// that the mapping leads to. `None` where that is not so.
    pub(crate) fn insert(
        &mut self,
        range: IovaRange,
        phys: PhysAddr,
        (purpose, list): (Purpose, ListId),
        held: &mut Option<HeldMemory>,
    ) -> Option<MappingHandle> {
        let index = self.find(range.start())?;
        let taken = &self.order[index];
        if taken.holder != Holder::Taken || range.last() > taken.range.last() {
            return None;
        }
        if range.last() < taken.range.last() {
            self.split(index, range.last().checked_add(1)?)?;
        }
        self.mappings += 1;
        self.set_others(self.others - 1);
        let record = &mut self.order[index];
        record.begin(Holder::Mapping, phys, purpose, list);
        if let Some(held) = held.take() {
            record.hold(held);
        }
        Some(MappingHandle(index))
    }

    /// Cuts off what lies from `start` on, which has a record of its own then.
    pub(super) fn split(&mut self, index: Index, start: Iova) -> Option<Index> {
        self.make_room();
        let rest = self.order.split(index, start)?;
        self.remember(rest, start);
        Some(rest)
    }

    #[inline]
    fn mapping_at(&self, start: Iova) -> Option<Index> {
        self.find(start).filter(|index| self.order[*index].holder.is_mapping())
    }

    /// The mapping that starts at this address.
    pub(crate) fn get(&self, start: Iova) -> Option<&Record> {
        Some(&self.order[self.mapping_at(start)?])
    }

    /// The mapping that a handle was made for, if it is the one that starts at this address.
    fn named(&self, handle: MappingHandle, start: Iova) -> Option<Index> {
        let record = self.order.get(handle.0)?;
        (record.holder.is_mapping() && record.range.start() == start).then_some(handle.0)
    }

    /// A handle of the mapping that starts at this address.
    pub(crate) fn handle(&self, start: Iova) -> Option<MappingHandle> {
        self.mapping_at(start).map(MappingHandle)
    }

    /// Changes the mapping that a handle was made for, if it is the one that starts at this address.
    pub(crate) fn change<R>(
        &mut self,
        handle: MappingHandle,
        start: Iova,
        change: impl FnOnce(&mut Record) -> R,
    ) -> Option<R> {
        let record = self.order.get_mut(handle.0)?;
        let named = record.holder.is_mapping() && record.range.start() == start;
        if !named {
            return None;
        }
        Self::touch(&mut self.touched, record.holder);
        Some(self.tally.change(record, change))
    }

    /// Removes the mapping that starts at this address, which is free then. With the memory that was held for it.
    pub(crate) fn remove(&mut self, start: Iova) -> Option<HeldMemory> {
        let index = self.mapping_at(start)?;
        Self::touch(&mut self.touched, self.order[index].holder);
        let granule = self.order.granule();
        let held = self.order[index].take_held(granule);
        self.tally.forget(&self.order[index]);
        self.ended(1);
        self.free(index);
        held
    }

    /// So many mappings ended.
    fn ended(&mut self, count: usize) {
        self.mappings -= count;
    }

    /// The mapping that contains `address`.
    pub(crate) fn containing(&self, address: Iova) -> Option<&Record> {
        let record = &self.order[self.order.at_or_below(address)?];
        (record.holder.is_mapping() && address <= record.range.last()).then_some(record)
    }

    /// The mappings that start at or above `start`, in order.
    pub(crate) fn iter_from(&self, start: Iova) -> impl Iterator<Item = &Record> {
        let first = self.find(start).unwrap_or_else(|| self.order.at_or_above(start));
        self.mappings_from(first)
    }

    /// Those that lie in `range` as a whole, in order.
    pub(crate) fn iter_in(&self, range: IovaRange) -> impl Iterator<Item = &Record> {
        self.iter_from(range.start()).take_while(move |record| record.range.last() <= range.last())
    }

    fn mappings_from(&self, first: Index) -> impl Iterator<Item = &Record> {
        let records = core::iter::successors(Some(&self.order[first]), |record| self.order.get(record.next));
        records.filter(|record| record.holder.is_mapping())
    }

    /// The first mapping of `range`, if it is made of whole mappings that touch each other.
    pub(crate) fn whole(&self, range: IovaRange) -> Option<MappingHandle> {
        let first = self.mapping_at(range.start())?;
        let mut record = &self.order[first];
        loop {
            if record.range.last() >= range.last() {
                return (record.range.last() == range.last()).then_some(MappingHandle(first));
            }
            let next = self.order.get(record.next)?;
            let touches = record.range.last().checked_add(1) == Some(next.range.start());
            if !touches || !next.holder.is_mapping() {
                return None;
            }
            record = next;
        }
    }

    /// Visits the mappings of `range` in order and removes those for which `keep` says no, whose addresses are free
    /// then. `handle` may name the first.
    pub(crate) fn retain_in(
        &mut self,
        range: IovaRange,
        handle: Option<MappingHandle>,
        keep: impl FnMut(&mut Record) -> bool,
    ) {
        let named = handle.and_then(|handle| self.named(handle, range.start()));
        let first = named.or_else(|| self.find(range.start()));
        let first = first.unwrap_or_else(|| self.order.at_or_above(range.start()));
        self.retain_from(first, range.last(), keep);
    }

    /// Visits all mappings in order and removes those for which `keep` says no, whose addresses are free then.
    pub(crate) fn retain_all(&mut self, keep: impl FnMut(&mut Record) -> bool) {
        self.retain_from(self.order.first(), Iova::new(u64::MAX), keep);
    }

    fn retain_from(&mut self, first: Index, last: Iova, mut keep: impl FnMut(&mut Record) -> bool) {
        // What was made together and goes together is freed as one range: its first record, and its last one so far.
        let mut gone = (NIL, NIL);
        let mut index = first;
        loop {
            let record = &mut self.order[index];
            if record.holder == Holder::End || record.range.last() > last {
                break;
            }
            let is_last = record.range.last() == last;
            if record.holder.is_mapping() {
                Self::touch(&mut self.touched, record.holder);
            }
            if record.holder.is_mapping() && !self.tally.change(record, &mut keep) {
                debug_assert!(!record.holds_memory(), "the memory of {} is lost", record.range);
                self.tally.forget(record);
                record.holder = Holder::Taken;
                let goes_with = gone.1 != NIL && record.prev == gone.1;
                self.ended(1);
                if !(goes_with && self.is_beside(gone.1, index)) {
                    self.free_run(gone);
                    gone.0 = index;
                }
                gone.1 = index;
            }
            if is_last {
                break;
            }
            // Read now: what followed may have given way to what was freed.
            index = self.order[index].next;
        }
        self.free_run(gone);
    }

    /// Frees the records from the first to the last, which touch each other, as one range. There may be none.
    #[inline]
    fn free_run(&mut self, (first, last): (Index, Index)) {
        if first != last {
            self.order.merge(first, last);
        }
        if first != NIL {
            self.free(first);
        }
    }

    /// Visits the mappings of a run that is [whole](Self::whole) up to `last`, in order.
    pub(crate) fn visit(&mut self, first: MappingHandle, last: Iova, mut visit: impl FnMut(&mut Record)) {
        let mut index = first.0;
        while let Some(record) = self.order.get_mut(index) {
            if record.holder.is_mapping() {
                Self::touch(&mut self.touched, record.holder);
                self.tally.change(record, &mut visit);
            }
            if record.range.last() >= last {
                break;
            }
            index = record.next;
        }
    }

    /// Whether all mappings of a run that is [whole](Self::whole) up to `last` are as `is` says.
    pub(crate) fn all(&self, first: MappingHandle, last: Iova, mut is: impl FnMut(&Record) -> bool) -> bool {
        let mut index = first.0;
        while let Some(record) = self.order.get(index) {
            if !is(record) {
                return false;
            }
            if record.range.last() >= last {
                break;
            }
            index = record.next;
        }
        true
    }

    /// Whether two neighbours touch, and were made together.
    fn is_beside(&self, low: Index, high: Index) -> bool {
        let (low, high) = (&self.order[low], &self.order[high]);
        // What lies behind another does.
        high.rank < 0 || low.range.last().checked_add(1) == Some(high.range.start()) && low.is_beside(high)
    }
}
