//! What goes over the wire, and who waits meanwhile.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use virtio_iommu::transport::DeviceStatus;
use virtio_iommu::{
    BypassError, Domain, DomainOptions, EndpointId, Iova, Leave, MapError, PhysAddr, Prot, RecoverError,
    ShutdownError,
};
use virtio_iommu_model::{Config, Endpoint, Request, flag};

use super::hooked::{self, Step};
use super::{Bench, devices};
use crate::support::{EP, EP2, PAGE, RW, TestPlatform};

const AT: Iova = Iova::new(0x10_0000);

/// Fails when the bypass is closed after an ATTACH, a doorbell is rung for each MAP, or what is in quarantine is mapped.
#[test]
fn i09_closed_then_attached_then_mapped() {
    for config in devices() {
        let (bench, hooks) = hooked::bench(config);
        let memory = bench.machine.memory(4 * PAGE).phys;
        for (page, prot) in [(0, Prot::READ), (1, Prot::WRITE), (2, RW)] {
            let at = Iova::new(AT.get() + 2 * page * PAGE);
            // SAFETY: nobody but the test uses the memory.
            unsafe { bench.domain.map_at(at, memory, PAGE, prot) }.unwrap();
        }
        bench.fail();
        bench.machine.device().clear_log();
        hooks.take_steps();
        bench.recover().unwrap();

        let id = bench.domain.id().get();
        let map = |virt_start: u64, pages: u64, phys_start: u64, flags| Request::Map {
            domain: id,
            virt_start,
            virt_end: virt_start + pages * PAGE - 1,
            phys_start,
            flags,
        };
        let requests = bench.machine.requests();
        let shape: Vec<_> = requests.iter().take(4).collect();
        for (at, endpoint) in [(0, EP), (2, EP2)] {
            assert!(matches!(shape[at], Request::Probe { endpoint: it, .. } if *it == endpoint.get()));
            let attach = Request::Attach { domain: id, endpoint: endpoint.get(), flags: 0, reserved: 0 };
            assert_eq!(*shape[at + 1], attach);
        }
        let (read, write) = (flag::MAP_READ, flag::MAP_WRITE);
        let at = AT.get();
        let live = map(bench.live_at(), 2, bench.live_phys.get(), read | write);
        let mut expected = vec![
            live,
            map(at, 1, memory.get(), read),
            map(at + 2 * PAGE, 1, memory.get(), write),
            map(at + 4 * PAGE, 1, memory.get(), read | write),
        ];
        let start = |request: &Request| match *request {
            Request::Map { virt_start, .. } => virt_start,
            _ => 0,
        };
        expected.sort_by_key(start);
        assert_eq!(requests[4..], expected);

        let steps = hooks.take_steps();
        let at = |step| steps.iter().position(|it| *it == step).unwrap();
        let written = at(Step::WriteConfig);
        let running = steps
            .iter()
            .position(|it| matches!(it, Step::Status(status) if status.contains(DeviceStatus::DRIVER_OK)));
        assert!(at(Step::Enable(0)) < running.unwrap() && at(Step::Enable(1)) < running.unwrap());
        assert!(running.unwrap() < written && written < at(Step::Notify(0)));
        let rung = steps.iter().filter(|it| **it == Step::Notify(0)).count();
        assert_eq!(rung, 5, "two PROBEs, two ATTACHes, and once for all MAPs");
    }
}

#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

type Mapping = Pin<Box<dyn Future<Output = Result<(), MapError>> + Send>>;

/// Somebody else who maps a page, and looks whether he may at every step of the recovery from the `first` one on. He also
/// does what interrupts and other CPUs do.
fn meanwhile(config: Config, first: usize, recover: impl Fn(&Bench)) {
    let (mut bench, hooks) = hooked::bench(config);
    let woken = Arc::new(Count::default());
    let begun: Arc<Mutex<Option<Mapping>>> = Arc::default();
    let (task, waker) = (Arc::clone(&begun), Waker::from(Arc::clone(&woken)));
    let (viommu, domain) = (bench.viommu.clone(), bench.domain.clone());
    let memory = bench.machine.memory(PAGE).phys;
    let mut steps = 0;
    hooks.at_each(move |step| {
        steps += 1;
        if steps < first {
            return;
        }
        let domain = domain.clone();
        let mut task = task.lock().unwrap();
        let mapping = task.get_or_insert_with(|| {
            // SAFETY: nobody but the test uses the memory.
            Box::pin(async move { unsafe { domain.map_at_async(AT, memory, PAGE, RW) }.await })
        });
        let polled = mapping.as_mut().poll(&mut Context::from_waker(&waker));
        assert_eq!(polled, Poll::Pending, "{step:?}");
        viommu.poll();
        assert_eq!(viommu.close_bypass(), Err(BypassError::Recovering));
        assert_eq!(viommu.reset_queues(), Err(RecoverError::Busy));
        // SAFETY: endpoints of a test do DMA only when it says so.
        let refused = unsafe { (viommu.open_bypass(), viommu.recover(), viommu.shutdown(Leave::AsFound)) };
        let expected =
            (Err(BypassError::Recovering), Err(RecoverError::Busy), Err(ShutdownError::Recovering));
        assert_eq!(refused, expected);
    });
    woken.0.store(0, Ordering::Relaxed);
    recover(&bench);
    hooks.stop();
    assert!(woken.0.load(Ordering::Relaxed) > 0);
    let sent = |bench: &Bench| {
        let requests = bench.machine.requests();
        requests.iter().any(|it| matches!(it, Request::Map { virt_start, .. } if *virt_start == AT.get()))
    };
    assert!(!sent(&bench));
    let mapping = begun.lock().unwrap().take();
    let polled = mapping.unwrap().as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert_eq!(polled, Poll::Ready(Ok(())));
    assert!(sent(&bench) && bench.machine.reaches(EP2, AT.get()));
    // SAFETY: mapped above.
    unsafe { bench.domain.unmap(AT, PAGE) }.unwrap();
    // Events come again, each once.
    assert!(!bench.machine.reaches(EP, AT.get()));
    let flows = bench.machine.device().counters().events > 0;
    assert_eq!(bench.viommu.poll() > 0, flows);
    bench.viommu.reclaim();
    bench.assert_works();
}

