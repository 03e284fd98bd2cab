//! Bounce pages: memory that an endpoint always reaches, for buffers that it must not.

use crate::addr::Iova;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU64, Ordering};

/// Chunks that a pool has: one bit each.
const CHUNKS: usize = 64;

/// Pages of one endpoint, mapped once, handed out in runs of chunks. Takes no lock.
///
/// # Invariants
/// The memory is valid for reads and writes as long as the pool exists, and only whoever set a chunk's bit in
/// `used` touches the chunk.
pub(super) struct BouncePool {
    start: NonNull<u8>,
    iova: Iova,
    chunk: usize,
    chunks: usize,
    used: AtomicU64,
}

// SAFETY: the memory belongs to the pool, and its chunks to whoever took them, on any thread.
unsafe impl Send for BouncePool {}
// SAFETY: as above; the only shared state is atomic.
unsafe impl Sync for BouncePool {}

impl BouncePool {
    /// # Safety
    /// `len` bytes from `start` are valid for reads and writes, mapped at `iova`, and used by nobody but the
    /// pool and the endpoint while the pool exists.
    pub(super) unsafe fn new(start: NonNull<u8>, len: usize, iova: Iova, granule: usize) -> Self {
        let chunk = len.div_ceil(CHUNKS).next_multiple_of(granule);
        Self { start, iova, chunk, chunks: len / chunk, used: AtomicU64::new(0) }
    }

    /// Takes chunks for `len` bytes. Returns the number of the first.
    pub(super) fn take(&self, len: usize) -> Option<usize> {
        let count = len.div_ceil(self.chunk).max(1);
        if count > self.chunks {
            return None;
        }
        let mut used = self.used.load(Ordering::Relaxed);
        // Ends: a failed exchange means that another CPU made progress.
        loop {
            let first = (0..=self.chunks - count).find(|first| used & mask(*first, count) == 0)?;
            let taken = used | mask(first, count);
            match self.used.compare_exchange_weak(used, taken, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(first),
                Err(now) => used = now,
            }
        }
    }

    /// Gives chunks back that [`take`](Self::take) returned for `len` bytes.
    pub(super) fn give_back(&self, first: usize, len: usize) {
        let count = len.div_ceil(self.chunk).max(1);
        self.used.fetch_and(!mask(first, count), Ordering::Release);
    }

    /// Takes all chunks for good, if none is out. Then nobody touches the memory any more.
    pub(super) fn retire(&self) -> bool {
        self.used.compare_exchange(0, u64::MAX, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// The first chunk of an address that was handed out for `len` bytes, or `None` for one that was not.
    pub(super) fn chunk_of(&self, iova: Iova, len: usize) -> Option<usize> {
        let offset = usize::try_from(iova.get().checked_sub(self.iova.get())?).ok()?;
        let (first, count) = (offset / self.chunk, len.div_ceil(self.chunk).max(1));
        let inside = offset.is_multiple_of(self.chunk) && first < self.chunks && count <= self.chunks - first;
        let taken = inside && self.used.load(Ordering::Relaxed) & mask(first, count) == mask(first, count);
        taken.then_some(first)
    }

    pub(super) fn iova(&self, first: usize) -> Iova {
        Iova::new(self.iova.get() + (first * self.chunk) as u64)
    }

    fn at(&self, first: usize, len: usize) -> *mut u8 {
        assert!(len <= (self.chunks - first) * self.chunk, "outside of the bounce pool");
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

fn mask(first: usize, count: usize) -> u64 {
    let run = if count >= CHUNKS { u64::MAX } else { (1 << count) - 1 };
    run << first
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
        assert_eq!(pool.chunks, 8);
        assert_eq!(pool.take(0x1001), Some(0));
        assert_eq!(pool.take(0x6000), Some(2));
        assert_eq!(pool.take(1), None);
        pool.give_back(0, 0x1001);
        assert_eq!(pool.take(0x2000), Some(0));
        assert_eq!(pool.take(0x9000), None);
    }

    #[test]
    fn a_large_pool_has_large_chunks() {
        let pool = pool(0x10_0000);
        assert_eq!((pool.chunk, pool.chunks), (0x4000, 64));
        assert_eq!(pool.take(0x10_0000), Some(0));
        assert_eq!(pool.take(1), None);
        pool.give_back(0, 0x10_0000);
        assert_eq!(pool.used.load(Ordering::Relaxed), 0);
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
