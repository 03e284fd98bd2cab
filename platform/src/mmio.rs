//! Device registers in memory: single accesses of a fixed width inside one mapped region.
//!
//! `safe-mmio` makes each access one plain load or store. A volatile access of the compiler's may also move the pointer on
//! aarch64, and a hypervisor cannot emulate a device behind that.
//!
//! The region is made once, by whoever mapped it; the accessors check the offset against it, so that a wrong one is our
//! own bug and panics, and never reaches another device.

use core::ptr::NonNull;

use safe_mmio::UniqueMmioPointer;
use safe_mmio::fields::ReadWrite;

/// A mapped region of device registers.
#[derive(Clone, Copy, Debug)]
pub struct Mmio {
    base: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: the region is device memory that no Rust reference points to; each access is a single volatile load or store,
// so accesses from several CPUs interleave as a whole.
unsafe impl Send for Mmio {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mmio {}

macro_rules! accessors {
    ($read:ident, $write:ident, $type:ty, $doc:literal) => {
        #[doc = concat!("Reads the ", $doc, " at `offset`.\n\n# Panics\n\nWhen `offset` is unaligned or outside the region.")]
        pub fn $read(&self, offset: usize) -> $type {
            let pointer = self.pointer::<ReadWrite<$type>>(offset);
            // SAFETY: `pointer` checked alignment and bounds; `new`'s caller promised that the region is mapped device
            // memory. It is "unique" for one access, which is single, so that those of other CPUs come before or after.
            unsafe { UniqueMmioPointer::new(pointer) }.read()
        }

        #[doc = concat!("Writes the ", $doc, " at `offset`.\n\n# Panics\n\nWhen `offset` is unaligned or outside the region.")]
        pub fn $write(&self, offset: usize, value: $type) {
            let pointer = self.pointer::<ReadWrite<$type>>(offset);
            // SAFETY: as for the read; what the store makes the device do is the caller's business.
            unsafe { UniqueMmioPointer::new(pointer) }.write(value);
        }
    };
}

impl Mmio {
    /// Wraps a mapped region.
    ///
    /// # Safety
    ///
    /// `base` must be 8-byte aligned, and the `len_bytes` bytes from it mapped device memory that stays mapped for good
    /// and that no Rust reference covers.
    pub const unsafe fn new(base: NonNull<u8>, len_bytes: usize) -> Self {
        Self { base, len_bytes }
    }

    /// The region's first byte.
    pub const fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// The region's length.
    pub const fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    accessors!(read8, write8, u8, "byte");
    accessors!(read16, write16, u16, "16-bit register");
    accessors!(read32, write32, u32, "32-bit register");
    accessors!(read64, write64, u64, "64-bit register");

    fn pointer<T>(&self, offset: usize) -> NonNull<T> {
        let inside = offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.len_bytes);
        assert!(
            inside && offset.is_multiple_of(align_of::<T>()),
            "register offset {offset:#x} in a region of {:#x} bytes",
            self.len_bytes
        );
        // SAFETY: inside the region, by the check.
        unsafe { self.base.add(offset) }.cast()
    }
}

/// A device's registers, so that a test of its driver can bring its own.
pub trait Registers {
    /// Reads 32 bits.
    fn read32(&self, offset: usize) -> u32;
    /// Writes 32 bits.
    fn write32(&self, offset: usize, value: u32);
    /// Reads 64 bits.
    fn read64(&self, offset: usize) -> u64;
    /// Writes 64 bits.
    fn write64(&self, offset: usize, value: u64);
}

impl Registers for Mmio {
    fn read32(&self, offset: usize) -> u32 {
        Mmio::read32(self, offset)
    }

    fn write32(&self, offset: usize, value: u32) {
        Mmio::write32(self, offset, value);
    }

    fn read64(&self, offset: usize) -> u64 {
        Mmio::read64(self, offset)
    }

    fn write64(&self, offset: usize, value: u64) {
        Mmio::write64(self, offset, value);
    }
}

/// Orders what was written to memory before a doorbell that tells a device of it.
///
/// Atomic fences order memory with memory, which is not enough before a store to device memory on arm and riscv.
#[inline(always)]
pub fn memory_before_doorbell() {
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier has no effect but ordering.
    unsafe {
        core::arch::asm!("dmb oshst", options(nostack, preserves_flags));
    }
    #[cfg(target_arch = "riscv64")]
    // SAFETY: a barrier has no effect but ordering.
    unsafe {
        core::arch::asm!("fence w, o", options(nostack, preserves_flags));
    }
    // Elsewhere stores of both kinds stay in order, and only the compiler has to be told.
    #[cfg(not(any(target_arch = "aarch64", target_arch = "riscv64")))]
    core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_stay_inside() {
        let mut memory = [0u64; 2];
        let base = NonNull::new(memory.as_mut_ptr().cast::<u8>()).expect("an array is somewhere");
        // SAFETY: the array outlives the region and is not touched otherwise meanwhile.
        let mmio = unsafe { Mmio::new(base, 16) };
        mmio.write64(8, 0x1122_3344_5566_7788);
        assert_eq!((mmio.read8(8), mmio.read16(10), mmio.read32(12)), (0x88, 0x5566, 0x1122_3344));
        assert!(std::panic::catch_unwind(|| mmio.read32(14)).is_err());
        assert!(std::panic::catch_unwind(|| mmio.read64(16)).is_err());
        assert!(std::panic::catch_unwind(|| mmio.write8(usize::MAX, 0)).is_err());
    }
}
