//! Futures polled by hand, with wakers that count, that tell when they are used under the driver's lock, and that can do
//! other code's work while they are cloned or called.

use std::future::Future;
use std::mem::ManuallyDrop;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};

use super::watch;

type Work = Box<dyn FnOnce() + Send>;

/// What a waker does to a task: counts.
#[derive(Default)]
struct Inner {
    wakes: AtomicU32,
    on_clone: Mutex<Option<Work>>,
    on_wake: Mutex<Option<Work>>,
}

/// Runs what was left there, once, with no lock held.
fn run(slot: &Mutex<Option<Work>>) {
    let work = watch::outside(|| slot.lock().unwrap_or_else(PoisonError::into_inner).take());
    if let Some(work) = work {
        work();
    }
}

/// Rings when its waker is called.
#[derive(Clone, Default)]
pub(crate) struct Bell(Arc<Inner>);

impl Bell {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn waker(&self) -> Waker {
        // SAFETY: the table's functions treat the pointer as the `Arc` that it came from.
        unsafe { Waker::from_raw(raw(Arc::clone(&self.0))) }
    }

    /// How often it rang.
    pub(crate) fn wakes(&self) -> u32 {
        self.0.wakes.load(Ordering::SeqCst)
    }

    /// Wakers that somebody else keeps.
    pub(crate) fn wakers(&self) -> usize {
        Arc::strong_count(&self.0) - 1
    }

    /// Runs at the next clone of the waker: between the driver's look at the ring and its wish to be interrupted.
    pub(crate) fn on_clone(&self, work: impl FnOnce() + Send + 'static) {
        *self.0.on_clone.lock().unwrap() = Some(Box::new(work));
    }

    /// Runs at the next call of the waker.
    pub(crate) fn on_wake(&self, work: impl FnOnce() + Send + 'static) {
        *self.0.on_wake.lock().unwrap() = Some(Box::new(work));
    }
}

static TABLE: RawWakerVTable = RawWakerVTable::new(clone, wake, wake_by_ref, forget);

fn raw(inner: Arc<Inner>) -> RawWaker {
    RawWaker::new(Arc::into_raw(inner).cast(), &TABLE)
}

/// # Safety
/// The pointer is the data of a waker of this table that is not dropped yet.
unsafe fn borrow(data: *const ()) -> ManuallyDrop<Arc<Inner>> {
    // SAFETY: from `raw`; the count of the waker stays its own.
    ManuallyDrop::new(unsafe { Arc::from_raw(data.cast()) })
}

unsafe fn clone(data: *const ()) -> RawWaker {
    watch::call_out();
    // SAFETY: the caller's promise.
    let inner = unsafe { borrow(data) };
    run(&inner.on_clone);
    raw(Arc::clone(&inner))
}

unsafe fn wake(data: *const ()) {
    // SAFETY: the caller's promise, here and below; the waker ends here.
    unsafe { wake_by_ref(data) };
    // SAFETY: as above.
    unsafe { forget(data) };
}

unsafe fn wake_by_ref(data: *const ()) {
    watch::call_out();
    // SAFETY: the caller's promise.
    let inner = unsafe { borrow(data) };
    inner.wakes.fetch_add(1, Ordering::SeqCst);
    run(&inner.on_wake);
}

unsafe fn forget(data: *const ()) {
    watch::call_out();
    // SAFETY: the caller's promise; the waker ends here.
    let inner = ManuallyDrop::into_inner(unsafe { borrow(data) });
    watch::outside(|| drop(inner));
}

/// A future that a test polls, with a bell of its own. That it can be made shows that the future is `Send`.
pub(crate) struct Task<'a, T> {
    future: Pin<Box<dyn Future<Output = T> + Send + 'a>>,
    pub(crate) bell: Bell,
}

impl<'a, T> Task<'a, T> {
    pub(crate) fn new(future: impl Future<Output = T> + Send + 'a) -> Self {
        Self { future: Box::pin(future), bell: Bell::new() }
    }

    pub(crate) fn poll(&mut self) -> Poll<T> {
        let waker = self.bell.waker();
        self.future.as_mut().poll(&mut Context::from_waker(&waker))
    }

    /// The same for a task that is expected to wait.
    pub(crate) fn sleep(&mut self) {
        assert!(self.poll().is_pending(), "it does not wait");
    }

    /// The same for a task that is expected to be done.
    pub(crate) fn finish(&mut self) -> T {
        match self.poll() {
            Poll::Ready(result) => result,
            Poll::Pending => panic!("it still waits"),
        }
    }

    /// How often it was woken.
    pub(crate) fn wakes(&self) -> u32 {
        self.bell.wakes()
    }
}
