//! Futures, the lock and interrupts, in every interleaving. Run by `cargo xtask test`.
//!
//! Everything from [`Viommu::start`] down is the driver's own; kernel and registers are stubs, the device is the
//! one of the ring's tests. The clock stands still, so that no deadline helps: whoever is not woken sleeps for
//! ever, which loom calls a deadlock. The lock is loom's. `Arc`s are not tracked, and a waker may be called once
//! too often.

use super::*;
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::domain::Domain;
use crate::engine::{AttachPlan, Placement, Purpose, Spot, Tag};
use crate::exchange;
use crate::id::DomainId;
use crate::lock::RawLock;
use crate::options::DomainOptions;
use crate::platform::DmaMemory;
use crate::prot::Prot;
use crate::queue::{Completion, Outcome};
use crate::ring::Suppression;
use crate::ring::loom::{Bell, Device, OK, Taken, explore, explore_both, memory};
use crate::transport::{DeviceStatus, InterruptCause, QueueAddresses, TransportError};
use crate::viommu::{Interrupt, Viommu};
use crate::wire::config::offset;
use crate::wire::feature::Features;
use ::loom::cell::UnsafeCell;
use ::loom::sync::{RwLock, RwLockWriteGuard};
use ::loom::thread;
use alloc::sync::Arc;
use alloc::task::Wake;
use core::cell::Cell;
use core::future::Future;
use core::pin::{Pin, pin};
use core::task::{Context, Poll, Waker};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64};

const READ: Purpose = Purpose { prot: Prot::READ, tag: Tag::NONE };

mod tests;

std::thread_local! {
    /// Who holds the lock. The threads of a model share a thread of the machine.
    static HOLDER: Cell<Option<thread::ThreadId>> = const { Cell::new(None) };
}

/// I11: waking, ringing and calling out are done without the lock.
fn assert_unlocked() {
    if std::thread::panicking() {
        return;
    }
    assert_ne!(HOLDER.get(), Some(thread::current().id()), "called with the lock held");
}

/// The kernel's lock. Loom's `RwLock` for writing, which unlike its `Mutex` prints nothing.
struct Lock(OnceLock<RwLock<()>>);

// SAFETY: loom's lock is one; it lives as long as this, and is released before.
unsafe impl RawLock for Lock {
    const UNLOCKED: Self = Self(OnceLock::new());
    /// `None` when a test failed: its remains are one thread.
    type Saved = Option<RwLockWriteGuard<'static, ()>>;

    fn acquire(&self) -> Self::Saved {
        if std::thread::panicking() {
            return None;
        }
        let guard = self.0.get_or_init(|| RwLock::new(())).write().unwrap();
        HOLDER.set(Some(thread::current().id()));
        // SAFETY: released before the lock goes, by the contract of `release`.
        Some(unsafe {
            core::mem::transmute::<RwLockWriteGuard<'_, ()>, RwLockWriteGuard<'static, ()>>(guard)
        })
    }

    unsafe fn release(&self, saved: Self::Saved) {
        HOLDER.set(None);
        drop(saved);
    }
}

/// A page that an endpoint writes to as long as the device maps it, and its owner after he got it back.
struct Page {
    cell: UnsafeCell<()>,
    returned: std::sync::atomic::AtomicUsize,
}

// SAFETY: loom runs one thread at a time, and ends the test when accesses race.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    const PHYS: u64 = 0x77_0000;

    fn touch(&self) {
        self.cell.with_mut(|_| ());
    }

    fn returned(&self) -> usize {
        self.returned.load(Ordering::Relaxed)
    }
}

struct Kernel {
    page: Arc<Page>,
    next: AtomicU64,
}

// SAFETY: the memory is accessed through its tracked cells only.
unsafe impl Platform for Kernel {
    type Lock = Lock;

