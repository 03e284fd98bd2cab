//! When a domain flushes by itself.

use super::*;
use virtio_iommu::{DmaError, Options, PhysSegment};
use virtio_iommu_model::{Execute, Inject};

/// Maps and unmaps `count` pages one after the other, and says for which of them unmapping flushed.
fn churn(opened: &Opened, count: usize) -> Vec<usize> {
    let unmap = |_: &usize| {
        let (mapping, phys) = opened.adopt();
        let unmapped = opened.endpoint.unmap(mapping).unwrap();
        assert_eq!(opened.machine.is_lent_back(phys), unmapped == Unmapped::Now);
        unmapped == Unmapped::Now
    };
    (1..=count).filter(unmap).collect()
}

#[test]
fn at_so_many_mappings() {
    let opened = opened(DeferredBounds { mappings: 4, ..LOOSE });
    assert_eq!(churn(&opened, 10), [4, 8]);
    assert_eq!(opened.domain.stats().deferred_mappings, 2);
    for mappings in [0, 1] {
        let opened = self::opened(DeferredBounds { mappings, ..LOOSE });
        assert_eq!(churn(&opened, 3), [1, 2, 3], "as good as strict");
    }
}

/// Fails when a list counts as one.
#[test]
fn a_list_counts_as_its_mappings() {
    let opened = opened(DeferredBounds { mappings: 4, ..LOOSE });
    let segments = apart(opened.machine.memory(16 * PAGE).phys, 5);
    let mut iovas = [Iova::new(0); 5];
    // SAFETY: nobody but the test uses the memory.
    let list = unsafe { opened.endpoint.map_scatter(&segments, Direction::Both, &mut iovas) }.unwrap();
    assert_eq!(opened.endpoint.unmap(list), Ok(Unmapped::Now));
    assert!(!opened.reaches(iovas[0]));
}

#[test]
fn at_so_many_bytes() {
    let opened = opened(DeferredBounds { bytes: 3 * PAGE, ..LOOSE });
    assert_eq!(churn(&opened, 7), [3, 6]);
}

/// What may look at the clock, with a mapping that it may unmap.
type Look<'a> = &'a dyn Fn(&Opened, DmaMapping);

/// Fails when any of the places does not look at the clock.
#[test]
fn at_such_an_age() {
    let bounds = DeferredBounds { age_ns: 1_000_000, ..LOOSE };
    let list = |opened: &Opened, segments: &[PhysSegment]| {
        let mut iovas = vec![Iova::new(0); segments.len()];
        // SAFETY: nobody but the test uses the memory.
        drop(unsafe { opened.endpoint.map_scatter(segments, Direction::Both, &mut iovas) }.unwrap());
    };
    let memory = |opened: &Opened| opened.machine.memory(8 * PAGE).phys;
    let look: [Look<'_>; 8] = [
        &|opened, _| list(opened, &apart(memory(opened), 4)),
        &|opened, _| {
            list(opened, &[PhysSegment { phys: memory(opened), len: 5 }, apart(memory(opened), 1)[0]])
        },
        &|opened, _| list(opened, &apart(memory(opened), 1)),
        &|opened, _| {
            let mut mapped = [None];
            // SAFETY: as above.
            unsafe { opened.endpoint.map_each(&apart(memory(opened), 1), Direction::Both, &mut mapped) }
                .unwrap();
        },
        // SAFETY: as above.
        &|opened, _| _ = unsafe { opened.domain.map(memory(opened), PAGE, RW, ANYWHERE) }.unwrap(),
        &|opened, _| assert_eq!(opened.viommu.poll(), 0),
        &|opened, _| drop(opened.adopt()),
        &|opened, other| assert_eq!(opened.endpoint.unmap(other), Ok(Unmapped::Now)),
    ];
    for (index, look) in look.into_iter().enumerate() {
        let opened = opened(bounds);
        let (mapping, phys) = opened.adopt();
        let (other, _) = opened.adopt();
        defer(&opened, mapping);
        opened.machine.pass_time(999_000);
        opened.viommu.poll();
        assert!(!opened.machine.is_lent_back(phys), "not yet");
        opened.machine.pass_time(2_000);
        look(&opened, other);
        assert!(opened.machine.is_lent_back(phys), "place {index}");
        assert_eq!(opened.domain.stats().deferred_mappings, 0);
    }
}

#[test]
fn without_a_clock_the_age_is_no_bound() {
    let bounds = DeferredBounds { age_ns: 0, ..LOOSE };
    let machine = Machine::clockless(Config::default());
    let opened = Opened::on(machine, Machine::options(), policy(bounds), EndpointOptions::default());
    assert_eq!(churn(&opened, 5), []);
    opened.viommu.poll();
    assert_eq!(opened.domain.stats().deferred_mappings, 5);
    // With one, everything is old at once.
    let opened = self::opened(bounds);
    assert_eq!(churn(&opened, 3), [1, 2, 3]);
}

