//! What device drivers use: coherent memory, in-place mappings, bounce pages.

use std::ptr::NonNull;

use virtio_iommu::{
    Direction, DmaDevice, DmaError, Domain, DomainOptions, Endpoint, EndpointOptions, Iova, MapError,
    OpenError, Options, PhysAddr, RequestError, Status, UnmapError, Viommu,
};
use virtio_iommu_model::{Config, Inject};

use crate::support::{ANYWHERE, EP, EP2, Machine, PAGE, POISON, RW, TestPlatform, bytes_of, fill};

struct Bench {
    endpoint: Endpoint<TestPlatform>,
    domain: Domain<TestPlatform>,
    viommu: Viommu<TestPlatform>,
    machine: Machine,
}

fn open(config: Config, options: Options, bounce_pages: u64) -> Bench {
    let machine = Machine::new(config);
    let staged = machine.start_with(options).unwrap();
    staged.introduce(EP).unwrap();
    let viommu = staged.go_live().unwrap();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let options =
        EndpointOptions { bounce_bytes: (bounce_pages * PAGE) as usize, ..EndpointOptions::default() };
    let endpoint = viommu.open(EP, &domain, options).unwrap();
    machine.device().clear_log();
    Bench { endpoint, domain, viommu, machine }
}

fn bench() -> Bench {
    open(Config::default(), Machine::options(), 0)
}

fn with_bounce(pages: u64) -> Bench {
    open(Config::default(), Machine::options(), pages)
}

#[test]
fn coherent_memory_is_zeroed_whole_and_shared() {
    let bench = bench();
    let before = bench.machine.outstanding();
    let memory = bench.endpoint.alloc_coherent(PAGE as usize + 1).unwrap();
    let (at, len) = (memory.iova().get(), memory.len_bytes());
    assert_eq!((len as u64, bench.machine.outstanding()), (2 * PAGE, before + 1));
    assert_eq!(bench.machine.dma_read(EP, at, len).unwrap(), vec![0; len]);
    bench.machine.dma_write(EP, at + PAGE, &[7]).unwrap();
    // SAFETY: inside of the memory, which the endpoint does not write meanwhile.
    assert_eq!(unsafe { memory.ptr().add(PAGE as usize).read_volatile() }, 7);
    bench.endpoint.free_coherent(memory).unwrap();
    assert_eq!(bench.machine.outstanding(), before);
    assert!(!bench.machine.reaches(EP, at));
}

#[test]
fn coherent_memory_of_any_granule() {
    for mask in [!0, 0x20_1000, !0xffff] {
        let bench = open(Config { page_size_mask: mask, ..Config::default() }, Machine::options(), 1);
        let memory = bench.endpoint.alloc_coherent(1).unwrap();
        assert!(memory.len_bytes() as u64 >= bench.endpoint.granule());
        assert!(bench.machine.reaches(EP, memory.iova().get()));
        bench.endpoint.free_coherent(memory).unwrap();
        bench.endpoint.close().unwrap();
    }
}

#[test]
fn coherent_memory_runs_out_or_cannot_be_mapped() {
    let bench = bench();
    let before = bench.machine.outstanding();
    bench.machine.inject([Inject::Refuse(8)]);
    let error = bench.endpoint.alloc_coherent(1).unwrap_err();
    let refused = RequestError::Refused(Status::NoMem);
    assert!(matches!(error, DmaError::Map(MapError::Request { error, .. }) if error == refused));
    assert_eq!(bench.machine.outstanding(), before, "given back at once");
    bench.machine.limit_allocations(0);
    assert_eq!(bench.endpoint.alloc_coherent(5).unwrap_err(), DmaError::NoMemory { len: 5 });
    assert!(bench.endpoint.alloc_coherent(usize::MAX).is_err());
}

#[test]
fn adopted_memory_comes_back_when_it_is_unmapped_or_refused() {
    let bench = bench();
    let (held, phys) = bench.machine.lend(2 * PAGE);
    let mapping = bench.endpoint.adopt(held, Direction::FromDevice).unwrap();
    let at = mapping.iova().get();
    bench.machine.dma_write(EP, at + 2 * PAGE - 1, &[1]).unwrap();
    assert!(!bench.machine.reaches(EP, at), "write only");
    bench.endpoint.unmap(mapping).unwrap();
    assert!(bench.machine.is_lent_back(phys));

    let (held, phys) = bench.machine.lend(PAGE);
    bench.machine.inject([Inject::Refuse(8)]);
    let (_, back) = bench.endpoint.adopt(held, Direction::Both).unwrap_err();
    assert_eq!(back.expect("refused, so it is the caller's").memory().phys, phys);
    assert!(!bench.machine.is_lent_back(phys), "not by two ways");
    // Not whole granules: refused before anything is sent.
    let (held, _) = bench.machine.lend(PAGE / 2);
    let (result, requests, _) = bench.machine.traffic(|| bench.endpoint.adopt(held, Direction::Both));
    assert!(matches!(result, Err((DmaError::Map(MapError::Misaligned { .. }), Some(_)))));
    assert_eq!(requests, 0);
}

