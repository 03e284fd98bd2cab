//! The lock, and what map and unmap may not do (I11). That nothing forbidden happens under it is checked at the end
//! of every test, see [`Machine`](crate::support::Machine); here is that the check would see it.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll};
use std::thread;

use virtio_iommu::{Direction, DmaDevice, EndpointOptions, Iova, PhysAddr, PhysSegment, Platform, RawLock};
use virtio_iommu_model::{Config, Execute, Inject, Release};

use crate::support::{
    ANYWHERE, Bell, Broken, EP, EP2, Machine, PAGE, RW, Rng, WatchedLock, heap_uses, outside, take_broken,
};

/// Fails when `begin_map` or `begin_unmap` allocates, or a batch does.
#[test]
fn i11_mapping_and_unmapping_use_no_heap() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let endpoint =
        viommu.open(EP, &domain, EndpointOptions { bounce_bytes: 4096, ..Default::default() }).unwrap();
    let memory = machine.memory(64 * PAGE);
    let segments: Vec<_> = (0..20)
        .map(|index| PhysSegment { phys: PhysAddr::new(memory.phys.get() + 2 * index * PAGE), len: 100 })
        .collect();
    let mut iovas = vec![Iova::new(0); segments.len()];
    let ((), uses) = heap_uses(|| {
        for _ in 0..200 {
            // SAFETY: nobody but the test uses the memory.
            let at = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
            // SAFETY: mapped above.
            unsafe { domain.unmap(at, PAGE) }.unwrap();
            // SAFETY: as above.
            let mapping = unsafe { endpoint.map_scatter(&segments, Direction::Both, &mut iovas) }.unwrap();
            endpoint.unmap(mapping).unwrap();
        }
        // Failing, timing out, polling and reclaiming use none either.
        // SAFETY: nobody but the test uses the memory, also when the outcome is unknown.
        let _ = unsafe { domain.map_at(Iova::new(1), memory.phys, PAGE, RW) };
        viommu.poll();
        viommu.stats();
    });
    assert_eq!(uses, 0);
    machine.inject([Inject::Hold(Execute::Now), Inject::Refuse(8), Inject::Refuse(5)]);
    let ((), uses) = heap_uses(|| {
        // SAFETY: as above.
        let lost = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) };
        assert!(lost.is_err());
        // SAFETY: as above.
        assert!(unsafe { endpoint.map_scatter(&segments, Direction::Both, &mut iovas) }.is_err());
    });
    assert_eq!(uses, 0);
    machine.release(Release::All);
    let (_, uses) = heap_uses(|| (viommu.poll(), viommu.reclaim()));
    assert_eq!(uses, 0);
}

/// Fails when a future of `map` or `unmap` uses the heap, or falling asleep, waking and being dropped do.
#[test]
fn futures_use_no_heap() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    let memory = machine.memory(64 * PAGE);
    let segments: Vec<_> = (0..20)
        .map(|index| PhysSegment { phys: PhysAddr::new(memory.phys.get() + 2 * index * PAGE), len: 100 })
        .collect();
    let mut iovas = vec![Iova::new(0); segments.len()];
    let bell = Bell::new();
    let waker = bell.waker();
    let context = &mut Context::from_waker(&waker);
    let hold = || outside(|| machine.inject([Inject::Hold(Execute::Now)]));
    // The caller's future, on the caller's stack.
    macro_rules! finish {
        ($future:expr) => {{
            let mut future = pin!($future);
            hold();
            assert!(future.as_mut().poll(context).is_pending());
            let before = bell.wakes();
            outside(|| machine.release(Release::All));
            viommu.on_interrupt();
            viommu.poll();
            assert_eq!(bell.wakes(), before + 1);
            let Poll::Ready(result) = future.poll(context) else { panic!("it still waits") };
            result.unwrap()
        }};
    }
    let ((), uses) = heap_uses(|| {
        for _ in 0..20 {
            // SAFETY: nobody but the test uses the memory.
            let at = finish!(unsafe { domain.map_async(memory.phys, PAGE, RW, ANYWHERE) });
            // SAFETY: mapped above.
            finish!(unsafe { domain.unmap_async(at, PAGE) });
            // SAFETY: as above.
            let list = finish!(unsafe { endpoint.map_scatter_async(&segments, Direction::Both, &mut iovas) });
            finish!(endpoint.unmap_async(list));
            {
                // SAFETY: nobody but the test uses the memory, also when the outcome is unknown.
                let mut dropped = pin!(unsafe { domain.map_async(memory.phys, PAGE, RW, ANYWHERE) });
                hold();
                assert!(dropped.as_mut().poll(context).is_pending());
            }
            outside(|| machine.release(Release::All));
            viommu.poll();
            assert_eq!(viommu.reclaim(), 1);
        }
    });
    assert_eq!(uses, 0);
}

