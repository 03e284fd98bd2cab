//! A queue that is reset by itself (RING_RESET).

use virtio_iommu::transport::{DeviceStatus, TransportError};
use virtio_iommu::{
    Direction, DmaDevice, DomainOptions, EndpointOptions, Features, Iova, MapError, Options, Platform,
    RecoverError, RequestError, StartError,
};
use virtio_iommu_model::{Config, Execute, GuestMemory, Inject, Release, feature};

use super::bench;
use super::futures::Task;
use super::hooked::{self, Step};
use crate::support::{EP, EP2, Machine, PAGE, RW};

const AT: Iova = Iova::new(0x10_0000);
const BOTH: [Execute; 2] = [Execute::Now, Execute::AtRelease];

/// Fails when RING_RESET is accepted where the transport cannot do it, or a queue is reset without it.
#[test]
fn without_the_feature_nothing_is_touched() {
    let without = Config { features: Config::default().features & !feature::RING_RESET, ..Config::default() };
    for (config, can, expected) in
        [(without, true, false), (Config::default(), false, false), (Config::default(), true, true)]
    {
        let (machine, viommu, hooks) = hooked::live(config, can);
        hooks.take_steps();
        assert_eq!(viommu.features().contains(Features::RING_RESET), expected);
        assert_eq!(machine.device().negotiated_features() & feature::RING_RESET != 0, expected);
        if expected {
            continue;
        }
        assert_eq!(viommu.reset_queues(), Err(RecoverError::NoRingReset));
        assert_eq!(hooks.take_steps(), []);
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        viommu.attach(EP, &domain).unwrap();
    }
}

/// Fails when a slot that the device had stays lost, or an answer comes twice.
#[test]
fn slots_come_back() {
    for machine in [Machine::new(Config::default()), Machine::clockless(Config::default())] {
        let viommu =
            machine.start_with(Options { queue_size: 4, ..Machine::options() }).unwrap().go_live().unwrap();
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        viommu.attach(EP, &domain).unwrap();
        let memory = machine.memory(PAGE).phys;
        // SAFETY: nobody but the test uses the memory.
        let map = |page: u64| unsafe { domain.map_at(Iova::new(page * PAGE), memory, PAGE, RW) };
        for round in 0..3 {
            machine.inject([Inject::Hold(Execute::Now), Inject::Drop(Execute::AtRelease)]);
            assert!(map(1).is_err() && map(2).is_err());
            let full = map(3);
            assert!(matches!(full, Err(MapError::NotSent(RequestError::NoSlot))), "{round}");
            viommu.reset_queues().unwrap();
            assert_eq!(machine.release(Release::All), 0, "the device forgot them");
            viommu.poll();
            assert_eq!((viommu.stats().abandoned_requests, viommu.stats().stray_answers), (0, 0));
            assert_eq!((viommu.stats().quarantined_mappings, viommu.reclaim()), (2, 2));
            for page in 1..4 {
                map(page).unwrap();
                assert!(machine.reaches(EP, page * PAGE));
            }
            // SAFETY: mapped above.
            unsafe { domain.unmap(Iova::new(PAGE), 3 * PAGE) }.unwrap();
        }
    }
}

/// Fails when a request that the device forgot counts as carried out, or as not; or when what it was about stays in doubt
/// for ever.
#[test]
fn i03_what_was_in_flight_is_of_unknown_outcome() {
    for execute in BOTH {
        let mut bench = bench(Config::default());
        let (held, mapping) = bench.machine.lend(PAGE);
        bench.machine.inject([Inject::Drop(execute)]);
        bench.endpoint.adopt(held, Direction::Both).unwrap_err();
        let (held, unmapping) = bench.machine.lend(PAGE);
        let mapped = bench.endpoint.adopt(held, Direction::Both).unwrap();
        bench.machine.inject([Inject::Drop(execute)]);
        bench.endpoint.unmap(mapped).unwrap_err();
        bench.machine.inject([Inject::Drop(execute)]);
        bench.viommu.detach(EP2).unwrap_err();
        bench.viommu.detach(EP2).unwrap_err();

        bench.viommu.reset_queues().unwrap();
        assert_eq!(bench.viommu.stats().quarantined_mappings, 3);
        let back = |bench: &super::Bench| {
            [bench.stuck, mapping, unmapping].map(|phys| bench.machine.is_lent_back(phys))
        };
        assert_eq!(back(&bench), [false; 3]);
        assert_eq!((bench.viommu.reclaim(), back(&bench)), (3, [true; 3]));
        // Where the DETACH was carried out the device says that it is not there.
        bench.viommu.detach(EP2).unwrap();
        assert_eq!(bench.machine.device().domain_of(EP2.get()), None);
        bench.machine.inject([Inject::Drop(execute)]);
        bench.viommu.attach(EP2, &bench.domain).unwrap_err();
        bench.viommu.reset_queues().unwrap();
        // Where it was not, that it is not there.
        bench.viommu.detach(EP2).unwrap();
        bench.viommu.attach(EP2, &bench.domain).unwrap();
        bench.assert_works();
    }
}

