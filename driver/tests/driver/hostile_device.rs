//! A device that writes nonsense: nothing panics, nothing loops, errors are errors, memory stays where it is (I8).

use std::collections::BTreeMap;

use virtio_iommu::{
    Direction, DmaDevice, DomainOptions, EndpointOptions, Introduction, Iova, MapError, RequestError,
};
use virtio_iommu_model::{Config, Endpoint, Execute, Inject, Random, Release, feature};

use crate::support::{EP, EP2, Machine, PAGE, POLLS, RW, Rng};

const AT: Iova = Iova::new(0x10_0000);

#[test]
fn d08_the_tails_reserved_bytes_are_ignored() {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    machine.inject([Inject::TailReserved([1, 2, 3])]);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, memory.phys, PAGE, RW) }.unwrap();
}

/// D-09 and I4: fails when `judge` looks at the status alone, or at the length alone.
#[test]
fn d09_i04_success_takes_the_length_and_the_status() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    // A slot that holds an OK of before.
    // SAFETY: nobody but the test uses the memory.
    let map = |page: u64| unsafe { domain.map_at(Iova::new(page * PAGE), memory.phys, PAGE, RW) };
    map(1).unwrap();
    for (page, inject, unknown) in [
        (2, Inject::Unwritten, false),
        (3, Inject::UsedLen(0), true),
        (4, Inject::UsedLen(3), true),
        (5, Inject::Status(0x80), true),
        (6, Inject::Status(0xff), true),
        (7, Inject::Refuse(8), false),
    ] {
        machine.inject([inject]);
        assert!(map(page).is_err(), "{inject:?}");
        let expected = usize::from(unknown);
        assert_eq!(viommu.stats().quarantined_mappings, expected, "{inject:?}");
        assert_eq!(machine.reaches(EP, page * PAGE), unknown);
        assert_eq!(viommu.reclaim(), expected);
        assert!(!machine.reaches(EP, page * PAGE));
    }
    machine.inject([Inject::UsedLen(u32::MAX)]);
    map(9).unwrap();
}

/// Fails, by a panic or a slot that is free twice, when `RequestQueue::slot_of` takes any id for a request in flight.
#[test]
fn i08_used_entries_that_name_nobody() {
    for id in [1, 3, 254, 256, 257, 0x1_0000, u32::MAX] {
        let (machine, viommu, domain) = Machine::attached(Config::default());
        let memory = machine.memory(PAGE);
        machine.inject([Inject::UsedId(id)]);
        // SAFETY: nobody but the test uses the memory.
        let map = |page: u64| unsafe { domain.map_at(Iova::new(page * PAGE), memory.phys, PAGE, RW) };
        assert!(
            matches!(map(1), Err(MapError::Quarantined { error: RequestError::TimedOut, .. })),
            "{id:#x}"
        );
        assert_eq!((viommu.stats().stray_answers, viommu.stats().quarantined_mappings), (1, 1));
        // The others go on; what was misnamed stays the device's.
        map(2).unwrap();
        assert!(matches!(map(1), Err(MapError::InUse(_))));
    }
}

/// Fails when `Ring::pop` does not compare with what was published.
#[test]
fn i08_a_used_index_that_jumps_breaks_the_ring_and_ends_all_waits() {
    for inject in [Inject::Twice, Inject::UsedJump(1), Inject::UsedJump(300), Inject::UsedJump(0x8000)] {
        let (machine, viommu, domain) = Machine::attached(Config::default());
        let memory = machine.memory(PAGE);
        // SAFETY: nobody but the test uses the memory.
        let map = |page: u64| unsafe { domain.map_at(Iova::new(page * PAGE), memory.phys, PAGE, RW) };
        map(1).unwrap();
        machine.inject([inject]);
        let _ = map(2);
        let polls = machine.relaxed();
        let (result, requests, _) = machine.traffic(|| map(3));
        assert!(result.is_err(), "{inject:?}");
        assert_eq!(requests, 0);
        assert!(viommu.detach(EP).is_err());
        assert!(viommu.attach(EP2, &domain).is_err());
        // SAFETY: mapped above; it stays mapped.
        assert!(unsafe { domain.unmap(Iova::new(PAGE), PAGE) }.is_err());
        assert!(machine.relaxed() - polls < POLLS, "a broken ring is not waited for");
        assert!(machine.reaches(EP, PAGE));
        assert!(viommu.stats().quarantined_mappings >= 1);
        viommu.poll();
        viommu.reclaim();
    }
}

/// Fails when `EventQueue::next` takes a record that is too short, or counts one twice.
#[test]
fn i08_events_of_any_length_and_content() {
    let machine = Machine::new(Config::default());
    let viommu = machine.bring_up();
    let mut rng = Rng::new(0x00e7_e275);
    let mut sent = 0;
    for _ in 0..2_000 {
        let len = rng.below(25) as usize;
        let record: Vec<u8> = (0..len).map(|_| rng.below(256) as u8).collect();
        machine.push_event(&record);
        sent += 1;
        if rng.below(20) == 0 {
            viommu.poll();
            while viommu.next_fault().is_some() {}
        }
    }
    machine.push_event(&[0; 48]);
    while viommu.poll() > 0 {}
    let counts = viommu.stats().faults;
    let lost = machine.device().counters().events_dropped;
    assert_eq!(counts.delivered + counts.malformed + lost, sent + 1);
}

