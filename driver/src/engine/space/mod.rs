//! The addresses of a domain: which are free, and who has the others.
//!
//! ```text
//!             allocate, take           insert               remove, retain
//!   free -----------------------> taken -------> a mapping ----------------> free, or cached
//!     ^ '---- reserve: for good     | release                                   |
//!     '-----------------------------'---------- <- allocate: of the same size --'
//! ```
//! One structure for both, so that a range can never be free and mapped (I2). Records lie in a slab, which grows
//! by chunks; each is found by its handle at once, by its address through the tree of [`Order`], and by an address that
//! was used lately without it. Ranges that come back stay in a magazine for a while, so that mapping and unmapping the
//! same sizes changes no tree. Nothing here allocates but what says so, and no step depends on how many mappings there
//! are but by the height of the tree, except for what visits all.

mod free;
mod list;
mod magazine;
mod mapped;
mod order;
mod quick;
mod revive;
mod slab;
#[cfg(test)]
mod tests;
mod tree;

use super::mapping::{Holder, Record, Tally};
use crate::addr::{Iova, IovaRange};
use alloc::boxed::Box;
use alloc::vec::Vec;
pub(crate) use list::Parts;
use magazine::Magazines;
use order::Order;
use slab::{Index, MAX_CHUNK, NIL};

/// Places for addresses that were used lately, by their last bits.
const RECENT: usize = 256;

/// More ranges are in use than there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListFull;

/// Why a range cannot be reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReserveError {
    /// Part of it is in use.
    InUse,
    /// More ranges are in use than there is room for.
    ListFull,
}

/// How much a space has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    pub mappings: usize,
    /// Reserved regions.
    pub holes: usize,
    /// What else may be taken.
    pub others: usize,
}

impl Room {
    fn ranges(self) -> usize {
        self.mappings.saturating_add(self.holes + self.others)
    }
}

/// The addresses of a domain.
///
/// # Invariants
/// `others` counts what was taken and may come back by parts, and what is reserved. With the mappings it never passes the
/// capacity of `order`, so that each part finds a record: a free one, or one of a cached range.
pub(crate) struct Space {
    order: Order,
    magazines: Magazines,
    /// Where records lie, by their addresses' last bits: a hint.
    recent: Box<[Index; RECENT]>,
    usable: IovaRange,
    /// What is reserved for good.
    holes: Vec<IovaRange>,
    room: Room,
    others: usize,
    mappings: usize,
    /// How many mappings there may be, as long as `others` stays as it is.
    most: usize,
    tally: Tally,
    /// How often something happened to a part of a [list](list) by itself. No list is whole that was made before.
    touched: u32,
}

/// The whole space and its room for records.
impl Space {
    /// All of `usable`, which is made of whole granules, is free. Allocates.
    pub(crate) fn new(usable: IovaRange, granule: u64, room: Room) -> Self {
        // Never the last granule of the whole space.
        let last = usable.last().min(Iova::new(u64::MAX - granule));
        let usable = IovaRange::new(usable.start(), last).unwrap_or(usable);
        let order = Order::new(usable, granule, room.ranges());
        let most = order.capacity().saturating_sub(room.holes + room.others);
        let room = Room { mappings: room.mappings.min(most), ..room };
        Self {
            order,
            magazines: Magazines::new(),
            recent: Box::new([NIL; RECENT]),
            usable,
            holes: Vec::with_capacity(room.holes),
            room,
            others: 0,
            mappings: 0,
            most: room.mappings,
            tally: Tally::default(),
            touched: 1,
        }
    }

    /// How many mappings it has room for.
    pub(crate) fn capacity(&self) -> usize {
        self.room.mappings
    }

    pub(crate) fn is_full(&self) -> bool {
        self.mappings >= self.room.mappings
    }

    /// How many records have to be [added](Self::grow) for so many mappings. More than that where there are some
    /// already, so that growing step by step ends with few chunks.
    pub(crate) fn lacks(&self, mappings: usize) -> usize {
        let capacity = self.order.capacity();
        let room = Room { mappings, ..self.room };
        match room.ranges().saturating_sub(capacity) {
            0 => 0,
            missing => missing.max(capacity / 2).min(MAX_CHUNK),
        }
    }

    /// Makes room for so many mappings with more records, none where it [lacks](Self::lacks) none. They come back where
    /// they were not needed, to be dropped outside of the lock. As many as an index can name, a list of billions, is
    /// the most: then the capacity stays smaller.
    pub(crate) fn grow(&mut self, mappings: usize, spare: Vec<Record>) -> Option<Vec<Record>> {
        let unused = match self.lacks(mappings) {
            0 => Some(spare),
            _ => self.order.add_chunk(spare),
        };
        let most = self.order.capacity() - self.room.holes - self.room.others;
        self.room.mappings = self.room.mappings.max(mappings.min(most));
        self.set_others(self.others);
        unused
    }

    /// How many mappings there are.
    pub(crate) fn len(&self) -> usize {
        self.mappings
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.mappings == 0
    }

    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Whether a mapping is there that the device may have, or get, although no endpoint is known to be in the domain.
    pub(crate) fn is_in_doubt(&self) -> bool {
        self.tally.certain < self.mappings as u64
    }

    fn room_left(&self) -> usize {
        self.order.capacity() - self.others - self.mappings
    }

    fn set_others(&mut self, others: usize) {
        self.others = others;
        self.most = self.room.mappings.min(self.order.capacity() - others);
    }

    fn hint(&self, address: Iova) -> usize {
        self.order.page(address) as usize % RECENT
    }

    fn remember(&mut self, index: Index, start: Iova) {
        let hint = self.hint(start);
        self.recent[hint] = index;
    }

    /// The record that starts at this address.
    #[inline]
    fn find(&self, start: Iova) -> Option<Index> {
        let starts = |index: &Index| {
            let record = self.order.get(*index);
            record.is_some_and(|record| record.holder != Holder::Nobody && record.range.start() == start)
        };
        let recent = self.recent[self.hint(start)];
        // A part of a list may be none any more.
        if starts(&recent) && self.order[recent].holder != Holder::Part {
            return Some(recent);
        }
        self.order.at_or_below(start).filter(starts)
    }

    /// Sees to it that a record can be added, as the invariant promises.
    fn make_room(&mut self) {
        if !self.order.has_room() {
            self.magazines.free_any(&mut self.order);
        }
    }
}
