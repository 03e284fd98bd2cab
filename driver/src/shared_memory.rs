//! Memory that driver and device both touch: the rings, request slots and event buffers.
//!
//! Every access is within the region's bounds: that is looked at each time, or once for all entries of the ring, and once
//! for each cell, when it is said where they lie. What the device wrote is read once, volatile, into the
//! driver's own memory and parsed there, since the device may change it at any time.

use crate::addr::PhysAddr;
use crate::platform::DmaMemory;
use crate::ring::{CELL_LEN, Layout};
use crate::sync::{AtomicU16, Ordering};
use core::ptr::{self, NonNull};

/// A region that the driver owns and the device reaches.
///
/// # Invariants
/// The memory is valid for reads and writes and aligned to 8 bytes for as long as this exists. What `places` points at
/// lies in it, aligned for its parts, so that accesses there need no check.
pub(crate) struct SharedMemory {
    memory: DmaMemory,
    places: Places,
}

/// The alignment that the accessors rely on.
const MIN_ALIGN: usize = 8;

/// Where a ring's parts lie.
///
/// # Invariants
/// All point into the memory that it was made for, which is valid as long as it is used, as [`SharedMemory::with_ring`] saw.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    avail: NonNull<u8>,
    used: NonNull<u8>,
    /// Where the device says after which available entry it wants a doorbell.
    avail_event: NonNull<u8>,
    /// The ring's size, less one.
    mask: usize,
}

/// A place for one request, with two descriptors of its own. It is used with the memory that it is a part of, and belongs to
/// whoever has that.
///
/// # Invariants
/// Both point into the memory that it is a part of, which is valid as long as it is used: at the start of [`CELL_LEN`] bytes,
/// aligned to 8, and at the length in the first descriptor.
#[derive(Debug)]
pub(crate) struct Cell {
    start: NonNull<u8>,
    descriptor_len: NonNull<u32>,
}

// SAFETY: the memory belongs to no thread, and who has a cell has the rest of it too.
unsafe impl Send for Cell {}

// SAFETY: the memory belongs to no thread, and this is its only owner.
unsafe impl Send for SharedMemory {}

impl SharedMemory {
    /// # Safety
    /// The memory is valid for reads and writes and used by no one but this and the device as long
    /// as this exists, or a cell of it.
    ///
    /// # Panics
    /// When the memory is not aligned to 8 bytes, which breaks the platform's promise.
    pub(crate) unsafe fn new(memory: DmaMemory) -> Self {
        assert!(memory.ptr.addr().get().is_multiple_of(MIN_ALIGN), "DMA memory is not aligned");
        assert!(memory.len >= CELL_LEN, "DMA memory is too short");
        // INVARIANT: the caller's promise, and the checks above: with all places at the start no access passes 64 bytes.
        let start = memory.ptr;
        Self { memory, places: Places { avail: start, used: start, avail_event: start, mask: 0 } }
    }

    /// Says where a ring lies, whose entries are then reached by any index, modulo its size.
    ///
    /// # Panics
    /// When it does not lie in the region.
    pub(crate) fn with_ring(mut self, size: u16, layout: &Layout) -> Self {
        // The last access to each part.
        let avail = self.at(layout.avail, 6 + 2 * usize::from(size), 2);
        let used = self.at(layout.used, 6 + 8 * usize::from(size), 4);
        assert!(size.is_power_of_two() && 16 * usize::from(size) <= layout.avail, "no ring");
        let avail_event = self.at(layout.used + 4 + 8 * usize::from(size), 2, 2);
        // INVARIANT: checked just now.
        self.places = Places { avail, used, avail_event, mask: usize::from(size - 1) };
        self
    }

    /// The cell at `offset`, whose first descriptor has this index.
    ///
    /// # Panics
    /// When either does not lie in the region.
    pub(crate) fn cell(&self, offset: usize, descriptor: u16) -> Cell {
        // INVARIANT: checked by `at`; the memory is valid by the promise to `new`.
        let start = self.at(offset, CELL_LEN, 8);
        Cell { start, descriptor_len: self.at(16 * usize::from(descriptor) + 8, 4, 4).cast() }
    }

