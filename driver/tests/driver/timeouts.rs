//! Every wait ends, and what a request touches that was not answered stays in quarantine until it is (I3).

use virtio_iommu::{
    AttachError, DeferredBounds, DetachError, Direction, DmaDevice, DmaError, DmaMapping, Domain,
    DomainOptions, Endpoint, EndpointOptions, Iova, MapError, PhysAddr, PhysSegment, RequestError, Status,
    UnmapError, UnmapPolicy, Unmapped, Viommu,
};
use virtio_iommu_model::{Config, Execute, Inject, Release};

use crate::support::{EP, EP2, Machine, PAGE, POLLS, RW, TestPlatform};

const AT: Iova = Iova::new(0x10_0000);
const BOTH: [Execute; 2] = [Execute::Now, Execute::AtRelease];

/// With a clock and without.
fn machines() -> [Machine; 2] {
    [Machine::new(Config::default()), Machine::clockless(Config::default())]
}

struct Bench {
    // Before the machine, so that the last check sees what dropping them does.
    endpoint: Endpoint<TestPlatform>,
    domain: Domain<TestPlatform>,
    viommu: Viommu<TestPlatform>,
    machine: Machine,
}

fn bench(machine: Machine) -> Bench {
    bench_with(machine, UnmapPolicy::Strict)
}

fn bench_with(machine: Machine, unmap: UnmapPolicy) -> Bench {
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions { unmap, ..DomainOptions::default() }).unwrap();
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    Bench { endpoint, domain, viommu, machine }
}

impl Bench {
    fn adopt(&self) -> (Result<DmaMapping, DmaError>, PhysAddr) {
        let (held, phys) = self.machine.lend(PAGE);
        let mapped = self.endpoint.adopt(held, Direction::Both);
        let mapped = mapped.map_err(|(error, back)| {
            let in_doubt = matches!(error, DmaError::Map(MapError::Quarantined { .. }));
            assert_eq!(back.is_none(), in_doubt, "{error}");
            error
        });
        (mapped, phys)
    }

    /// Nothing is in doubt any more.
    fn assert_clean(&self) {
        let stats = self.viommu.stats();
        let doubt = (stats.abandoned_requests, stats.quarantined_mappings, stats.quarantined_bytes);
        assert_eq!(doubt, (0, 0, 0));
    }

    fn assert_quarantined(&self, mappings: usize, requests: u64) {
        let stats = self.viommu.stats();
        assert_eq!((stats.quarantined_mappings, stats.abandoned_requests), (mappings, requests));
        assert_eq!(stats.quarantined_bytes, mappings as u64 * PAGE);
    }
}

fn is_timeout(error: &MapError) -> bool {
    matches!(error, MapError::Quarantined { error: RequestError::TimedOut, .. })
}

/// Fails when `lose` does nothing, or `finish` frees no abandoned slot, or `settle_map` takes a late OK for live.
#[test]
fn i03_a_map_without_answer_keeps_memory_addresses_and_slot() {
    for execute in BOTH {
        for machine in machines() {
            let bench = bench(machine);
            let polls = bench.machine.relaxed();
            bench.machine.inject([Inject::Hold(execute)]);
            let (mapped, phys) = bench.adopt();
            assert!(matches!(mapped, Err(DmaError::Map(error)) if is_timeout(&error)));
            assert!((POLLS - 1..=POLLS).contains(&(bench.machine.relaxed() - polls)));
            bench.assert_quarantined(1, 1);
            // Trying does not help as long as the device owes the answer.
            assert_eq!((bench.viommu.reclaim(), bench.viommu.poll()), (0, 0));
            assert!(!bench.machine.is_lent_back(phys) && bench.machine.is_live(phys));

            // The next mapping gets other addresses and another slot, of which the model would tell.
            let (other, other_phys) = bench.adopt();
            let other = other.unwrap();
            bench.endpoint.unmap(other).unwrap();
            assert!(bench.machine.is_lent_back(other_phys));

            bench.machine.release(Release::All);
            bench.viommu.poll();
            assert_eq!(bench.machine.device().mappings(bench.domain.id().get()).count(), 1);
            bench.assert_quarantined(1, 0);
            assert!(!bench.machine.is_lent_back(phys), "the device has it mapped");
            assert_eq!(bench.viommu.reclaim(), 1);
            assert!(bench.machine.is_lent_back(phys));
            bench.assert_clean();
        }
    }
}

