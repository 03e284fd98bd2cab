//! How long a layer below a driver works, for a benchmark that does not count it as the driver's.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::arch::clock;

/// Adds up what a layer does, with all that is below it.
#[derive(Debug, Default)]
pub struct Work {
    ticks: AtomicU64,
    calls: AtomicU64,
}

impl Work {
    /// Counts `work`. Inlined, so that nothing but that lies between the two readings.
    #[inline(always)]
    pub(super) fn count<R>(&self, work: impl FnOnce() -> R) -> R {
        let start = clock::ticks();
        let result = work();
        let ticks = clock::ticks().wrapping_sub(start);
        self.ticks.fetch_add(ticks, Ordering::Relaxed);
        self.calls.fetch_add(1, Ordering::Relaxed);
        result
    }

    /// Ticks of the CPU's counter so far.
    pub fn ticks(&self) -> u64 {
        self.ticks.load(Ordering::Relaxed)
    }

    /// How often the layer was called.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
}