    /// The whole region, to be given back when neither this nor the device uses it any more.
    pub(crate) fn region(&self) -> DmaMemory {
        self.memory
    }

    pub(crate) fn phys(&self, offset: usize) -> PhysAddr {
        PhysAddr::new(self.memory.phys.get() + offset as u64)
    }

    /// The address of `len` bytes at `offset`.
    ///
    /// # Panics
    /// When they do not lie in the region: offsets come from the driver's own layout, never from a device.
    #[inline]
    fn at(&self, offset: usize, len: usize, align: usize) -> NonNull<u8> {
        let inside = offset <= self.memory.len && len <= self.memory.len - offset;
        assert!(inside && offset.is_multiple_of(align), "offset outside of shared memory");
        // SAFETY: inside the region by the check above.
        unsafe { self.memory.ptr.add(offset) }
    }

    /// An address in one of the places.
    #[inline(always)]
    fn placed(&self, place: NonNull<u8>, offset: usize) -> *mut u8 {
        // SAFETY: the places lie in the region, and callers stay in theirs.
        unsafe { place.add(offset) }.as_ptr()
    }

    #[inline(always)]
    fn placed_u16(&self, place: NonNull<u8>, offset: usize) -> &AtomicU16 {
        // SAFETY: inside the region and aligned by the invariant; the device's accesses to it are atomic 16-bit ones.
        unsafe { AtomicU16::from_ptr(self.placed(place, offset).cast()) }
    }

    /// Where the ring's parts lie, for a loop over its entries: for all that the compiler knows, whatever is written could
    /// change what is kept here. It is used with this memory only.
    #[inline(always)]
    pub(crate) fn places(&self) -> Places {
        self.places
    }

    /// Writes an entry of the available ring, by any index.
    #[inline]
    pub(crate) fn set_avail_entry(&mut self, index: usize, head: u16) {
        self.set_avail_entry_at(self.places, index, head);
    }

    /// The same where the ring lies [there](Self::places).
    #[inline(always)]
    pub(crate) fn set_avail_entry_at(&mut self, places: Places, index: usize, head: u16) {
        debug_assert_eq!(places.avail, self.places.avail, "they are of another ring");
        let entry = index & places.mask;
        self.placed_u16(places.avail, 4 + 2 * entry).store(head.to_le(), Ordering::Relaxed);
    }

    /// Publishes the available index: everything written before is visible to a device that sees it.
    #[inline]
    pub(crate) fn publish_avail_index(&mut self, index: u16) {
        self.placed_u16(self.places.avail, 2).store(index.to_le(), Ordering::Release);
    }