#[test]
fn i03_a_map_that_is_refused_late_is_free_at_once() {
    let bench = bench(Machine::new(Config { max_mappings: 1, ..Config::default() }));
    let (first, _) = bench.adopt();
    let first = first.unwrap();
    bench.machine.inject([Inject::Hold(Execute::AtRelease)]);
    let (mapped, phys) = bench.adopt();
    assert!(mapped.is_err());
    bench.machine.release(Release::All);
    bench.viommu.poll();
    assert!(bench.machine.is_lent_back(phys));
    bench.assert_clean();
    bench.endpoint.unmap(first).unwrap();
}

/// Fails when `settle_unmap` lets go on an error, or `lose` forgets the UNMAP.
#[test]
fn i03_i01_an_unmap_without_answer_keeps_the_memory() {
    for execute in BOTH {
        for machine in machines() {
            let bench = bench(machine);
            let (mapping, phys) = bench.adopt();
            let mapping = mapping.unwrap();
            let at = mapping.iova().get();
            bench.machine.inject([Inject::Hold(execute)]);
            let error = bench.endpoint.unmap(mapping).unwrap_err();
            assert!(matches!(error, UnmapError::Request { error: RequestError::TimedOut, .. }));
            bench.assert_quarantined(1, 1);
            assert_eq!(bench.machine.reaches(EP, at), execute == Execute::AtRelease);
            assert_eq!(bench.viommu.reclaim(), 0);
            assert!(!bench.machine.is_lent_back(phys) && bench.machine.is_live(phys));
            // SAFETY: refused before anything is sent.
            let reused = unsafe { bench.domain.map_at(Iova::new(at), phys, PAGE, RW) };
            assert!(matches!(reused, Err(MapError::InUse(_))), "I2: its addresses are not free");

            bench.machine.release(Release::All);
            bench.viommu.poll();
            assert!(!bench.machine.reaches(EP, at));
            assert!(bench.machine.is_lent_back(phys));
            bench.assert_clean();
        }
    }
}

#[test]
fn i01_an_unmap_that_is_refused_keeps_the_memory() {
    for answer in [Inject::Refuse(3), Inject::Unwritten, Inject::Refuse(0x77), Inject::UsedLen(0)] {
        let bench = bench(Machine::new(Config::default()));
        let (mapping, phys) = bench.adopt();
        let mapping = mapping.unwrap();
        let at = mapping.iova().get();
        bench.machine.inject([answer]);
        assert!(bench.endpoint.unmap(mapping).is_err());
        bench.viommu.poll();
        bench.assert_quarantined(1, 0);
        assert!(!bench.machine.is_lent_back(phys));
        assert_eq!(bench.viommu.reclaim(), 1);
        assert!(!bench.machine.reaches(EP, at) && bench.machine.is_lent_back(phys));
        bench.assert_clean();
    }
}

/// The other way back: the last endpoint leaves, and nothing bypasses.
#[test]
fn i01_the_end_of_a_domain_frees_its_quarantine() {
    let bench = bench(Machine::new(Config::default()));
    let (mapping, phys) = bench.adopt();
    let mapping = mapping.unwrap();
    let at = mapping.iova().get();
    bench.machine.inject([Inject::Refuse(3)]);
    assert!(bench.endpoint.unmap(mapping).is_err());
    bench.viommu.attach(EP2, &bench.domain).unwrap();
    bench.viommu.detach(EP).unwrap();
    assert!(bench.machine.reaches(EP2, at) && !bench.machine.is_lent_back(phys));
    bench.viommu.detach(EP2).unwrap();
    assert!(!bench.machine.reaches(EP2, at) && bench.machine.is_lent_back(phys));
    bench.assert_clean();
}

/// A MAP in flight may be carried out in whatever domain has the number then: nothing is freed before its answer.
#[test]
fn i03_the_end_of_a_domain_does_not_free_what_is_in_flight() {
    for execute in BOTH {
        let bench = bench(Machine::new(Config::default()));
        bench.machine.inject([Inject::Hold(execute)]);
        let (mapped, phys) = bench.adopt();
        assert!(mapped.is_err());
        bench.viommu.detach(EP).unwrap();
        assert!(!bench.machine.is_lent_back(phys));
        assert_eq!(bench.viommu.attach(EP, &bench.domain), Err(AttachError::DeadDomain));
        bench.machine.release(Release::All);
        bench.viommu.poll();
        bench.viommu.reclaim();
        assert!(bench.machine.is_lent_back(phys));
        bench.assert_clean();
        assert_eq!(bench.domain.stats().mapped_bytes, 0);
        bench.viommu.attach(EP, &bench.domain).unwrap();
    }
}

