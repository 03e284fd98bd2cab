//! Futures, the lock and interrupts, in every interleaving. Run by `cargo xtask test`.
//!
//! Everything from [`Viommu::start`] down is the driver's own; kernel and registers are stubs, the device is the
//! one of the ring's tests. The clock stands still, so that no deadline helps: whoever is not woken sleeps for
//! ever, which loom calls a deadlock. The lock is loom's. `Arc`s are not tracked, and a waker may be called once
//! too often.

use super::*;
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::domain::Domain;
use crate::engine::AttachPlan;
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
    engine.take(domain.key(), at()).unwrap();
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
        let list = engine.begin_list();
        let (_, op) = engine.begin_map(key, (list, at()), phys, Prot::READ, &mut held()).unwrap();
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

/// Whoever sleeps is woken when his answer is there, and the page goes back after it, once.
///
/// Fails without the second look in `InFlight::sleep`, without its wish for interrupts, without the wake in
/// `Viommu::poll`, and, as a race for the page, with a relaxed load in `Ring::used_index`.
#[test]
fn an_answer_wakes_who_waits_for_it() {
    explore_both("answer", 3, |suppression| {
        let (world, device) = world(suppression, 1);
        world.map_page();
        let device = world.spawn(device, 1);
        assert_eq!(run(exchange::unmap(world.shared(), world.domain.key(), at())), Ok(()));
        assert_eq!(world.page.returned(), 1);
        device.join().unwrap();
        world.assert_clean();
    });
}

/// An interrupt that comes while another one's poll is under way makes for one more poll.
///
/// Fails with `interrupted` cleared after the queues were looked at.
#[test]
fn an_interrupt_during_a_poll_is_not_lost() {
    explore_both("interrupt during a poll", 2, |suppression| {
        let (world, mut device) = world(suppression, 2);
        let (first, second) = (submit(world.shared()), submit(world.shared()));
        let bottom_half = Arc::new(Bell::new());
        let (viommu, page, wake) = (world.viommu.clone(), Arc::clone(&world.page), Arc::clone(&bottom_half));
        let device = thread::spawn(move || {
            while let Some(taken) = device.take() {
                if answer(&mut device, &taken, &page) && viommu.on_interrupt() == Interrupt::Wake {
                    wake.ring();
                }
            }
        });
        let (viommu, ends) = (world.viommu.clone(), Arc::new(AtomicBool::new(false)));
        let (woken, ended) = (Arc::clone(&bottom_half), Arc::clone(&ends));
        let poller = thread::spawn(move || {
            while !ended.load(Ordering::Acquire) {
                woken.wait();
                viommu.poll();
            }
        });
        assert_eq!(run(world.shared().finish(second)), Ok(()));
        assert_eq!(run(world.shared().finish(first)), Ok(()));
        ends.store(true, Ordering::Release);
        bottom_half.ring();
        device.join().unwrap();
        poller.join().unwrap();
        world.assert_clean();
    });
}

/// Two waiters, each of whom may drain the other's answer.
///
/// Fails with nobody woken in `InFlight::look`, and where the last look of the one takes the wish for interrupts
/// from the other, who sleeps (`rest_if_nobody_sleeps` without its question).
#[test]
fn a_waiter_who_drains_the_others_answer_wakes_him() {
    explore_both("two waiters", 2, |suppression| {
        let (world, device) = world(suppression, 2);
        let (mine, his) = (submit(world.shared()), submit(world.shared()));
        let device = world.spawn(device, 2);
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || run(viommu.shared.finish(his)));
        assert_eq!(run(world.shared().finish(mine)), Ok(()));
        assert_eq!(other.join().unwrap(), Ok(()));
        device.join().unwrap();
        world.assert_clean();
    });
}

/// Two waiters for one slot.
///
/// Fails without `slot_due`, with nobody woken in `InFlight::look`, and without the second look in `sleep_for_slot`.
#[test]
fn a_slot_that_comes_free_wakes_who_waits_for_it() {
    explore_both("slot", 2, |suppression| {
        let (world, device) = world(suppression, 1);
        let device = world.spawn(device, 2);
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || run(request(&viommu.shared)));
        assert_eq!(run(request(world.shared())), Ok(()));
        assert_eq!(other.join().unwrap(), Ok(()));
        device.join().unwrap();
        world.assert_clean();
    });
}

/// Who is dropped with the slot's request in flight, or asleep at the head of those who wait, leaves the slot to
/// the next.
///
/// Fails like the test before, with a slot that is free as soon as its request is given up, and with nobody woken where
/// that is.
#[test]
fn a_slot_goes_past_who_was_dropped() {
    explore_both("dropped holder", 2, |suppression| {
        let (world, device) = world(suppression, 1);
        let mut holder = std::boxed::Box::pin(request(world.shared()));
        assert!(poll_once(holder.as_mut()).is_pending());
        let device = world.spawn(device, 2);
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || run(request(&viommu.shared)));
        drop(holder);
        assert_eq!(other.join().unwrap(), Ok(()));
        device.join().unwrap();
        world.assert_clean();
    });
    explore_both("dropped sleeper", 2, |suppression| {
        let (world, device) = world(suppression, 1);
        let batch = submit(world.shared());
        let mut first = std::boxed::Box::pin(request(world.shared()));
        assert!(poll_once(first.as_mut()).is_pending());
        let device = world.spawn(device, 2);
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || run(request(&viommu.shared)));
        drop(first);
        assert_eq!(run(world.shared().finish(batch)), Ok(()));
        assert_eq!(other.join().unwrap(), Ok(()));
        device.join().unwrap();
        world.assert_clean();
    });
}