#[test]
fn in_place_mappings_keep_the_offset() {
    let bench = bench();
    let memory = bench.machine.memory(4 * PAGE);
    let start = memory.phys.get() + PAGE + 0x234;
    // SAFETY: nobody but the test uses the memory.
    let mapping = unsafe { bench.endpoint.map(PhysAddr::new(start), 0x1000, Direction::ToDevice) }.unwrap();
    fill(&memory, 0x5a);
    assert_eq!((mapping.iova().get() & 0xfff, mapping.len_bytes()), (0x234, 0x1000));
    assert_eq!(bench.machine.dma_read(EP, mapping.iova().get(), 0x1000).unwrap(), vec![0x5a; 0x1000]);
    assert!(bench.machine.dma_write(EP, mapping.iova().get(), &[1]).is_err());
    let first = mapping.iova().get() - 0x234;
    assert!(!bench.machine.reaches(EP, first - 1) && !bench.machine.reaches(EP, first + 2 * PAGE));
    bench.endpoint.unmap(mapping).unwrap();
    assert!(!bench.machine.reaches(EP, first));
}

#[test]
fn a_mapping_can_be_ended_by_its_address() {
    let bench = bench();
    let (held, phys) = bench.machine.lend(2 * PAGE);
    let at = bench.endpoint.adopt(held, Direction::Both).unwrap().iova();
    for wrong in [at.get() + PAGE, at.get() + 1, at.get() - PAGE, 0] {
        // SAFETY: nothing starts there, so that nothing happens.
        let error = unsafe { bench.endpoint.unmap_at(Iova::new(wrong)) };
        assert_eq!(error, Err(UnmapError::NotMapped(Iova::new(wrong))));
    }
    // SAFETY: mapped above, its handle dropped.
    unsafe { bench.endpoint.unmap_at(at) }.unwrap();
    assert!(bench.machine.is_lent_back(phys));
}

fn share(endpoint: &impl DmaDevice, buffer: &mut [u8], direction: Direction) -> Result<Iova, DmaError> {
    // SAFETY: a slice, which nobody uses during the call.
    unsafe { endpoint.share(NonNull::from(buffer), direction) }
}

fn unshare(endpoint: &impl DmaDevice, at: Iova, buffer: &mut [u8], direction: Direction) {
    // SAFETY: as in `share`.
    unsafe { endpoint.unshare(at, NonNull::from(buffer), direction) }
}

#[test]
fn buffers_bounce_in_each_direction_and_send_nothing() {
    let bench = with_bounce(4);
    let mut array = [0xee_u8; 300];
    let (_, requests, kicks) = bench.machine.traffic(|| {
        let buffer = &mut array[100..200];
        let at = share(&bench.endpoint, buffer, Direction::ToDevice).unwrap();
        assert_eq!(bench.machine.dma_read(EP, at.get(), 100).unwrap(), [0xee; 100]);
        assert_eq!(bench.machine.dma_read(EP, at.get() + 100, 1).unwrap(), [0], "a neighbour is not visible");
        bench.machine.dma_write(EP, at.get(), &[1; 100]).unwrap();
        unshare(&bench.endpoint, at, buffer, Direction::ToDevice);
        assert_eq!(buffer, [0xee; 100], "nothing comes back");

        let at = share(&bench.endpoint, buffer, Direction::FromDevice).unwrap();
        assert_eq!(bench.machine.dma_read(EP, at.get(), 100).unwrap(), [0; 100], "nothing goes there");
        bench.machine.dma_write(EP, at.get(), &[2; 50]).unwrap();
        bench.machine.dma_write(EP, at.get() + 100, &[3]).unwrap();
        unshare(&bench.endpoint, at, buffer, Direction::FromDevice);
        assert_eq!((buffer[49], buffer[50], buffer[99]), (2, 0, 0));

        let at = share(&bench.endpoint, buffer, Direction::Both).unwrap();
        assert_eq!(bench.machine.dma_read(EP, at.get(), 2).unwrap(), [2, 2]);
        bench.machine.dma_write(EP, at.get(), &[4]).unwrap();
        unshare(&bench.endpoint, at, buffer, Direction::Both);
        assert_eq!((buffer[0], buffer[1]), (4, 2));
    });
    assert_eq!((requests, kicks), (0, 0));
    assert_eq!((array[99], array[200]), (0xee, 0xee));
}