/// Fails when `lose` takes the endpoint for detached.
#[test]
fn i03_an_attach_without_answer_leaves_the_endpoint_in_doubt() {
    for execute in BOTH {
        for machine in machines() {
            let viommu = machine.bring_up();
            let domain = viommu.create_domain(DomainOptions::default()).unwrap();
            let other = viommu.create_domain(DomainOptions::default()).unwrap();
            machine.inject([Inject::Hold(execute)]);
            let error = RequestError::TimedOut;
            assert_eq!(viommu.attach(EP, &domain), Err(AttachError::Request { endpoint: EP, error }));
            assert_eq!(viommu.attach(EP, &other), Err(AttachError::Busy(EP)));
            assert_eq!(viommu.detach(EP), Err(DetachError::NotAttached(EP)));
            machine.release(Release::All);
            viommu.poll();
            assert_eq!(viommu.attach(EP, &domain), Ok(()), "the late answer was yes");
            viommu.detach(EP).unwrap();
            viommu.attach(EP, &other).unwrap();
            assert_eq!(viommu.stats().abandoned_requests, 0);
        }
    }
}

#[test]
fn i03_a_detach_without_answer_leaves_the_endpoint_in_doubt() {
    for execute in BOTH {
        for machine in machines() {
            let bench = bench(machine);
            let (mapping, phys) = bench.adopt();
            let mapping = mapping.unwrap();
            let at = mapping.iova().get();
            bench.machine.inject([Inject::Hold(execute)]);
            assert!(bench.viommu.detach(EP).is_err());
            assert_eq!(bench.viommu.attach(EP, &bench.domain), Err(AttachError::Busy(EP)));
            assert_eq!(bench.machine.reaches(EP, at), execute == Execute::AtRelease);
            assert!(!bench.machine.is_lent_back(phys));
            bench.machine.release(Release::All);
            bench.viommu.poll();
            assert!(!bench.machine.reaches(EP, at));
            let (unmapped, requests, _) = bench.machine.traffic(|| bench.endpoint.unmap(mapping));
            assert_eq!((unmapped, requests), (Ok(Unmapped::Now), 0));
            assert!(bench.machine.is_lent_back(phys));
            bench.viommu.attach(EP, &bench.domain).unwrap();
        }
    }
}

#[test]
fn i03_a_probe_without_answer_keeps_its_area() {
    for execute in BOTH {
        let machine = Machine::new(Config::default());
        let staged = machine.start().unwrap();
        machine.inject([Inject::Hold(execute)]);
        assert!(staged.introduce(EP).is_err());
        // There is one area for PROBE, and it is the device's now.
        let refused = staged.introduce(EP2).unwrap_err();
        assert!(matches!(refused, virtio_iommu::StartError::Endpoint { error: RequestError::NoSlot, .. }));
        machine.release(Release::All);
        assert!(staged.introduce(EP2).is_ok() && staged.introduce(EP).is_ok());
        assert_eq!(staged.stats().abandoned_requests, 0);
    }
}

#[test]
fn an_answer_during_the_wait_is_in_time() {
    let bench = bench(Machine::new(Config::default()));
    for which in [Release::Oldest, Release::AllReversed] {
        bench.machine.inject([Inject::Hold(Execute::AtRelease)]);
        let mut left = POLLS / 2;
        bench.machine.on_relax(move |device, ram| {
            left = left.saturating_sub(1);
            if left == 0 {
                device.release(which, ram);
            }
        });
        let (mapping, phys) = bench.adopt();
        bench.endpoint.unmap(mapping.unwrap()).unwrap();
        assert!(bench.machine.is_lent_back(phys));
    }
    bench.assert_clean();
}

