//! Spaces, and the shape of their trees.

mod list;
mod random;
mod shape;

use super::magazine::MAX_CACHED;
use super::*;
use crate::addr::PhysAddr;
use crate::engine::Tag;
use crate::engine::mapping::{ListId, MappingHandle, MappingState, Purpose};
use crate::prot::Prot;
use std::println;

const GRANULE: u64 = 0x1000;

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
}

fn pages(page: u64, count: u64) -> IovaRange {
    range(page * GRANULE, (page + count) * GRANULE - 1)
}

fn space(usable: IovaRange, mappings: usize) -> Space {
    Space::new(usable, GRANULE, Room { mappings, holes: 4, others: 0 })
}

const ANYWHERE: (Iova, Iova) = (Iova::new(GRANULE), Iova::new(u64::MAX));

fn allocate(space: &mut Space, len: u64) -> Option<IovaRange> {
    space.allocate(len, GRANULE, ANYWHERE, 1).unwrap()
}

fn purpose() -> Purpose {
    Purpose { prot: Prot::READ, tag: Tag::NONE }
}

fn insert(space: &mut Space, range: IovaRange, list: u64) -> MappingHandle {
    let phys = PhysAddr::new(range.start().get());
    space.insert(range, phys, (purpose(), ListId::new(list)), &mut None).unwrap()
}

fn map(space: &mut Space, len: u64) -> (IovaRange, MappingHandle) {
    let range = allocate(space, len).unwrap();
    let list = range.start().get() / GRANULE;
    (range, insert(space, range, list))
}

impl Space {
    /// Looks at everything that has to hold. Slow.
    fn check(&self) {
        self.order.check();
        let records = || {
            core::iter::successors(self.order.get(self.order.first()), |record| self.order.get(record.next))
        };
        let count = |holder| records().filter(|record| record.holder == holder).count();
        assert_eq!(records().filter(|record| record.holder.is_mapping()).count(), self.mappings);
        assert_eq!(count(Holder::Reserved), self.holes.len());
        assert_eq!(count(Holder::Cached), self.magazines.count(&self.order));
        assert_eq!(count(Holder::End), 1);
        let used = records().count() - count(Holder::Cached) - 1;
        let outside = self.others + self.mappings;
        assert!(used <= outside && outside <= self.order.capacity(), "{used} {outside}");
        assert_eq!(self.most, self.room.mappings.min(self.order.capacity() - self.others));
        // Counted anew.
        let mut tally = Tally::default();
        for record in records().filter(|record| record.holder.is_mapping()) {
            tally.remember(record);
        }
        assert_eq!(tally, self.tally);
    }

    fn free_ranges(&self) -> Vec<IovaRange> {
        let mut found = Vec::new();
        let mut floor = self.usable.start();
        let mut index = self.order.first();
        while let Some(record) = self.order.get(index) {
            if let Some(last) = record.range.start().get().checked_sub(1) {
                found.extend(IovaRange::new(floor, Iova::new(last)));
            }
            floor = Iova::new(record.range.last().get() + 1);
            index = record.next;
        }
        found
    }
}

#[test]
fn from_the_top_down_and_back() {
    let mut space = space(range(0, 0xffff), 8);
    let first = allocate(&mut space, 0x1000).unwrap();
    let second = allocate(&mut space, 0x2000).unwrap();
    assert_eq!((first, second), (range(0xf000, 0xffff), range(0xd000, 0xefff)));
    space.release(first, 1);
    space.release(second, 1);
    // Both are kept for the next; who wants another size or place gets them too.
    assert_eq!(space.allocate(0xf000, 0x1000, ANYWHERE, 1), Ok(Some(range(0x1000, 0xffff))));
    space.release(range(0x1000, 0xffff), 1);
    assert_eq!(space.take(range(0x2000, 0xefff)), Ok(true));
    assert_eq!(space.free_ranges(), [range(0, 0x1fff), range(0xf000, 0xffff)]);
    space.check();
}

#[test]
fn zero_is_never_given_out_but_can_be_asked_for() {
    let mut space = space(range(0, 0x1fff), 8);
    assert_eq!(allocate(&mut space, 0x1000), Some(range(0x1000, 0x1fff)));
    assert_eq!(allocate(&mut space, 0x1000), None);
    assert_eq!(space.take(range(0, 0xfff)), Ok(true));
    assert_eq!(space.take(range(0, 0xfff)), Ok(false));
}