#[test]
fn bounce_pages_run_out_and_come_back() {
    let bench = with_bounce(4);
    let mut buffers = [[1u8; 16]; 4];
    let shared: Vec<_> =
        buffers.iter_mut().map(|buffer| share(&bench.endpoint, buffer, Direction::Both).unwrap()).collect();
    let mut more = [0; 16];
    assert_eq!(share(&bench.endpoint, &mut more, Direction::Both), Err(DmaError::NoBounce { len: 16 }));
    // Addresses that were not handed out are ignored.
    for wrong in [bench.endpoint.faulting_iova(), Iova::new(0), Iova::new(shared[0].get() + 1)] {
        unshare(&bench.endpoint, wrong, &mut more, Direction::Both);
        assert_eq!(more, [0; 16]);
    }
    unshare(&bench.endpoint, shared[2], &mut buffers[2], Direction::Both);
    assert_eq!(share(&bench.endpoint, &mut more, Direction::Both), Ok(shared[2]));
    let mut large = vec![0; 5 * PAGE as usize];
    assert!(share(&bench.endpoint, &mut large, Direction::Both).is_err());
    let none = self::bench();
    assert_eq!(share(&none.endpoint, &mut more, Direction::Both), Err(DmaError::NoBounce { len: 16 }));
}

#[test]
fn the_faulting_address_always_faults() {
    let bench = with_bounce(1);
    let at = bench.endpoint.faulting_iova();
    let memory = bench.machine.memory(PAGE);
    for _ in 0..200 {
        // SAFETY: nobody but the test uses the memory.
        let mapped = unsafe { bench.domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
        assert_ne!(mapped, at);
    }
    // SAFETY: refused before anything is sent.
    let there = unsafe { bench.domain.map_at(at, memory.phys, PAGE, RW) };
    assert!(matches!(there, Err(MapError::InUse(_))));
    assert!(!bench.machine.reaches(EP, at.get()));
    assert!(bench.machine.dma_write(EP, at.get() + PAGE - 1, &[1]).is_err());
    bench.endpoint.flush().unwrap();
}

#[test]
fn the_endpoints_limit_holds() {
    let machine = Machine::new(Config::default());
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let limit = Iova::new(0xffff_ffff);
    let options = EndpointOptions { limit, bounce_bytes: 0x10_0000, ..Default::default() };
    let endpoint = viommu.open(EP, &domain, options).unwrap();
    assert_eq!((endpoint.limit(), endpoint.endpoint(), endpoint.granule()), (limit, EP, PAGE));
    let memory = endpoint.alloc_coherent(1).unwrap();
    assert!(memory.iova() <= limit && endpoint.faulting_iova() <= limit);
    let mut buffer = [0; 8];
    assert!(share(&endpoint, &mut buffer, Direction::Both).unwrap() <= limit);
    endpoint.free_coherent(memory).unwrap();
}

/// Fails when `close` forgets the bounce pages.
#[test]
fn closing_gives_everything_back() {
    for shared in [false, true] {
        let bench = with_bounce(4);
        let Bench { endpoint, domain, viommu, machine } = bench;
        if shared {
            viommu.attach(EP2, &domain).unwrap();
        }
        let mut buffer = [0; 8];
        let at = share(&endpoint, &mut buffer, Direction::Both).unwrap().get();
        assert!(machine.reaches(EP, at));
        unshare(&endpoint, Iova::new(at), &mut buffer, Direction::Both);
        endpoint.close().unwrap();
        assert!(!machine.reaches(EP, at) && !machine.reaches(EP2, at));
        assert_eq!(machine.outstanding(), 2, "the two queues");
        assert_eq!((domain.mapping_count(), viommu.stats().quarantined_mappings), (0, 0));
        if !shared {
            // All of the addresses came back, too: the domain can be used once more.
            let again = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
            assert_eq!(again.faulting_iova().get(), (1 << 39) - PAGE);
        }
    }
}

/// Fails when `close` frees pages that a buffer is in, or copies out of pages that are gone.
#[test]
fn bounce_pages_outlive_the_buffers_in_them() {
    let Bench { endpoint, domain, viommu, machine } = with_bounce(4);
    let view = endpoint.clone();
    let mut buffer = [0x77; 8];
    let at = share(&endpoint, &mut buffer, Direction::Both).unwrap();
    endpoint.close().unwrap();
    assert_eq!((machine.outstanding(), domain.mapping_count()), (3, 1));
    assert!(!machine.reaches(EP, at.get()));
    buffer.fill(0x11);
    unshare(&view, at, &mut buffer, Direction::Both);
    assert_eq!(buffer, [0x11; 8], "nothing is copied after the end");
    assert_eq!(share(&view, &mut buffer, Direction::Both), Err(DmaError::Closed));
    let ((), requests, _) = machine.traffic(|| drop((endpoint, view)));
    assert_eq!((requests, machine.outstanding(), domain.mapping_count()), (0, 2, 0));
    assert_eq!(viommu.reclaim(), 0);
}

#[test]
fn an_endpoint_that_is_dropped_keeps_its_pages_until_they_are_reclaimed() {
    let Bench { endpoint, domain, viommu, machine } = with_bounce(4);
    let mut buffer = [0x77; 8];
    let at = share(&endpoint, &mut buffer, Direction::ToDevice).unwrap().get();
    drop(endpoint);
    assert!(machine.reaches(EP, at), "it is attached and mapped as before");
    assert_eq!((machine.outstanding(), viommu.stats().quarantined_mappings), (3, 1));
    assert_eq!(viommu.reclaim(), 1);
    assert!(!machine.reaches(EP, at));
    assert_eq!((machine.outstanding(), domain.mapping_count()), (2, 0));
}

#[test]
fn closing_that_fails_frees_the_pages_all_the_same() {
    let Bench { endpoint, domain, viommu, machine } = with_bounce(2);
    machine.inject([Inject::Refuse(2)]);
    assert!(endpoint.close().is_err());
    // DETACH was refused, so they were unmapped the other way.
    assert_eq!((machine.outstanding(), viommu.stats().quarantined_mappings), (2, 0));
    assert_eq!(machine.device().domain_of(EP.get()), Some(domain.id().get()));
    viommu.detach(EP).unwrap();
}

#[test]
fn an_endpoint_whose_pages_cannot_be_had_is_detached() {
    for script in [vec![], vec![Inject::Pass, Inject::Refuse(8)]] {
        let machine = Machine::new(Config::default());
        let viommu = machine.bring_up();
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        if script.is_empty() {
            machine.limit_allocations(0);
        }
        machine.inject(script);
        let options = EndpointOptions { bounce_bytes: 1, ..EndpointOptions::default() };
        assert!(matches!(viommu.open(EP, &domain, options), Err(OpenError::Dma(_))));
        assert_eq!((machine.device().domain_of(EP.get()), machine.outstanding()), (None, 2));
    }
}

/// Fails when `open` detaches an endpoint that was attached before it.
#[test]
fn a_second_view_that_fails_leaves_the_first_one_alone() {
    let bench = with_bounce(1);
    let memory = bench.endpoint.alloc_coherent(1).unwrap();
    bench.machine.limit_allocations(0);
    let options = EndpointOptions { bounce_bytes: 1, ..EndpointOptions::default() };
    assert!(bench.viommu.open(EP, &bench.domain, options).is_err());
    assert!(bench.machine.reaches(EP, memory.iova().get()));
}

/// Isolation of two endpoints in domains of their own, tried both ways with a positive control.
#[test]
fn endpoints_do_not_reach_each_others_memory() {
    let machine = Machine::new(Config::default());
    let viommu = machine.bring_up();
    let open = |id| {
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        viommu.open(id, &domain, EndpointOptions::default()).unwrap()
    };
    let (one, other) = (open(EP), open(EP2));
    let memory = machine.memory(PAGE);
    fill(&memory, 0x11);
    // SAFETY: nobody but the test uses the memory.
    let mapping = unsafe { one.map(memory.phys, PAGE as usize, Direction::Both) }.unwrap();
    let at = mapping.iova().get();
    machine.dma_write(EP, at, &[0x22]).unwrap();
    assert!(machine.dma_write(EP2, at, &[0x33]).is_err() && !machine.reaches(EP2, at));
    assert_eq!(bytes_of(&memory)[0], 0x22);
    viommu.poll();
    assert_eq!((viommu.fault_count(EP), viommu.fault_count(EP2)), (0, 2));
    one.unmap(mapping).unwrap();
    // SAFETY: as above.
    let theirs = unsafe { other.map(memory.phys, PAGE as usize, Direction::Both) }.unwrap();
    assert!(machine.reaches(EP2, theirs.iova().get()) && !machine.reaches(EP, theirs.iova().get()));
    other.unmap(theirs).unwrap();
}

#[test]
fn freed_memory_is_poisoned_so_that_these_tests_see_a_late_access() {
    let bench = bench();
    let memory = bench.endpoint.alloc_coherent(1).unwrap();
    let ptr = memory.ptr();
    bench.endpoint.free_coherent(memory).unwrap();
    // SAFETY: the tests' memory stays mapped in this process for good.
    assert_eq!(unsafe { ptr.read_volatile() }, POISON);
}
