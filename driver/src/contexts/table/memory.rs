//! Memory that a table lies in: where it comes from, and the writes to it. All unsafe code of the tables is here and in the
//! promises of those who call it.

use crate::addr::PhysAddr;
use crate::platform::{DmaMemory, Platform};
use crate::viommu::Viommu;
use core::sync::atomic::Ordering;

/// Where tables get their memory. [`Viommu`] gives its platform's.
///
/// # Safety
/// [`allocate`](Self::allocate) must return memory that is valid for reads and writes, zeroed, aligned as asked and
/// contiguous in physical space, at least as long as asked, and not used by anyone else until it is given back.
pub unsafe trait TableMemory {
    /// Allocates `len` bytes aligned to `align`, a power of two and at least 8, zeroed. `None` when there is none.
    fn allocate(&self, len: usize, align: usize) -> Option<DmaMemory>;

    /// Takes back what [`allocate`](Self::allocate) returned.
    ///
    /// # Safety
    /// `memory` came from `allocate` of the same memory with this `align`, nobody uses it, no device reaches it, and it
    /// is given back once.
    unsafe fn free(&self, memory: DmaMemory, align: usize);
}

// SAFETY: what `Platform::dma_alloc` promises is what is asked for here.
unsafe impl<P: Platform> TableMemory for Viommu<P> {
    fn allocate(&self, len: usize, align: usize) -> Option<DmaMemory> {
        self.shared.platform.dma_alloc(len, align)
    }

    unsafe fn free(&self, memory: DmaMemory, align: usize) {
        // SAFETY: the caller's promise is the same.
        unsafe { self.shared.platform.dma_free(memory, align) }
    }
}

/// Bytes of a word, and its alignment, which a `u64` has less of on some machines.
const WORD_LEN: usize = 8;

/// A table's memory: 64-bit words that the driver only writes.
///
/// # Invariants
/// The memory is valid for writes, aligned to 8 bytes, and has `words` words. Dropping it leaks it.
#[derive(Debug)]
pub(super) struct TablePage {
    memory: DmaMemory,
    align: usize,
    words: usize,
}

impl TablePage {
    /// `len` zero bytes, a power of two of them and at least 8, aligned to that. `None` where there are none, or where they
    /// are not aligned, which breaks the memory's promise: they are lost then.
    pub(super) fn allocate<M: TableMemory>(memory: &M, len: usize) -> Option<Self> {
        let align = len;
        let memory = memory.allocate(len, align)?;
        let aligned = memory.phys.get().is_multiple_of(align as u64)
            && memory.ptr.addr().get().is_multiple_of(WORD_LEN);
        // INVARIANT: the promise of `TableMemory`, and alignment as looked at.
        (aligned && memory.len >= len).then_some(Self { memory, align, words: len / WORD_LEN })
    }

    pub(super) fn phys(&self) -> PhysAddr {
        self.memory.phys
    }

    pub(super) fn words(&self) -> usize {
        self.words
    }

    /// Writes a word. Whatever was written before it is visible to a device that sees it.
    ///
    /// # Panics
    /// When there is no such word: indices come from the driver's own arithmetic.
    pub(super) fn write(&mut self, index: usize, value: u64) {
        assert!(index < self.words, "word {index} of a table of {}", self.words);
        // SAFETY: inside of the memory by the check above.
        let at = unsafe { self.memory.ptr.as_ptr().cast::<u64>().add(index) };
        #[cfg(target_has_atomic = "64")]
        {
            // SAFETY: valid, aligned by the invariant, and no reference covers it. Atomic, since the device may read, and
            // set its own bits, at any time.
            let word = unsafe { core::sync::atomic::AtomicU64::from_ptr(at) };
            word.store(value.to_le(), Ordering::Release);
        }
        #[cfg(not(target_has_atomic = "64"))]
        {
            use core::sync::atomic::AtomicU32;
            // SAFETY: as above, both halves.
            let halves = unsafe { [0, 1].map(|half| AtomicU32::from_ptr(at.cast::<u32>().add(half))) };
            // What makes an entry valid is in the lower half of every format: the device never sees a valid one of which a
            // half is another's. Where one takes a valid one's place, it faults in between.
            halves[0].store(0, Ordering::Release);
            halves[1].store(((value >> 32) as u32).to_le(), Ordering::Release);
            halves[0].store((value as u32).to_le(), Ordering::Release);
        }
    }

    /// Gives the memory back.
    ///
    /// # Safety
    /// `memory` is where it came from, and no device reaches it any more.
    pub(super) unsafe fn free<M: TableMemory>(self, memory: &M) {
        // SAFETY: from `allocate` with this alignment, given back once since `self` is gone; the rest is the caller's promise.
        unsafe { memory.free(self.memory, self.align) };
    }
}
