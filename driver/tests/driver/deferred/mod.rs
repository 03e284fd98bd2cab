//! Unmapping that is deferred: what the policy promises, and what it does not, attacked by the endpoint's own accesses.

mod again;
mod bounds;
mod failures;
mod futures;
mod leaving;
mod random;

use virtio_iommu::{
    DeferredBounds, Direction, DmaDevice, DmaMapping, DomainOptions, EndpointOptions, Iova, MapError,
    PhysAddr, UnmapError, UnmapPolicy, Unmapped,
};
use virtio_iommu_model::{Config, Request};

use crate::support::{ANYWHERE, EP, Machine, Opened, PAGE, RW, apart, bytes_of, fill, heap_uses};

/// Bounds that are not reached.
const LOOSE: DeferredBounds = DeferredBounds { mappings: 64, bytes: u64::MAX, age_ns: u64::MAX };

fn policy(bounds: DeferredBounds) -> DomainOptions {
    DomainOptions { unmap: UnmapPolicy::Deferred(bounds), ..DomainOptions::default() }
}

fn opened(bounds: DeferredBounds) -> Opened {
    Opened::new(Config::default(), policy(bounds), EndpointOptions::default())
}

/// Unmaps what is to be deferred.
fn defer(opened: &Opened, mapping: DmaMapping) {
    assert_eq!(opened.endpoint.unmap(mapping), Ok(Unmapped::AtFlush));
}