/// Fails when the end of the 64-bit space is counted as one more address.
#[test]
fn the_last_granule_of_the_whole_space_is_never_given_out() {
    let mut space = space(IovaRange::WHOLE, 8);
    assert_eq!(allocate(&mut space, 0x1000), Some(range(u64::MAX - 0x1fff, u64::MAX - 0x1000)));
    assert_eq!(space.take(range(u64::MAX - 0xfff, u64::MAX)), Ok(false));
    assert_eq!(space.reserve(range(u64::MAX - 0xfff, u64::MAX)), Ok(()));
    let rest = range(0x1000, u64::MAX - 0x2000);
    assert_eq!(allocate(&mut space, rest.len_bytes().unwrap()), Some(rest), "longer than 2^32 granules");
    assert_eq!(allocate(&mut space, 0x1000), None);
    space.check();
}

#[test]
fn holes_stay_holes_and_may_overlap() {
    let mut space = space(range(0, 0xffff), 8);
    space.reserve(range(0x4000, 0xbfff)).unwrap();
    space.reserve(range(0xa000, 0x2_0000)).unwrap();
    space.reserve(range(0x4000, 0x4fff)).unwrap();
    let taken = allocate(&mut space, 0x3000).unwrap();
    assert_eq!(taken, range(0x1000, 0x3fff));
    space.release(taken, 1);
    assert_eq!(space.take(range(0x3000, 0x4fff)), Ok(false));
    assert_eq!(space.take(range(0, 0x3fff)), Ok(true));
    assert_eq!(space.free_ranges(), []);
    space.check();
}

#[test]
fn what_is_in_use_cannot_be_reserved() {
    let mut space = space(range(0, 0xffff), 8);
    let taken = allocate(&mut space, 0x1000).unwrap();
    let before = space.free_ranges();
    assert_eq!(space.reserve(range(0xe000, 0xffff)), Err(ReserveError::InUse));
    assert_eq!(space.free_ranges(), before, "nothing changes on an error");
    space.release(taken, 1);
    // It is kept for the next now, which does not count.
    assert_eq!(space.reserve(range(0xe000, 0xffff)), Ok(()));
    space.check();
}

#[test]
fn limit_and_alignment() {
    let mut space = space(range(0, u64::MAX - 0x1000), 8);
    let below_4g = (Iova::new(1), Iova::new(0xffff_ffff));
    let low = space.allocate(0x20_0000, 0x20_0000, below_4g, 1).unwrap().unwrap();
    assert_eq!(low, range(0xffe0_0000, 0xffff_ffff));
    assert_eq!(space.allocate(0x1000, 0x1000, (Iova::new(1), Iova::new(0xfff)), 1), Ok(None));
    // What is kept has to suit as well.
    space.release(low, 1);
    let high = space.allocate(0x20_0000, 0x40_0000, (Iova::new(1), Iova::new(u64::MAX)), 1).unwrap();
    assert_eq!(high.unwrap().start().get() % 0x40_0000, 0);
    assert_ne!(high, Some(low));
}

/// Fails when the size asked for is rounded down to granules.
#[test]
fn a_length_that_is_no_multiple_of_the_granule_is_not_taken_from_a_magazine() {
    let mut space = space(range(0, 0xffff), 8);
    let one = allocate(&mut space, 0x1000).unwrap();
    space.release(one, 1);
    let longer = allocate(&mut space, 0x1800).unwrap();
    assert_eq!(longer.len_bytes(), Some(0x1800));
}

/// Fails when a handle is believed without its addresses, as one that names another mapping by now.
#[test]
fn a_handle_of_another_mapping_unmaps_nothing() {
    let mut space = space(range(0, 0xffff_ffff), 4);
    let made = [(), (), ()].map(|()| {
        let (range, record) = map(&mut space, 0x1000);
        assert!(space.confirm(record, range));
        (range, record)
    });
    let [(first, of_first), (second, of_second), (third, of_third)] = made;
    assert_eq!(space.begin_unmap(first, of_second), Some(of_first));
    let state = |space: &Space, range: IovaRange| space.get(range.start()).map(|record| record.state);
    assert_eq!(state(&space, second), Some(MappingState::Live));
    assert!(!space.end_unmapped_plain(of_second, first), "the other one is live");
    assert!(space.end_unmapped_plain(of_first, first));
    assert_eq!(space.defer(of_second, third).map(|(record, _)| record), None);
    assert_eq!([second, third].map(|range| state(&space, range)), [Some(MappingState::Live); 2]);
    assert_eq!(space.begin_unmap(third, of_third), Some(of_third));
    space.check();
}

