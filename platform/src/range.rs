//! Ranges of physical addresses, and sets of them.
//!
//! A range is inclusive, `start..=last`, so that one that ends at the top of the address space needs no special case.
//! [`RangeSet`] keeps disjoint, sorted, merged ranges. Its work is linear in their number, which firmware bounds: memory
//! maps and bus windows have a few dozen.

use alloc::vec::Vec;
use core::fmt;

/// A non-empty range of physical addresses, `start..=last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PhysRange {
    start: u64,
    last: u64,
}

impl PhysRange {
    /// Makes the range `start..=last`; `None` when it would be empty.
    pub const fn new(start: u64, last: u64) -> Option<Self> {
        if start <= last { Some(Self { start, last }) } else { None }
    }

    /// Makes the range of `len_bytes` from `start`; `None` when it would be empty or pass the end of the address space.
    pub const fn from_len(start: u64, len_bytes: u64) -> Option<Self> {
        if len_bytes == 0 {
            return None;
        }
        match start.checked_add(len_bytes - 1) {
            Some(last) => Some(Self { start, last }),
            None => None,
        }
    }

    /// The first address.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The last address, which belongs to the range.
    pub const fn last(self) -> u64 {
        self.last
    }

    /// The number of bytes; `u64::MAX` stands for the whole address space too.
    pub const fn len_bytes(self) -> u64 {
        (self.last - self.start).saturating_add(1)
    }

    /// Whether the two share an address.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// Whether all of `other` lies inside.
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// The largest range of whole blocks inside, or `None`. `align` is a power of two.
    pub const fn shrink_to(self, align: u64) -> Option<Self> {
        let mask = align - 1;
        let Some(start) = self.start.checked_add(mask) else { return None };
        let start = start & !mask;
        // One past the last address is block-aligned exactly when `last` has all low bits set.
        let last = if self.last & mask == mask {
            self.last
        } else {
            match (self.last & !mask).checked_sub(1) {
                Some(last) => last,
                None => return None,
            }
        };
        Self::new(start, last)
    }

    /// The smallest range of whole blocks around it. `align` is a power of two.
    pub const fn grow_to(self, align: u64) -> Self {
        Self { start: self.start & !(align - 1), last: self.last | (align - 1) }
    }
}

impl fmt::Display for PhysRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.start, self.last)
    }
}

/// A set of addresses, kept as disjoint ranges in ascending order with no two adjacent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: Vec<PhysRange>,
}

impl RangeSet {
    /// Makes the empty set.
    pub const fn new() -> Self {
        Self { ranges: Vec::new() }
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PhysRange> + '_ {
        self.ranges.iter().copied()
    }

    /// The number of addresses, saturating.
    pub fn len_bytes(&self) -> u64 {
        self.iter().fold(0, |sum, range| sum.saturating_add(range.len_bytes()))
    }

    /// Whether any address of `range` is in the set.
    pub fn overlaps(&self, range: PhysRange) -> bool {
        self.iter().any(|r| r.overlaps(range))
    }

    /// Whether every address of `range` is in the set.
    pub fn contains(&self, range: PhysRange) -> bool {
        self.iter().any(|r| r.contains(range))
    }

    /// Adds the addresses of `range`, those already present too.
    pub fn insert(&mut self, range: PhysRange) {
        let mut merged = range;
        self.ranges.retain(|r| {
            let touches = r.overlaps(merged)
                || r.last.checked_add(1) == Some(merged.start)
                || merged.last.checked_add(1) == Some(r.start);
            if touches {
                merged = PhysRange { start: r.start.min(merged.start), last: r.last.max(merged.last) };
            }
            !touches
        });
        let at = self.ranges.partition_point(|r| r.start < merged.start);
        self.ranges.insert(at, merged);
    }

    /// Takes the addresses of `range` away, those absent too.
    pub fn remove(&mut self, range: PhysRange) {
        let mut left = Vec::with_capacity(self.ranges.len() + 1);
        for r in &self.ranges {
            if !r.overlaps(range) {
                left.push(*r);
                continue;
            }
            if r.start < range.start {
                left.push(PhysRange { start: r.start, last: range.start - 1 });
            }
            if range.last < r.last {
                left.push(PhysRange { start: range.last + 1, last: r.last });
            }
        }
        self.ranges = left;
    }

    /// Finds the lowest aligned range of `len_bytes` that lies inside the set and inside `bounds`. `align` is a power of
    /// two. The set is not changed.
    pub fn find(&self, len_bytes: u64, align: u64, bounds: PhysRange) -> Option<PhysRange> {
        self.iter().find_map(|r| {
            let lowest = r.start.max(bounds.start);
            let start = lowest.checked_add(align - 1)? & !(align - 1);
            let found = PhysRange::from_len(start, len_bytes)?;
            (r.contains(found) && bounds.contains(found)).then_some(found)
        })
    }