/// An UNMAP that is dropped against its answer: the page goes back once, after the answer, by whoever is left.
///
/// Fails, as a race for the page, with the mapping let go of in `Engine::lose`; and with a slot that is free as
/// soon as its request is given up.
#[test]
fn a_dropped_unmap_gives_the_page_back_once() {
    explore_both("dropped UNMAP", 3, |suppression| {
        let (world, device) = world(suppression, 1);
        world.map_page();
        let device = world.spawn(device, 1);
        let mut unmapping = std::boxed::Box::pin(exchange::unmap(world.shared(), world.domain.key(), at()));
        let _ = poll_once(unmapping.as_mut());
        drop(unmapping);
        world.viommu.poll();
        device.join().unwrap();
        world.viommu.poll();
        assert_eq!(world.page.returned(), 1);
        world.assert_clean();
    });
}

/// A MAP that is dropped against its answer leaves the page mapped and in quarantine, unless it was done.
///
/// Fails with the mapping let go of in `Engine::lose`, or when the late answer is settled.
#[test]
fn a_dropped_map_keeps_the_page_until_it_is_reclaimed() {
    explore_both("dropped MAP", 3, |suppression| {
        let (world, device) = world(suppression, 1);
        let device = world.spawn(device, 1);
        let key = world.domain.key();
        let (mut page, run) = (held(), Run { phys: PhysAddr::new(Page::PHYS), len: 0x1000 });
        let runs = core::iter::once(run);
        let mut mapping =
            std::boxed::Box::pin(exchange::map(world.shared(), key, at(), runs, Prot::READ, &mut page));
        let mapped = poll_once(mapping.as_mut());
        drop(mapping);
        world.viommu.poll();
        let mut device = device.join().unwrap();
        world.viommu.poll();
        let stuck = usize::from(mapped.is_pending());
        assert_eq!((world.viommu.stats().quarantined_mappings, world.page.returned()), (stuck, 0));

        let mut unmapping = pin!(async {
            match mapped {
                Poll::Ready(result) => {
                    assert_eq!(result, Ok(()));
                    exchange::unmap(world.shared(), key, at()).await
                }
                Poll::Pending => exchange::reclaim(world.shared(), key, at()).await,
            }
        });
        assert!(poll_once(unmapping.as_mut()).is_pending());
        assert_eq!(world.page.returned(), 0);
        let taken = device.take().unwrap();
        answer(&mut device, &taken, &world.page);
        assert_eq!(poll_once(unmapping.as_mut()), Poll::Ready(Ok(())));
        assert_eq!(world.page.returned(), 1);
        world.assert_clean();
    });
}

/// A doorbell that somebody else rings is rung for what it was due for.
///
/// Fails without `memory_before_doorbell`, and with a relaxed swap in `Shared::ring`. The release in
/// `State::publish` can be left out: the fence in `Ring::publish` comes before it.
#[test]
fn who_sees_the_doorbell_sees_the_request() {
    explore_both("doorbell of another", 3, |suppression| {
        let (world, mut device) = world_with(suppression, 1, Some(AtomicBool::new(false)));
        let doorbell = Arc::clone(&world.doorbell);
        let device = thread::spawn(move || {
            // Not a fence: loom's also acquires what the threads before this one read.
            if doorbell.register.as_ref().unwrap().load(Ordering::Acquire) {
                assert!(device.take().is_some(), "rung for nothing");
            }
        });
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || viommu.shared.ring());
        let _ = submit(world.shared());
        world.shared().ring();
        other.join().unwrap();
        device.join().unwrap();
        assert!(world.doorbell.register.as_ref().unwrap().load(Ordering::Relaxed), "not rung at all");
    });
}

/// Whoever waits when the device asks for a reset, or the driver ends, is woken: for an answer, and for a slot.
///
/// Failed as long as who fell asleep after that was not woken: the end comes between his look and his sleep.
#[test]
fn the_end_wakes_all() {
    for why in [RequestError::NeedsReset, RequestError::ShutDown] {
        explore("end", 3, move || {
            let (world, _device) = world(Suppression::Flags, 1);
            let viommu = world.viommu.clone();
            let other = thread::spawn(move || viommu.shared.end(why));
            assert!(run(request(world.shared())).is_err());
            other.join().unwrap();
        });
        explore("end without a slot", 3, move || {
            let (world, _device) = world(Suppression::Flags, 1);
            let _ = submit(world.shared());
            let viommu = world.viommu.clone();
            let other = thread::spawn(move || viommu.shared.end(why));
            assert_eq!(run(request(world.shared())), Err(why));
            other.join().unwrap();
        });
    }
}

/// Whoever waits when the device breaks the ring is woken, too.
///
/// Failed as long as the poll that found it woke nobody; fails without the wish for interrupts in `sleep_for_slot`.
#[test]
fn a_broken_ring_wakes_all() {
    let broken = RequestError::RingBroken { used_index: 0x4000, expected_at_most: 1 };
    explore_both("broken ring", 3, move |suppression| {
        let (world, mut device) = world(suppression, 1);
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || {
            if device.show_used(0x4000) {
                interrupt(&viommu);
            }
        });
        assert!(run(request(world.shared())).is_err());
        other.join().unwrap();
        assert_eq!(world.shared().state.lock().dead, Some(broken));
    });
    explore_both("broken ring without a slot", 3, move |suppression| {
        let (world, mut device) = world(suppression, 1);
        let _ = submit(world.shared());
        let viommu = world.viommu.clone();
        let other = thread::spawn(move || {
            if device.show_used(0x4000) {
                interrupt(&viommu);
            }
        });
        assert_eq!(run(request(world.shared())), Err(broken));
        other.join().unwrap();
    });
}