/// Fails when what is taken is not counted, or cached ranges keep their records from others.
#[test]
fn records_run_out_and_grow_without_moving() {
    let mut space = Space::new(range(0, 0xffff_ffff), GRANULE, Room { mappings: 6, holes: 0, others: 0 });
    let taken: Vec<_> = (0..6).map(|_| allocate(&mut space, 0x1000).unwrap()).collect();
    assert_eq!(space.allocate(0x1000, 0x1000, ANYWHERE, 1), Err(ListFull));
    assert_eq!(space.take(range(0x1000, 0x1fff)), Err(ListFull));
    for range in taken.iter().step_by(2) {
        space.release(*range, 1);
    }
    // Their records are those of cached ranges.
    let list = space.allocate(0x3000, 0x1000, ANYWHERE, 3).unwrap().unwrap();
    for part in [0, 1, 2] {
        insert(&mut space, pages(list.start().get() / GRANULE + part, 1), 1);
        space.check();
    }
    assert_eq!(space.allocate(0x1000, 0x1000, ANYWHERE, 1), Err(ListFull));
    assert!(space.is_full() || space.len() == 3);
    assert_eq!(space.lacks(6), 0);
    assert_eq!(space.lacks(7), 3, "half as many more");
    let spare = Vec::with_capacity(space.lacks(12));
    assert!(space.grow(12, spare).is_none());
    assert_eq!(space.capacity(), 12);
    assert!(space.grow(12, Vec::new()).is_some(), "there are enough");
    assert!(space.allocate(0x6000, 0x1000, ANYWHERE, 6).unwrap().is_some());
    space.check();
}

#[test]
fn a_range_is_whole_only_on_boundaries_and_without_holes() {
    let mut space = space(range(0, 0xffff), 8);
    for range in [range(0x1000, 0x1fff), range(0x2000, 0x3fff), range(0x5000, 0x5fff)] {
        assert_eq!(space.take(range), Ok(true));
        insert(&mut space, range, 0);
    }
    assert_eq!(space.whole(range(0x1000, 0x3fff)), space.handle(Iova::new(0x1000)));
    assert_eq!(space.whole(range(0x2000, 0x3fff)), space.handle(Iova::new(0x2000)));
    // Taken, but not mapped.
    assert_eq!(space.take(range(0x6000, 0x6fff)), Ok(true));
    for broken in [
        range(0x1000, 0x2fff),
        range(0x1800, 0x3fff),
        range(0x2000, 0x5fff),
        range(0x5000, 0x6fff),
        range(0x4000, 0x4fff),
        range(0x6000, 0x6fff),
    ] {
        assert!(space.whole(broken).is_none(), "{broken}");
    }
}

#[test]
fn lookup_by_any_address() {
    let mut space = space(range(0, 0xffff), 8);
    for range in [range(0x1000, 0x1fff), range(0x3000, 0x3fff)] {
        assert_eq!(space.take(range), Ok(true));
        insert(&mut space, range, 0);
    }
    assert_eq!(space.containing(Iova::new(0x1fff)).unwrap().range, range(0x1000, 0x1fff));
    assert!(space.containing(Iova::new(0x2000)).is_none());
    assert!(space.containing(Iova::new(0xfff)).is_none());
}

