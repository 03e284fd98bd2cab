//! Shared memory for `loom`, in place of `shared_memory.rs`: the same accesses, to cells that are tracked.
//!
//! Notification fields and indices are atomics, which may be read stale. All else is plain, ring entries too: an
//! access that no index orders is a data race, and ends the test. Nothing is ever accessed by its address.

use crate::addr::PhysAddr;
use crate::platform::DmaMemory;
use crate::ring::Layout;
use crate::sync::{AtomicU16, Ordering};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use loom::cell::UnsafeCell;

/// What the driver owns of the cells, which it shares with a device on another thread.
pub(crate) struct SharedMemory {
    memory: DmaMemory,
    cells: Arc<Cells>,
    places: Places,
}

/// As in `shared_memory.rs`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Places {
    avail: usize,
    used: usize,
    mask: u16,
}

/// As in `shared_memory.rs`: offsets, in place of addresses.
#[derive(Debug)]
pub(crate) struct Cell {
    offset: usize,
    descriptor_len: usize,
}

/// Memory, cell by cell.
pub(crate) struct Cells {
    /// Each with its offset, ascending and without gaps.
    cells: Vec<(usize, Tracked)>,
    len: usize,
}

enum Tracked {
    Atomic(AtomicU16),
    Plain(UnsafeCell<Box<[u8]>>),
}

// SAFETY: loom runs one thread at a time, and ends the test when accesses to a plain cell race.
unsafe impl Send for Cells {}
// SAFETY: as above.
unsafe impl Sync for Cells {}

/// Bytes of a cell behind the ring: no request shares one with its answer.
const PLAIN_LEN: usize = 8;

impl SharedMemory {
    /// # Safety
    /// None here; the caller's promise is for memory that is accessed by its address.
    pub(crate) unsafe fn new(memory: DmaMemory) -> Self {
        Self { memory, cells: Arc::new(Cells::new(memory.len, &[])), places: Places::default() }
    }

    /// The same memory, with a ring of `size` entries at its start.
    pub(crate) fn with_ring(self, size: u16, layout: &Layout) -> Self {
        let (mask, size) = (size - 1, usize::from(size));
        let Layout { avail, used, len } = *layout;
        // Flags, index, entries, event; and where each part of the ring begins and ends.
        let (used_event, avail_event) = (avail + 4 + 2 * size, used + 4 + 8 * size);
        let mut edges: Vec<(usize, bool)> = (0..size).map(|index| (16 * index, false)).collect();
        edges.extend([(avail, true), (avail + 2, true)]);
        edges.extend((0..size).map(|entry| (avail + 4 + 2 * entry, false)));
        edges.push((used_event, true));
        edges.extend((used_event + 2 < used).then_some((used_event + 2, false)));
        edges.extend([(used, true), (used + 2, true)]);
        edges.extend((0..size).map(|entry| (used + 4 + 8 * entry, false)));
        edges.push((avail_event, true));
        edges.extend((avail_event + 2 < len).then_some((avail_event + 2, false)));
        edges.extend((len..self.memory.len).step_by(PLAIN_LEN).map(|offset| (offset, false)));
        let cells = Arc::new(Cells::new(self.memory.len, &edges));
        Self { cells, places: Places { avail, used, mask }, ..self }
    }

    /// The cell at `offset`, whose first descriptor has this index.
    pub(crate) fn cell(&self, offset: usize, descriptor: u16) -> Cell {
        Cell { offset, descriptor_len: 16 * usize::from(descriptor) + 8 }
    }

    pub(crate) fn places(&self) -> Places {
        self.places
    }

    pub(crate) fn set_avail_entry(&mut self, index: usize, head: u16) {
        self.set_avail_entry_at(self.places, index, head);
    }

    pub(crate) fn set_avail_entry_at(&mut self, places: Places, index: usize, head: u16) {
        let entry = index & usize::from(places.mask);
        self.cells.store(places.avail + 4 + 2 * entry, head, Ordering::Relaxed);
    }

    pub(crate) fn publish_avail_index(&mut self, index: u16) {
        self.cells.store(self.places.avail + 2, index, Ordering::Release);
    }

    pub(crate) fn set_used_event(&mut self, index: u16) {
        let at = self.places.avail + 6 + 2 * usize::from(self.places.mask);
        self.cells.store(at, index, Ordering::Relaxed);
    }

    pub(crate) fn avail_event(&self) -> u16 {
        self.cells.load(self.places.used + 12 + 8 * usize::from(self.places.mask), Ordering::Relaxed)
    }

    pub(crate) fn used_flags(&self) -> u16 {
        self.cells.load(self.places.used, Ordering::Relaxed)
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.cells.load(self.places.used + 2, Ordering::Acquire)
    }

    pub(crate) fn used_entry(&self, index: usize) -> (u32, u32) {
        self.used_entry_at(self.places, index)
    }

    pub(crate) fn used_entry_at(&self, places: Places, index: usize) -> (u32, u32) {
        let at = places.used + 4 + 8 * (index & usize::from(places.mask));
        (self.read_u32(at), self.read_u32(at + 4))
    }

    pub(crate) fn used_entry_if_last(&self, index: u16) -> Option<(u32, u32)> {
        (self.used_index() == index.wrapping_add(1)).then(|| self.used_entry(index.into()))
    }

