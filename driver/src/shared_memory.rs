//! Memory that driver and device both touch: the rings, request slots and event buffers.
//!
//! Every access is checked against the region's bounds. What the device wrote is read once, volatile, into the
//! driver's own memory and parsed there, since the device may change it at any time.

use crate::addr::PhysAddr;
use crate::platform::DmaMemory;
use crate::sync::{AtomicU16, Ordering};
use core::ptr;

/// A region that the driver owns and the device reaches.
///
/// # Invariants
/// The memory is valid for reads and writes and aligned to 8 bytes for as long as this exists.
pub(crate) struct SharedMemory {
    memory: DmaMemory,
}

/// The alignment that the accessors rely on.
const MIN_ALIGN: usize = 8;

impl SharedMemory {
    /// # Safety
    /// The memory is valid for reads and writes and used by no one but this and the device as long
    /// as this exists.
    ///
    /// # Panics
    /// When the memory is not aligned to 8 bytes, which breaks the platform's promise.
    pub(crate) unsafe fn new(memory: DmaMemory) -> Self {
        assert!(memory.ptr.addr().get().is_multiple_of(MIN_ALIGN), "DMA memory is not aligned");
        // INVARIANT: the caller's promise, and the check above.
        Self { memory }
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
    fn at(&self, offset: usize, len: usize, align: usize) -> *mut u8 {
        let inside = offset <= self.memory.len && len <= self.memory.len - offset;
        assert!(inside && offset.is_multiple_of(align), "offset outside of shared memory");
        // SAFETY: inside the region by the check above.
        unsafe { self.memory.ptr.as_ptr().add(offset) }
    }

    #[inline]
    fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        let address = self.at(offset, 2, 2).cast();
        // SAFETY: inside the region and aligned; the device's accesses to it are atomic 16-bit ones.
        unsafe { AtomicU16::from_ptr(address) }
    }

    /// Makes everything written before visible to a device that sees `value`.
    #[inline]
    pub(crate) fn store_release_u16(&self, offset: usize, value: u16) {
        self.atomic_u16(offset).store(value, Ordering::Release);
    }

    /// What the device wrote before it wrote the value read here is visible after.
    #[inline]
    pub(crate) fn load_acquire_u16(&self, offset: usize) -> u16 {
        self.atomic_u16(offset).load(Ordering::Acquire)
    }

    #[inline]
    pub(crate) fn read_u16(&self, offset: usize) -> u16 {
        self.atomic_u16(offset).load(Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn write_u16(&mut self, offset: usize, value: u16) {
        self.atomic_u16(offset).store(value, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn read_u32(&self, offset: usize) -> u32 {
        let address = self.at(offset, 4, 4).cast::<u32>();
        // SAFETY: inside the region and aligned; volatile, since the device may write at any time.
        u32::from_le(unsafe { address.read_volatile() })
    }

    /// Copies driver bytes in. The device does not look at them before an index published after this.
    #[inline]
    pub(crate) fn write_bytes(&mut self, offset: usize, bytes: &[u8]) {
        let address = self.at(offset, bytes.len(), 1);
        // SAFETY: inside the region, which no reference covers.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), address, bytes.len()) };
    }

    /// Copies device bytes out, each read once.
    pub(crate) fn read_bytes(&self, offset: usize, bytes: &mut [u8]) {
        let address = self.at(offset, bytes.len(), 1);
        for (index, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: inside the region, since `index` is below `bytes.len()`.
            *byte = unsafe { address.add(index).read_volatile() };
        }
    }
}
