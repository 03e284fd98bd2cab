//! Which IOVAs of a domain are free.
//!
//! Free ranges in an ordered list of fixed capacity, so that nothing is allocated under the driver's lock. Each
//! range that leaves can split one free range in two, so the list never needs more than one entry for each
//! range outside of it, and one.

use crate::addr::{Iova, IovaRange};
use alloc::vec::Vec;

/// The free addresses of a domain.
///
/// # Invariants
/// `free` is sorted, and between two of its ranges lies at least one address. `len + outside` never passes the
/// capacity: `outside` counts ranges that were taken or reserved and may come back.
pub(crate) struct IovaAllocator {
    free: Vec<IovaRange>,
}

/// The list cannot take another split: more ranges are in use than the domain has records for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListFull;

impl IovaAllocator {
    /// All of `usable` is free, and up to `ranges` ranges can be taken or reserved. Allocates.
    pub(crate) fn new(usable: IovaRange, ranges: usize) -> Self {
        let mut free = Vec::with_capacity(ranges + 1);
        free.push(usable);
        Self { free }
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
        }
        spare
    }

    /// Takes `len` bytes (a multiple of the granule) as high as possible, starting at a multiple of `align` and
    /// not below `lowest`, ending at or below `limit`.
    pub(crate) fn allocate(
        &mut self,
        len: u64,
        align: u64,
        lowest: Iova,
        limit: Iova,
    ) -> Result<Option<IovaRange>, ListFull> {
        for index in (0..self.free.len()).rev() {
            let free = self.free[index];
            let last = free.last().min(limit).get();
            let Some(highest_start) = last.checked_sub(len - 1) else { continue };
            let start = highest_start & !(align - 1);
            if start < free.start().max(lowest).get() {
                continue;
            }
            let Some(range) = IovaRange::from_len(Iova::new(start), len) else { continue };
            return self.carve(index, range).map(|()| Some(range));
        }
        Ok(None)
    }

    /// Takes exactly `range`, if all of it is free.
    pub(crate) fn take(&mut self, range: IovaRange) -> Result<bool, ListFull> {
        match self.free.iter().position(|free| free.contains(range)) {
            Some(index) => self.carve(index, range).map(|()| true),
            None => Ok(false),
        }
    }

    /// Takes what is free of `range`, for good.
    pub(crate) fn reserve(&mut self, range: IovaRange) -> Result<(), ListFull> {
        while let Some(index) = self.free.iter().position(|free| free.overlaps(range)) {
            let free = self.free[index];
            let start = free.start().max(range.start());
            let last = free.last().min(range.last());
            let Some(part) = IovaRange::new(start, last) else { break };
            self.carve(index, part)?;
        }
        Ok(())
    }

    /// Gives back a range that was taken.
    pub(crate) fn release(&mut self, range: IovaRange) {
        let at = self.free.partition_point(|free| free.start() < range.start());
        debug_assert!(!self.free.iter().any(|free| free.overlaps(range)), "{range} was free already");
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
            (None, None) => self.free.insert(at, range),
        }
    }

    /// Removes `range` from the free range at `index`, which contains it.
    fn carve(&mut self, index: usize, range: IovaRange) -> Result<(), ListFull> {
        let free = self.free[index];
        let before = range.start().get().checked_sub(1).map(Iova::new);
        let low = before.and_then(|last| IovaRange::new(free.start(), last));
        let high = range.last().checked_add(1).and_then(|start| IovaRange::new(start, free.last()));
        match (low, high) {
            (Some(low), Some(high)) => {
                if self.free.len() == self.free.capacity() {
                    return Err(ListFull);
                }
                self.free[index] = low;
                self.free.insert(index + 1, high);
            }
            (Some(part), None) | (None, Some(part)) => self.free[index] = part,
            (None, None) => {
                self.free.remove(index);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    const TOP: Iova = Iova::new(u64::MAX);

    fn allocate(iova: &mut IovaAllocator, len: u64) -> Option<IovaRange> {
        iova.allocate(len, 0x1000, Iova::new(0x1000), TOP).unwrap()
    }

    #[test]
    fn from_the_top_down_and_back() {
        let mut iova = IovaAllocator::new(range(0, 0xffff), 8);
        let first = allocate(&mut iova, 0x1000).unwrap();
        let second = allocate(&mut iova, 0x2000).unwrap();
        assert_eq!((first, second), (range(0xf000, 0xffff), range(0xd000, 0xefff)));
        iova.release(first);
        iova.release(second);
        assert_eq!(iova.free, [range(0, 0xffff)]);
    }

    #[test]
    fn zero_is_never_given_out_but_can_be_asked_for() {
        let mut iova = IovaAllocator::new(range(0, 0x1fff), 8);
        assert_eq!(allocate(&mut iova, 0x1000), Some(range(0x1000, 0x1fff)));
        assert_eq!(allocate(&mut iova, 0x1000), None);
        assert_eq!(iova.take(range(0, 0xfff)), Ok(true));
        assert_eq!(iova.take(range(0, 0xfff)), Ok(false));
    }

    #[test]
    fn holes_stay_holes() {
        let mut iova = IovaAllocator::new(range(0, 0xffff), 8);
        iova.reserve(range(0x4000, 0xefff)).unwrap();
        iova.reserve(range(0xe000, 0x2_0000)).unwrap();
        let taken = allocate(&mut iova, 0x3000).unwrap();
        assert_eq!(taken, range(0x1000, 0x3fff));
        iova.release(taken);
        assert_eq!(iova.free, [range(0, 0x3fff)]);
        assert_eq!(iova.take(range(0x3000, 0x4fff)), Ok(false));
    }

    #[test]
    fn limit_and_alignment() {
        let mut iova = IovaAllocator::new(range(0, u64::MAX - 0x1000), 8);
        let limit = Iova::new(0xffff_ffff);
        let low = iova.allocate(0x20_0000, 0x20_0000, Iova::new(1), limit).unwrap().unwrap();
        assert_eq!(low, range(0xffe0_0000, 0xffff_ffff));
        assert_eq!(iova.allocate(0x1000, 0x1000, Iova::new(1), Iova::new(0xfff)), Ok(None));
    }

    #[test]
    fn the_list_never_grows_under_the_lock() {
        let mut iova = IovaAllocator::new(range(0, 0xffff_ffff), 2);
        let capacity = iova.free.capacity();
        let mut taken = Vec::new();
        let mut start = 0x1000;
        while iova.take(range(start, start + 0xfff)).is_ok() {
            taken.push(range(start, start + 0xfff));
            start += 0x2000;
        }
        assert_eq!(taken.len(), capacity - 1);
        assert_eq!(iova.free.capacity(), capacity);
        drop(iova.grow_into(IovaAllocator::spare(capacity * 2)));
        assert_eq!(iova.take(range(start, start + 0xfff)), Ok(true));
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
            let mut iova = IovaAllocator::new(range(0, GRANULES * 0x1000 - 1), GRANULES as usize);
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
                        iova.release(range);
                        free[cells(range)].fill(true);
                    }
                    _ => {}
                }
            }
        }
    }
}
