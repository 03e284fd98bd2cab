//! Memory that the driver keeps for its owner as long as a device may reach it.

use crate::platform::DmaMemory;

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
    /// may be much later, in any call into the driver, without its lock held.
    ///
    /// # Safety
    /// The memory is the caller's alone, and stays valid and unused by anyone else until `release` is called.
    /// Calling `release` once with exactly this memory is sound.
    pub const unsafe fn new(memory: DmaMemory, release: unsafe fn(DmaMemory)) -> Self {
        Self { memory, release: Release::Hook(release) }
    }

    /// Memory from the platform's `dma_alloc`.
    pub(crate) const fn from_platform(memory: DmaMemory, align: usize) -> Self {
        Self { memory, release: Release::Platform { align } }
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
}
