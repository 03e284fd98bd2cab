//! The atomics of what several threads, or a device, look at: `core`'s, or `loom`'s in the tests that try every
//! interleaving.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, fence};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU16, AtomicUsize, fence};
#[cfg(loom)]
pub(crate) use tracked::AtomicBool;

pub(crate) use core::sync::atomic::Ordering;

#[cfg(loom)]
mod tracked {
    use super::Ordering;

    /// Loom's, with a store that is a swap.
    ///
    /// Loom lets a store come between what a swap on another thread reads and what it writes, so that after
    /// `store(true)` a swap may find the `false` of a swap that was over before: no machine does that. A swap has its
    /// place among the other swaps. Where all writes of a flag are swaps or stores of one thread this hides nothing but
    /// that a relaxed store ends the effect of an earlier release, which nothing here is about.
    pub(crate) struct AtomicBool(loom::sync::atomic::AtomicBool);

    impl AtomicBool {
        pub(crate) fn new(value: bool) -> Self {
            Self(loom::sync::atomic::AtomicBool::new(value))
        }

        pub(crate) fn load(&self, order: Ordering) -> bool {
            self.0.load(order)
        }

        pub(crate) fn store(&self, value: bool, order: Ordering) {
            self.0.swap(value, order);
        }

        pub(crate) fn swap(&self, value: bool, order: Ordering) -> bool {
            self.0.swap(value, order)
        }
    }
}
