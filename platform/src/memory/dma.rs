//! Memory that devices reach: whole frames with an owner.
//!
//! A [`DmaPages`] gives its frames back when it is dropped. It knows nothing of any IOMMU: whoever lets a device reach
//! the memory has to keep it until the device no longer can.

use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};

use virtio_iommu::{DmaMemory, HeldMemory, PhysAddr};

use super::frames::{self, FRAME_BYTES, OutOfFrames};
use super::phys_to_virt;
use crate::range::PhysRange;

/// Physically contiguous, zeroed frames.
#[derive(Debug)]
pub struct DmaPages {
    phys: u64,
    count: usize,
}

impl DmaPages {
    /// Allocates `count` frames.
    ///
    /// # Errors
    ///
    /// [`OutOfFrames`].
    pub fn allocate(count: usize) -> Result<Self, OutOfFrames> {
        Self::allocate_aligned(count, 1)
    }

    /// Allocates `count` frames at a multiple of `align` frames.
    ///
    /// # Errors
    ///
    /// [`OutOfFrames`].
    pub fn allocate_aligned(count: usize, align: usize) -> Result<Self, OutOfFrames> {
        Ok(Self { phys: frames::allocate(count, align)?, count })
    }

    /// The physical address of the first byte.
    pub const fn phys(&self) -> u64 {
        self.phys
    }

    /// The number of frames.
    pub const fn frame_count(&self) -> usize {
        self.count
    }

    /// The number of bytes.
    pub const fn len_bytes(&self) -> usize {
        self.count * FRAME_BYTES as usize
    }

    /// The physical addresses.
    pub fn range(&self) -> PhysRange {
        PhysRange::from_len(self.phys, self.len_bytes() as u64)
            .unwrap_or_else(|| unreachable!("a run is not empty"))
    }

    /// A pointer to the first byte. Devices may write behind it, so make no reference of it that outlives a moment in
    /// which they cannot.
    pub fn as_ptr(&self) -> NonNull<u8> {
        NonNull::new(phys_to_virt(self.phys)).unwrap_or_else(|| unreachable!("no frame is at address 0"))
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Panics
    ///
    /// When that is not inside the pages.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        // SAFETY: `check` found the destination inside the frames, which are ours and mapped; `bytes` is elsewhere, since
        // nothing gives out slices of the frames.
        unsafe { self.as_ptr().as_ptr().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        // The device is told of the buffer only after its content is there.
        fence(Ordering::Release);
    }

    /// Copies from `offset` to `bytes`.
    ///
    /// # Panics
    ///
    /// When that is not inside the pages.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.check(offset, bytes.len());
        fence(Ordering::Acquire);
        let source = self.as_ptr();
        for (index, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: `check` found the source inside the frames, which are ours and mapped. Volatile, since a device
            // may have written there.
            *byte = unsafe { source.as_ptr().add(offset + index).read_volatile() };
        }
    }

    /// Sets every byte.
    pub fn fill(&mut self, byte: u8) {
        // SAFETY: the frames are ours and mapped.
        unsafe { self.as_ptr().as_ptr().write_bytes(byte, self.len_bytes()) };
        fence(Ordering::Release);
    }

    /// Whether every byte has a value.
    pub fn all_bytes_are(&self, byte: u8) -> bool {
        let source = self.as_ptr();
        fence(Ordering::Acquire);
        // SAFETY: inside the frames, which are ours and mapped. Volatile, since a device may have written there.
        (0..self.len_bytes()).all(|index| unsafe { source.as_ptr().add(index).read_volatile() } == byte)
    }

    /// Gives up the ownership, and gives the physical address, which [`frames::free`] takes back.
    pub fn into_raw(self) -> u64 {
        let phys = self.phys;
        core::mem::forget(self);
        phys
    }

    /// Lends the frames to the IOMMU's driver, which frees them when no device reaches them any more.
    pub fn into_held(self) -> HeldMemory {
        let memory = DmaMemory { phys: PhysAddr::new(self.phys), ptr: self.as_ptr(), len: self.len_bytes() };
        self.into_raw();
        // SAFETY: the frames are ours alone, and `free_held` gives them back once.
        unsafe { HeldMemory::new(memory, free_held) }
    }

    fn check(&self, offset: usize, len_bytes: usize) {
        let inside = offset.checked_add(len_bytes).is_some_and(|end| end <= self.len_bytes());
        assert!(
            inside,
            "{len_bytes:#x} bytes at offset {offset:#x} of {:#x} bytes of DMA memory",
            self.len_bytes()
        );
    }
}

/// Frees frames that were lent.
///
/// # Safety
///
/// The memory came from [`DmaPages::into_held`], and this is called once with it.
unsafe fn free_held(memory: DmaMemory) {
    // SAFETY: the caller's promise; no device reaches it any more.
    if let Err(error) = unsafe { frames::free(memory.phys.get()) } {
        log::error!("{error}");
    }
}

impl Drop for DmaPages {
    fn drop(&mut self) {
        // SAFETY: the frames are ours, and the owner of a device's permission keeps the pages as long as it lasts.
        if let Err(error) = unsafe { frames::free(self.phys) } {
            // Somebody freed them by address: a bug of ours, which must not pass unseen.
            log::error!("{error}");
        }
    }
}
