//! A spin lock that handlers of interrupts may take.

use core::sync::atomic::{AtomicBool, Ordering};

use virtio_iommu::RawLock;

use crate::arch::interrupts;

/// A spin lock whose holder takes no interrupts, so that no handler on the same CPU waits for it.
#[derive(Debug)]
pub struct InterruptsOff {
    taken: AtomicBool,
}

// SAFETY: only who changed `taken` from false to true has the lock, and `acquire` sees what was written before `release`.
unsafe impl RawLock for InterruptsOff {
    const UNLOCKED: Self = Self { taken: AtomicBool::new(false) };

    type Saved = interrupts::Saved;

    fn acquire(&self) -> Self::Saved {
        let saved = interrupts::save_and_disable();
        while self.taken.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            core::hint::spin_loop();
        }
        saved
    }

    unsafe fn release(&self, saved: Self::Saved) {
        self.taken.store(false, Ordering::Release);
        interrupts::restore(saved);
    }
}
