//! The kernel around the driver: memory of the machine, the host's clock.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use virtio_iommu::{DmaMemory, Platform, SpinNotInInterrupts};

use crate::ram::Ram;

/// A platform whose DMA memory is the RAM of a machine in QEMU.
#[derive(Clone, Debug)]
pub struct HostPlatform {
    ram: Arc<Ram>,
    started: Instant,
}

impl HostPlatform {
    /// The platform over this memory.
    pub(crate) fn new(ram: Arc<Ram>) -> Self {
        Self { ram, started: Instant::now() }
    }

    /// Takes memory as the driver does, for data of a test.
    ///
    /// # Panics
    /// When there is none left.
    pub fn alloc(&self, len: usize) -> DmaMemory {
        self.ram.alloc(len, 0x1000).expect("the machine has no memory left")
    }
}

// SAFETY: the heap of `Ram` hands out zeroed, aligned blocks, each to one owner; physical addresses are
// offsets in one mapping, which stays as long as the platform does.
unsafe impl Platform for HostPlatform {
    type Lock = SpinNotInInterrupts;

    fn dma_alloc(&self, len: usize, align: usize) -> Option<DmaMemory> {
        self.ram.alloc(len, align)
    }

    unsafe fn dma_free(&self, memory: DmaMemory, align: usize) {
        self.ram.free(memory, align);
    }

    fn now_ns(&self) -> Option<u64> {
        u64::try_from(self.started.elapsed().as_nanos()).ok()
    }

    fn relax(&self) {
        thread::yield_now();
    }
}
