//! Unmapping: entries that go, blocks that are split, tables that are left empty, and what of all that is stale.

use super::format::{Shape, TableFormat};
use super::memory::TablePage;
use super::node::Node;
use super::stale::{Stale, StaleEntries, StaleList};
use super::{PageTable, TableMemory, TableUnmapError};
use crate::addr::{Iova, IovaRange};
use alloc::vec::Vec;

/// The part of what is unmapped that one entry translates, and all that the entry translates.
#[derive(Clone, Copy)]
struct Piece {
    index: u16,
    start: u64,
    last: u64,
    entry_start: u64,
    entry_last: u64,
}

impl Piece {
    fn is_whole(&self) -> bool {
        self.start == self.entry_start && self.last == self.entry_last
    }

    fn stale(&self, entries: StaleEntries) -> Option<Stale> {
        let range = IovaRange::new(Iova::new(self.entry_start), Iova::new(self.entry_last))?;
        Some(Stale { range, entries })
    }
}

/// The entries of a level from `start` to `last`.
fn pieces(shape: &Shape, level: u32, start: u64, last: u64) -> impl Iterator<Item = Piece> {
    let len = shape.entry_len(level);
    let index = move |at| shape.index(level, at);
    let mut next = Some(start);
    core::iter::from_fn(move || {
        let start = next?;
        let (entry_start, entry_last) = (start & !(len - 1), start | (len - 1));
        let piece_last = entry_last.min(last);
        next = (piece_last < last).then(|| piece_last + 1);
        Some(Piece { index: index(start), start, last: piece_last, entry_start, entry_last })
    })
}

impl<M: TableMemory> PageTable<M> {
    /// Unmaps all that is mapped in the range, which may have holes, and returns how many bytes that was.
    ///
    /// Blocks that lie partly in the range are split, which may take memory. What has to be invalidated is in
    /// [`stale`](Self::stale) then; before that is confirmed, the device may still reach what was mapped. On Arm what
    /// remains of a block that was split faults until then.
    ///
    /// # Errors
    /// [`TableUnmapError`]. Nothing was changed.
    pub fn unmap(&mut self, range: IovaRange) -> Result<u64, TableUnmapError> {
        let granule = self.granule();
        let (start, last) = (range.start().get(), range.last().get());
        if !start.is_multiple_of(granule) {
            return Err(TableUnmapError::Misaligned { value: start, granule });
        }
        if last & (granule - 1) != granule - 1 {
            return Err(TableUnmapError::Misaligned { value: last, granule });
        }
        let input = self.input_range();
        if !input.contains(range) {
            return Err(TableUnmapError::OutsideInput { range, input });
        }
        let top = self.shape.levels - 1;
        let needed = splits(&self.shape, &self.root, top, start, last);
        let pages = self.allocate(needed).ok_or(TableUnmapError::NoMemory { pages: needed })?;
        let mut remover = Remover {
            format: self.format,
            shape: self.shape,
            spare: pages,
            retired: Vec::new(),
            unlinked: Vec::new(),
            stale: &mut self.pending,
            bytes: 0,
        };
        remover.remove(&mut self.root, top, start, last);
        let Remover { spare, mut retired, mut unlinked, bytes, .. } = remover;
        debug_assert!(spare.is_empty(), "pages were counted before");
        self.pages = self.pages + needed - retired.len();
        self.mapped_bytes -= bytes;
        self.retired.append(&mut retired);
        self.unlinked.append(&mut unlinked);
        Ok(bytes)
    }
}

/// How many tables it takes to split blocks.
fn splits(shape: &Shape, node: &Node, level: u32, start: u64, last: u64) -> usize {
    let of_piece = |piece: Piece| match node.child(piece.index) {
        Some(_) if piece.is_whole() => 0,
        Some(child) => splits(shape, child, level - 1, piece.start, piece.last),
        None if node.entry(piece.index) == 0 || piece.is_whole() => 0,
        None => split_cost(shape, level, piece.start, piece.last),
    };
    pieces(shape, level, start, last).map(of_piece).sum()
}

/// How many tables it takes to split one block of a level of which a part goes: at most two for each level below.
fn split_cost(shape: &Shape, level: u32, start: u64, last: u64) -> usize {
    let partly = pieces(shape, level - 1, start, last).filter(|piece| !piece.is_whole());
    1 + partly.map(|piece| split_cost(shape, level - 1, piece.start, piece.last)).sum::<usize>()
}

struct Remover<'a> {
    format: TableFormat,
    shape: Shape,
    spare: Vec<TablePage>,
    retired: Vec<TablePage>,
    unlinked: Vec<(u64, u32)>,
    stale: &'a mut StaleList,
    bytes: u64,
}

impl Remover<'_> {
    fn remove(&mut self, node: &mut Node, level: u32, start: u64, last: u64) {
        let shape = self.shape;
        for piece in pieces(&shape, level, start, last) {
            let entry = node.entry(piece.index);
            if entry == 0 {
                continue;
            }
            if let Some(child) = node.child_mut(piece.index) {
                self.remove(child, level - 1, piece.start, piece.last);
                if child.is_empty() {
                    self.retire(node, piece);
                }
            } else {
                self.bytes += piece.last - piece.start + 1;
                self.mark(piece, StaleEntries::LeafOnly);
                match piece.is_whole() {
                    true => drop(node.clear(piece.index)),
                    false => self.split(node, level, piece, entry),
                }
            }
        }
    }

    /// Takes an empty table out. Its page is walked until the invalidation is confirmed, all over the addresses that it
    /// translated, mapped or not.
    fn retire(&mut self, node: &mut Node, piece: Piece) {
        if let Some(empty) = node.clear(piece.index) {
            empty.into_pages(&mut self.retired);
        }
        self.mark(piece, StaleEntries::AllLevels);
    }

    /// Puts a table in a block's place that maps what remains. With break-before-make the device sees it only after the
    /// invalidation.
    fn split(&mut self, node: &mut Node, level: u32, piece: Piece, block: u64) {
        let child = self.rest_of(level, piece, block);
        let entry = self.format.table(child.page().phys().get());
        if self.format.breaks_before_make() {
            node.hide_child(piece.index, entry, child);
            self.unlinked.push((piece.entry_start, level - 1));
        } else {
            node.set_child(piece.index, entry, child);
        }
    }

    /// A table of what remains of a block.
    fn rest_of(&mut self, level: u32, gone: Piece, block: u64) -> Node {
        let below = level - 1;
        let phys = self.format.leaf_phys(block);
        let bits =
            self.format.leaf_bits(self.format.leaf_prot(block)).expect("a block has what a leaf can say");
        let mut table = Node::new(self.spare.pop().expect("pages were counted before"));
        let shape = self.shape;
        for piece in pieces(&shape, below, gone.entry_start, gone.entry_last) {
            let leaf = self.format.leaf(below, phys + (piece.start - gone.entry_start), bits);
            let (start, last) = (piece.start.max(gone.start), piece.last.min(gone.last));
            if start > last {
                table.set_leaf(piece.index, leaf);
            } else if (start, last) != (piece.start, piece.last) {
                let child = self.rest_of(below, Piece { start, last, ..piece }, leaf);
                let entry = self.format.table(child.page().phys().get());
                table.set_child(piece.index, entry, child);
            }
        }
        table
    }

    fn mark(&mut self, piece: Piece, entries: StaleEntries) {
        if let Some(stale) = piece.stale(entries) {
            self.stale.push(stale);
        }
    }
}
