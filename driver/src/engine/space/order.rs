//! The ranges that are not free, ordered by address: a list of all, and a balanced tree that finds them and the free
//! ones between.
//!
//! ```text
//!   addresses   [free   ][A     ][B  ][C  ][free ][D ][free          ](end
//!   list                  A <---> B <-> C <-----> D <---------------> end
//!   tree                  A                       D                   end      each with the free addresses before it
//! ```
//! A free range has no record: it is what lies before the record that follows, and each subtree knows the longest in it
//! (an AVL tree, as Linux keeps its gaps between mappings). So what is given back needs no place, and free neighbours
//! are one range by nature. A record that touches the one before it may stay out of the tree, *behind* it, since there
//! is nothing free before it: the parts of a list lie so, at most [`MAX_BEHIND`] in a row, or twice as many where the first of
//! them are new.

use super::slab::{Index, NIL, Slab};
use crate::addr::{Iova, IovaRange};
use crate::engine::mapping::{Holder, Record};
use alloc::vec::Vec;

/// The most records in a row that stay out of the tree.
pub(super) const MAX_BEHIND: i8 = 63;

/// How many free ranges are looked at that are long enough but may lie askew.
const MAX_ASKEW: usize = 4096;

/// # Invariants
/// The list is sorted, and its ranges do not overlap. It ends with a record at the first address that is not usable. A
/// record is in the tree (its `rank` is the height of its subtree) or touches the one before it (its `rank` is below 0).
/// `gap` is the longest free range before any record of the subtree, in granules; all from 2^32 - 1 on count alike.
pub(super) struct Order {
    slab: Slab,
    pub(super) root: Index,
    pub(super) first: Index,
    /// The first usable address.
    floor: u64,
    granule_bits: u32,
}

/// What a free range has to have.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub len: u64,
    /// A power of two, the granule or more.
    pub align: u64,
    pub lowest: u64,
    pub limit: u64,
}

impl core::ops::Index<Index> for Order {
    type Output = Record;

    #[inline(always)]
    fn index(&self, index: Index) -> &Record {
        &self.slab[index]
    }
}

impl core::ops::IndexMut<Index> for Order {
    #[inline(always)]
    fn index_mut(&mut self, index: Index) -> &mut Record {
        &mut self.slab[index]
    }
}

impl Order {
    /// All of `usable`, which ends below 2^64 - 1, is free, with room for `records` ranges that are not. Allocates.
    pub(super) fn new(usable: IovaRange, granule: u64, records: usize) -> Self {
        let mut slab = Slab::new(records.saturating_add(1));
        let end = Iova::new(usable.last().get().saturating_add(1));
        let end = IovaRange::from_len(end, 1).unwrap_or(IovaRange::WHOLE);
        let root = slab.put(Record::new(end, Holder::End)).unwrap_or(NIL);
        let (floor, granule_bits) = (usable.start().get(), granule.trailing_zeros());
        let mut order = Self { slab, root, first: root, floor, granule_bits };
        order.update(root);
        order
    }

    pub(super) fn capacity(&self) -> usize {
        self.slab.capacity() - 1
    }

    /// Whether a record can be added.
    pub(super) fn has_room(&self) -> bool {
        self.room() > 0
    }

    /// How many records can be added.
    #[inline(always)]
    pub(super) fn room(&self) -> usize {
        self.slab.room()
    }

    pub(super) fn add_chunk(&mut self, chunk: Vec<Record>) -> Option<Vec<Record>> {
        self.slab.add(chunk)
    }

    #[inline(always)]
    pub(super) fn get(&self, index: Index) -> Option<&Record> {
        self.slab.get(index)
    }

    #[inline(always)]
    pub(super) fn get_mut(&mut self, index: Index) -> Option<&mut Record> {
        self.slab.get_mut(index)
    }

    #[inline(always)]
    pub(super) fn get_mut_alone(&mut self, index: Index) -> Option<&mut Record> {
        self.slab.get_mut_alone(index)
    }

    pub(super) fn first(&self) -> Index {
        self.first
    }

    pub(super) fn granule(&self) -> u64 {
        1 << self.granule_bits
    }

    /// A number that differs for addresses that lie close to each other.
    #[inline(always)]
    pub(super) fn page(&self, address: Iova) -> u64 {
        address.get() >> self.granule_bits
    }

