//! Free addresses: taking them, and giving them back.

use super::order::Wanted;
use super::slab::{Index, NIL};
use super::{ListFull, ReserveError, Space};
use crate::addr::{Iova, IovaRange};
use crate::engine::mapping::Holder;

impl Space {
    /// Takes `len` bytes (a multiple of the granule) as high as possible, starting at a multiple of `align` (a power of
    /// two, the granule or more) and not below `lowest`, ending at or below `limit`. Of addresses that were used lately
    /// it takes the latest that suit. They come back by [`release`](Self::release), or as mappings, in as many as
    /// `parts` parts. `None` where there are none; with an alignment above the granule also where the search among
    /// thousands of free ranges that are too short to be sure took too long.
    pub(crate) fn allocate(
        &mut self,
        len: u64,
        align: u64,
        (lowest, limit): (Iova, Iova),
        parts: usize,
    ) -> Result<Option<IovaRange>, ListFull> {
        if parts > self.room_left() {
            return Err(ListFull);
        }
        let (lowest, limit) = (lowest.get(), limit.get());
        let suits = |range: IovaRange| {
            let (start, last) = (range.start().get(), range.last().get());
            let there = start >= lowest && last <= limit && start & (align - 1) == 0;
            there && last - start == len.wrapping_sub(1)
        };
        let granules = self.order.page(Iova::new(len));
        let cached = self.magazines.pop(&mut self.order, granules, suits);
        let taken = cached.map(|(index, record)| {
            record.holder = Holder::Taken;
            (index, record.range)
        });
        let found = match taken {
            None => self.search(Wanted { len, align, lowest, limit }),
            found => found,
        };
        let Some((index, range)) = found else { return Ok(None) };
        self.set_others(self.others + parts);
        self.remember(index, range.start());
        Ok(Some(range))
    }

    pub(super) fn search(&mut self, wanted: Wanted) -> Option<(Index, IovaRange)> {
        self.make_room();
        let found = match self.order.highest(wanted) {
            None if self.magazines.drain(&mut self.order) => self.order.highest(wanted),
            found => found,
        };
        let (next, start) = found?;
        let range = IovaRange::from_len(Iova::new(start), wanted.len)?;
        Some((self.order.insert(range, Holder::Taken, next)?, range))
    }

    /// Takes exactly `range` (whole granules), if all of it is free. It comes back in one part.
    pub(crate) fn take(&mut self, range: IovaRange) -> Result<bool, ListFull> {
        if self.room_left() == 0 {
            return Err(ListFull);
        }
        if !self.usable.contains(range) {
            return Ok(false);
        }
        let granules = self.order.granules(range);
        let index = match self.magazines.pop(&mut self.order, granules, |cached| cached == range) {
            Some((index, record)) => {
                record.holder = Holder::Taken;
                index
            }
            None => {
                self.make_room();
                let Some(next) = self.clear(range) else { return Ok(false) };
                let inserted = self.order.insert(range, Holder::Taken, next);
                let Some(index) = inserted else { return Err(ListFull) };
                index
            }
        };
        self.set_others(self.others + 1);
        self.remember(index, range.start());
        Ok(true)
    }

    /// Frees what is cached in `range`. The record that follows, if all of `range` is free then.
    fn clear(&mut self, range: IovaRange) -> Option<Index> {
        // Bounded: each round empties a magazine, or ends.
        loop {
            let (next, blocking) = self.first_in(range);
            let Some(blocking) = blocking else { return Some(next) };
            if self.order[blocking].holder != Holder::Cached {
                return None;
            }
            self.magazines.drain_like(&mut self.order, blocking);
        }
    }

    /// The first record above the start of `range`, and the first one that has an address of it.
    fn first_in(&self, range: IovaRange) -> (Index, Option<Index>) {
        let next = self.order.at_or_above(range.start());
        let below = Some(self.order[next].prev).filter(|below| *below != NIL);
        let overlaps = |index: &Index| {
            let record = &self.order[*index];
            record.holder != Holder::End && record.range.overlaps(range)
        };
        (next, below.filter(overlaps).or(Some(next).filter(overlaps)))
    }

    /// Takes `range` for good, as far as it is usable at all. Parts of it may be reserved already; the rest must
    /// be free. Nothing changes on an error.
    pub(crate) fn reserve(&mut self, range: IovaRange) -> Result<(), ReserveError> {
        let start = range.start().max(self.usable.start());
        let last = range.last().min(self.usable.last());
        let Some(range) = IovaRange::new(start, last) else { return Ok(()) };
        if self.holes.iter().any(|hole| hole.contains(range)) {
            return Ok(());
        }
        let mut pieces = 0;
        let mut next = self.unreserved_in(range);
        // Bounded by the holes, as below.
        while let Some(piece) = next {
            self.clear(piece).ok_or(ReserveError::InUse)?;
            pieces += 1;
            next = range.after(piece).and_then(|rest| self.unreserved_in(rest));
        }
        if pieces > self.room_left().min(self.room.holes - self.holes.len()) {
            return Err(ReserveError::ListFull);
        }
        while let Some(piece) = self.unreserved_in(range) {
            self.make_room();
            let next = self.clear(piece).ok_or(ReserveError::InUse)?;
            self.order.insert(piece, Holder::Reserved, next).ok_or(ReserveError::ListFull)?;
            self.holes.push(piece);
            self.set_others(self.others + 1);
        }
        Ok(())
    }

    /// The first stretch of `range` that is not reserved.
    pub(crate) fn unreserved_in(&self, range: IovaRange) -> Option<IovaRange> {
        let mut start = range.start();
        // Bounded: holes do not overlap, so each is passed once.
        while let Some(hole) = self.holes.iter().find(|hole| hole.start() <= start && start <= hole.last()) {
            start = hole.last().checked_add(1)?;
        }
        let above = self.holes.iter().map(|hole| hole.start()).filter(|hole| *hole > start);
        let last = above.min().map_or(range.last(), |hole| Iova::new(hole.get() - 1).min(range.last()));
        IovaRange::new(start, last)
    }

    /// Gives back what was taken and not mapped: all, or the rest behind what was, which was to be `parts` parts.
    pub(crate) fn release(&mut self, range: IovaRange, parts: usize) {
        let taken = |index: &Index| {
            let record = &self.order[*index];
            record.holder == Holder::Taken && record.range == range
        };
        let found = self.find(range.start()).filter(taken);
        debug_assert!(found.is_some(), "{range} was not taken");
        debug_assert!(parts <= self.others);
        if let Some(index) = found {
            self.set_others(self.others - parts);
            self.free(index);
        }
    }

    /// Nobody has these addresses any more.
    #[inline]
    pub(super) fn free(&mut self, index: Index) {
        if !self.magazines.push(&mut self.order, index) {
            self.order.remove(index);
        }
    }
}