/// Every slot lost: calls fail in bounded time, and send nothing.
#[test]
fn when_all_slots_are_lost_calls_fail_until_the_answers_come() {
    for machine in machines() {
        let options = virtio_iommu::Options { queue_size: 4, ..Machine::options() };
        let viommu = {
            let staged = machine.start_with(options).unwrap();
            staged.introduce(EP).unwrap();
            staged.go_live().unwrap()
        };
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
        let (held, kept) = machine.lend(PAGE);
        let kept_mapping = endpoint.adopt(held, Direction::Both).unwrap();
        let memory = machine.memory(PAGE);
        machine.inject([Inject::Hold(Execute::Now), Inject::Hold(Execute::AtRelease)]);
        // SAFETY: nobody but the test uses the memory, also when the outcome is unknown.
        let map = |at| unsafe { domain.map_at(Iova::new(at), memory.phys, PAGE, RW) };
        assert!(is_timeout(&map(0x1000).unwrap_err()) && is_timeout(&map(0x2000).unwrap_err()));

        let (result, requests, _) = machine.traffic(|| map(0x3000));
        assert!(matches!(result, Err(MapError::NotSent(RequestError::NoSlot))));
        assert_eq!(requests, 0);
        assert!(viommu.detach(EP).is_err());
        let unmapped = endpoint.unmap(kept_mapping).unwrap_err();
        assert!(matches!(unmapped, UnmapError::Request { error: RequestError::NoSlot, .. }));
        assert!(!machine.is_lent_back(kept));
        assert_eq!(viommu.stats().quarantined_mappings, 3);

        machine.release(Release::AllReversed);
        viommu.poll();
        assert_eq!(viommu.reclaim(), 3);
        assert!(machine.is_lent_back(kept));
        map(0x3000).unwrap();
        assert_eq!(viommu.stats().quarantined_mappings, 0);
    }
}

#[test]
fn requests_that_are_dropped_cost_their_slot_and_nothing_else() {
    let bench = bench(Machine::new(Config::default()));
    for lost in 1..=5 {
        bench.machine.inject([Inject::Drop(Execute::AtRelease)]);
        assert!(bench.adopt().0.is_err());
        bench.assert_quarantined(lost, lost as u64);
        let (mapping, _) = bench.adopt();
        bench.endpoint.unmap(mapping.unwrap()).unwrap();
    }
}

#[test]
fn a_device_that_asks_for_a_reset_is_not_waited_for_without_end() {
    for machine in machines() {
        let bench = bench(machine);
        let (mapping, phys) = bench.adopt();
        bench.machine.inject([Inject::NeedsReset]);
        let error = bench.endpoint.unmap(mapping.unwrap()).unwrap_err();
        assert!(matches!(error, UnmapError::Request { error: RequestError::NeedsReset, .. }));
        assert!(bench.adopt().0.is_err());
        assert!(bench.viommu.detach(EP).is_err());
        bench.viommu.poll();
        bench.viommu.reclaim();
        assert!(!bench.machine.is_lent_back(phys));
    }
}

/// I12: the first MAP of a domain answers INVAL, since its number has mappings of an earlier life.
#[test]
fn i12_numbers_that_are_not_fresh_are_replaced() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    let old = domain.id();
    // MAP, then DETACH and ATTACH under the next number, which has the same fate.
    let (refused, pass) = (Inject::Refuse(4), Inject::Pass);
    machine.inject([refused, pass, pass, refused]);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, memory.phys, PAGE, RW) }.unwrap();
    assert_eq!(domain.id().get(), old.get() + 2);
    assert!(machine.reaches(EP, AT.get()));
    assert_eq!(machine.device().domain_of(EP.get()), Some(domain.id().get()));
    // The number is not used again.
    for _ in 0..3 {
        assert_ne!(viommu.create_domain(DomainOptions::default()).unwrap().id(), old);
    }
    // A domain that worked is not renumbered.
    machine.inject([Inject::Refuse(4)]);
    let id = domain.id();
    // SAFETY: as above.
    let refused = unsafe { domain.map_at(Iova::new(0x20_0000), memory.phys, PAGE, RW) };
    assert!(matches!(refused, Err(MapError::Request { error: RequestError::Refused(Status::Inval), .. })));
    assert_eq!(domain.id(), id);
}

