//! The lock around the driver's state, made from whatever lock the kernel has.
//!
//! The driver holds it for bounded work only: no waiting, no doorbell, no call out, no allocation.

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};

/// A raw lock that may save and restore the interrupt state.
///
/// A kernel that maps or unmaps in interrupt handlers gives one that disables interrupts while held.
///
/// # Safety
/// Between `acquire` and the matching `release` no other `acquire` of the same lock returns, on any CPU, and
/// what was written before `release` is seen after the next `acquire`.
pub unsafe trait RawLock: Send + Sync {
    /// A free lock.
    const UNLOCKED: Self;

    /// What `acquire` saved and `release` restores, such as the interrupt flag. `()` where nothing is.
    type Saved;

    /// Waits for the lock and takes it.
    fn acquire(&self) -> Self::Saved;

    /// Gives the lock back.
    ///
    /// # Safety
    /// The caller holds the lock, and `saved` came from the `acquire` that took it.
    unsafe fn release(&self, saved: Self::Saved);
}

/// Any `lock_api` raw mutex as the driver's lock. It does not touch the interrupt state unless `R` does.
#[cfg(feature = "lock_api")]
pub struct LockApi<R>(R);

#[cfg(feature = "lock_api")]
// SAFETY: `lock_api::RawMutex` promises mutual exclusion and the ordering that comes with it.
unsafe impl<R: lock_api::RawMutex + Send + Sync> RawLock for LockApi<R> {
    const UNLOCKED: Self = Self(R::INIT);
    type Saved = ();

    #[inline(always)]
    fn acquire(&self) {
        // So that the way without a wait is a straight one.
        if !self.0.try_lock() {
            wait(&self.0);
        }
    }

    unsafe fn release(&self, (): ()) {
        // SAFETY: the caller holds the lock.
        unsafe { self.0.unlock() };
    }
}

#[cfg(feature = "lock_api")]
#[cold]
fn wait(lock: &impl lock_api::RawMutex) {
    lock.lock();
}

/// A spin lock that leaves interrupts as they are.
///
/// A handler that takes it while the interrupted code holds it waits for ever: do not use it where interrupt
/// handlers map, unmap or poll.
#[cfg(feature = "spin")]
pub type SpinNotInInterrupts = LockApi<spin::Mutex<()>>;

/// A value behind a [`RawLock`].
pub(crate) struct Mutex<L, T> {
    lock: L,
    value: UnsafeCell<T>,
}

// SAFETY: the lock gives one thread at a time access to the value, which may move between threads.
unsafe impl<L: RawLock, T: Send> Sync for Mutex<L, T> {}

impl<L: RawLock, T> Mutex<L, T> {
    pub(crate) const fn new(value: T) -> Self {
        Self { lock: L::UNLOCKED, value: UnsafeCell::new(value) }
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    pub(crate) fn lock(&self) -> Guard<'_, L, T> {
        Guard { saved: Some(self.lock.acquire()), mutex: self }
    }
}

/// Access to the value while the lock is held.
pub(crate) struct Guard<'a, L: RawLock, T> {
    mutex: &'a Mutex<L, T>,
    /// `Some` until dropped.
    saved: Option<L::Saved>,
}

impl<L: RawLock, T> Deref for Guard<'_, L, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the guard holds the lock.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<L: RawLock, T> DerefMut for Guard<'_, L, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard holds the lock, and is borrowed alone.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<L: RawLock, T> Drop for Guard<'_, L, T> {
    fn drop(&mut self) {
        if let Some(saved) = self.saved.take() {
            // SAFETY: the guard took the lock with this very state, and is going away.
            unsafe { self.mutex.lock.release(saved) };
        }
    }
}