/// Fails when `make_room` does not flush, or its caller does not try again.
#[test]
fn when_addresses_run_out() {
    // Seven pages that can be mapped, one of which always faults.
    let config = Config { input_range: 0..=0x7fff, ..Config::default() };
    let opened = Opened::new(config, policy(LOOSE), EndpointOptions::default());
    for round in 0..20 {
        let (mapping, _) = opened.adopt();
        defer(&opened, mapping);
        assert!(opened.domain.stats().deferred_mappings <= 6, "round {round}");
    }
    // The raw layer needs room too.
    let memory = opened.machine.memory(6 * PAGE);
    // SAFETY: nobody but the test uses the memory.
    let at = unsafe { opened.domain.map(memory.phys, 6 * PAGE, RW, ANYWHERE) }.unwrap();
    // SAFETY: nobody but the test uses the memory.
    let more = unsafe { opened.endpoint.map(memory.phys, 1, Direction::Both) };
    assert!(matches!(more, Err(DmaError::Map(MapError::IovaExhausted { .. }))), "nothing to flush");
    // SAFETY: mapped above.
    unsafe { opened.domain.unmap(at, 6 * PAGE) }.unwrap();
}

#[test]
fn when_records_run_out() {
    let domain = DomainOptions { mappings: 8, ..policy(LOOSE) };
    let opened = Opened::new(Config::default(), domain, EndpointOptions::default());
    assert_eq!(churn(&opened, 30), []);
    opened.endpoint.flush().unwrap();
    // Held memory is not lost by the second attempt, or by its failure.
    let live: Vec<_> = (0..8).map(|_| opened.adopt()).collect();
    let (held, phys) = opened.machine.lend(PAGE);
    let (error, back) = opened.endpoint.adopt(held, Direction::Both).unwrap_err();
    assert!(matches!(error, DmaError::Map(MapError::NoRecord { capacity: 8 })));
    assert_eq!(back.unwrap().memory().phys, phys);
    let segments = apart(opened.machine.memory(16 * PAGE).phys, 4);
    let mut iovas = [Iova::new(0); 4];
    for (mapping, _) in live {
        defer(&opened, mapping);
    }
    // SAFETY: nobody but the test uses the memory.
    let list = unsafe { opened.endpoint.map_scatter(&segments, Direction::Both, &mut iovas) }.unwrap();
    defer(&opened, list);
}

/// Many ranges and few slots: several batches, each of what the ring takes.
#[test]
fn flushes_take_as_many_batches_as_the_ring_needs() {
    for (queue_size, kicks) in [(256, 1), (16, 3), (4, 10)] {
        let options = Options { queue_size, ..Machine::options() };
        let machine = Machine::new(Config::default());
        let opened = Opened::on(machine, options, policy(LOOSE), EndpointOptions::default());
        let mappings: Vec<_> = (0..40).map(|_| opened.adopt()).collect();
        let mut kept = Vec::new();
        for (index, (mapping, _)) in mappings.into_iter().enumerate() {
            match index % 2 {
                0 => defer(&opened, mapping),
                _ => kept.push(mapping),
            }
        }
        assert_eq!(opened.machine.traffic(|| opened.endpoint.flush()), (Ok(()), 20, kicks));
        assert!(kept.iter().all(|mapping| opened.reaches(mapping.iova())));
    }
}

/// A list that is full, and a flush that cannot empty it: nothing is forgotten.
#[test]
fn with_the_list_full_and_no_slot_unmapping_is_strict_and_fails() {
    let options = Options { queue_size: 2, ..Machine::options() };
    let bounds = DeferredBounds { mappings: 2, ..LOOSE };
    let machine = Machine::new(Config::default());
    let opened = Opened::on(machine, options, policy(bounds), EndpointOptions::default());
    let mappings: Vec<_> = (0..4).map(|_| opened.adopt()).collect();
    // The only slot is lost.
    opened.machine.inject([Inject::Drop(Execute::AtRelease)]);
    let (held, _) = opened.machine.lend(PAGE);
    assert!(opened.endpoint.adopt(held, Direction::Both).is_err());
    let unmapped: Vec<_> = mappings.into_iter().map(|(mapping, _)| opened.endpoint.unmap(mapping)).collect();
    assert_eq!(unmapped[..2], [Ok(Unmapped::AtFlush); 2], "the second flush found no slot");
    assert!(unmapped[2..].iter().all(|unmapped| matches!(unmapped, Err(UnmapError::Request { .. }))));
    assert!(opened.endpoint.flush().is_err());
    assert_eq!(opened.viommu.stats().quarantined_mappings, 3);
    assert_eq!(opened.domain.stats().deferred_mappings, 2);
}
