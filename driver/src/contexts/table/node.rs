//! One table of the tree: the device's page, and the driver's own copy of it.

use super::memory::TablePage;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

/// A table. An entry is empty (0), leads to a child, or maps memory.
///
/// # Invariants
/// `entries` is what the page holds, but for children that are hidden, whose entry the device sees as empty. `live` is
/// how many are not empty.
#[derive(Debug)]
pub(super) struct Node {
    page: TablePage,
    entries: Box<[u64]>,
    children: BTreeMap<u16, Node>,
    live: usize,
}

impl Node {
    /// An empty table in a zeroed page.
    pub(super) fn new(page: TablePage) -> Self {
        // INVARIANT: a new page is zeroed.
        let entries = vec![0; page.words()].into_boxed_slice();
        Self { page, entries, children: BTreeMap::new(), live: 0 }
    }

    pub(super) fn page(&self) -> &TablePage {
        &self.page
    }

    pub(super) fn is_empty(&self) -> bool {
        self.live == 0
    }

    pub(super) fn entry(&self, index: u16) -> u64 {
        self.entries[usize::from(index)]
    }

    pub(super) fn child(&self, index: u16) -> Option<&Self> {
        self.children.get(&index)
    }

    pub(super) fn child_mut(&mut self, index: u16) -> Option<&mut Self> {
        self.children.get_mut(&index)
    }

    /// Writes an entry that maps memory.
    pub(super) fn set_leaf(&mut self, index: u16, entry: u64) {
        self.set(index, entry, entry);
    }

    /// Puts a table, whose content is written, where there was nothing or a block.
    pub(super) fn set_child(&mut self, index: u16, entry: u64, child: Self) {
        self.set(index, entry, entry);
        self.children.insert(index, child);
    }

    /// The same, but the device sees nothing until [`show`](Self::show).
    pub(super) fn hide_child(&mut self, index: u16, entry: u64, child: Self) {
        self.set(index, entry, 0);
        self.children.insert(index, child);
    }

    /// Makes a hidden child visible, or does nothing.
    pub(super) fn show(&mut self, index: u16) {
        if self.children.contains_key(&index) {
            self.page.write(usize::from(index), self.entry(index));
        }
    }

    /// Empties an entry, and returns its child, if it had one.
    pub(super) fn clear(&mut self, index: u16) -> Option<Self> {
        self.set(index, 0, 0);
        self.children.remove(&index)
    }

    fn set(&mut self, index: u16, entry: u64, shown: u64) {
        let old = core::mem::replace(&mut self.entries[usize::from(index)], entry);
        self.live += usize::from(entry != 0);
        self.live -= usize::from(old != 0);
        self.page.write(usize::from(index), shown);
    }

    /// All pages of the table and what is below it. No recursion deeper than the format's levels.
    pub(super) fn into_pages(self, pages: &mut Vec<TablePage>) {
        for child in self.children.into_values() {
            child.into_pages(pages);
        }
        pages.push(self.page);
    }
}