    fn dma_alloc(&self, len: usize, _align: usize) -> Option<DmaMemory> {
        Some(memory(self.next.fetch_add(0x10_0000, Ordering::Relaxed), len))
    }

    unsafe fn dma_free(&self, memory: DmaMemory, _align: usize) {
        assert_unlocked();
        assert_eq!(memory.phys.get(), Page::PHYS);
        self.page.touch();
        self.page.returned.fetch_add(1, Ordering::Relaxed);
    }

    fn now_ns(&self) -> Option<u64> {
        Some(0)
    }

    fn relax(&self) {
        thread::yield_now();
    }
}

struct Registers {
    suppression: Suppression,
    status: AtomicU8,
    doorbell: Arc<Doorbell>,
}

/// The request queue's doorbell: a device sleeps until it rings, or looks at the register.
struct Doorbell {
    bell: Bell,
    register: Option<AtomicBool>,
}

impl Transport for Registers {
    fn device_features(&self) -> u64 {
        let more = match self.suppression {
            Suppression::Flags => Features::empty(),
            Suppression::EventIndex => Features::EVENT_IDX,
        };
        (Features::REQUIRED | more).bits()
    }

    fn set_driver_features(&self, _features: u64) {}

    fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.status.load(Ordering::Relaxed))
    }

    fn set_status(&self, status: DeviceStatus) {
        self.status.store(status.bits(), Ordering::Relaxed);
    }

    fn config_generation(&self) -> u32 {
        0
    }

    fn read_config_u8(&self, _offset: usize) -> Result<u8, TransportError> {
        Ok(0)
    }

    fn read_config_u32(&self, at: usize) -> Result<u32, TransportError> {
        Ok(if at == offset::PAGE_SIZE_MASK { !0xfff } else { !0 })
    }

    fn write_config_u8(&self, _offset: usize, _value: u8) -> Result<(), TransportError> {
        Ok(())
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        if queue == EVENT_QUEUE { 2 } else { 64 }
    }

    fn enable_queue(&self, _: u16, _: u16, _: QueueAddresses) -> Result<(), TransportError> {
        Ok(())
    }

    fn notify(&self, queue: u16) {
        assert_unlocked();
        if queue == EVENT_QUEUE {
            return;
        }
        match &self.doorbell.register {
            Some(register) => register.store(true, Ordering::Relaxed),
            None => self.doorbell.bell.ring(),
        }
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        InterruptCause { queue: true, config: false }
    }
}

/// A driver with a domain that has an endpoint.
struct World {
    viommu: Viommu<Kernel>,
    domain: Domain<Kernel>,
    page: Arc<Page>,
    doorbell: Arc<Doorbell>,
}

/// A world, and its device.
fn world(suppression: Suppression, slots: u16) -> (World, Device) {
    world_with(suppression, slots, None)
}

fn world_with(suppression: Suppression, slots: u16, register: Option<AtomicBool>) -> (World, Device) {
    HOLDER.set(None);
    let page = Arc::new(Page { cell: UnsafeCell::new(()), returned: 0.into() });
    let doorbell = Arc::new(Doorbell { bell: Bell::new(), register });
    let registers = Registers { suppression, status: 0.into(), doorbell: Arc::clone(&doorbell) };
    let kernel = Kernel { page: Arc::clone(&page), next: 0x10_0000.into() };
    let options = Options {
        queue_size: 2 * slots,
        max_polls: u64::MAX,
        max_endpoints: 1,
        max_domains: 1,
        fault_backlog: 1,
        ..Options::default()
    };
    let viommu = Viommu::start(registers, kernel, options).unwrap().go_live().unwrap();
    let domain = viommu.create_domain(DomainOptions { mappings: 2, ..DomainOptions::default() }).unwrap();
    let mut state = viommu.shared.state.lock();
    let (engine, endpoint) = (&mut state.engine, EndpointId::new(8));
    engine.introduce(endpoint, &mut Arc::from([]));
    let AttachPlan::Send(_, op) = engine.begin_attach(endpoint, domain.key()).unwrap() else {
        panic!("nothing was sent")
    };
    engine.settle(&Completion { op, outcome: Ok(()), abandoned: false });
    let device = Device::of(state.requests.ring());
    drop(state);
    (World { viommu, domain, page, doorbell }, device)
}