/// Fails when a future that waits is not woken, or waits on.
#[test]
fn futures_in_flight_end() {
    for execute in BOTH {
        let bench = bench(Config::default());
        let memory = bench.machine.memory(PAGE).phys;
        bench.machine.inject([Inject::Drop(execute)]);
        // SAFETY: nobody but the test uses the memory.
        let mut task = Task::start(unsafe { bench.domain.map_at_async(AT, memory, PAGE, RW) });
        bench.viommu.reset_queues().unwrap();
        assert!(task.is_woken());
        let mapped = task.poll().unwrap();
        assert!(
            matches!(mapped, Err(MapError::Quarantined { error: RequestError::Reset, .. })),
            "{mapped:?}"
        );
        assert_eq!(bench.machine.reaches(EP, AT.get()), execute == Execute::Now);
        assert_eq!(bench.viommu.reclaim(), 2);
        assert!(!bench.machine.reaches(EP, AT.get()));
    }
}

/// Fails when a PROBE that nobody looked after keeps its area: no endpoint could be probed again, and all were lost.
#[test]
fn a_probe_in_flight_stands_in_nobodys_way() {
    let mut bench = bench(Config::default());
    let new = virtio_iommu::EndpointId::new(10);
    bench.machine.device().add_endpoint(virtio_iommu_model::Endpoint::new(new.get()));
    bench.machine.inject([Inject::Drop(Execute::Now)]);
    let (viommu, domain) = (bench.viommu.clone(), bench.domain.clone());
    let mut task = Task::start(viommu.attach_async(new, &domain));
    bench.fail();
    let recovered = bench.recover().unwrap();
    assert_eq!((recovered.endpoints, recovered.lost.len()), (2, 0), "{recovered:?}");
    assert!(task.is_woken() && task.poll().unwrap().is_err());
    bench.viommu.attach(new, &bench.domain).unwrap();
    assert!(bench.machine.reaches(new, bench.live_at()));
    bench.assert_works();
}

/// Fails when a ring that the device broke stays broken, or `dead` stays set.
#[test]
fn a_broken_used_ring_is_mended() {
    for jump in [Inject::UsedJump(300), Inject::UsedJump(0x8000)] {
        let mut bench = bench(Config::default());
        let memory = bench.machine.memory(PAGE).phys;
        // SAFETY: nobody but the test uses the memory.
        let map = |bench: &super::Bench| unsafe { bench.domain.map_at(AT, memory, PAGE, RW) };
        bench.machine.inject([jump]);
        let _ = map(&bench);
        let broken = bench.viommu.detach(EP2).unwrap_err();
        assert!(broken.to_string().contains("used index"), "{broken}");
        bench.viommu.reset_queues().unwrap();
        bench.viommu.reclaim();
        if bench.machine.reaches(EP, AT.get()) {
            // SAFETY: mapped above.
            unsafe { bench.domain.unmap(AT, PAGE) }.unwrap();
        }
        bench.assert_works();
    }
}

/// Fails when a broken event queue stays as it is, or its buffers are not posted again.
#[test]
fn a_broken_event_queue_is_mended() {
    let (bench, hooks) = hooked::bench(Config::default());
    let fault = |bench: &super::Bench| {
        assert!(!bench.machine.reaches(EP, 0xdead_0000));
        bench.viommu.poll()
    };
    assert_eq!(fault(&bench), 1);
    let used = hooks.used_ring(1);
    bench.machine.on_relax(move |_, ram| ram.write(used + 2, &0x7000_u16.to_le_bytes()).unwrap());
    bench.machine.platform().relax();
    bench.machine.on_relax(|_, _| {});
    assert_eq!((bench.viommu.poll(), fault(&bench), fault(&bench)), (0, 0, 0));

    hooks.take_steps();
    let viommu = bench.viommu.clone();
    hooks.at_each(move |_| {
        // What an interrupt does. The model would tell of a doorbell for a queue that is not set up.
        viommu.poll();
    });
    bench.viommu.reset_queues().unwrap();
    hooks.stop();
    let reset: Vec<_> =
        hooks.take_steps().into_iter().filter(|step| matches!(step, Step::ResetQueue(_))).collect();
    assert_eq!(reset, [Step::ResetQueue(0), Step::ResetQueue(1)]);
    for _ in 0..300 {
        assert_eq!(fault(&bench), 1, "more than there are buffers");
    }
    // The request queue alone is reset where the other one is well.
    hooks.take_steps();
    bench.viommu.reset_queues().unwrap();
    assert!(!hooks.take_steps().contains(&Step::ResetQueue(1)));
    assert_eq!(fault(&bench), 1);
}

