//! Where records lie: chunks of fixed capacity, so that nothing moves when more are added.

use crate::engine::mapping::{Holder, Record};
use alloc::vec::Vec;

/// Names a record's place: its chunk in the upper bits, its offset there in the lower ones.
pub(super) type Index = u32;

/// No record.
pub(super) const NIL: Index = Index::MAX;

const OFFSET_BITS: u32 = 26;

/// The most records in one chunk.
pub(super) const MAX_CHUNK: usize = 1 << OFFSET_BITS;

/// The most chunks. [`NIL`] is in none of them.
const MAX_CHUNKS: usize = 32;

pub(super) struct Slab {
    /// The first chunk: most domains have no other, so that it is found without a look at the list.
    first: Vec<Record>,
    /// The others.
    more: Vec<Vec<Record>>,
    /// The chunk that is being filled; those after it are empty.
    filling: usize,
    /// The last record that was given back, which names the next by its `next`.
    vacant: Index,
    /// Records that can be had.
    room: usize,
    capacity: usize,
}

impl Slab {
    /// Room for `records` records. Allocates.
    pub(super) fn new(records: usize) -> Self {
        let first = Vec::with_capacity(records.clamp(1, MAX_CHUNK));
        let capacity = first.capacity().min(MAX_CHUNK);
        let more = Vec::with_capacity(MAX_CHUNKS - 1);
        Self { first, more, filling: 0, vacant: NIL, room: capacity, capacity }
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many more records can be had.
    pub(super) fn room(&self) -> usize {
        self.room
    }

    /// Adds an empty chunk. It comes back where there are too many, to be dropped outside of the lock.
    pub(super) fn add(&mut self, chunk: Vec<Record>) -> Option<Vec<Record>> {
        let fits = self.more.len() < MAX_CHUNKS - 1 && chunk.capacity() >= 1;
        if !fits {
            return Some(chunk);
        }
        // Only what an index can say counts.
        let records = chunk.capacity().min(MAX_CHUNK);
        self.room += records;
        self.capacity += records;
        self.more.push(chunk);
        None
    }

    /// Puts a record into a place that is free. `None` where there is none. Allocates nothing.
    pub(super) fn put(&mut self, record: Record) -> Option<Index> {
        let index = self.vacant;
        if index == NIL {
            return self.put_new(record);
        }
        let place = &mut self[index];
        let next = place.next;
        *place = record;
        self.take_vacant(next, 1);
        Some(index)
    }

    /// The same for a place that was never in use.
    pub(super) fn put_new(&mut self, record: Record) -> Option<Index> {
        if self.room == 0 {
            return None;
        }
        self.room -= 1;
        // Bounded by the number of chunks; there is room, so one of them has it.
        loop {
            let filling = self.filling;
            let chunk = self.chunk(filling)?;
            if chunk.len() < chunk.capacity().min(MAX_CHUNK) {
                let index = (filling as Index) << OFFSET_BITS | chunk.len() as Index;
                chunk.push(record);
                return Some(index);
            }
            self.filling += 1;
        }
    }

    /// A place that was in use before, or [`NIL`]. The record there names another.
    pub(super) fn vacant(&self) -> Index {
        self.vacant
    }

    /// Takes so many of those, up to this one, which is the next then.
    pub(super) fn take_vacant(&mut self, next: Index, count: usize) {
        self.vacant = next;
        self.room -= count;
    }

    /// Gives the places of `count` records back, each of which names the next one. They stay as they are.
    pub(super) fn give_back_chain(&mut self, first: Index, last: Index, count: usize) {
        self[last].next = self.vacant;
        self.vacant = first;
        self.room += count;
    }

    fn chunk(&mut self, number: usize) -> Option<&mut Vec<Record>> {
        match number.checked_sub(1) {
            None => Some(&mut self.first),
            Some(number) => self.more.get_mut(number),
        }
    }

    /// Gives a record's place back.
    pub(super) fn give_back(&mut self, index: Index) {
        let vacant = self.vacant;
        let place = &mut self[index];
        place.holder = Holder::Nobody;
        place.next = vacant;
        self.vacant = index;
        self.room += 1;
    }

    /// The record in a place that may be none.
    #[inline(always)]
    pub(super) fn get(&self, index: Index) -> Option<&Record> {
        match self.first.get(index as usize) {
            Some(record) => Some(record),
            None => self.get_more(index),
        }
    }

    #[cold]
    fn get_more(&self, index: Index) -> Option<&Record> {
        let (chunk, at) = place(index)?;
        self.more.get(chunk)?.get(at)
    }

    /// The record in a place that may be none.
    #[inline(always)]
    pub(super) fn get_mut(&mut self, index: Index) -> Option<&mut Record> {
        if (index as usize) < self.first.len() {
            return self.first.get_mut(index as usize);
        }
        self.get_more_mut(index)
    }

    /// The same for whoever looks for one record alone: in a loop the call would cost more than it saves.
    #[inline(always)]
    pub(super) fn get_mut_alone(&mut self, index: Index) -> Option<&mut Record> {
        if (index as usize) < self.first.len() {
            return self.first.get_mut(index as usize);
        }
        self.get_more_mut_alone(index)
    }

    // Inlined it would share its end with the way above, which then took more steps.
    #[cold]
    #[inline(never)]
    fn get_more_mut_alone(&mut self, index: Index) -> Option<&mut Record> {
        self.get_more_mut(index)
    }

    #[cold]
    fn get_more_mut(&mut self, index: Index) -> Option<&mut Record> {
        let (chunk, at) = place(index)?;
        self.more.get_mut(chunk)?.get_mut(at)
    }
}

/// Of the chunk that is not the first, and the record in it.
#[inline]
fn place(index: Index) -> Option<(usize, usize)> {
    let chunk = (index >> OFFSET_BITS).checked_sub(1)?;
    Some((chunk as usize, index as usize & (MAX_CHUNK - 1)))
}

impl core::ops::Index<Index> for Slab {
    type Output = Record;

    #[inline(always)]
    fn index(&self, index: Index) -> &Record {
        match self.get(index) {
            Some(record) => record,
            None => nobody(index),
        }
    }
}

impl core::ops::IndexMut<Index> for Slab {
    #[inline(always)]
    fn index_mut(&mut self, index: Index) -> &mut Record {
        match self.get_mut(index) {
            Some(record) => record,
            None => nobody(index),
        }
    }
}

/// The driver's own indices name records.
#[cold]
fn nobody(index: Index) -> ! {
    panic!("no record has the index {index:#x}")
}
