//! What is mapped in one space.

use crate::addr::{Iova, IovaRange};
use crate::prot::Prot;
use alloc::collections::BTreeMap;

/// One mapping, made and removed whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub range: IovaRange,
    /// Where its first address leads: memory, or an address of the parent.
    pub target: u64,
    pub prot: Prot,
}

impl Entry {
    /// Where its last address leads. Mappings do not wrap.
    pub(super) fn target_last(&self) -> u64 {
        self.target + self.range.len_minus_one()
    }
}

/// Mappings that do not overlap, by their first address.
#[derive(Debug, Default)]
pub(super) struct Mappings(BTreeMap<u64, Entry>);

impl Mappings {
    pub(super) fn iter(&self) -> impl Iterator<Item = Entry> + '_ {
        self.0.values().copied()
    }

    /// Those that have an address in the range, in ascending order.
    pub(super) fn overlapping(&self, range: IovaRange) -> impl Iterator<Item = Entry> + '_ {
        let before = self.0.range(..range.start().get()).next_back();
        let inside = self.0.range(range.start().get()..=range.last().get());
        before.into_iter().chain(inside).map(|(_, entry)| *entry).filter(move |e| e.range.overlaps(range))
    }

    pub(super) fn at(&self, address: Iova) -> Option<Entry> {
        self.overlapping(IovaRange::new(address, address)?).next()
    }

    /// Adds one that overlaps none.
    pub(super) fn insert(&mut self, entry: Entry) {
        self.0.insert(entry.range.start().get(), entry);
    }

    /// Removes the one with exactly this range.
    pub(super) fn remove(&mut self, range: IovaRange) {
        self.0.remove(&range.start().get());
    }
}