/// Fails when a queue that the device may still look at is given to it again, or the driver goes on without one.
#[test]
fn a_queue_reset_that_does_not_end_leaves_the_driver_dead() {
    let (mut bench, hooks) = hooked::bench(Config::default());
    hooks.set_endless(true);
    let polls = bench.machine.relaxed();
    assert_eq!(bench.viommu.reset_queues(), Err(RecoverError::QueueTimedOut { queue: 0 }));
    assert!(bench.machine.relaxed() - polls < 1000);
    assert!(hooks.take_steps().iter().all(|step| !matches!(step, Step::Enable(_))));
    hooks.set_endless(false);
    assert_eq!(bench.viommu.stats().abandoned_requests, 1, "it is the device's as before");
    // SAFETY: nobody but the test uses the memory.
    let mapped = unsafe { bench.domain.map_at(AT, bench.machine.memory(PAGE).phys, PAGE, RW) };
    assert!(matches!(mapped, Err(MapError::NotSent(RequestError::NeedsReset))), "{mapped:?}");
    assert_eq!(bench.viommu.reset_queues(), Err(RecoverError::NeedsReset));
    assert_eq!(bench.recover().unwrap().endpoints, 2);
    bench.assert_works();
}

/// Fails when the driver goes on without a queue, or counts it as reset again.
#[test]
fn a_queue_that_cannot_be_enabled_again_leaves_the_driver_dead() {
    let (mut bench, hooks) = hooked::bench(Config::default());
    hooks.refuse(Some(0));
    let refused = StartError::Queue(TransportError::NoQueue { queue: 0 });
    assert_eq!(bench.viommu.reset_queues(), Err(RecoverError::Start(refused)));
    assert!(bench.endpoint.alloc_coherent(1).is_err());
    hooks.refuse(None);
    assert_eq!(bench.viommu.reset_queues(), Err(RecoverError::NeedsReset));
    assert_eq!(bench.recover().unwrap().endpoints, 2);
    bench.assert_works();
}

/// Fails when a queue is reset on a device that asks for more.
#[test]
fn a_device_that_asks_for_a_reset_gets_all_of_it() {
    let (mut bench, hooks) = hooked::bench(Config::default());
    bench.fail();
    assert_eq!(bench.viommu.reset_queues(), Err(RecoverError::NeedsReset));
    assert_eq!(hooks.take_steps(), []);
    assert_eq!(bench.recover().unwrap().endpoints, 2);
    bench.assert_works();
    let on = |step: &Step| matches!(step, Step::Status(status) if *status == DeviceStatus::empty());
    assert!(hooks.take_steps().iter().any(on));
}

/// Fails when an index of the first life is carried on, or the indices do not wrap in the second.
#[test]
fn the_ring_works_for_more_requests_than_its_index_counts() {
    for event_idx in [feature::RING_EVENT_IDX, 0] {
        let features = Config::default().features & !feature::RING_EVENT_IDX | event_idx;
        let (machine, viommu, domain) =
            Machine::attached(Config { features, log_limit: 0, ..Config::default() });
        let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
        let memory = machine.memory(PAGE).phys;
        for life in 0..3 {
            for _ in 0..if life == 1 { 33_000 } else { 150 } {
                // SAFETY: nobody but the test uses the memory.
                let mapping = unsafe { endpoint.map(memory, PAGE as usize, Direction::Both) }.unwrap();
                endpoint.unmap(mapping).unwrap();
            }
            if life == 0 {
                viommu.reset_queues().unwrap();
            } else {
                // SAFETY: endpoints of a test do DMA only when it says so.
                assert_eq!(unsafe { viommu.recover() }.unwrap().endpoints, 1);
            }
        }
        assert_eq!((viommu.stats().stray_answers, viommu.stats().quarantined_mappings), (0, 0));
    }
}
