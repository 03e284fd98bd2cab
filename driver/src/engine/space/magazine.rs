//! Ranges that were given back lately, kept by size, so that the next one who wants that size takes no search.

use super::order::Order;
use super::slab::{Index, NIL};
use crate::addr::{IovaRange, PhysAddr};
use crate::engine::mapping::{Holder, Record};
use core::num::NonZeroU64;

/// Sizes in granules up to this one, a megabyte of the smallest, have a magazine each; beyond it the powers of two have.
const SMALL: u64 = 256;

/// None, which stays empty, 1 to 256 granules, and 512 to 4096.
const CLASSES: usize = SMALL as usize + 5;

/// How many magazines are looked at for one that gives way to another size, while a mapping ends.
const LOOKS: usize = 32;

/// The most ranges in all magazines. Few in unit tests, so that they give way to each other there.
pub(super) const MAX_CACHED: usize = if cfg!(test) { 8 } else { 512 };

/// Stacks of records in state [`Holder::Cached`], all of a stack of the same size. Each names the next below it in
/// `phys`, which it has no other use for.
pub(super) struct Magazines {
    tops: [Index; CLASSES],
    cached: usize,
    /// The magazine that gave way last when all were full together.
    victim: usize,
}

/// Which magazine keeps ranges of so many granules.
#[inline(always)]
fn class_of(granules: u64) -> Option<usize> {
    if granules <= SMALL { Some(granules as usize) } else { class_of_many(granules) }
}

#[cold]
fn class_of_many(granules: u64) -> Option<usize> {
    let log = NonZeroU64::new(granules)?.trailing_zeros();
    let class = SMALL as usize - SMALL.ilog2() as usize + log as usize;
    (granules.is_power_of_two() && class < CLASSES).then_some(class)
}

/// The next record of a magazine.
fn below(record: &Record) -> Index {
    record.phys.get() as Index
}

impl Magazines {
    pub(super) fn new() -> Self {
        Self { tops: [NIL; CLASSES], cached: 0, victim: 0 }
    }

    /// Takes the latest range of this size, if it suits. The caller says who has it now.
    #[inline(always)]
    pub(super) fn pop<'o>(
        &mut self,
        order: &'o mut Order,
        granules: u64,
        suits: impl FnOnce(IovaRange) -> bool,
    ) -> Option<(Index, &'o mut Record)> {
        let top = &mut self.tops[class_of(granules)?];
        let index = *top;
        let record = order.get_mut(index)?;
        if !suits(record.range) {
            return None;
        }
        *top = below(record);
        self.cached -= 1;
        Some((index, record))
    }

    /// [`push`](Self::push) for a range of so many granules, where that frees no other.
    #[inline(always)]
    pub(super) fn keep(&mut self, index: Index, record: &mut Record, granules: u64) -> bool {
        let Some(class) = class_of(granules) else { return false };
        // What lies behind another goes, so that no more and more of them do.
        if self.cached >= MAX_CACHED || record.rank < 0 {
            return false;
        }
        (record.holder, record.counted) = (Holder::Cached, false);
        record.phys = PhysAddr::new(self.tops[class].into());
        self.tops[class] = index;
        self.cached += 1;
        true
    }

    /// Keeps a range that nobody has any more. False where it is to be freed instead.
    pub(super) fn push(&mut self, order: &mut Order, index: Index) -> bool {
        let granules = order.granules(order[index].range);
        let Some(class) = class_of(granules) else { return false };
        if self.cached == MAX_CACHED {
            match self.next_victim(class) {
                Some(victim) => self.free_one(order, victim),
                None => return false,
            }
        }
        self.keep(index, &mut order[index], granules)
    }

    /// Another magazine that has something, each in its turn, if one of the next is.
    fn next_victim(&mut self, but: usize) -> Option<usize> {
        let (next, victim) = (self.victim + 1, self.first_from(self.victim + 1, LOOKS, but));
        self.victim = victim.unwrap_or(next + LOOKS - 1) % CLASSES;
        victim
    }

    /// The first of so many magazines that has something.
    fn first_from(&self, first: usize, looks: usize, but: usize) -> Option<usize> {
        let mut classes = (first..first + looks).map(|class| class % CLASSES);
        classes.find(|class| *class != but && self.tops[*class] != NIL)
    }

    fn free_one(&mut self, order: &mut Order, class: usize) {
        let top = self.tops[class];
        if top != NIL {
            self.tops[class] = below(&order[top]);
            self.cached -= 1;
            order.remove(top);
        }
    }

    /// Frees one range, whichever, so that its record can be had. False where there is none.
    pub(super) fn free_any(&mut self, order: &mut Order) -> bool {
        // Where the last one was there are often more.
        match self.first_from(self.victim, CLASSES, CLASSES) {
            Some(class) => {
                self.victim = class;
                self.free_one(order, class);
                true
            }
            None => false,
        }
    }

    /// Frees all ranges of the size that this cached one has.
    pub(super) fn drain_like(&mut self, order: &mut Order, index: Index) {
        let Some(class) = class_of(order.granules(order[index].range)) else { return };
        // Bounded by MAX_CACHED.
        while self.tops[class] != NIL {
            self.free_one(order, class);
        }
    }

    /// Frees all. False where there was nothing.
    pub(super) fn drain(&mut self, order: &mut Order) -> bool {
        let any = self.cached > 0;
        // Bounded by MAX_CACHED.
        while self.free_any(order) {}
        any
    }
}

#[cfg(test)]
impl Magazines {
    /// How many ranges there are, each in the magazine of its size.
    pub(super) fn count(&self, order: &Order) -> usize {
        let mut count = 0;
        for (class, top) in self.tops.iter().enumerate() {
            let mut index = *top;
            while index != NIL {
                assert_eq!(order[index].holder, Holder::Cached);
                assert_eq!(class_of(order.granules(order[index].range)), Some(class));
                assert!(order[index].rank > 0);
                count += 1;
                index = below(&order[index]);
            }
        }
        assert_eq!(count, self.cached);
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_size_has_its_own_magazine() {
        let classes: [_; 9] = [0, 1, 256, 257, 511, 512, 1024, 4096, 8192].map(class_of);
        let last = CLASSES - 1;
        let of_many = [Some(257), Some(258), Some(last), None];
        assert_eq!(classes[..5], [Some(0), Some(1), Some(256), None, None]);
        assert_eq!(classes[5..], of_many);
    }
}