#[test]
fn the_watch_sees_what_it_is_there_for() {
    let machine = Machine::new(Config::default());
    let (platform, lock) = (machine.platform(), WatchedLock::UNLOCKED);
    lock.acquire();
    drop(Box::new(1));
    platform.relax();
    let memory = platform.dma_alloc(8, 8).unwrap();
    // SAFETY: from just above.
    unsafe { platform.dma_free(memory, 8) };
    virtio_iommu::transport::Transport::notify(&machine.transport(), 0);
    // Cloned, dropped, and called.
    let waker = Bell::new().waker();
    drop(waker.clone());
    waker.wake_by_ref();
    // SAFETY: taken above.
    unsafe { lock.release(()) };
    let broken = take_broken();
    assert!(broken.heap >= 1);
    assert_eq!(Broken { heap: 0, ..broken }, Broken { heap: 0, doorbell: 1, relax: 1, call_out: 5 });
    assert_eq!(machine.take_violations().len(), 1, "a doorbell of a queue that is not there");
    assert_eq!(heap_uses(|| drop(Box::new(1))).1, 2);
}

/// Two threads in one domain, two in another; every access that was allowed is tried.
#[test]
fn threads_do_not_disturb_each_other() {
    let machine = Machine::new(Config::default());
    // The clock moves with each poll, and a thread may have to wait until another rang for it.
    let patient = virtio_iommu::Options { timeout_ns: u64::MAX, ..Machine::options() };
    let viommu = machine.start_with(patient).unwrap().go_live().unwrap();
    let domains = [EP, EP2].map(|id| {
        let domain = viommu.create_domain(Default::default()).unwrap();
        (id, viommu.open(id, &domain, EndpointOptions::default()).unwrap())
    });
    thread::scope(|scope| {
        for seed in 0..4 {
            let (machine, viommu, (id, endpoint)) = (&machine, &viommu, &domains[seed % 2]);
            scope.spawn(move || {
                let mut rng = Rng::new(seed as u64);
                let mut live = Vec::new();
                for _ in 0..300 {
                    if live.len() < 8 && rng.below(2) == 0 {
                        let (held, phys) = machine.lend(PAGE);
                        live.push((endpoint.adopt(held, Direction::Both).unwrap(), phys));
                    } else if !live.is_empty() {
                        let (mapping, phys) = live.swap_remove(rng.below(live.len() as u64) as usize);
                        let at = mapping.iova().get();
                        machine.dma_write(*id, at, &[seed as u8]).unwrap();
                        assert_eq!(machine.dma_read(*id, at, 1).unwrap(), [seed as u8]);
                        endpoint.unmap(mapping).unwrap();
                        assert!(machine.is_lent_back(phys));
                    }
                    if rng.below(10) == 0 {
                        viommu.poll();
                    }
                }
                for (mapping, _) in live {
                    endpoint.unmap(mapping).unwrap();
                }
                assert_eq!(take_broken(), Broken::NONE);
            });
        }
    });
    assert_eq!(viommu.stats().quarantined_mappings, 0);
}

/// The lock that comes with the crate.
#[cfg(feature = "spin")]
mod spin {
    use virtio_iommu::{DmaMemory, DomainOptions, Platform, SpinNotInInterrupts, Viommu};
    use virtio_iommu_model::Config;

    use crate::support::{ANYWHERE, EP, Machine, PAGE, RW, TestPlatform};

    /// The same platform with the lock that comes with the crate.
    struct Spinning(TestPlatform);

    // SAFETY: the tests' platform does all the work.
    unsafe impl Platform for Spinning {
        type Lock = SpinNotInInterrupts;

        fn dma_alloc(&self, len: usize, align: usize) -> Option<DmaMemory> {
            self.0.dma_alloc(len, align)
        }

        unsafe fn dma_free(&self, memory: DmaMemory, align: usize) {
            // SAFETY: the caller's promise.
            unsafe { self.0.dma_free(memory, align) };
        }
    }

    #[test]
    fn the_spin_lock_works_as_the_drivers_lock() {
        let machine = Machine::new(Config::default());
        let options = Machine::options();
        let staged = Viommu::start(machine.transport(), Spinning(machine.platform()), options).unwrap();
        staged.introduce(EP).unwrap();
        let viommu = staged.go_live().unwrap();
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        viommu.attach(EP, &domain).unwrap();
        let memory = machine.memory(PAGE);
        // SAFETY: nobody but the test uses the memory.
        let at = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
        assert!(machine.reaches(EP, at.get()));
    }
}
