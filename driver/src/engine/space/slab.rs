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
    chunks: Vec<Vec<Record>>,
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
        let mut slab =
            Self { chunks: Vec::with_capacity(MAX_CHUNKS), filling: 0, vacant: NIL, room: 0, capacity: 0 };
        // There is room for the first one.
        drop(slab.add(Vec::with_capacity(records.min(MAX_CHUNK))));
        slab
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
        let fits = self.chunks.len() < MAX_CHUNKS && chunk.capacity() >= 1;
        if !fits {
            return Some(chunk);
        }
        // Only what an index can say counts.
        let records = chunk.capacity().min(MAX_CHUNK);
        self.room += records;
        self.capacity += records;
        self.chunks.push(chunk);
        None
    }

    /// Puts a record into a place that is free. `None` where there is none. Allocates nothing.
    pub(super) fn put(&mut self, record: Record) -> Option<Index> {
        if self.room == 0 {
            return None;
        }
        self.room -= 1;
        let index = self.vacant;
        if index != NIL {
            let place = &mut self[index];
            let next = place.next;
            *place = record;
            self.vacant = next;
            return Some(index);
        }
        // Bounded by the number of chunks; there is room, so one of them has it.
        while self.chunks[self.filling].len() >= self.chunks[self.filling].capacity().min(MAX_CHUNK) {
            self.filling += 1;
        }
        let chunk = &mut self.chunks[self.filling];
        let index = (self.filling as Index) << OFFSET_BITS | chunk.len() as Index;
        chunk.push(record);
        Some(index)
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
    #[inline]
    pub(super) fn get(&self, index: Index) -> Option<&Record> {
        let (chunk, at) = place(index);
        self.chunks.get(chunk)?.get(at)
    }

    /// The record in a place that may be none.
    #[inline]
    pub(super) fn get_mut(&mut self, index: Index) -> Option<&mut Record> {
        let (chunk, at) = place(index);
        self.chunks.get_mut(chunk)?.get_mut(at)
    }
}

/// Of the chunk and the record in it.
#[inline]
fn place(index: Index) -> (usize, usize) {
    ((index >> OFFSET_BITS) as usize, index as usize & (MAX_CHUNK - 1))
}

impl core::ops::Index<Index> for Slab {
    type Output = Record;

    #[inline]
    fn index(&self, index: Index) -> &Record {
        let (chunk, at) = place(index);
        &self.chunks[chunk][at]
    }
}

impl core::ops::IndexMut<Index> for Slab {
    #[inline]
    fn index_mut(&mut self, index: Index) -> &mut Record {
        let (chunk, at) = place(index);
        &mut self.chunks[chunk][at]
    }
}