/// Fails when `map_runs` renumbers a domain whose records are not empty: the endpoint would be left detached.
#[test]
fn i12_a_domain_with_something_in_doubt_keeps_its_number() {
    let bench = bench(Machine::new(Config::default()));
    bench.machine.inject([Inject::Hold(Execute::AtRelease), Inject::Refuse(4)]);
    assert!(bench.adopt().0.is_err());
    let id = bench.domain.id();
    let memory = bench.machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    assert!(unsafe { bench.domain.map_at(AT, memory.phys, PAGE, RW) }.is_err());
    assert_eq!((bench.domain.id(), bench.machine.device().domain_of(EP.get())), (id, Some(id.get())));
    bench.machine.release(Release::All);
    // SAFETY: as above.
    unsafe { bench.domain.map_at(AT, memory.phys, PAGE, RW) }.unwrap();
}

#[test]
fn memory_goes_back_once_whatever_the_order() {
    let bench = bench(Machine::new(Config::default()));
    let lent: Vec<_> = (0..4)
        .map(|_| {
            bench.machine.inject([Inject::Hold(Execute::Now)]);
            let (held, phys) = bench.machine.lend(PAGE);
            assert!(bench.endpoint.adopt(held, Direction::Both).is_err());
            phys
        })
        .collect();
    bench.machine.release(Release::AllReversed);
    for _ in 0..3 {
        bench.viommu.poll();
        bench.viommu.reclaim();
    }
    // Memory that came back twice would have failed the machine's own check.
    assert!(lent.into_iter().all(|phys| bench.machine.is_lent_back(phys)));
    bench.assert_clean();
}

/// Fails when the second answer stays in the ring, behind one that was taken the quick way or behind a batch: the slot's next
/// request counts as answered by it, while the device still has it.
#[test]
fn i03_an_answer_that_comes_twice_answers_no_other_request() {
    for in_batch in [false, true] {
        let bench = bench(Machine::new(Config::default()));
        let memory = bench.machine.memory(PAGE);
        // Another one is in flight, without which the second answer breaks the ring.
        let held = Inject::Hold(Execute::AtRelease);
        bench.machine.inject([held, Inject::Twice, held]);
        assert!(bench.adopt().0.is_err());
        // SAFETY: memory of the test's, which lives until the device is gone.
        let _mapped = unsafe {
            if in_batch {
                let mut mapped = [None];
                let segments = [PhysSegment { phys: memory.phys, len: PAGE as usize }];
                bench.endpoint.map_each(&segments, Direction::Both, &mut mapped).unwrap();
                mapped
            } else {
                [Some(bench.endpoint.map(memory.phys, PAGE as usize, Direction::Both).unwrap())]
            }
        };
        let (next, phys) = bench.adopt();
        assert!(matches!(next, Err(DmaError::Map(error)) if is_timeout(&error)), "{in_batch}: {next:?}");
        bench.assert_quarantined(2, 2);
        assert_eq!(bench.viommu.stats().stray_answers, 1);

        // Its own answer is its own. The other one's would be one more than were asked for.
        bench.machine.release(Release::Newest);
        bench.viommu.poll();
        bench.assert_quarantined(2, 1);
        assert_eq!((bench.viommu.reclaim(), bench.machine.is_lent_back(phys)), (1, true));
        bench.assert_quarantined(1, 1);
    }
}

/// Fails when the second answer stays in the ring behind a flush.
#[test]
fn i03_a_flush_that_is_answered_twice_answers_no_other_request() {
    let bench = bench_with(Machine::new(Config::default()), UnmapPolicy::Deferred(DeferredBounds::default()));
    let memory = bench.machine.memory(PAGE);
    let held = Inject::Hold(Execute::AtRelease);
    bench.machine.inject([held, Inject::Pass, Inject::Twice, held]);
    assert!(bench.adopt().0.is_err());
    // SAFETY: memory of the test's, which lives until the device is gone.
    let mapping = unsafe { bench.endpoint.map(memory.phys, PAGE as usize, Direction::Both) }.unwrap();
    assert_eq!(bench.endpoint.unmap(mapping), Ok(Unmapped::AtFlush));
    bench.endpoint.flush().unwrap();
    let (next, _) = bench.adopt();
    assert!(matches!(next, Err(DmaError::Map(error)) if is_timeout(&error)), "{next:?}");
    assert_eq!(bench.viommu.stats().stray_answers, 1);
    bench.assert_quarantined(2, 2);
}
