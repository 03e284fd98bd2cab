//! Mapping: what is refused, what it takes, and the entries.

use super::format::{Shape, TableFormat};
use super::memory::TablePage;
use super::node::Node;
use super::stale::{Stale, StaleEntries};
use super::{NotPresent, PageTable, TableMapError, TableMemory};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::prot::Prot;
use alloc::vec::Vec;

/// A range that is being mapped, or the part of it that one entry translates. Both ends inclusive.
#[derive(Clone, Copy)]
struct Part {
    start: u64,
    last: u64,
    phys: u64,
}

impl Part {
    /// The parts of this one, by the entries of a level that translate them.
    fn by_entry(self, shape: &Shape, level: u32) -> impl Iterator<Item = (u16, Part)> {
        let len = shape.entry_len(level);
        let index = move |at| shape.index(level, at);
        let mut next = Some(self.start);
        core::iter::from_fn(move || {
            let start = next?;
            let last = (start | (len - 1)).min(self.last);
            next = (last < self.last).then(|| last + 1);
            Some((index(start), Part { start, last, phys: self.phys + (start - self.start) }))
        })
    }

    /// Whether an entry of this level can map all of it.
    fn is_leaf(&self, shape: &Shape, level: u32) -> bool {
        let len = shape.entry_len(level);
        let whole = self.start & (len - 1) == 0 && self.last - self.start == len - 1;
        level == 0 || level <= shape.leaf_level && whole && self.phys & (len - 1) == 0
    }
}

impl<M: TableMemory> PageTable<M> {
    /// Maps `len` bytes, by blocks where alignment allows.
    ///
    /// Allocates. All of it is mapped or, on an error, none. The device finds it at once; where it caches what is not
    /// present ([`NotPresent::MayBeCached`]) the range is stale.
    ///
    /// # Errors
    /// [`TableMapError`].
    ///
    /// # Safety
    /// Endpoints whose context walks the table may do with the memory what `prot` allows, from now until the range was
    /// unmapped and its invalidation confirmed.
    pub unsafe fn map(
        &mut self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
    ) -> Result<(), TableMapError> {
        let (part, bits) = self.check(iova, phys, len, prot)?;
        let needed = count(&self.shape, Some(&self.root), self.shape.levels - 1, part);
        let pages = self.allocate(needed);
        let mut pages = pages.ok_or(TableMapError::NoMemory { pages: needed })?;
        let writer = Writer { format: self.format, shape: self.shape, bits };
        writer.write(&mut self.root, self.shape.levels - 1, part, &mut pages);
        debug_assert!(pages.is_empty(), "pages were counted before");
        self.pages += needed;
        self.mapped_bytes += len;
        if self.not_present == NotPresent::MayBeCached
            && let Some(range) = IovaRange::from_len(iova, len)
        {
            // Also that the way there was not present.
            self.pending.push(Stale { range, entries: StaleEntries::AllLevels });
        }
        Ok(())
    }

    fn check(&self, iova: Iova, phys: PhysAddr, len: u64, prot: Prot) -> Result<(Part, u64), TableMapError> {
        let granule = self.granule();
        for value in [iova.get(), phys.get(), len] {
            if !value.is_multiple_of(granule) {
                return Err(TableMapError::Misaligned { value, granule });
            }
        }
        if len == 0 {
            return Err(TableMapError::Empty);
        }
        let input = self.input_range();
        let range = IovaRange::from_len(iova, len).filter(|range| input.contains(*range));
        let range = range.ok_or(TableMapError::OutsideInput { iova, len, input })?;
        let last_phys = phys.get().checked_add(len - 1);
        if last_phys.is_none_or(|last| last > self.shape.last_output()) {
            return Err(TableMapError::OutsideOutput { phys, len, bits: self.shape.output_bits });
        }
        let bits = self.format.leaf_bits(prot).ok_or(TableMapError::Prot { prot })?;
        if let Some(stale) = self.stale_in(range) {
            return Err(TableMapError::Stale { range: stale });
        }
        let part = Part { start: iova.get(), last: range.last().get(), phys: phys.get() };
        match first_mapped(&self.shape, &self.root, self.shape.levels - 1, part) {
            Some(iova) => Err(TableMapError::Mapped { iova: Iova::new(iova) }),
            None => Ok((part, bits)),
        }
    }
}

/// The first address of the part that is mapped. Only as deep as the format has levels.
fn first_mapped(shape: &Shape, node: &Node, level: u32, part: Part) -> Option<u64> {
    part.by_entry(shape, level).find_map(|(index, part)| match node.child(index) {
        Some(child) => first_mapped(shape, child, level - 1, part),
        None => (node.entry(index) != 0).then_some(part.start),
    })
}

/// How many tables are missing to map a part, in which nothing is mapped.
fn count(shape: &Shape, node: Option<&Node>, level: u32, part: Part) -> usize {
    let missing = |(index, part): (u16, Part)| {
        if part.is_leaf(shape, level) {
            return 0;
        }
        let child = node.and_then(|node| node.child(index));
        usize::from(child.is_none()) + count(shape, child, level - 1, part)
    };
    part.by_entry(shape, level).map(missing).sum()
}

struct Writer {
    format: TableFormat,
    shape: Shape,
    bits: u64,
}

impl Writer {
    /// Writes the entries. A new table is filled before it is put into its place, so that the device never sees half of one.
    fn write(&self, node: &mut Node, level: u32, part: Part, pages: &mut Vec<TablePage>) {
        for (index, part) in part.by_entry(&self.shape, level) {
            if part.is_leaf(&self.shape, level) {
                node.set_leaf(index, self.format.leaf(level, part.phys, self.bits));
            } else if let Some(child) = node.child_mut(index) {
                self.write(child, level - 1, part, pages);
            } else {
                let mut child = Node::new(pages.pop().expect("pages were counted before"));
                self.write(&mut child, level - 1, part, pages);
                let entry = self.format.table(child.page().phys().get());
                node.set_child(index, entry, child);
            }
        }
    }
}