/// Fails when `unmap` sends anything, `defer` gives back memory or addresses, or `flush` waits for nothing.
#[test]
fn the_endpoint_reaches_memory_until_the_flush_and_nobody_else_gets_it() {
    let opened = opened(LOOSE);
    let (mapping, phys) = opened.adopt();
    let at = mapping.iova();
    let (unmapped, requests, kicks) = opened.machine.traffic(|| opened.endpoint.unmap(mapping));
    assert_eq!((unmapped, requests, kicks), (Ok(Unmapped::AtFlush), 0, 0));

    // What is not promised: the endpoint still writes there.
    opened.machine.dma_write(EP, at.get(), &[0xbb; 16]).unwrap();
    assert_eq!(opened.machine.dma_read(EP, at.get(), 1).unwrap(), [0xbb]);
    // What is: it is nobody else's, neither the memory nor the addresses.
    opened.viommu.poll();
    assert!(!opened.machine.is_lent_back(phys) && opened.machine.is_live(phys));
    let memory = opened.machine.memory(PAGE);
    // SAFETY: refused before anything is sent.
    let there = unsafe { opened.domain.map_at(at, memory.phys, PAGE, RW) };
    assert!(matches!(there, Err(MapError::InUse(_))));
    for _ in 0..20 {
        // SAFETY: nobody but the test uses the memory.
        let other = unsafe { opened.domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
        assert_ne!(other, at);
        // SAFETY: mapped above.
        unsafe { opened.domain.unmap(other, PAGE) }.unwrap();
    }
    let stats = opened.domain.stats();
    assert_eq!((stats.deferred_mappings, stats.deferred_bytes), (1, PAGE));

    let (flushed, requests, kicks) = opened.machine.traffic(|| opened.endpoint.flush());
    assert_eq!((flushed, requests, kicks), (Ok(()), 1, 1));
    assert!(!opened.reaches(at) && opened.machine.is_lent_back(phys));
    let stats = opened.domain.stats();
    assert_eq!((stats.deferred_mappings, stats.deferred_bytes, stats.mapped_bytes), (0, 0, 0));
    // SAFETY: nobody but the test uses the memory.
    unsafe { opened.domain.map_at(at, memory.phys, PAGE, RW) }.unwrap();
    // Nothing waits: nothing is sent.
    assert_eq!(opened.machine.traffic(|| opened.domain.flush()), (Ok(()), 0, 0));
}

/// Memory that the driver does not hold is not protected: that is why `unmap` says so.
#[test]
fn memory_mapped_on_the_callers_word_is_exposed_until_the_flush() {
    let opened = opened(LOOSE);
    let memory = opened.machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    let mapping = unsafe { opened.endpoint.map(memory.phys, PAGE as usize, Direction::FromDevice) }.unwrap();
    let at = mapping.iova();
    defer(&opened, mapping);
    // The caller is wrong to reuse it now.
    fill(&memory, 0x55);
    opened.machine.dma_write(EP, at.get(), &[0xee]).unwrap();
    assert_eq!(bytes_of(&memory)[0], 0xee, "the write after the unmapping lands");
    opened.endpoint.flush().unwrap();
    fill(&memory, 0x55);
    assert!(opened.machine.dma_write(EP, at.get(), &[0xee]).is_err());
    assert_eq!(bytes_of(&memory)[0], 0x55);
}

/// Fails when ranges are not sorted, not merged, or merged over a hole or over what is live.
#[test]
fn neighbours_share_a_request_and_all_share_a_doorbell() {
    let opened = opened(LOOSE);
    let mut mappings: Vec<_> = (0..12).map(|_| Some(opened.adopt())).collect();
    // From the top down: 0 is the highest. Numbers 3 and 8 stay.
    for index in [5, 0, 11, 2, 7, 1, 9, 4, 6, 10] {
        let (mapping, _) = mappings[index].take().unwrap();
        defer(&opened, mapping);
    }
    let before = opened.machine.device().counters().kicks[0];
    let (flushed, requests) = opened.requests_of(|| opened.endpoint.flush());
    assert_eq!(flushed, Ok(()));
    assert_eq!(opened.machine.device().counters().kicks[0] - before, 1);
    let lens: Vec<_> = requests
        .iter()
        .map(|request| match request {
            Request::Unmap { virt_start, virt_end, .. } => (virt_end - virt_start + 1) / PAGE,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(lens, [3, 4, 3], "in the order of their addresses");
    for (mapping, phys) in mappings.into_iter().flatten() {
        assert!(opened.reaches(mapping.iova()) && !opened.machine.is_lent_back(phys));
        defer(&opened, mapping);
    }
    opened.endpoint.flush().unwrap();
    assert_eq!((opened.domain.mapping_count(), opened.mapped_on_device()), (0, vec![]));
}

/// A list is one range of several records, and goes with its neighbours.
#[test]
fn lists_are_deferred_whole() {
    let opened = opened(LOOSE);
    let (single, _) = opened.adopt();
    let segments = apart(opened.machine.memory(16 * PAGE).phys, 5);
    let mut iovas = [Iova::new(0); 5];
    // SAFETY: nobody but the test uses the memory.
    let list = unsafe { opened.endpoint.map_scatter(&segments, Direction::Both, &mut iovas) }.unwrap();
    defer(&opened, list);
    defer(&opened, single);
    assert_eq!(opened.domain.stats().deferred_mappings, 6);
    assert!(iovas.iter().all(|at| opened.reaches(*at)));
    assert_eq!(opened.machine.traffic(|| opened.endpoint.flush()), (Ok(()), 1, 1));
    assert!(!iovas.iter().any(|at| opened.reaches(*at)));
}

/// Fails when a deferred record passes for a live one.
#[test]
fn what_is_deferred_cannot_be_unmapped_again() {
    let opened = opened(LOOSE);
    let (mapping, phys) = opened.adopt();
    let at = mapping.iova();
    defer(&opened, mapping);
    let not_mapped = UnmapError::NotMapped(at);
    // SAFETY: refused before anything is sent.
    assert_eq!(unsafe { opened.endpoint.unmap_at(at) }, Err(not_mapped));
    // SAFETY: as above.
    assert_eq!(unsafe { opened.domain.unmap(at, PAGE) }, Err(not_mapped));
    opened.endpoint.flush().unwrap();
    assert!(opened.machine.is_lent_back(phys));
}

/// The raw layer promises what it always did.
#[test]
fn the_raw_layer_stays_strict() {
    let opened = opened(LOOSE);
    let memory = opened.machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    let at = unsafe { opened.domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
    // SAFETY: mapped above.
    unsafe { opened.domain.unmap(at, PAGE) }.unwrap();
    assert!(!opened.reaches(at));
}

/// Fails when `defer`, or a flush, uses the heap (I11).
#[test]
fn deferring_and_flushing_use_no_heap() {
    let opened = opened(DeferredBounds { mappings: 16, ..LOOSE });
    let memory = opened.machine.memory(32 * PAGE);
    let (flushes, uses) = heap_uses(|| {
        let mut flushes = 0;
        for round in 0..200 {
            // Every other one is mapped again, and counts all the same.
            let page = PhysAddr::new(memory.phys.get() + round / 2 % 32 * PAGE);
            // SAFETY: nobody but the test uses the memory.
            let mapping = unsafe { opened.endpoint.map(page, 16, Direction::Both) }.unwrap();
            flushes += usize::from(opened.endpoint.unmap(mapping) == Ok(Unmapped::Now));
        }
        opened.endpoint.flush().unwrap();
        flushes
    });
    assert_eq!((flushes, uses), (6, 0));
}

/// A domain that died has nothing that could be deferred.
#[test]
fn in_a_dead_domain_unmapping_is_done_at_once() {
    let opened = opened(LOOSE);
    let (mapping, phys) = opened.adopt();
    opened.viommu.detach(EP).unwrap();
    let (unmapped, requests, _) = opened.machine.traffic(|| opened.endpoint.unmap(mapping));
    assert_eq!((unmapped, requests), (Ok(Unmapped::Now), 0));
    assert!(opened.machine.is_lent_back(phys));
}

#[test]
fn coherent_memory_is_deferred_too() {
    let opened = opened(LOOSE);
    let before = opened.machine.outstanding();
    let memory = opened.endpoint.alloc_coherent(1).unwrap();
    let at = memory.iova();
    assert_eq!(opened.endpoint.free_coherent(memory), Ok(Unmapped::AtFlush));
    assert!(opened.reaches(at) && opened.machine.outstanding() == before + 1);
    opened.endpoint.flush().unwrap();
    assert!(!opened.reaches(at) && opened.machine.outstanding() == before);
}

/// Threads that map, defer and flush in one domain. What came back is mapped by nobody.
#[test]
fn threads_share_a_domain() {
    let machine = Machine::new(Config::default());
    // The clock moves with each poll, and a thread may have to wait until another rang for it.
    let patient = virtio_iommu::Options { timeout_ns: u64::MAX, ..Machine::options() };
    let patient = virtio_iommu::Options { max_polls: u64::MAX, ..patient };
    let bounds = DeferredBounds { mappings: 8, bytes: u64::MAX, age_ns: 50_000 };
    let opened = Opened::on(machine, patient, policy(bounds), EndpointOptions::default());
    std::thread::scope(|scope| {
        for seed in 0..4u64 {
            let opened = &opened;
            scope.spawn(move || {
                for round in 0..200 {
                    let (mapping, phys) = opened.adopt();
                    opened.machine.dma_write(EP, mapping.iova().get(), &[seed as u8]).unwrap();
                    let unmapped = opened.endpoint.unmap(mapping).unwrap();
                    if unmapped == Unmapped::Now {
                        assert!(opened.machine.is_lent_back(phys));
                    }
                    match (round + seed) % 10 {
                        0 => {
                            opened.endpoint.flush().unwrap();
                            assert!(opened.machine.is_lent_back(phys));
                        }
                        5 => drop(opened.viommu.poll()),
                        _ => {}
                    }
                }
            });
        }
    });
    opened.endpoint.flush().unwrap();
    assert_eq!((opened.domain.mapping_count(), opened.viommu.stats().quarantined_mappings), (0, 0));
}
