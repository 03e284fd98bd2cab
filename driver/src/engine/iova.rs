//! Which IOVAs of a domain are free.
//!
//! Free ranges in an ordered list of fixed capacity, so that nothing is allocated under the driver's lock.
//! Between any two free ranges lies something that is outside of the list, so that there are never more of them
//! than outside ranges and one.

use crate::addr::{Iova, IovaRange};
use alloc::vec::Vec;

/// The free addresses of a domain.
///
/// # Invariants
/// `free` is sorted, and between two of its ranges lies at least one address. `outside`, which counts what was
/// taken and may come back by parts, and what is reserved, never passes `ranges`; the capacity of `free` is
/// larger by one.
pub(crate) struct IovaAllocator {
    usable: IovaRange,
    free: Vec<IovaRange>,
    outside: usize,
    ranges: usize,
    /// What is reserved for good.
    holes: Vec<IovaRange>,
}

/// More ranges are in use than there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListFull;

/// Part of the range is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReserveError {
    InUse,
    ListFull,
}

impl IovaAllocator {
    /// All of `usable` is free. Up to `ranges` ranges can be taken or reserved, at most `holes` of them for good.
    /// Allocates.
    pub(crate) fn new(usable: IovaRange, ranges: usize, holes: usize) -> Self {
        let mut free = Self::spare(ranges);
        free.push(usable);
        Self { usable, free, outside: 0, ranges, holes: Vec::with_capacity(holes) }
    }

    /// A list for `ranges` ranges, empty: for [`grow_into`](Self::grow_into). Allocates.
    pub(crate) fn spare(ranges: usize) -> Vec<IovaRange> {
        Vec::with_capacity(ranges + 1)
    }

    /// Moves into the larger list and returns the smaller one, to be dropped outside of the lock.
    pub(crate) fn grow_into(&mut self, mut spare: Vec<IovaRange>) -> Vec<IovaRange> {
        if spare.capacity() > self.free.capacity() {
            spare.extend_from_slice(&self.free);
            core::mem::swap(&mut self.free, &mut spare);
            self.ranges = self.free.capacity() - 1;
        }
        spare
    }

    /// Takes `len` bytes (a multiple of the granule) as high as possible, starting at a multiple of `align` and
    /// not below `lowest`, ending at or below `limit`. They come back by [`release`](Self::release), in as many
    /// as `parts` parts.
    pub(crate) fn allocate(
        &mut self,
        len: u64,
        align: u64,
        (lowest, limit): (Iova, Iova),
        parts: usize,
    ) -> Result<Option<IovaRange>, ListFull> {
        if parts > self.ranges - self.outside {
            return Err(ListFull);
        }
        for index in (0..self.free.len()).rev() {
            let free = self.free[index];
            let last = free.last().min(limit).get();
            let Some(highest_start) = last.checked_sub(len - 1) else { continue };
            let start = highest_start & !(align - 1);
            if start < free.start().max(lowest).get() {
                continue;
            }
            let Some(range) = IovaRange::from_len(Iova::new(start), len) else { continue };
            self.carve(index, range);
            self.outside += parts;
            return Ok(Some(range));
        }
        Ok(None)
    }

    /// Takes exactly `range`, if all of it is free. It comes back in one part.
    pub(crate) fn take(&mut self, range: IovaRange) -> Result<bool, ListFull> {
        if self.outside == self.ranges {
            return Err(ListFull);
        }
        let Some(index) = self.free.iter().position(|free| free.contains(range)) else { return Ok(false) };
        self.carve(index, range);
        self.outside += 1;
        Ok(true)
    }