    /// The length of a range in granules.
    #[inline(always)]
    pub(super) fn granules(&self, range: IovaRange) -> u64 {
        (range.len_minus_one() >> self.granule_bits) + 1
    }

    /// The last record that starts at or below `address`.
    #[inline(never)]
    pub(super) fn at_or_below(&self, address: Iova) -> Option<Index> {
        let (mut node, mut found) = (self.root, NIL);
        while node != NIL {
            let record = &self[node];
            if record.range.start() <= address {
                (found, node) = (node, record.right);
            } else {
                node = record.left;
            }
        }
        if found == NIL {
            return None;
        }
        // Those that lie behind it, at most MAX_BEHIND.
        loop {
            let next = self[found].next;
            if next == NIL || self[next].rank > 0 || self[next].range.start() > address {
                return Some(found);
            }
            found = next;
        }
    }

    /// The first record that starts at or above `address`, or the end.
    pub(super) fn at_or_above(&self, address: Iova) -> Index {
        match self.at_or_below(address) {
            None => self.first,
            Some(below) if self[below].range.start() == address || self[below].next == NIL => below,
            Some(below) => self[below].next,
        }
    }

    /// The first free address before a record.
    pub(super) fn gap_start(&self, index: Index) -> u64 {
        match self[index].prev {
            NIL => self.floor,
            // Below the record's start, so that it does not wrap.
            prev => self[prev].range.last().get() + 1,
        }
    }

    pub(super) fn gap(&self, index: Index) -> u32 {
        let free = self[index].range.start().get() - self.gap_start(index);
        u32::try_from(free >> self.granule_bits).unwrap_or(u32::MAX)
    }

    /// The highest free range as wanted: the record that follows it, and its start.
    pub(super) fn highest(&self, wanted: Wanted) -> Option<(Index, u64)> {
        let slack = wanted.align - self.granule();
        let mut tries = MAX_ASKEW;
        // What is longer by the slack has an aligned part for certain.
        let certain =
            wanted.len.checked_add(slack).and_then(|len| self.search(self.root, len, wanted, &mut tries));
        if certain.is_some() || slack == 0 {
            return certain;
        }
        tries = MAX_ASKEW;
        self.search(self.root, wanted.len, wanted, &mut tries)
    }

    /// In the subtree of `node`, among the free ranges of `len` bytes and more. As deep as the tree is high.
    fn search(&self, node: Index, len: u64, wanted: Wanted, tries: &mut usize) -> Option<(Index, u64)> {
        if node == NIL || *tries == 0 {
            return None;
        }
        let record = &self[node];
        let least = u32::try_from(len >> self.granule_bits).unwrap_or(u32::MAX);
        if record.gap < least {
            return None;
        }
        if record.range.last().get() < wanted.limit {
            let above = self.search(record.right, len, wanted, tries);
            if above.is_some() {
                return above;
            }
        }
        let gap = self.gap_start(node)..record.range.start().get();
        if self.gap(node) >= least && gap.start <= wanted.limit {
            *tries = tries.saturating_sub(1);
            if let Some(start) = place(gap.start, gap.end, wanted) {
                return Some((node, start));
            }
        }
        if gap.start <= wanted.lowest {
            return None;
        }
        self.search(record.left, len, wanted, tries)
    }

    /// Adds a range that is free now and lies before `next`. `None` where there is no room.
    pub(super) fn insert(&mut self, range: IovaRange, holder: Holder, next: Index) -> Option<Index> {
        let index = self.slab.put(Record::new(range, holder))?;
        self.link(index, self[next].prev, next);
        self.attach(index);
        Some(index)
    }

    /// Cuts a range: what lies from `start` on becomes a record of its own, behind it. `None` where there is no room.
    pub(super) fn split(&mut self, index: Index, start: Iova) -> Option<Index> {
        let Record { range, holder, rank, next, .. } = self[index];
        let low =
            start.get().checked_sub(1).and_then(|last| IovaRange::new(range.start(), Iova::new(last)))?;
        let high = IovaRange::new(start, range.last())?;
        let rest = self.slab.put(Record::new(high, holder))?;
        self[index].range = low;
        self.link(rest, index, next);
        match rank.min(0) - 1 {
            behind if behind >= -MAX_BEHIND => self[rest].rank = behind,
            _ => self.attach(rest),
        }
        Some(rest)
    }

