//! Memory for unit tests that play the device's side.

use crate::addr::PhysAddr;
use crate::platform::DmaMemory;
use alloc::boxed::Box;
use alloc::vec;
use core::ptr::NonNull;

pub(crate) struct TestMemory;

impl TestMemory {
    /// Zeroed memory of `len` bytes, aligned to 8, for the rest of the test process.
    pub(crate) fn leak(len: usize) -> DmaMemory {
        let words: &'static mut [u64] = Box::leak(vec![0u64; len.div_ceil(8)].into_boxed_slice());
        let ptr = NonNull::from(words).cast::<u8>();
        DmaMemory { phys: PhysAddr::new(ptr.addr().get() as u64), ptr, len }
    }
}