/// Fails, by a panic, when `Properties::next` trusts a length.
#[test]
fn i08_properties_of_any_content() {
    let mut rng = Rng::new(0x0009_0be5);
    for probe_size in [0, 1, 3, 4, 23, 24, 512] {
        for _ in 0..60 {
            let machine = Machine::new(Config { probe_size, ..Config::default() });
            // Mostly small numbers, so that types and lengths make sense now and then.
            let garbage = (0..probe_size)
                .map(|_| if rng.below(3) == 0 { rng.below(256) as u8 } else { rng.below(3) as u8 })
                .collect();
            let endpoint = Endpoint { raw_instead: Some(garbage), ..Endpoint::new(EP.get()) };
            machine.device().add_endpoint(endpoint);
            let staged = machine.start().unwrap();
            let introduced = staged.introduce(EP);
            if let Some(regions) = staged.reserved_regions(EP) {
                assert!(introduced.is_ok() && regions.len() <= 64);
                let domain = staged.create_domain(DomainOptions::default()).unwrap();
                let _ = staged.attach(EP, &domain);
            }
        }
    }
}

#[test]
fn a_list_of_regions_without_end() {
    let machine = Machine::new(Config { probe_size: 60_000, ..Config::default() });
    let mut region = vec![1, 0, 20, 0];
    region.extend([0; 20]);
    let endpoint = Endpoint { raw_instead: Some(region.repeat(2_500)), ..Endpoint::new(EP.get()) };
    machine.device().add_endpoint(endpoint);
    let staged = machine.start().unwrap();
    assert_ne!(staged.introduce(EP), Ok(Introduction::Known), "rather none than half of them");
    assert_eq!(staged.reserved_regions(EP), None);
}

/// Thousands of operations under random misbehaviour. After each, what the endpoint reaches is compared with what the
/// driver believes, by real accesses at both edges, and memory that came back must not be reached.
///
/// Not injected: statuses that contradict what was done, which no driver can see through.
#[test]
fn random_misbehaviour_never_exposes_memory_that_went_back() {
    let choices = vec![
        Inject::Hold(Execute::Now),
        Inject::Hold(Execute::AtRelease),
        Inject::Refuse(3),
        Inject::Refuse(5),
        Inject::Refuse(8),
        Inject::Refuse(0x99),
        Inject::Status(0x99),
        Inject::TailReserved([9, 9, 9]),
        Inject::UsedLen(0),
        Inject::UsedLen(3),
        Inject::Unwritten,
        Inject::Defer,
    ];
    for seed in 0..12 {
        for features in [Config::default().features, Config::default().features & !feature::RING_EVENT_IDX] {
            random_operations(seed, features, &choices);
        }
    }
}

fn random_operations(seed: u64, features: u64, choices: &[Inject]) {
    let mut rng = Rng::new(seed);
    let (machine, viommu, domain) = Machine::attached(Config { features, ..Config::default() });
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    machine.device().inject.random = Some(Random::new(seed, 4, choices.to_vec()));
    let mut live = BTreeMap::new();
    let mut lent = Vec::new();
    for step in 0..250 {
        match rng.below(10) {
            0..=4 => {
                let pages = 1 + rng.below(3);
                let (held, phys) = machine.lend(pages * PAGE);
                match endpoint.adopt(held, Direction::Both) {
                    Ok(mapping) => {
                        live.insert(mapping.iova().get(), (mapping, phys, pages));
                    }
                    Err((_, Some(back))) => assert_eq!(back.memory().phys, phys),
                    Err((_, None)) => lent.push(phys),
                }
            }
            5..=7 if !live.is_empty() => {
                let at = *live.keys().nth(rng.below(live.len() as u64) as usize).unwrap();
                let (mapping, phys, _) = live.remove(&at).unwrap();
                match endpoint.unmap(mapping) {
                    Ok(_) => assert!(machine.is_lent_back(phys), "step {step}"),
                    Err(_) => lent.push(phys),
                }
            }
            8 => {
                machine.release(if rng.below(2) == 0 { Release::AllReversed } else { Release::Oldest });
                viommu.poll();
            }
            _ => {
                viommu.reclaim();
            }
        }
        for (at, (_, phys, pages)) in &live {
            for edge in [*at, at + pages * PAGE - 1] {
                let mark = rng.below(256) as u8;
                machine.dma_write(EP, edge, &[mark]).unwrap();
                assert_eq!(machine.dma_read(EP, edge, 1).unwrap(), [mark], "step {step}");
            }
            assert_eq!(domain.translate(Iova::new(*at)).unwrap().phys, *phys);
        }
        check_device_mappings(&machine, domain.id().get(), step);
    }
    // Let everything come back.
    machine.device().inject.random = None;
    for (_, (mapping, phys, _)) in live {
        let _ = endpoint.unmap(mapping);
        lent.push(phys);
    }
    machine.release(Release::All);
    viommu.poll();
    while viommu.reclaim() > 0 {}
    assert_eq!(viommu.stats().quarantined_mappings, 0);
    assert_eq!((viommu.stats().abandoned_requests, domain.mapping_count()), (0, 0));
    assert_eq!((domain.stats().mapped_bytes, viommu.stats().stray_answers), (0, 0));
    assert!(lent.into_iter().all(|phys| machine.is_lent_back(phys)));
    assert_eq!(machine.device().mappings(domain.id().get()).count(), 0);
}

/// Whatever the device has mapped is memory that nobody got back, and the driver knows of it.
fn check_device_mappings(machine: &Machine, domain: u32, step: usize) {
    let mappings: Vec<_> = machine.device().mappings(domain).collect();
    for mapping in mappings {
        let phys = virtio_iommu::PhysAddr::new(mapping.phys_first);
        assert!(machine.is_live(phys), "step {step}: {mapping:x?} leads to memory that went back");
    }
}