    pub(crate) fn fill_cell<const N: usize, const AT: usize>(
        &mut self,
        cell: &mut Cell,
        (words, len): (&[u64; N], u32),
        bytes: [u8; 4],
    ) {
        for (number, word) in words.iter().enumerate() {
            self.cells.write(cell.offset + 8 * number, &word.to_ne_bytes());
        }
        self.cells.write(cell.offset + AT, &bytes);
        self.cells.write(cell.descriptor_len, &len.to_le_bytes());
    }

    pub(crate) fn read_cell<const AT: usize>(&self, cell: &Cell) -> [u8; 4] {
        let mut bytes = [0; 4];
        self.cells.read(cell.offset + AT, &mut bytes);
        bytes
    }

    /// The device's side of it.
    #[cfg(test)]
    pub(crate) fn share(&self) -> Arc<Cells> {
        Arc::clone(&self.cells)
    }

    pub(crate) fn region(&self) -> DmaMemory {
        self.memory
    }

    pub(crate) fn phys(&self, offset: usize) -> PhysAddr {
        PhysAddr::new(self.memory.phys.get() + offset as u64)
    }

    #[cfg(test)]
    pub(crate) fn store_release_u16(&self, offset: usize, value: u16) {
        self.cells.store(offset, value, Ordering::Release);
    }

    #[cfg(test)]
    pub(crate) fn read_u16(&self, offset: usize) -> u16 {
        self.cells.load(offset, Ordering::Relaxed)
    }

    pub(crate) fn write_u16(&mut self, offset: usize, value: u16) {
        self.cells.store(offset, value, Ordering::Relaxed);
    }

    fn read_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.cells.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn write_bytes(&mut self, offset: usize, bytes: &[u8]) {
        self.cells.write(offset, bytes);
    }

    pub(crate) fn read_bytes(&self, offset: usize, bytes: &mut [u8]) {
        self.cells.read(offset, bytes);
    }
}

impl Cells {
    /// Zeroed cells that begin at `edges`, atomic where it says so; one plain cell without any.
    fn new(len: usize, edges: &[(usize, bool)]) -> Self {
        let edges = if edges.is_empty() { &[(0, false)] } else { edges };
        let ends = edges.iter().skip(1).map(|(offset, _)| *offset).chain([len]);
        let cell = |(&(offset, atomic), end): (&(usize, bool), usize)| {
            let cell = match atomic {
                true => Tracked::Atomic(AtomicU16::new(0)),
                false => Tracked::Plain(UnsafeCell::new(vec![0; end - offset].into_boxed_slice())),
            };
            (offset, cell)
        };
        Self { cells: edges.iter().zip(ends).map(cell).collect(), len }
    }

    /// The 16 bits at `offset`, which a ring entry holds in plain memory.
    pub(crate) fn load(&self, offset: usize, order: Ordering) -> u16 {
        match self.at(offset) {
            Some(Tracked::Atomic(cell)) => cell.load(order),
            _ => {
                let mut bytes = [0; 2];
                self.read(offset, &mut bytes);
                u16::from_le_bytes(bytes)
            }
        }
    }

    /// The same for a store.
    pub(crate) fn store(&self, offset: usize, value: u16, order: Ordering) {
        match self.at(offset) {
            Some(Tracked::Atomic(cell)) => cell.store(value, order),
            _ => self.write(offset, &value.to_le_bytes()),
        }
    }

    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) {
        let len = into.len();
        self.each(offset, len, |cell, from, at, len| {
            // SAFETY: loom sees to it that no one writes meanwhile.
            cell.with(|bytes| into[at..at + len].copy_from_slice(unsafe { &(&*bytes)[from..from + len] }));
        });
    }

    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        self.each(offset, bytes.len(), |cell, from, at, len| {
            cell.with_mut(|cell| {
                // SAFETY: loom sees to it that no one reads or writes meanwhile.
                let cell = unsafe { &mut (&mut *cell)[from..from + len] };
                cell.copy_from_slice(&bytes[at..at + len]);
            });
        });
    }

    fn at(&self, offset: usize) -> Option<&Tracked> {
        let index = self.cells.binary_search_by_key(&offset, |(start, _)| *start).ok()?;
        Some(&self.cells[index].1)
    }

    /// Each plain cell that `len` bytes at `offset` lie in, with the part's place in the cell, in the bytes, and its
    /// length.
    fn each(
        &self,
        offset: usize,
        len: usize,
        mut access: impl FnMut(&UnsafeCell<Box<[u8]>>, usize, usize, usize),
    ) {
        assert!(offset <= self.len && len <= self.len - offset, "offset outside of shared memory");
        let mut index = self.cells.partition_point(|(start, _)| *start <= offset) - 1;
        let mut at = 0;
        while at < len {
            let (start, cell) = &self.cells[index];
            let end = self.cells.get(index + 1).map_or(self.len, |(next, _)| *next);
            let part = (len - at).min(end - (offset + at));
            match cell {
                Tracked::Plain(cell) => access(cell, offset + at - start, at, part),
                Tracked::Atomic(_) => panic!("bytes at {offset:#x} reach over an index"),
            }
            (index, at) = (index + 1, at + part);
        }
    }
}
