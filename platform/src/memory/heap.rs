//! The kernel's heap: a small static part for early boot, and a part of RAM once the memory map is known.
//!
//! On a host the standard library's allocator serves instead.

/// The smallest and the largest part of RAM that the heap takes; in between, a quarter.
const MIN_BYTES: u64 = 1 << 20;
const MAX_BYTES: u64 = 256 << 20;

/// How much of `usable_bytes` becomes heap: whole frames.
pub fn size_for(usable_bytes: u64) -> u64 {
    (usable_bytes / 4).clamp(MIN_BYTES, MAX_BYTES) & !(super::frames::FRAME_BYTES - 1)
}

#[cfg(target_os = "none")]
mod kernel {
    use spin::Once;
    use talc::TalcLock;
    use talc::source::Manual;

    use crate::memory::phys_to_virt;
    use crate::range::PhysRange;

    /// Enough for the memory map, the command line and the list of ACPI tables, each bounded.
    const EARLY_BYTES: usize = 256 << 10;

    #[global_allocator]
    static HEAP: TalcLock<spin::Mutex<()>, Manual> = TalcLock::new(Manual);

    #[repr(align(4096))]
    struct Early(#[expect(dead_code, reason = "only its memory is used")] [u8; EARLY_BYTES]);

    static mut EARLY: Early = Early([0; EARLY_BYTES]);

    /// Gives the static part to the heap, once.
    pub fn init_early() {
        static DONE: Once = Once::new();
        DONE.call_once(|| {
            // SAFETY: the static is used here only, and once; it lives for ever.
            let claimed = unsafe { HEAP.lock().claim((&raw mut EARLY).cast(), EARLY_BYTES) };
            assert!(claimed.is_some(), "the early heap is large enough to be one");
        });
    }

    pub(super) fn allocated_bytes() -> usize {
        HEAP.lock().counters().allocated_bytes
    }

    /// Gives a part of RAM to the heap.
    ///
    /// # Safety
    ///
    /// The range must be mapped, writable RAM that nothing else uses, now or later.
    pub unsafe fn extend(range: PhysRange) {
        // SAFETY: passed on to the caller.
        let claimed = unsafe { HEAP.lock().claim(phys_to_virt(range.start()), range.len_bytes() as usize) };
        if claimed.is_none() {
            log::warn!("heap: {range} is too small to be used");
        }
    }
}

#[cfg(target_os = "none")]
pub use kernel::{extend, init_early};

/// The bytes that are allocated: what was asked for, without what the heap adds. On a host nobody counts them.
pub fn allocated_bytes() -> Option<usize> {
    #[cfg(target_os = "none")]
    return Some(kernel::allocated_bytes());
    #[cfg(not(target_os = "none"))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_a_bounded_quarter_in_whole_frames() {
        assert_eq!(size_for(64 << 20), 16 << 20);
        assert_eq!(size_for(1 << 40), MAX_BYTES);
        assert_eq!(size_for(0), MIN_BYTES);
        assert_eq!(size_for((16 << 20) + 5000) % 4096, 0);
    }
}
