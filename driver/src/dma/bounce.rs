//! Bounce pages: memory that an endpoint always reaches, for buffers that it must not.

use super::slots::Slots;
use crate::addr::Iova;
use core::ptr::{self, NonNull};

/// Pages of one endpoint, mapped once, handed out in runs of granules. Takes no lock.
///
/// # Invariants
/// The memory is valid for reads and writes as long as the pool exists and is not retired, and only whoever took a
/// chunk touches it.
pub(super) struct BouncePool {
    start: NonNull<u8>,
    iova: Iova,
    /// The granule, so that no two buffers share one.
    chunk: usize,
    slots: Slots,
}

// SAFETY: the memory belongs to the pool, and its chunks to whoever took them, on any thread.
unsafe impl Send for BouncePool {}
// SAFETY: as above; the only shared state is atomic.
unsafe impl Sync for BouncePool {}

impl BouncePool {
    /// Allocates.
    ///
    /// # Safety
    /// `len` bytes from `start`, whole granules, are valid for reads and writes, mapped at `iova`, and used by nobody
    /// but the pool and the endpoint while the pool exists and is not retired.
    pub(super) unsafe fn new(start: NonNull<u8>, len: usize, iova: Iova, granule: usize) -> Self {
        Self { start, iova, chunk: granule, slots: Slots::new(len / granule) }
    }

    fn chunks(&self, len: usize) -> usize {
        len.div_ceil(self.chunk).max(1)
    }

    /// Takes chunks for `len` bytes. Returns the number of the first.
    pub(super) fn take(&self, len: usize) -> Option<usize> {
        self.slots.take_run(self.chunks(len))
    }

    /// Gives chunks back that [`take`](Self::take) returned for `len` bytes.
    pub(super) fn give_back(&self, first: usize, len: usize) {
        match self.chunks(len) {
            1 => self.slots.give_back(first),
            count => self.slots.give_back_run(first, count),
        }
    }

    /// Takes all chunks for good, if none is out. Then nobody touches the memory any more.
    pub(super) fn retire(&self) -> bool {
        self.slots.retire()
    }

    /// The first chunk of an address that was handed out for `len` bytes, or `None` for one that was not.
    pub(super) fn chunk_of(&self, iova: Iova, len: usize) -> Option<usize> {
        let offset = usize::try_from(iova.get().checked_sub(self.iova.get())?).ok()?;
        let first = offset / self.chunk;
        let out = offset.is_multiple_of(self.chunk) && self.slots.are_out(first, self.chunks(len));
        out.then_some(first)
    }

    pub(super) fn iova(&self, first: usize) -> Iova {
        Iova::new(self.iova.get() + (first * self.chunk) as u64)
    }

    /// Where the chunks are for the driver.
    #[cfg(feature = "dma-api-0_10")]
    pub(super) fn ptr(&self, first: usize) -> NonNull<u8> {
        // SAFETY: inside of the pool, as each number of a chunk is.
        unsafe { self.start.add(first * self.chunk) }
    }

    fn at(&self, first: usize, len: usize) -> *mut u8 {
        assert!(len <= (self.slots.count() - first) * self.chunk, "outside of the bounce pool");
        // SAFETY: inside the pool by the check above.
        unsafe { self.start.as_ptr().add(first * self.chunk) }
    }

    /// Copies a buffer in.
    ///
    /// # Safety
    /// The caller took the chunks for this length, and the buffer is valid for reads.
    pub(super) unsafe fn copy_in(&self, first: usize, buffer: NonNull<[u8]>) {
        let to = self.at(first, buffer.len());
        // SAFETY: both are valid by the caller's promise and the pool's invariant, and a pool is nobody's buffer.
        unsafe { ptr::copy_nonoverlapping(buffer.cast::<u8>().as_ptr(), to, buffer.len()) };
    }

    /// Clears what an earlier user left, as far as `len` goes.
    pub(super) fn zero(&self, first: usize, len: usize) {
        let at = self.at(first, len);
        // SAFETY: inside the pool, in chunks that the caller took.
        unsafe { ptr::write_bytes(at, 0, len) };
    }

    /// Copies to a buffer.
    ///
    /// # Safety
    /// The caller took the chunks for this length, and the buffer is valid for writes.
    pub(super) unsafe fn copy_out(&self, first: usize, buffer: NonNull<[u8]>) {
        let from = self.at(first, buffer.len());
        // SAFETY: as in `copy_in`.
        unsafe { ptr::copy_nonoverlapping(from, buffer.cast::<u8>().as_ptr(), buffer.len()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_memory::TestMemory;

    const BASE: Iova = Iova::new(0x10_0000);

    fn pool(len: usize) -> BouncePool {
        // SAFETY: leaked memory, and nothing is behind the address.
        unsafe { BouncePool::new(TestMemory::leak(len).ptr, len, BASE, 0x1000) }
    }

    #[test]
    fn runs_are_handed_out_once() {
        let pool = pool(0x8000);
        assert_eq!(pool.take(0x1001), Some(0));
        assert_eq!(pool.take(0x6000), Some(2));
        assert_eq!(pool.take(1), None);
        pool.give_back(0, 0x1001);
        assert_eq!(pool.take(0x2000), Some(0));
        assert_eq!(pool.take(0x9000), None);
    }

    #[test]
    fn a_large_pool_is_handed_out_whole_or_by_granules() {
        let pool = pool(0x10_0000);
        assert_eq!(pool.take(0x10_0000), Some(0));
        assert_eq!(pool.take(1), None);
        pool.give_back(0, 0x10_0000);
        let taken = (0..).map_while(|_| pool.take(0x1000)).count();
        assert_eq!(taken, 0x100);
    }

    #[test]
    fn strange_addresses_are_nobodys() {
        let pool = pool(0x4000);
        let first = pool.take(0x1000).unwrap();
        assert_eq!(pool.chunk_of(pool.iova(first), 0x1000), Some(first));
        assert_eq!(pool.chunk_of(Iova::new(BASE.get() + 1), 0x1000), None);
        assert_eq!(pool.chunk_of(Iova::new(BASE.get() + 0x1000), 0x1000), None, "not taken");
        assert_eq!(pool.chunk_of(Iova::new(0), 0x1000), None);
        assert_eq!(pool.chunk_of(pool.iova(first), usize::MAX), None);
    }
}
