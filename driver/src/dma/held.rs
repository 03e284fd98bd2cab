//! Memory that the driver keeps for its owner as long as a device may reach it.

use crate::addr::PhysAddr;
use crate::platform::DmaMemory;
use core::ptr::NonNull;

/// Memory with a way back to its owner.
///
/// The driver takes it with a mapping and gives it back when the device confirmed that the mapping is gone. In
/// between nobody else has it, so that a request of unknown outcome never exposes memory that was reused.
#[derive(Debug)]
#[must_use = "dropping it loses the memory: neither owner nor driver has it"]
pub struct HeldMemory {
    memory: DmaMemory,
    release: Release,
}

/// How held memory goes back.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Release {
    /// To [`Platform::dma_free`](crate::Platform::dma_free).
    Platform { align: usize },
    /// To whoever lent it.
    Hook(unsafe fn(DmaMemory)),
}

impl HeldMemory {
    /// Lends memory to the driver, which calls `release` with it once, when no device reaches it any more. That
    /// may be much later, in any call into the driver, without its lock held. The driver does not access it, and gives
    /// `ptr` back as it was.
    ///
    /// # Safety
    /// The memory is the caller's alone, and stays valid and unused by anyone else until `release` is called.
    /// Calling `release` once with exactly this memory is sound.
    pub const unsafe fn new(memory: DmaMemory, release: unsafe fn(DmaMemory)) -> Self {
        Self { memory, release: Release::Hook(release) }
    }

    /// Memory from the platform's `dma_alloc`, aligned to the granule.
    pub(crate) const fn from_platform(memory: DmaMemory, granule: usize) -> Self {
        Self { memory, release: Release::Platform { align: granule } }
    }

    /// Where the memory lies.
    pub const fn memory(&self) -> DmaMemory {
        self.memory
    }

    /// Takes the memory back that was lent and not mapped. The way back is not gone.
    pub fn into_memory(self) -> DmaMemory {
        self.memory
    }

    pub(crate) fn into_parts(self) -> (DmaMemory, Release) {
        (self.memory, self.release)
    }

    /// What a mapping of exactly this memory does not say already.
    pub(crate) fn into_kept(self) -> Kept {
        let hook = match self.release {
            Release::Platform { .. } => None,
            Release::Hook(hook) => Some(hook),
        };
        Kept { ptr: self.memory.ptr, hook }
    }
}

/// Held memory beside the record of its mapping, which knows where it lies and how long it is.
#[derive(Debug)]
pub(crate) struct Kept {
    ptr: NonNull<u8>,
    /// Whom it goes back to, if not to the platform.
    hook: Option<unsafe fn(DmaMemory)>,
}

// SAFETY: as for `DmaMemory`: the pointer is a plain number here, and whoever dereferences it answers for it.
unsafe impl Send for Kept {}
// SAFETY: as above.
unsafe impl Sync for Kept {}

impl Kept {
    /// The memory of a mapping of `len` bytes to `phys`, by a device with this granule.
    pub(crate) fn into_held(self, phys: PhysAddr, len: usize, granule: usize) -> HeldMemory {
        let release = self.hook.map_or(Release::Platform { align: granule }, Release::Hook);
        HeldMemory { memory: DmaMemory { phys, ptr: self.ptr, len }, release }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_memory::TestMemory;
    use std::format;

    unsafe fn hook(_: DmaMemory) {}

    /// Fails when the compact form loses something.
    #[test]
    fn kept_memory_is_what_was_held() {
        let memory = TestMemory::leak(0x2000);
        for release in [Release::Platform { align: 0x1000 }, Release::Hook(hook)] {
            let text = format!("{:?}", HeldMemory { memory, release });
            let kept = HeldMemory { memory, release }.into_kept();
            assert_eq!(format!("{:?}", kept.into_held(memory.phys, 0x2000, 0x1000)), text);
        }
    }
}