/// Fails when a handle is believed without its address, or a removed record still answers.
#[test]
fn a_stale_handle_reaches_no_other_record() {
    let mut space = space(range(0, 0xffff), 8);
    let (old, handle) = map(&mut space, 0x1000);
    assert_eq!(space.change(handle, old.start(), |record| record.range), Some(old));
    assert!(space.remove(old.start()).is_none());
    assert_eq!(space.change(handle, old.start(), |record| record.range), None, "cached");
    assert_eq!(space.take(range(0x1000, 0xffff)), Ok(true));
    assert_eq!(space.change(handle, old.start(), |record| record.range), None, "gone");
    space.release(range(0x1000, 0xffff), 1);
    assert_eq!(space.take(range(0x4000, 0x4fff)), Ok(true));
    let new = insert(&mut space, range(0x4000, 0x4fff), 1);
    assert_eq!(new, handle, "else this shows nothing");
    assert_eq!(space.change(handle, old.start(), |record| record.range), None, "another's");
    assert_eq!(space.change(MappingHandle(u32::MAX), old.start(), |record| record.range), None);
}

/// Neighbours are one range again, whatever the order in which they come back.
#[test]
fn what_comes_back_in_any_order_is_one_range() {
    let count = if cfg!(debug_assertions) { 3_000 } else { 100_000 };
    let usable = pages(1, 2 * count as u64);
    let mut space = space(usable, count);
    let mut ranges: Vec<_> = (0..count as u64).map(|at| map(&mut space, GRANULE * (1 + at % 2)).0).collect();
    space.order.check();
    let mut state = 0x5eed_u64;
    println!("seed {state:#x}");
    for at in (1..ranges.len()).rev() {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ranges.swap(at, (state >> 33) as usize % (at + 1));
    }
    for range in ranges {
        assert!(space.remove(range.start()).is_none());
    }
    assert!(space.is_empty());
    assert_eq!(allocate(&mut space, usable.len_bytes().unwrap()), Some(usable));
    space.check();
}

/// The parts of a list lie behind its first one, and any of them can go first.
#[test]
fn parts_of_a_list_go_in_any_order() {
    for parts in [2, 64, 65, 200] {
        for step in [1, 3, 7] {
            let mut space = space(pages(1, 1000), 300);
            let list = space.allocate(parts * GRANULE, GRANULE, ANYWHERE, parts as usize).unwrap().unwrap();
            let first = list.start().get() / GRANULE;
            for part in 0..parts {
                insert(&mut space, pages(first + part, 1), 9);
            }
            space.check();
            for offset in 0..step {
                for part in (offset..parts).step_by(step as usize) {
                    let at = pages(first + part, 1);
                    assert_eq!(space.containing(at.last()).map(|record| record.range), Some(at));
                    space.retain_in(at, None, |_| false);
                    assert!(space.containing(at.last()).is_none());
                    space.check();
                }
            }
            assert_eq!(allocate(&mut space, 1000 * GRANULE), Some(pages(1, 1000)));
        }
    }
}

/// Fails when a list that goes as a whole is freed part by part.
#[test]
fn a_whole_list_is_cached_as_one_range() {
    for parts in [64_u64, 128] {
        let mut space = space(pages(1, 1000), 300);
        let len = parts * GRANULE;
        let list = space.allocate(len, GRANULE, ANYWHERE, parts as usize).unwrap().unwrap();
        for part in 0..parts {
            insert(&mut space, pages(list.start().get() / GRANULE + part, 1), 9);
        }
        space.retain_in(list, None, |_| false);
        space.check();
        assert_eq!(space.magazines.count(&space.order), 1);
        assert_eq!(space.allocate(len, GRANULE, ANYWHERE, 1), Ok(Some(list)));
    }
}

/// Fails when the walk goes on at a record that gave way to another in the magazines.
#[test]
fn removing_all_passes_over_what_gives_way_meanwhile() {
    let (usable, count) = (pages(1, 8 * MAX_CACHED as u64), 2 * MAX_CACHED);
    let mut space = space(usable, 2 * count);
    // From the top down: one granule, two granules, one granule ...
    let mut pair = || (map(&mut space, GRANULE).0, map(&mut space, 2 * GRANULE).0);
    let singles: Vec<_> = (0..count).map(|_| pair().0).collect();
    // The magazines are full. What gives way first lies right behind the second mapping that is removed.
    for single in singles[count - MAX_CACHED..count - 2].iter().chain(singles[count - 2..].iter().rev()) {
        space.remove(single.start());
    }
    assert_eq!(space.magazines.count(&space.order), MAX_CACHED);
    space.check();
    space.retain_all(|_| false);
    space.check();
    assert!(space.is_empty());
    assert_eq!(allocate(&mut space, usable.len_bytes().unwrap()), Some(usable));
}
