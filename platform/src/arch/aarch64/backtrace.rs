//! The return addresses on a stack, by the frame pointers that the build keeps.

use core::arch::asm;

use crate::{cpus, image};

/// The most callers that are looked up.
const MAX_DEPTH: usize = 32;

/// The return addresses from the caller's frame outwards.
pub fn here() -> impl Iterator<Item = u64> {
    let frame: u64;
    // SAFETY: copies a register.
    unsafe { asm!("mov {}, x29", out(reg) frame, options(nomem, nostack, preserves_flags)) };
    from_frame(frame)
}

/// The return addresses from the frame that `frame` points to outwards. Stops at the first pointer that is not into one
/// of the kernel's stacks, or that does not lead upwards.
pub fn from_frame(mut frame: u64) -> impl Iterator<Item = u64> {
    core::iter::from_fn(move || {
        let on_a_stack = |address: u64| {
            image::stacks()
                .into_iter()
                .chain(cpus::stacks())
                .any(|s| s.start() <= address && address + 15 <= s.last())
        };
        if !frame.is_multiple_of(8) || !on_a_stack(frame) {
            return None;
        }
        let pointer = frame as *const u64;
        // SAFETY: 16 bytes of one of the kernel's own stacks, which stay mapped, and `frame` is 8-byte aligned.
        let (next, return_address) = unsafe { (pointer.read(), pointer.add(1).read()) };
        frame = if next > frame { next } else { 0 };
        (return_address != 0).then_some(return_address)
    })
    .take(MAX_DEPTH)
}