    /// Finds the highest aligned range of `len_bytes` that lies inside the set and inside `bounds`. `align` is a power of
    /// two. The set is not changed.
    pub fn find_last(&self, len_bytes: u64, align: u64, bounds: PhysRange) -> Option<PhysRange> {
        self.ranges.iter().rev().find_map(|r| {
            let highest = r.last.min(bounds.last);
            let start = highest.checked_sub(len_bytes.checked_sub(1)?)? & !(align - 1);
            let found = PhysRange::from_len(start, len_bytes)?;
            (r.contains(found) && bounds.contains(found)).then_some(found)
        })
    }
}

impl FromIterator<PhysRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = PhysRange>>(ranges: I) -> Self {
        let mut set = Self::new();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> PhysRange {
        PhysRange::new(start, last).expect("a test's range is not empty")
    }

    fn ranges(set: &RangeSet) -> Vec<(u64, u64)> {
        set.iter().map(|r| (r.start(), r.last())).collect()
    }

    #[test]
    fn a_range_may_end_at_the_top_and_never_wraps() {
        assert_eq!(PhysRange::from_len(u64::MAX, 1), Some(range(u64::MAX, u64::MAX)));
        assert_eq!(PhysRange::from_len(u64::MAX, 2), None);
        assert_eq!(PhysRange::from_len(5, 0), None);
        assert_eq!(range(0, u64::MAX).len_bytes(), u64::MAX);
    }

    #[test]
    fn shrinking_and_growing_keep_to_whole_blocks() {
        assert_eq!(range(1, 0x2fff).shrink_to(0x1000), Some(range(0x1000, 0x2fff)));
        assert_eq!(range(1, 0x2ffe).shrink_to(0x1000), Some(range(0x1000, 0x1fff)));
        assert_eq!(range(1, 0xffe).shrink_to(0x1000), None);
        assert_eq!(range(0, 0xffe).shrink_to(0x1000), None);
        assert_eq!(range(u64::MAX - 1, u64::MAX).shrink_to(0x1000), None);
        assert_eq!(range(0x1001, 0x1001).grow_to(0x1000), range(0x1000, 0x1fff));
        assert_eq!(range(u64::MAX, u64::MAX).grow_to(0x1000), range(u64::MAX - 0xfff, u64::MAX));
    }

    #[test]
    fn insert_merges_neighbours_and_overlaps() {
        let set: RangeSet =
            [range(30, 39), range(10, 19), range(20, 25), range(24, 31), range(50, 59)].into_iter().collect();
        assert_eq!(ranges(&set), [(10, 39), (50, 59)]);
        let top: RangeSet = [range(u64::MAX, u64::MAX), range(0, u64::MAX - 1)].into_iter().collect();
        assert_eq!(ranges(&top), [(0, u64::MAX)]);
    }

    #[test]
    fn remove_splits() {
        let mut set: RangeSet = [range(0, 99)].into_iter().collect();
        set.remove(range(10, 19));
        set.remove(range(90, 200));
        set.remove(range(0, 0));
        assert_eq!(ranges(&set), [(1, 9), (20, 89)]);
    }

    #[test]
    fn find_honours_alignment_and_bounds() {
        let set: RangeSet = [range(0x1001, 0x4fff), range(0x8000, u64::MAX)].into_iter().collect();
        assert_eq!(set.find(0x1000, 0x1000, range(0, u64::MAX)), Some(range(0x2000, 0x2fff)));
        assert_eq!(set.find(0x4000, 0x4000, range(0, u64::MAX)), Some(range(0x8000, 0xbfff)));
        assert_eq!(set.find(0x4000, 0x4000, range(0, 0xb000)), None);
        assert_eq!(set.find(0x1000, 0x1000, range(u64::MAX - 5, u64::MAX)), None);
        assert_eq!(set.find_last(0x1000, 0x1000, range(0, 0x9ffe)), Some(range(0x8000, 0x8fff)));
        assert_eq!(set.find_last(0x2000, 0x2000, range(0, 0x9fff)), Some(range(0x8000, 0x9fff)));
        assert_eq!(set.find_last(0x1000, 0x1000, range(0, 0x7fff)), Some(range(0x4000, 0x4fff)));
        assert_eq!(set.find_last(0x8000, 0x1000, range(0, 0x7fff)), None);
    }
}