/// Fails when an operation that begins during a recovery is refused or sent, when a poll touches a queue that is not set
/// up, or when anything else is let in.
#[test]
fn all_others_wait_for_the_end_of_a_recovery() {
    for config in devices() {
        // The last is a doorbell of the readmissions, when the domain has no endpoint for certain.
        for first in [1, 4, 10, 12] {
            meanwhile(config.clone(), first, |bench| {
                bench.fail();
                assert_eq!(bench.recover().unwrap().endpoints, 2);
            });
        }
    }
}

/// The same for a queue's own reset, which leaves the domain as it is.
#[test]
fn all_others_wait_for_the_end_of_a_queue_reset() {
    for first in [1, 2] {
        meanwhile(Config::default(), first, |bench| {
            bench.viommu.reset_queues().unwrap();
            assert_eq!(bench.viommu.stats().abandoned_requests, 0);
        });
    }
}

/// Fails when a domain that is created meanwhile gets a number that is in use.
#[test]
fn domains_that_are_created_meanwhile_are_their_own() {
    let (bench, hooks) = hooked::bench(Config { domain_range: 1..=4, ..Config::qemu_10() });
    let viommu = bench.viommu.clone();
    let created = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&created);
    hooks.at_each(move |step| {
        if step == Step::Notify(0) && list.lock().unwrap().is_empty() {
            let domain = viommu.create_domain(DomainOptions::default());
            list.lock().unwrap().push(domain.unwrap());
        }
    });
    bench.fail();
    assert_eq!(bench.recover().unwrap().endpoints, 2);
    hooks.stop();
    let other = created.lock().unwrap().pop().unwrap();
    assert_ne!(other.id(), bench.domain.id());
    let id = EndpointId::new(10);
    bench.machine.device().add_endpoint(Endpoint::new(id.get()));
    bench.viommu.attach(id, &other).unwrap();
    assert!(!bench.machine.reaches(id, bench.live_at()));
}

/// What a mapping at an address of the driver's choice comes to at its first poll, which takes the quick way where all is
/// as usual. Dropped then.
fn first_poll(domain: &Domain<TestPlatform>, memory: PhysAddr) -> Poll<Result<Iova, MapError>> {
    let limit = Iova::new(u64::MAX);
    // SAFETY: nobody but the test uses the memory.
    let mut mapping = Box::pin(unsafe { domain.map_async(memory, PAGE, RW, limit) });
    mapping.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::new(Count::default()))))
}

/// Fails when `StateLock` takes a recovery for usual: then a request goes into a ring that is being reset.
#[test]
fn nobody_takes_the_quick_way_while_a_queue_is_reset() {
    let (bench, hooks) = hooked::bench(Config::default());
    let (domain, memory) = (bench.domain.clone(), bench.machine.memory(PAGE).phys);
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let requests = domain.stats().requests;
    hooks.at_each(move |step| {
        if matches!(step, Step::ResetQueue(_) | Step::Enable(_)) {
            assert_eq!(first_poll(&domain, memory), Poll::Pending, "{step:?}");
            assert_eq!(domain.stats().requests, requests, "{step:?}");
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    bench.viommu.reset_queues().unwrap();
    hooks.stop();
    assert!(asked.load(Ordering::Relaxed) >= 2);
}

/// Fails when the quick way does not look whether its domain gets its mappings again.
#[test]
fn nothing_new_is_mapped_the_quick_way_before_a_replay_ends() {
    let (machine, viommu, hooks) = hooked::live(Config::default(), true);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    let memory = machine.memory(PAGE).phys;
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, memory, PAGE, RW) }.unwrap();
    viommu.detach(EP).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let (count, handle) = (Arc::clone(&asked), domain.clone());
    hooks.at_each(move |step| {
        if step == Step::Notify(0) {
            assert_eq!(first_poll(&handle, memory), Poll::Ready(Err(MapError::NoEndpoint)));
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    viommu.attach(EP, &domain).unwrap();
    hooks.stop();
    assert_eq!(asked.load(Ordering::Relaxed), 2, "ATTACH, and the MAP of what was live");
    assert!(machine.reaches(EP, AT.get()));
}
