//! What all tests stand on: the driver over the model, on a machine of host memory.
//!
//! ```text
//!   test ---- Machine (device, log, DMA by endpoints, memory, clock)
//!     |           | Arc
//!   Viommu --- TestPlatform, ModelTransport ---- model::Device ---- Ram
//! ```

mod interposed;
mod machine;
mod opened;
mod platform;
mod ram;
mod task;
mod watch;

pub(crate) use interposed::{When, interposed};
pub(crate) use machine::{EP, EP2, Machine, PAGE, POLLS, bytes_of, fill};
pub(crate) use opened::{Opened, apart};
#[cfg(feature = "virtio-drivers")]
pub(crate) use platform::ModelTransport;
pub(crate) use platform::TestPlatform;
pub(crate) use ram::POISON;
#[cfg(feature = "contexts")]
pub(crate) use ram::Ram;
pub(crate) use task::{Bell, Task};
pub(crate) use watch::{Broken, WatchedHeap, WatchedLock, heap_uses, outside, take_broken};

use virtio_iommu::{Iova, Prot};

/// Any address.
pub(crate) const ANYWHERE: Iova = Iova::new(u64::MAX);
pub(crate) const RW: Prot = Prot::READ.union(Prot::WRITE);

/// A seeded source of numbers (SplitMix64). The seed is printed, so that a failure can be repeated.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        println!("seed {seed:#x}");
        Self(seed)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}
