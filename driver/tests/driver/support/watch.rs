//! What must not happen while the driver's lock is held (I11): a doorbell, a wait, a call out, an allocation.
//!
//! The tests' lock keeps count of itself for each thread, and the tests' global allocator looks at that count. What was
//! done under the lock is noted, not panicked about: an allocator cannot, and the test sees it at its end.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_iommu::RawLock;

thread_local! {
    static HELD: Cell<u32> = const { Cell::new(0) };
    static PAUSED: Cell<bool> = const { Cell::new(false) };
    static STRICT: Cell<bool> = const { Cell::new(false) };
    static BROKEN: Cell<Broken> = const { Cell::new(Broken::NONE) };
}

/// How often what happened under the lock, on this thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    pub(crate) heap: u32,
    pub(crate) doorbell: u32,
    pub(crate) relax: u32,
    pub(crate) call_out: u32,
}

impl Broken {
    pub(crate) const NONE: Self = Self { heap: 0, doorbell: 0, relax: 0, call_out: 0 };
}

fn note_if_held(note: impl FnOnce(&mut Broken)) {
    if HELD.get() > 0 && !PAUSED.get() {
        let mut broken = BROKEN.get();
        note(&mut broken);
        BROKEN.set(broken);
    }
}

pub(crate) fn doorbell() {
    note_if_held(|broken| broken.doorbell += 1);
}

pub(crate) fn relax() {
    note_if_held(|broken| broken.relax += 1);
}

pub(crate) fn call_out() {
    note_if_held(|broken| broken.call_out += 1);
}

/// What this thread did under a lock, and forgets it.
pub(crate) fn take_broken() -> Broken {
    BROKEN.replace(Broken::NONE)
}

/// Runs the test's own side, which may use the heap.
pub(crate) fn outside<R>(work: impl FnOnce() -> R) -> R {
    let before = PAUSED.replace(true);
    let result = work();
    PAUSED.set(before);
    result
}

/// Runs driver code that must not use the heap at all, lock or not. Returns how often it did.
pub(crate) fn heap_uses<R>(work: impl FnOnce() -> R) -> (R, u32) {
    let before = BROKEN.get().heap;
    STRICT.set(true);
    let result = work();
    STRICT.set(false);
    let mut broken = BROKEN.get();
    let uses = broken.heap - before;
    broken.heap = before;
    BROKEN.set(broken);
    (result, uses)
}

/// A spin lock that keeps count for its thread.
pub(crate) struct WatchedLock(AtomicBool);

// SAFETY: one thread at a time changes the flag from false to true; acquire and release order what lies between.
unsafe impl RawLock for WatchedLock {
    const UNLOCKED: Self = Self(AtomicBool::new(false));
    type Saved = ();

    fn acquire(&self) {
        while self.0.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            std::thread::yield_now();
        }
        HELD.set(HELD.get() + 1);
    }

    unsafe fn release(&self, (): ()) {
        HELD.set(HELD.get() - 1);
        self.0.store(false, Ordering::Release);
    }
}

/// The system's allocator, which looks whether a lock is held.
pub(crate) struct WatchedHeap;

impl WatchedHeap {
    fn note() {
        let forbidden = HELD.get() > 0 || STRICT.get();
        if forbidden && !PAUSED.get() {
            let mut broken = BROKEN.get();
            broken.heap += 1;
            BROKEN.set(broken);
        }
    }
}

// SAFETY: the system's allocator does all the work; the notes are plain numbers of the thread.
unsafe impl GlobalAlloc for WatchedHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        Self::note();
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        Self::note();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}