    /// A record that was in use before, if there is one: each of them names another.
    pub(super) fn vacant(&self) -> Index {
        self.slab.vacant()
    }

    /// Takes so many of those, up to this one, which is the next then.
    pub(super) fn take_vacant(&mut self, next: Index, count: usize) {
        self.slab.take_vacant(next, count);
    }

    /// A new record for a part of a list that is being made, behind the record `last`, which names it then. The vacant ones are
    /// taken, although the order does not know that yet.
    #[cold]
    pub(super) fn append_new(&mut self, last: Index) -> Option<Index> {
        let index = self.slab.put_new(Record::new(self[last].range, Holder::Part))?;
        self[last].next = index;
        Some(index)
    }

    /// Adds what is left of a list's addresses, behind the last part so far.
    pub(super) fn append_rest(
        &mut self,
        range: IovaRange,
        (last, next): (Index, Index),
        rank: i8,
    ) -> Option<Index> {
        let rest = self.slab.put(Record::new(range, Holder::Taken))?;
        self.join(last, rest);
        self.join(rest, next);
        match rank - 1 {
            behind if behind >= -MAX_BEHIND => self[rest].rank = behind,
            _ => self.attach(rest),
        }
        Some(rest)
    }

    /// Makes two records neighbours.
    pub(super) fn join(&mut self, low: Index, high: Index) {
        (self[low].next, self[high].prev) = (high, low);
    }

    /// [`merge`](Self::merge) for so many records of which all but the first lie behind it.
    pub(super) fn merge_parts(&mut self, first: Index, last: Index, count: usize) {
        let (second, next, end) = (self[first].next, self[last].next, self[last].range.last());
        self.slab.give_back_chain(second, last, count - 1);
        self.join(first, next);
        let range = self[first].range;
        self[first].range = IovaRange::new(range.start(), end).unwrap_or(range);
    }

    /// Makes one record of neighbours that touch, from the first to the last. It stands where the first did, and the
    /// others go, with what they held.
    pub(super) fn merge(&mut self, first: Index, last: Index) {
        let (start, end, next) = (self[first].range.start(), self[last].range.last(), self[last].next);
        let mut index = self[first].next;
        // Bounded by the records in between. The list is mended at last: nothing is free between them, and what the tree
        // knows of the one that follows stays right.
        while index != next {
            let Record { rank, next, .. } = self[index];
            if rank > 0 {
                self.detach(index);
            }
            self.slab.give_back(index);
            index = next;
        }
        self[first].range = IovaRange::new(start, end).unwrap_or(self[first].range);
        self[first].next = next;
        self[next].prev = first;
    }

    /// Removes a record: its addresses are free.
    pub(super) fn remove(&mut self, index: Index) {
        let Record { rank, next, .. } = self[index];
        let next_is_behind = self[next].rank < 0;
        if rank > 0 && next_is_behind {
            self.replace(index, next);
        } else if rank > 0 {
            self.detach(index);
            self.unlink(index);
            self.refresh(next);
        } else {
            self.unlink(index);
            if next_is_behind {
                self.attach(next);
            } else {
                self.refresh(next);
            }
        }
        self.slab.give_back(index);
    }

    fn link(&mut self, index: Index, prev: Index, next: Index) {
        (self[index].prev, self[index].next) = (prev, next);
        self[next].prev = index;
        match prev {
            NIL => self.first = index,
            prev => self[prev].next = index,
        }
    }

    pub(super) fn unlink(&mut self, index: Index) {
        let Record { prev, next, .. } = self[index];
        self[next].prev = prev;
        match prev {
            NIL => self.first = next,
            prev => self[prev].next = next,
        }
    }
}

/// The highest start in the free addresses from `start` to below `end`.
fn place(start: u64, end: u64, wanted: Wanted) -> Option<u64> {
    let last = end.checked_sub(1)?.min(wanted.limit);
    let highest = last.checked_sub(wanted.len.checked_sub(1)?)? & !(wanted.align - 1);
    (highest >= start.max(wanted.lowest)).then_some(highest)
}