    #[inline]
    pub(crate) fn set_used_event(&mut self, index: u16) {
        let at = 6 + 2 * self.places.mask;
        self.placed_u16(self.places.avail, at).store(index.to_le(), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn avail_event(&self) -> u16 {
        u16::from_le(self.placed_u16(self.places.avail_event, 0).load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn used_flags(&self) -> u16 {
        u16::from_le(self.placed_u16(self.places.used, 0).load(Ordering::Relaxed))
    }

    /// The used index. What the device wrote before it is visible after.
    #[inline]
    pub(crate) fn used_index(&self) -> u16 {
        u16::from_le(self.placed_u16(self.places.used, 2).load(Ordering::Acquire))
    }

    /// An entry of the used ring, by any index: id and length.
    #[inline]
    pub(crate) fn used_entry(&self, index: usize) -> (u32, u32) {
        self.used_entry_at(self.places, index)
    }

    /// The same of the last entry that the device has written; `None` where it is another.
    #[inline(always)]
    pub(crate) fn used_entry_if_last(&self, index: u16) -> Option<(u32, u32)> {
        // Read once, as `places` says, and no more before it is needed.
        let used = self.places.used;
        let next = u16::from_le(self.placed_u16(used, 2).load(Ordering::Acquire));
        (next == index.wrapping_add(1))
            .then(|| self.used_entry_at(Places { used, ..self.places }, index.into()))
    }

    /// An entry of the used ring, by any index, where the ring lies [there](Self::places).
    #[inline(always)]
    pub(crate) fn used_entry_at(&self, places: Places, index: usize) -> (u32, u32) {
        debug_assert_eq!(places.used, self.places.used, "they are of another ring");
        let entry = index & places.mask;
        let at = self.placed(places.used, 4 + 8 * entry).cast::<u32>();
        // SAFETY: inside the region and aligned by the invariant; volatile, since the device may write at any time.
        let (id, len) = unsafe { (at.read_volatile(), at.add(1).read_volatile()) };
        (u32::from_le(id), u32::from_le(len))
    }

    /// Writes words to the beginning of a cell, four bytes at `AT`, and to its first descriptor how many bytes of the words
    /// there are.
    #[inline(always)]
    pub(crate) fn fill_cell<const N: usize, const AT: usize>(
        &mut self,
        cell: &mut Cell,
        (words, len): (&[u64; N], u32),
        bytes: [u8; 4],
    ) {
        const { assert!(8 * N <= AT && AT + 4 <= CELL_LEN && AT.is_multiple_of(4), "outside of the cell") };
        // For all that the compiler knows, what is written could change them.
        let Cell { start, descriptor_len } = *cell;
        // SAFETY: inside the cell and aligned, by its invariant; no reference covers it.
        unsafe {
            start.cast::<[u64; N]>().write(*words);
            start.add(AT).cast::<[u8; 4]>().write(bytes);
        }
        // SAFETY: valid and aligned by the cell's invariant; no reference covers it.
        unsafe { descriptor_len.write_volatile(len.to_le()) };
    }

    /// Reads four bytes of a cell, at `AT`.
    #[inline(always)]
    pub(crate) fn read_cell<const AT: usize>(&self, cell: &Cell) -> [u8; 4] {
        const { assert!(AT + 4 <= CELL_LEN && AT.is_multiple_of(4), "outside of the cell") };
        // SAFETY: inside the cell and aligned, by its invariant; volatile, since the device may write at any time.
        unsafe { cell.start.add(AT).cast::<u32>().read_volatile() }.to_ne_bytes()
    }

    #[inline]
    fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        let address = self.at(offset, 2, 2).as_ptr().cast();
        // SAFETY: inside the region and aligned; the device's accesses to it are atomic 16-bit ones.
        unsafe { AtomicU16::from_ptr(address) }
    }

    /// Makes everything written before visible to a device that sees `value`.
    #[cfg(test)]
    #[inline]
    pub(crate) fn store_release_u16(&self, offset: usize, value: u16) {
        self.atomic_u16(offset).store(value, Ordering::Release);
    }

    #[cfg(test)]
    #[inline]
    pub(crate) fn read_u16(&self, offset: usize) -> u16 {
        self.atomic_u16(offset).load(Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn write_u16(&mut self, offset: usize, value: u16) {
        self.atomic_u16(offset).store(value, Ordering::Relaxed);
    }

    /// Copies driver bytes in. The device does not look at them before an index published after this.
    #[inline]
    pub(crate) fn write_bytes(&mut self, offset: usize, bytes: &[u8]) {
        let address = self.at(offset, bytes.len(), 1).as_ptr();
        // SAFETY: inside the region, which no reference covers.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), address, bytes.len()) };
    }

    /// Copies device bytes out, each read once.
    pub(crate) fn read_bytes(&self, offset: usize, bytes: &mut [u8]) {
        let address = self.at(offset, bytes.len(), 1).as_ptr();
        for (index, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: inside the region, since `index` is below `bytes.len()`.
            *byte = unsafe { address.add(index).read_volatile() };
        }
    }
}
