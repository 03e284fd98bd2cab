//! A guest's memory, by the addresses that the guest knows it by.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};

use spin::Mutex;
use virtio_iommu::{DmaMemory, PhysAddr, Platform, SpinNotInInterrupts};
use virtio_iommu_model::{GuestMemory, OutOfMemoryRange};

use crate::memory::dma::DmaPages;
use crate::memory::frames::{FRAME_BYTES, OutOfFrames};
use crate::time;

/// A guest: pages that it allocates from, as a kernel does. Clones are handles to the same one.
///
/// It is the [`Platform`] of the guest's driver and the [`GuestMemory`] of the guest's devices. Both speak of addresses that
/// begin at [`base`](Self::base), and neither gets beyond the pages.
#[derive(Clone, Debug)]
pub struct Guest(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    base: u64,
    pages: DmaPages,
    /// Whether each page is taken.
    taken: Mutex<Vec<bool>>,
}

/// The guest has no pages that are free and in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory {
    /// How many it should have had.
    pub pages: usize,
}

impl fmt::Display for NoMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest has no {} free pages in a row", self.pages)
    }
}

impl core::error::Error for NoMemory {}

impl Guest {
    /// A guest with `count` pages, of which the first is at `base`, a multiple of `align` pages, to it.
    ///
    /// # Errors
    ///
    /// [`OutOfFrames`].
    pub fn new(base: u64, count: usize, align: usize) -> Result<Self, OutOfFrames> {
        let pages = DmaPages::allocate_aligned(count, align)?;
        Ok(Self::with(base, pages))
    }

    /// A guest that knows its pages, `count` of them, by the machine's own addresses: for a device that the machine has.
    ///
    /// # Errors
    ///
    /// [`OutOfFrames`].
    pub fn at_home(count: usize) -> Result<Self, OutOfFrames> {
        let pages = DmaPages::allocate(count)?;
        Ok(Self::with(pages.phys(), pages))
    }

    fn with(base: u64, pages: DmaPages) -> Self {
        let taken = Mutex::new(vec![false; pages.frame_count()]);
        Self(Arc::new(Inner { base, pages, taken }))
    }

    /// Its first address.
    pub fn base(&self) -> u64 {
        self.0.base
    }

    /// Where that is in the machine's memory.
    pub fn phys(&self) -> u64 {
        self.0.pages.phys()
    }

    /// The number of bytes.
    pub fn len_bytes(&self) -> u64 {
        self.0.pages.len_bytes() as u64
    }

    /// How many pages are taken.
    pub fn pages_taken(&self) -> usize {
        self.0.taken.lock().iter().filter(|taken| **taken).count()
    }

    /// Takes zeroed pages, at a multiple of `align` pages, for good or until [`free`](Self::free).
    ///
    /// # Errors
    ///
    /// [`NoMemory`].
    pub fn allocate(&self, count: usize, align: usize) -> Result<u64, NoMemory> {
        let refused = Err(NoMemory { pages: count });
        let mut taken = self.0.taken.lock();
        // To the guest's own alignment.
        let first_page = self.0.base / FRAME_BYTES;
        let aligned = |at: &usize| (first_page + *at as u64).is_multiple_of(align.max(1) as u64);
        let mut places = (0..taken.len().saturating_sub(count.saturating_sub(1))).filter(aligned);
        let Some(at) = places.find(|at| taken[*at..*at + count].iter().all(|taken| !taken)) else {
            return refused;
        };
        taken[at..at + count].fill(true);
        drop(taken);
        let address = self.0.base + at as u64 * FRAME_BYTES;
        self.fill(address, count * FRAME_BYTES as usize, 0);
        Ok(address)
    }

    /// Gives pages back that [`allocate`](Self::allocate) gave. What is not the guest's is passed over.
    pub fn free(&self, address: u64, count: usize) {
        let Some(at) = address.checked_sub(self.0.base).map(|offset| (offset / FRAME_BYTES) as usize) else {
            return;
        };
        let mut taken = self.0.taken.lock();
        let len = taken.len();
        taken[at.min(len)..at.saturating_add(count).min(len)].fill(false);
    }

    /// Sets bytes. What is not the guest's is passed over.
    pub fn fill(&self, address: u64, len: usize, byte: u8) {
        let Ok(pointer) = self.pointer(address, len) else { return };
        // SAFETY: `pointer` found the range inside the guest's pages, which are mapped and of which there are no references.
        unsafe { pointer.as_ptr().write_bytes(byte, len) };
        fence(Ordering::Release);
    }

    /// Whether bytes of the guest's all have a value.
    pub fn all_bytes_are(&self, address: u64, len: usize, byte: u8) -> bool {
        let mut bytes = vec![0; len];
        self.read(address, &mut bytes).is_ok() && bytes.iter().all(|other| *other == byte)
    }

    /// The pointer to a range that is inside the pages.
    fn pointer(&self, address: u64, len: usize) -> Result<NonNull<u8>, OutOfMemoryRange> {
        let error = OutOfMemoryRange { addr: address, len_bytes: len as u64 };
        let offset = address.checked_sub(self.0.base).ok_or(error)?;
        let offset = usize::try_from(offset).map_err(|_| error)?;
        offset.checked_add(len).filter(|end| *end <= self.0.pages.len_bytes()).ok_or(error)?;
        // SAFETY: inside the pages, by the line above.
        Ok(unsafe { self.0.pages.as_ptr().add(offset) })
    }
}

impl GuestMemory for Guest {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), OutOfMemoryRange> {
        let pointer = self.pointer(addr, buf.len())?;
        fence(Ordering::Acquire);
        for (index, byte) in buf.iter_mut().enumerate() {
            // SAFETY: `pointer` found the range inside the guest's pages, which are mapped. Volatile, since drivers and
            // devices write there.
            *byte = unsafe { pointer.as_ptr().add(index).read_volatile() };
        }
        Ok(())
    }

    fn write(&mut self, addr: u64, data: &[u8]) -> Result<(), OutOfMemoryRange> {
        let pointer = self.pointer(addr, data.len())?;
        for (index, byte) in data.iter().enumerate() {
            // SAFETY: as for `read`; what is there is the guest's, which expects its devices to write where it told them to.
            unsafe { pointer.as_ptr().add(index).write_volatile(*byte) };
        }
        fence(Ordering::Release);
        Ok(())
    }
}

// SAFETY: `allocate` gives zeroed, mapped, contiguous pages to one owner at a time, whose handle keeps the pages.
unsafe impl Platform for Guest {
    type Lock = SpinNotInInterrupts;

    fn dma_alloc(&self, len: usize, align: usize) -> Option<DmaMemory> {
        let frame = FRAME_BYTES as usize;
        let count = len.div_ceil(frame);
        let address = self.allocate(count, align.div_ceil(frame)).ok()?;
        let ptr = self.pointer(address, count * frame).ok()?;
        Some(DmaMemory { phys: PhysAddr::new(address), ptr, len: count * frame })
    }

    unsafe fn dma_free(&self, memory: DmaMemory, _align: usize) {
        self.free(memory.phys.get(), memory.len / FRAME_BYTES as usize);
    }

    fn now_ns(&self) -> Option<u64> {
        time::now_ns()
    }
}
