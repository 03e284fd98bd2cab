//! What a device may still have cached of a table.

use super::memory::TablePage;
use crate::addr::IovaRange;
use alloc::vec::Vec;

/// Addresses whose translation, as the device may have cached it, is not the table's any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stale {
    /// The addresses.
    pub range: IovaRange,
    /// Which entries changed.
    pub entries: StaleEntries,
}

/// Which entries of a table changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StaleEntries {
    /// Only those that map memory: what leads to them may stay cached.
    LeafOnly,
    /// Tables are gone: what led to them has to go from the caches too.
    AllLevels,
}

impl Stale {
    fn covers(&self, other: &Self) -> bool {
        self.range.contains(other.range) && self.entries >= other.entries
    }

    /// Both as one, where together they are one range, no wider than either.
    fn joined(&self, other: &Self) -> Option<Self> {
        let touches = |first: IovaRange, second: IovaRange| {
            first.last().checked_add(1).is_some_and(|next| next == second.start())
        };
        let near = self.range.overlaps(other.range)
            || touches(self.range, other.range)
            || touches(other.range, self.range);
        if self.entries != other.entries || !near {
            return None;
        }
        let start = self.range.start().min(other.range.start());
        let last = self.range.last().max(other.range.last());
        Some(Self { range: IovaRange::new(start, last)?, entries: self.entries })
    }
}

/// Stale ranges in the order in which they became so; neighbours are one.
#[derive(Debug, Default)]
pub(super) struct StaleList(Vec<Stale>);

impl StaleList {
    /// Adds one. Only the newest are looked at to join it: changes come in ascending order of addresses.
    pub(super) fn push(&mut self, mut new: Stale) {
        while let Some(last) = self.0.last() {
            if last.covers(&new) {
                return;
            }
            new = match last.joined(&new) {
                Some(joined) => joined,
                None if new.covers(last) => new,
                None => break,
            };
            self.0.pop();
        }
        self.0.push(new);
    }

    pub(super) fn as_slice(&self) -> &[Stale] {
        &self.0
    }

    pub(super) fn take(&mut self) -> Vec<Stale> {
        core::mem::take(&mut self.0)
    }
}

/// What has to be invalidated, with what waits for that.
///
/// It is confirmed or abandoned; when it is dropped instead, its ranges can never be mapped again and its pages are never
/// freed, which is safe, and a leak.
#[derive(Debug)]
#[must_use = "dropped it leaks pages, and its ranges stay stale for ever"]
pub struct Invalidation {
    pub(super) stale: Vec<Stale>,
    pub(super) pages: Vec<TablePage>,
    pub(super) unlinked: Vec<(u64, u32)>,
}

impl Invalidation {
    /// The ranges.
    pub fn ranges(&self) -> &[Stale] {
        &self.stale
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Iova;

    fn stale(start: u64, last: u64, entries: StaleEntries) -> Stale {
        Stale { range: IovaRange::new(Iova::new(start), Iova::new(last)).unwrap(), entries }
    }

    fn list(all: &[Stale]) -> Vec<Stale> {
        let mut list = StaleList::default();
        for one in all {
            list.push(*one);
        }
        list.take()
    }

    use StaleEntries::{AllLevels, LeafOnly};

    #[test]
    fn neighbours_of_one_kind_are_one() {
        let both = [stale(0, 0xfff, LeafOnly), stale(0x1000, 0x1fff, LeafOnly)];
        assert_eq!(list(&both), [stale(0, 0x1fff, LeafOnly)]);
        let apart = [stale(0, 0xfff, LeafOnly), stale(0x2000, 0x2fff, LeafOnly)];
        assert_eq!(list(&apart), apart);
        let kinds = [stale(0, 0xfff, LeafOnly), stale(0x1000, 0x1fff, AllLevels)];
        assert_eq!(list(&kinds), kinds);
    }

    #[test]
    fn what_a_table_covers_goes_into_it_and_not_the_other_way() {
        let table = stale(0, 0x1f_ffff, AllLevels);
        let pages = [stale(0, 0xfff, LeafOnly), stale(0x3000, 0x3fff, LeafOnly), table];
        assert_eq!(list(&pages), [table]);
        assert_eq!(list(&[table, stale(0x1000, 0x1fff, LeafOnly)]), [table]);
        let wide = [stale(0x1000, 0x1fff, AllLevels), stale(0, 0x2fff, LeafOnly)];
        assert_eq!(list(&wide), wide);
    }
}
