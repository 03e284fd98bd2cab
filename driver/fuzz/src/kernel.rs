//! The kernel around the driver: memory, and a lock that sees what must not happen while it is held (I11).

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use virtio_iommu::{DmaMemory, EndpointId, HeldMemory, Platform, RawLock};

use crate::ram::Ram;

/// The device and its memory, as kernel and session see them.
pub trait World: Send + Sync + 'static {
    /// The memory.
    fn ram(&self) -> &Ram;

    /// Time passes: the device does something.
    fn relax(&self);

    /// Memory goes back to its owner.
    ///
    /// # Panics
    /// When an endpoint may still reach it.
    fn check_gone(&self, memory: DmaMemory);

    /// The driver says that an endpoint reaches memory.
    ///
    /// # Panics
    /// When it does not.
    fn check_reached(&self, endpoint: EndpointId, iova: u64, memory: DmaMemory);
}

thread_local! {
    static HELD: Cell<bool> = const { Cell::new(false) };
    /// Whose the lent memory is: a release hook is a plain function.
    static LENDER: RefCell<Option<Arc<dyn World>>> = const { RefCell::new(None) };
}

/// Says that the driver calls out, which it must not do under its lock.
///
/// # Panics
/// When it does.
pub fn call_out(what: &str) {
    assert!(!HELD.get(), "{what} under the driver's lock");
}

/// A lock for one thread.
pub struct FuzzLock(AtomicBool);

// SAFETY: one at a time turns the flag from false to true.
unsafe impl RawLock for FuzzLock {
    const UNLOCKED: Self = Self(AtomicBool::new(false));
    type Saved = ();

    fn acquire(&self) {
        assert!(!self.0.swap(true, Ordering::Acquire), "the driver takes its lock twice");
        HELD.set(true);
    }

    unsafe fn release(&self, (): ()) {
        HELD.set(false);
        self.0.store(false, Ordering::Release);
    }
}

/// The kernel of a run.
pub struct Kernel<W> {
    world: Arc<W>,
    /// Polls that waits took so far.
    relaxed: Arc<AtomicUsize>,
    /// Blocks that there still are for the driver.
    blocks: Arc<AtomicUsize>,
}

impl<W> Clone for Kernel<W> {
    fn clone(&self) -> Self {
        let Self { world, relaxed, blocks } = self;
        Self { world: Arc::clone(world), relaxed: Arc::clone(relaxed), blocks: Arc::clone(blocks) }
    }
}

impl<W: World> Kernel<W> {
    /// A kernel that has so many blocks of memory for the driver.
    pub fn new(world: Arc<W>, blocks: usize) -> Self {
        LENDER.set(Some(Arc::clone(&world) as Arc<dyn World>));
        Self { world, relaxed: Arc::default(), blocks: Arc::new(AtomicUsize::new(blocks)) }
    }

    /// The device.
    pub fn world(&self) -> &Arc<W> {
        &self.world
    }

    /// Polls since this was last asked.
    pub fn take_relaxed(&self) -> usize {
        self.relaxed.swap(0, Ordering::Relaxed)
    }

    /// Ends the run: nothing is lent any more.
    pub fn end() {
        LENDER.set(None);
    }
}

/// Memory that the driver takes over and gives back.
pub fn lend(memory: DmaMemory) -> HeldMemory {
    // SAFETY: the memory is a block of the world's, which `take_back` accepts once.
    unsafe { HeldMemory::new(memory, take_back) }
}

/// # Safety
/// The memory was lent by [`lend`].
unsafe fn take_back(memory: DmaMemory) {
    call_out("lent memory went back");
    let lender = LENDER.with_borrow(Clone::clone).expect("lent memory went back after the run");
    lender.check_gone(memory);
    lender.ram().free(memory);
}

// SAFETY: fresh zeroed blocks, aligned as asked, each handed out once.
unsafe impl<W: World> Platform for Kernel<W> {
    type Lock = FuzzLock;

    fn dma_alloc(&self, len: usize, align: usize) -> Option<DmaMemory> {
        call_out("memory was allocated");
        let one_less = |left: usize| left.checked_sub(1);
        self.blocks.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).ok()?;
        self.world.ram().alloc(len, align)
    }

    unsafe fn dma_free(&self, memory: DmaMemory, _align: usize) {
        call_out("memory was freed");
        self.world.check_gone(memory);
        self.world.ram().free(memory);
    }

    fn relax(&self) {
        call_out("the driver waits");
        self.relaxed.fetch_add(1, Ordering::Relaxed);
        self.world.relax();
    }
}
