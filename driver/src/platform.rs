//! What the driver needs of the kernel around it: memory, a lock, a clock, and a way to wait.

use crate::addr::PhysAddr;
use crate::id::EndpointId;
use core::ptr::NonNull;

/// A piece of memory that devices can reach by its physical address.
///
/// Plain data: holding one proves nothing. Who owns the memory is said where one changes hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMemory {
    /// Where the memory starts for devices. Contiguous from there.
    pub phys: PhysAddr,
    /// Where it starts for this CPU.
    pub ptr: NonNull<u8>,
    /// Its length in bytes.
    pub len: usize,
}

// SAFETY: plain numbers; whoever dereferences the pointer answers for it.
unsafe impl Send for DmaMemory {}
// SAFETY: as above.
unsafe impl Sync for DmaMemory {}

/// The kernel, as the driver sees it. A value, not a set of statics, so that several IOMMUs can have several.
///
/// All methods may be called with the embedder's own locks held, and, where the embedder maps with interrupts
/// off, with interrupts off. None is called with the driver's lock held.
///
/// # Safety
/// [`dma_alloc`](Self::dma_alloc) must return memory that is valid for reads and writes, zeroed, aligned as
/// asked, contiguous in physical space, at least as long as asked, and not used by anyone else until it is given
/// back.
pub unsafe trait Platform: Send + Sync + 'static {
    /// The lock around the driver's state.
    type Lock: crate::lock::RawLock;

    /// Allocates `len` bytes for DMA, aligned to `align` (a power of two), zeroed. `None` when there is none.
    ///
    /// Called while starting, and when a buffer or a bounce pool is allocated; never by map or unmap.
    fn dma_alloc(&self, len: usize, align: usize) -> Option<DmaMemory>;

    /// Takes back what [`dma_alloc`](Self::dma_alloc) returned.
    ///
    /// # Safety
    /// `memory` came from `dma_alloc` of the same platform with this `align`, is not used by anyone any more,
    /// no device can reach it, and it is given back once.
    unsafe fn dma_free(&self, memory: DmaMemory, align: usize);

    /// A monotonic time in nanoseconds, or `None` where there is no clock: waits are then bounded by
    /// [`Options::max_polls`](crate::Options::max_polls).
    fn now_ns(&self) -> Option<u64> {
        None
    }

    /// Called before an endpoint is suspended for its faults: turns its bus mastering off, where that is known how.
    /// Blocked it is in any case, but its faults go on, and cost time.
    fn quiesce(&self, endpoint: EndpointId) {
        let _ = endpoint;
    }

    /// Called between two polls of a wait.
    fn relax(&self) {
        core::hint::spin_loop();
    }
}
