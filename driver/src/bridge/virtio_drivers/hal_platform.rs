//! A kernel's `Hal` as what the driver needs of a kernel.

use super::return_to;
use crate::addr::PhysAddr;
use crate::lock::RawLock;
use crate::platform::{DmaMemory, Platform};
use core::fmt;
use core::marker::PhantomData;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE};

/// A [`Platform`] of a kernel that has a `Hal` already: its memory, the lock `L`, and a clock if there is one.
///
/// `H` is the kernel's own `Hal`, without any IOMMU: the IOMMU's queues use physical addresses. Its pages are aligned to
/// 4 KiB, so that behind an IOMMU with a larger granule it has no memory for devices.
pub struct HalPlatform<H, L> {
    now_ns: Option<fn() -> u64>,
    parts: PhantomData<fn() -> (H, L)>,
}

impl<H, L> HalPlatform<H, L> {
    /// Without a clock: waits are bounded by [`Options::max_polls`](crate::Options::max_polls).
    #[expect(clippy::new_without_default, reason = "there is another way to make one, with a clock")]
    pub const fn new() -> Self {
        Self { now_ns: None, parts: PhantomData }
    }

    /// With a monotonic clock, in nanoseconds.
    pub const fn with_clock(now_ns: fn() -> u64) -> Self {
        Self { now_ns: Some(now_ns), parts: PhantomData }
    }
}

impl<H, L> fmt::Debug for HalPlatform<H, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HalPlatform").field("has_clock", &self.now_ns.is_some()).finish()
    }
}

// SAFETY: `Hal` promises memory that is valid, zeroed, aligned to its pages, contiguous, and nobody else's.
unsafe impl<H: Hal + 'static, L: RawLock + 'static> Platform for HalPlatform<H, L> {
    type Lock = L;

    fn dma_alloc(&self, len: usize, align: usize) -> Option<DmaMemory> {
        if align > PAGE_SIZE {
            return None;
        }
        let pages = len.div_ceil(PAGE_SIZE).max(1);
        let (phys, ptr) = H::dma_alloc(pages, BufferDirection::Both);
        // 0 is how `Hal` says that there is none.
        (phys != 0).then_some(DmaMemory { phys: PhysAddr::new(phys), ptr, len: pages * PAGE_SIZE })
    }

    unsafe fn dma_free(&self, memory: DmaMemory, _align: usize) {
        // SAFETY: the caller's promise: from `dma_alloc`, and nobody reaches it any more.
        unsafe { return_to::<H>(memory) };
    }

    fn now_ns(&self) -> Option<u64> {
        self.now_ns.map(|now_ns| now_ns())
    }
}