/// Where the page is mapped.
fn at() -> IovaRange {
    IovaRange::from_len(Iova::new(0x1000), 0x1000).unwrap()
}

/// The page as memory that the driver holds while it is mapped.
fn held() -> Option<HeldMemory> {
    Some(HeldMemory::from_platform(memory(Page::PHYS, 0x1000), 0x1000))
}

impl World {
    fn shared(&self) -> &Shared<Kernel> {
        &self.viommu.shared
    }

    /// The page was mapped before the test began.
    fn map_page(&self) {
        let (mut state, phys) = (self.shared().state.lock(), PhysAddr::new(Page::PHYS));
        let (key, engine) = (self.domain.key(), &mut state.engine);
        engine.take(key, at()).unwrap();
        let list = engine.begin_list();
        let (record, _) = engine.begin_map(key, (list, at()), phys, READ, &mut held()).unwrap();
        let op = Op::Map { domain: key, range: at(), record };
        engine.settle(&Completion { op, outcome: Ok(()), abandoned: false });
    }

    /// A device that answers so many requests, and interrupts its own CPU.
    fn spawn(&self, mut device: Device, count: usize) -> thread::JoinHandle<Device> {
        let (viommu, page) = (self.viommu.clone(), Arc::clone(&self.page));
        let doorbell = Arc::clone(&self.doorbell);
        thread::spawn(move || {
            device.serve(count, &doorbell.bell, |device, taken| {
                if answer(device, &taken, &page) {
                    interrupt(&viommu);
                }
            });
            device
        })
    }

    /// Nothing is left of what was under way.
    fn assert_clean(&self) {
        let stats = self.viommu.stats();
        assert_eq!((stats.quarantined_mappings, stats.abandoned_requests, stats.stray_answers), (0, 0, 0));
        assert!(self.shared().state.lock().requests.can_submit(false));
    }
}

/// A request that does nothing to the records.
fn nothing() -> Request {
    Request::Unmap { domain: DomainId::new(1), range: at() }
}

fn submit(shared: &Shared<Kernel>) -> Batch {
    shared.submit_one(&mut shared.state.lock(), &nothing(), Op::None)
}

/// The same as an operation: waits for a slot, and for the answer.
async fn request(shared: &Shared<Kernel>) -> Outcome {
    let batch = shared.with_slot(Need::Slot, |state| shared.submit_one(state, &nothing(), Op::None)).await?;
    shared.finish(batch).await
}

/// One that says what it did, and touches the page before: up to the answer of an UNMAP it is mapped.
fn answer(device: &mut Device, taken: &Taken, page: &Page) -> bool {
    page.touch();
    device.complete(taken, &OK)
}

/// The handler of an interrupt, and what it asks for, on the same CPU.
fn interrupt(viommu: &Viommu<Kernel>) {
    if viommu.on_interrupt() == Interrupt::Wake {
        viommu.poll();
    }
}

struct Sleeper(Bell);

impl Wake for Sleeper {
    fn wake(self: Arc<Self>) {
        assert_unlocked();
        self.0.ring();
    }
}

/// An executor with one task, which sleeps until its waker is called.
fn run<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let sleeper = Arc::new(Sleeper(Bell::new()));
    let waker = Waker::from(Arc::clone(&sleeper));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
            return result;
        }
        sleeper.0.wait();
    }
}

/// Polls once, with a waker that is nobody's.
fn poll_once<T>(future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    let waker = Waker::from(Arc::new(Sleeper(Bell::new())));
    future.poll(&mut Context::from_waker(&waker))
}