    /// Takes `range` for good, as far as it is usable at all. Parts of it may be reserved already; the rest must
    /// be free. Nothing changes on an error.
    pub(crate) fn reserve(&mut self, range: IovaRange) -> Result<(), ReserveError> {
        let start = range.start().max(self.usable.start());
        let last = range.last().min(self.usable.last());
        let Some(range) = IovaRange::new(start, last) else { return Ok(()) };
        let mut pieces = 0;
        self.pieces_to_reserve(range, |_, _| pieces += 1)?;
        let room = (self.ranges - self.outside).min(self.holes.capacity() - self.holes.len());
        if pieces > room {
            return Err(ReserveError::ListFull);
        }
        for _ in 0..pieces {
            let mut first = None;
            self.pieces_to_reserve(range, |index, piece| first = first.or(Some((index, piece))))?;
            let Some((index, piece)) = first else { break };
            self.carve(index, piece);
            self.holes.push(piece);
            self.outside += 1;
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

    /// Visits the free pieces of `range`, with the index of the free range that each is part of.
    fn pieces_to_reserve(
        &self,
        range: IovaRange,
        mut visit: impl FnMut(usize, IovaRange),
    ) -> Result<(), ReserveError> {
        let mut next = Some(range.start());
        // Bounded: each step passes a whole hole or free range.
        while let Some(at) = next.filter(|at| *at <= range.last()) {
            let around = |candidate: &IovaRange| candidate.start() <= at && at <= candidate.last();
            if let Some(hole) = self.holes.iter().find(|hole| around(hole)) {
                next = hole.last().checked_add(1);
                continue;
            }
            let index = self.free.iter().position(around).ok_or(ReserveError::InUse)?;
            let last = self.free[index].last().min(range.last());
            if let Some(piece) = IovaRange::new(at, last) {
                visit(index, piece);
            }
            next = last.checked_add(1);
        }
        Ok(())
    }

    /// Gives back a range that was taken, or a part of it that makes `parts` of its parts.
    pub(crate) fn release(&mut self, range: IovaRange, parts: usize) {
        debug_assert!(!self.free.iter().any(|free| free.overlaps(range)), "{range} was free already");
        debug_assert!(parts <= self.outside);
        self.outside -= parts;
        let at = self.free.partition_point(|free| free.start() < range.start());
        let joins = |low: IovaRange, high: IovaRange| low.last().checked_add(1) == Some(high.start());
        let below = at.checked_sub(1).filter(|below| joins(self.free[*below], range));
        let above = Some(at).filter(|at| *at < self.free.len() && joins(range, self.free[*at]));
        let span = |low: IovaRange, high: IovaRange| IovaRange::new(low.start(), high.last()).unwrap_or(low);
        match (below, above) {
            (Some(below), Some(above)) => {
                self.free[below] = span(self.free[below], self.free[above]);
                self.free.remove(above);
            }
            (Some(below), None) => self.free[below] = span(self.free[below], range),
            (None, Some(above)) => self.free[above] = span(range, self.free[above]),
            (None, None) => {
                debug_assert!(self.free.len() < self.free.capacity());
                self.free.insert(at, range);
            }
        }
    }

    /// Removes `range` from the free range at `index`, which contains it.
    fn carve(&mut self, index: usize, range: IovaRange) {
        let free = self.free[index];
        let before = range.start().get().checked_sub(1).map(Iova::new);
        let low = before.and_then(|last| IovaRange::new(free.start(), last));
        let high = range.last().checked_add(1).and_then(|start| IovaRange::new(start, free.last()));
        match (low, high) {
            (Some(low), Some(high)) => {
                debug_assert!(self.free.len() < self.free.capacity());
                self.free[index] = low;
                self.free.insert(index + 1, high);
            }
            (Some(part), None) | (None, Some(part)) => self.free[index] = part,
            (None, None) => {
                self.free.remove(index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    fn allocator(usable: IovaRange, ranges: usize) -> IovaAllocator {
        IovaAllocator::new(usable, ranges, 4)
    }

    const ANYWHERE: (Iova, Iova) = (Iova::new(0x1000), Iova::new(u64::MAX));

    fn allocate(iova: &mut IovaAllocator, len: u64) -> Option<IovaRange> {
        iova.allocate(len, 0x1000, ANYWHERE, 1).unwrap()
    }

    #[test]
    fn from_the_top_down_and_back() {
        let mut iova = allocator(range(0, 0xffff), 8);
        let first = allocate(&mut iova, 0x1000).unwrap();
        let second = allocate(&mut iova, 0x2000).unwrap();
        assert_eq!((first, second), (range(0xf000, 0xffff), range(0xd000, 0xefff)));
        iova.release(first, 1);
        iova.release(second, 1);
        assert_eq!((iova.free.as_slice(), iova.outside), ([range(0, 0xffff)].as_slice(), 0));
    }

    #[test]
    fn zero_is_never_given_out_but_can_be_asked_for() {
        let mut iova = allocator(range(0, 0x1fff), 8);
        assert_eq!(allocate(&mut iova, 0x1000), Some(range(0x1000, 0x1fff)));
        assert_eq!(allocate(&mut iova, 0x1000), None);
        assert_eq!(iova.take(range(0, 0xfff)), Ok(true));
        assert_eq!(iova.take(range(0, 0xfff)), Ok(false));
    }

    #[test]
    fn holes_stay_holes_and_may_overlap() {
        let mut iova = allocator(range(0, 0xffff), 8);
        iova.reserve(range(0x4000, 0xbfff)).unwrap();
        iova.reserve(range(0xa000, 0x2_0000)).unwrap();
        iova.reserve(range(0x4000, 0x4fff)).unwrap();
        let taken = allocate(&mut iova, 0x3000).unwrap();
        assert_eq!(taken, range(0x1000, 0x3fff));
        iova.release(taken, 1);
        assert_eq!(iova.free, [range(0, 0x3fff)]);
        assert_eq!(iova.take(range(0x3000, 0x4fff)), Ok(false));
    }

    #[test]
    fn what_is_in_use_cannot_be_reserved() {
        let mut iova = allocator(range(0, 0xffff), 8);
        let taken = allocate(&mut iova, 0x1000).unwrap();
        let before = iova.free.clone();
        assert_eq!(iova.reserve(range(0xe000, 0xffff)), Err(ReserveError::InUse));
        assert_eq!(iova.free, before, "nothing changes on an error");
        iova.release(taken, 1);
        assert_eq!(iova.reserve(range(0xe000, 0xffff)), Ok(()));
    }

    #[test]
    fn limit_and_alignment() {
        let mut iova = allocator(range(0, u64::MAX - 0x1000), 8);
        let below_4g = (Iova::new(1), Iova::new(0xffff_ffff));
        let low = iova.allocate(0x20_0000, 0x20_0000, below_4g, 1).unwrap().unwrap();
        assert_eq!(low, range(0xffe0_0000, 0xffff_ffff));
        assert_eq!(iova.allocate(0x1000, 0x1000, (Iova::new(1), Iova::new(0xfff)), 1), Ok(None));
    }

    /// Fails when `outside` is not counted: neighbours that are given back alone then make the list grow.
    #[test]
    fn the_list_never_grows_under_the_lock() {
        let mut iova = allocator(range(0, 0xffff_ffff), 6);
        let capacity = iova.free.capacity();
        let taken: Vec<_> = (0..6).map(|_| allocate(&mut iova, 0x1000).unwrap()).collect();
        assert_eq!(iova.allocate(0x1000, 0x1000, ANYWHERE, 1), Err(ListFull));
        assert_eq!(iova.take(range(0x1000, 0x1fff)), Err(ListFull));
        for range in taken.iter().step_by(2) {
            iova.release(*range, 1);
        }
        assert_eq!(iova.free.capacity(), capacity);
        drop(iova.grow_into(IovaAllocator::spare(12)));
        assert!(iova.allocate(0x6000, 0x1000, ANYWHERE, 6).unwrap().is_some());
    }

    /// Against a set of granules: what is free there is free here, whatever happened.
    #[test]
    fn agrees_with_a_plain_set() {
        const GRANULES: u64 = 64;
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for _ in 0..200 {
            let mut iova = allocator(range(0, GRANULES * 0x1000 - 1), GRANULES as usize);
            let capacity = iova.free.capacity();
            let mut free = [true; GRANULES as usize];
            let mut live: Vec<IovaRange> = Vec::new();
            let cells = |range: IovaRange| {
                (range.start().get() / 0x1000) as usize..=(range.last().get() / 0x1000) as usize
            };
            for _ in 0..100 {
                match random(3) {
                    0 => {
                        let len = (1 + random(6)) * 0x1000;
                        let got = allocate(&mut iova, len);
                        let fits =
                            free[1..].windows((len / 0x1000) as usize).any(|run| run.iter().all(|f| *f));
                        assert_eq!(got.is_some(), fits);
                        if let Some(range) = got {
                            assert!(free[cells(range)].iter().all(|f| *f));
                            free[cells(range)].fill(false);
                            live.push(range);
                        }
                    }
                    1 => {
                        let start = random(GRANULES - 4) * 0x1000;
                        let range = range(start, start + (1 + random(4)) * 0x1000 - 1);
                        let whole = free[cells(range)].iter().all(|f| *f);
                        assert_eq!(iova.take(range), Ok(whole));
                        if whole {
                            free[cells(range)].fill(false);
                            live.push(range);
                        }
                    }
                    _ if !live.is_empty() => {
                        let range = live.swap_remove(random(live.len() as u64) as usize);
                        iova.release(range, 1);
                        free[cells(range)].fill(true);
                    }
                    _ => {}
                }
                assert_eq!((iova.free.capacity(), iova.outside), (capacity, live.len()));
            }
        }
    }
}
