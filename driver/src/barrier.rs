//! The barriers between memory and what a device says or is told.

/// Orders the ring's memory writes before a following doorbell store.
///
/// Atomic fences order memory with memory, which is not enough before a store to device memory on arm and
/// riscv. On x86 stores of both kinds stay in order and only the compiler has to be told.
///
/// The driver does it before each [`notify`](crate::transport::Transport::notify) of its own. A kernel that drives
/// another virtio device over a [`transport`](crate::transport) has to as well.
#[inline(always)]
pub fn memory_before_doorbell() {
    // There is no device memory in the model: the doorbell is a relaxed store.
    #[cfg(loom)]
    loom::sync::atomic::fence(core::sync::atomic::Ordering::Release);
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier has no effect but ordering.
    unsafe {
        core::arch::asm!("dmb oshst", options(nostack, preserves_flags));
    }
    #[cfg(any(target_arch = "riscv64", target_arch = "riscv32"))]
    // SAFETY: a barrier has no effect but ordering.
    unsafe {
        core::arch::asm!("fence w, o", options(nostack, preserves_flags));
    }
    #[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
    core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
    #[cfg(not(any(
        target_arch = "aarch64",
        target_arch = "riscv64",
        target_arch = "riscv32",
        target_arch = "x86_64",
        target_arch = "x86"
    )))]
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

/// Orders the load that told that a device is done, of its register or of memory, before following loads of what it
/// wrote.
#[inline(always)]
pub(crate) fn device_before_memory() {
    #[cfg(loom)]
    loom::sync::atomic::fence(core::sync::atomic::Ordering::Acquire);
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier has no effect but ordering.
    unsafe {
        core::arch::asm!("dmb oshld", options(nostack, preserves_flags));
    }
    #[cfg(any(target_arch = "riscv64", target_arch = "riscv32"))]
    // SAFETY: a barrier has no effect but ordering.
    unsafe {
        core::arch::asm!("fence ir, r", options(nostack, preserves_flags));
    }
    #[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
    core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
    #[cfg(not(any(
        target_arch = "aarch64",
        target_arch = "riscv64",
        target_arch = "riscv32",
        target_arch = "x86_64",
        target_arch = "x86"
    )))]
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}
