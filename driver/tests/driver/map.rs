//! Mapping and unmapping: what is sent, what is refused, what the endpoint reaches.

use virtio_iommu::{DomainOptions, Iova, MapError, PhysAddr, Prot, RequestError, Status, UnmapError};
use virtio_iommu_model::{Config, Endpoint, Inject, Request, ReservedRegion, feature};

use crate::support::{ANYWHERE, EP, Machine, PAGE, RW, bytes_of, fill};

fn iova(address: u64) -> Iova {
    Iova::new(address)
}

const AT: Iova = Iova::new(0x10_0000);

#[test]
fn d17_d23_requests_are_exact() {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(4 * PAGE);
    let id = domain.id().get();
    // SAFETY: nobody but the test uses the memory.
    unsafe {
        domain.map_at(AT, memory.phys, 2 * PAGE, Prot::READ).unwrap();
        domain.map_at(iova(0x20_0000), memory.phys, PAGE, RW | Prot::MMIO).unwrap();
        domain.unmap(AT, 2 * PAGE).unwrap();
    }
    let phys_start = memory.phys.get();
    let map =
        |virt_start, virt_end, flags| Request::Map { domain: id, virt_start, virt_end, phys_start, flags };
    let expected = [
        map(0x10_0000, 0x10_1fff, 1),
        map(0x20_0000, 0x20_0fff, 7),
        Request::Unmap { domain: id, virt_start: 0x10_0000, virt_end: 0x10_1fff, reserved: 0 },
    ];
    assert_eq!(machine.requests(), expected);
    let lengths: Vec<_> = machine.entries().iter().map(|e| (e.readable_len, e.writable_len)).collect();
    assert_eq!(lengths, [(36, 4), (36, 4), (28, 4)]);
}

#[test]
fn what_is_mapped_is_reached_exactly_and_only_so() {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(3 * PAGE);
    fill(&memory, 0x55);
    let phys = PhysAddr::new(memory.phys.get() + PAGE);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, phys, PAGE, Prot::WRITE) }.unwrap();
    let last = AT.get() + PAGE - 1;
    machine.dma_write(EP, AT.get(), &[1]).unwrap();
    machine.dma_write(EP, last, &[2]).unwrap();
    for outside in [AT.get() - 1, last + 1] {
        assert!(machine.dma_write(EP, outside, &[3]).is_err());
    }
    assert!(machine.dma_read(EP, AT.get(), 1).is_err(), "write only");
    let bytes = bytes_of(&memory);
    assert_eq!((bytes[0xfff], bytes[0x1000], bytes[0x1fff], bytes[0x2000]), (0x55, 1, 2, 0x55));

    let translation = domain.translate(iova(AT.get() + 5)).unwrap();
    assert_eq!((translation.range.start(), translation.phys, translation.prot), (AT, phys, Prot::WRITE));
    // SAFETY: mapped above.
    unsafe { domain.unmap(AT, PAGE) }.unwrap();
    assert!(machine.dma_write(EP, AT.get(), &[4]).is_err());
    assert_eq!(domain.translate(AT), None);
}

/// Fails when `DomainRecord::check` lets any of these through.
#[test]
fn i05_d10_d19_d22_what_may_not_be_sent_is_not() {
    let features = Config::default().features & !feature::MMIO;
    let machine = Machine::new(Config { features, input_range: 0x10_0800..=0x8f_f7ff, ..Config::default() });
    let (machine, _viommu, domain) = machine.attach_one();
    let memory = machine.memory(4 * PAGE);
    let phys = memory.phys;
    let high = PhysAddr::new(u64::MAX - 0xfff);
    let cases = [
        (AT.get() + 0x1000, phys, 0, RW),
        (AT.get() + 0x1000, phys, 1, RW),
        (AT.get() + 0x1000, phys, 0x800, RW),
        (AT.get() + 0x1800, phys, PAGE, RW),
        (AT.get() + 0x1000, PhysAddr::new(phys.get() + 0x10), PAGE, RW),
        (AT.get() + 0x1000, high, 2 * PAGE, RW),
        (AT.get(), phys, PAGE, RW),
        (0x8f_f000, phys, PAGE, RW),
        (0x8f_e000, phys, 2 * PAGE, RW),
        (0, phys, PAGE, RW),
        (u64::MAX - 0xfff, phys, PAGE, RW),
        (u64::MAX - 0x1fff, phys, 2 * PAGE, RW),
        (u64::MAX - 0xfff, phys, 2 * PAGE, RW),
        (AT.get() + 0x1000, phys, u64::MAX - 0xfff, RW),
        (AT.get() + 0x1000, phys, PAGE, Prot::empty()),
        (AT.get() + 0x1000, phys, PAGE, Prot::MMIO),
        (AT.get() + 0x1000, phys, PAGE, RW | Prot::MMIO),
    ];
    for (at, phys, len, prot) in cases {
        // SAFETY: refused before anything is sent.
        let call = || unsafe { domain.map_at(iova(at), phys, len, prot) };
        let (result, requests, kicks) = machine.traffic(call);
        assert!(result.is_err(), "{at:#x} {phys} {len:#x} {prot:?}");
        assert_eq!((requests, kicks), (0, 0), "{result:?}");
    }
    // Both edges of what is usable: whole granules inside of the range.
    for at in [0x10_1000, 0x8f_e000] {
        // SAFETY: nobody but the test uses the memory.
        unsafe { domain.map_at(iova(at), phys, PAGE, RW) }.unwrap();
    }
}

#[test]
fn i05_the_last_granule_of_the_whole_space_is_never_used() {
    for features in [Config::default().features, Config::default().features & !feature::INPUT_RANGE] {
        let machine = Machine::new(Config { features, input_range: 0..=u64::MAX, ..Config::default() });
        let (machine, _viommu, domain) = machine.attach_one();
        let memory = machine.memory(PAGE);
        // SAFETY: nobody but the test uses the memory.
        let top = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
        assert_eq!(top.get(), u64::MAX - 0x1fff);
        // SAFETY: mapped above.
        unsafe { domain.unmap(top, PAGE) }.unwrap();
    }
}

/// Fails when `take` does not look at what is mapped.
#[test]
fn i05_overlaps_are_refused() {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(8 * PAGE);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(iova(0x10_2000), memory.phys, 2 * PAGE, RW) }.unwrap();
    for (at, pages) in [(0x10_2000, 2), (0x10_1000, 2), (0x10_3000, 2), (0x10_0000, 6), (0x10_2000, 1)] {
        // SAFETY: refused before anything is sent.
        let call = || unsafe { domain.map_at(iova(at), memory.phys, pages * PAGE, RW) };
        let (result, requests, _) = machine.traffic(call);
        assert!(matches!(result, Err(MapError::InUse(_))), "{at:#x}");
        assert_eq!(requests, 0);
    }
    for at in [0x10_1000, 0x10_4000] {
        // SAFETY: as above; touching is fine.
        unsafe { domain.map_at(iova(at), memory.phys, PAGE, RW) }.unwrap();
    }
}

/// Fails when addresses that were given back lead to earlier memory, count as free while they are mapped, or are lost where
/// the device refuses them.
#[test]
fn addresses_are_mapped_again_and_again() {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(4 * PAGE);
    // SAFETY: nobody but the test uses the memory.
    let map = |phys| unsafe { domain.map_at(AT, phys, PAGE, RW) };
    for page in 0..4 {
        let phys = PhysAddr::new(memory.phys.get() + page * PAGE);
        let (mapped, requests, kicks) = machine.traffic(|| map(phys));
        assert_eq!((mapped, requests, kicks), (Ok(()), 1, 1), "page {page}");
        assert_eq!(domain.translate(AT).map(|translation| translation.phys), Some(phys));
        machine.dma_write(EP, AT.get(), &[page as u8 + 1]).unwrap();
        let (again, requests, _) = machine.traffic(|| map(memory.phys));
        assert!(matches!(again, Err(MapError::InUse(_))) && requests == 0, "page {page}");
        // SAFETY: mapped above.
        unsafe { domain.unmap(AT, PAGE) }.unwrap();
        machine.inject([Inject::Refuse(8)]);
        let refused = map(phys);
        assert!(matches!(refused, Err(MapError::Request { .. })), "page {page}: {refused:?}");
        assert!(domain.translate(AT).is_none() && machine.dma_write(EP, AT.get(), &[9]).is_err());
    }
    let bytes = bytes_of(&memory);
    assert_eq!([0, 0x1000, 0x2000, 0x3000].map(|at| bytes[at]), [1, 2, 3, 4]);
}

/// Fails when `begin_attach` leaves out a region, the MSI window among them.
#[test]
fn d33_reserved_regions_are_kept_out_of_mappings() {
    let machine = Machine::new(Config { input_range: 0xfed0_0000..=0xff0f_ffff, ..Config::default() });
    let mut endpoint = Endpoint::x86(EP.get());
    endpoint.reserved.push(ReservedRegion::reserved(0xfef0_1234, 0xfef0_2345));
    machine.device().add_endpoint(endpoint);
    let (machine, _viommu, domain) = machine.attach_one();
    let memory = machine.memory(0x20_0000);
    for at in [0xfee0_0000, 0xfeef_f000, 0xfef0_1000, 0xfef0_2000] {
        // SAFETY: refused before anything is sent.
        let refused = unsafe { domain.map_at(iova(at), memory.phys, PAGE, RW) };
        assert!(matches!(refused, Err(MapError::InUse(_))), "{at:#x}");
    }
    // SAFETY: nobody but the test uses the memory.
    unsafe {
        domain.map_at(iova(0xfef0_0000), memory.phys, PAGE, RW).unwrap();
        domain.map_at(iova(0xfef0_3000), memory.phys, PAGE, RW).unwrap();
    }
    // The allocator takes all that is left, and the model reports each MAP that meets a region.
    domain.reserve(800);
    let mut mapped = 2;
    // SAFETY: as above.
    while unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.is_ok() {
        mapped += 1;
    }
    assert_eq!(mapped, 0x400 - 0x100 - 2);
}

/// Fails when `begin_unmap_of` does without `whole`.
#[test]
fn i06_d25_an_unmap_starts_and_ends_on_boundaries_of_mappings() {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(8 * PAGE);
    for (at, pages) in [(0x10_0000, 2), (0x10_2000, 1), (0x10_5000, 1)] {
        // SAFETY: nobody but the test uses the memory.
        unsafe { domain.map_at(iova(at), memory.phys, pages * PAGE, RW) }.unwrap();
    }
    for (at, len) in [
        (0x10_0000, PAGE),
        (0x10_1000, PAGE),
        (0x10_1000, 2 * PAGE),
        (0x10_0000, 0x2fff),
        (0x10_0000, 6 * PAGE),
        (0x10_2000, 4 * PAGE),
        (0x10_3000, PAGE),
        (0x10_5000, 2 * PAGE),
        (0, u64::MAX),
        (0x10_0000, 0),
        (u64::MAX, 2),
    ] {
        // SAFETY: refused before anything is sent.
        let (result, requests, _) = machine.traffic(|| unsafe { domain.unmap(iova(at), len) });
        let refused = matches!(result, Err(UnmapError::NotMapped(_) | UnmapError::NotWhole(_)));
        assert!(refused && requests == 0, "{at:#x} {len:#x}: {result:?}");
    }
    assert_eq!(domain.mapping_count(), 3);
    // Two that touch, by one request.
    // SAFETY: mapped above.
    let (result, requests, kicks) = machine.traffic(|| unsafe { domain.unmap(AT, 3 * PAGE) });
    assert_eq!((result, requests, kicks), (Ok(()), 1, 1));
    assert_eq!(machine.device().mappings(domain.id().get()).count(), 1);
    // SAFETY: unmapped above: refused.
    assert_eq!(unsafe { domain.unmap(AT, 3 * PAGE) }, Err(UnmapError::NotMapped(AT)));
}

/// I6: fails when `unmap` does not go on one by one.
#[test]
fn i06_an_unmap_answered_range_is_repeated_mapping_by_mapping() {
    // Once the device did nothing, once it did everything and says RANGE all the same.
    for answer in [Inject::Refuse(5), Inject::Status(5)] {
        let (machine, viommu, domain) = Machine::attached(Config::qemu_10());
        let memory = machine.memory(3 * PAGE);
        for page in 0..3 {
            let phys = PhysAddr::new(memory.phys.get() + page * PAGE);
            // SAFETY: nobody but the test uses the memory.
            unsafe { domain.map_at(iova(AT.get() + page * PAGE), phys, PAGE, RW) }.unwrap();
        }
        machine.inject([answer]);
        // SAFETY: mapped above.
        let (result, requests, _) = machine.traffic(|| unsafe { domain.unmap(AT, 3 * PAGE) });
        assert_eq!((result, requests), (Ok(()), 4));
        assert_eq!(machine.device().mappings(domain.id().get()).count(), 0);
        assert_eq!((domain.mapping_count(), viommu.stats().quarantined_mappings), (0, 0));
    }
}

#[test]
fn i06_one_mapping_that_stays_does_not_keep_its_neighbours() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(3 * PAGE);
    for page in 0..3 {
        // SAFETY: nobody but the test uses the memory.
        unsafe { domain.map_at(iova(AT.get() + page * PAGE), memory.phys, PAGE, RW) }.unwrap();
    }
    machine.inject([Inject::Refuse(5), Inject::Pass, Inject::Refuse(3), Inject::Pass]);
    // SAFETY: mapped above.
    let error = unsafe { domain.unmap(AT, 3 * PAGE) }.unwrap_err();
    assert!(matches!(error, UnmapError::Request { error: RequestError::Refused(Status::DevErr), .. }));
    assert_eq!(viommu.stats().quarantined_mappings, 1);
    assert!(machine.reaches(EP, AT.get() + PAGE) && !machine.reaches(EP, AT.get()));
    assert_eq!(viommu.reclaim(), 1);
    assert_eq!(viommu.stats().quarantined_bytes, 0);
}

#[test]
fn granules_of_any_size() {
    for (mask, granule) in [(!0xffff, 0x1_0000u64), (0x20_1000, 0x1000), (!0, 1), (1 << 16, 0x1_0000)] {
        let machine = Machine::new(Config { page_size_mask: mask, ..Config::default() });
        let (machine, viommu, domain) = machine.attach_one();
        assert_eq!(viommu.granule(), granule);
        let memory = machine.memory(0x4_0000);
        let len = (3 * granule).max(2);
        // SAFETY: nobody but the test uses the memory.
        let at = unsafe { domain.map(memory.phys, len, RW, ANYWHERE) }.unwrap();
        assert!(machine.reaches(EP, at.get()) && machine.reaches(EP, at.get() + len - 1));
        assert!(!machine.reaches(EP, at.get() - 1));
        // SAFETY: refused before anything is sent.
        let (result, requests, _) = machine.traffic(|| unsafe { domain.map(memory.phys, 1, RW, ANYWHERE) });
        assert_eq!((result, requests), (Err(MapError::Empty), 0), "D-19: no MAP says one byte");
        if granule > 1 {
            // SAFETY: as above.
            let result = unsafe { domain.map(memory.phys, granule / 2, RW, ANYWHERE) };
            assert!(matches!(result, Err(MapError::Misaligned { .. })));
        }
        // SAFETY: mapped above.
        unsafe { domain.unmap(at, len) }.unwrap();
    }
}

#[test]
fn addresses_are_chosen_below_the_limit_and_never_zero() {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    let map = |limit| unsafe { domain.map(memory.phys, PAGE, RW, iova(limit)) };
    assert_eq!(map(0xffff_ffff).unwrap(), iova(0xffff_f000));
    assert_eq!(map(0x2fff).unwrap(), iova(0x2000));
    assert_eq!(map(0x2ffe).unwrap(), iova(0x1000));
    assert_eq!(map(0x2fff), Err(MapError::IovaExhausted { len: PAGE, limit: iova(0x2fff) }));
    // A caller who wants 0 gets it.
    // SAFETY: as above.
    unsafe { domain.map_at(iova(0), memory.phys, PAGE, RW) }.unwrap();
    assert!(machine.reaches(EP, 0));
}

#[test]
fn records_run_out_and_more_can_be_had() {
    let machine = Machine::new(Config::default());
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions { mappings: 2, ..DomainOptions::default() }).unwrap();
    viommu.attach(EP, &domain).unwrap();
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    let map = || unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) };
    let mut mapped = vec![map().unwrap(), map().unwrap()];
    let (full, requests, _) = machine.traffic(map);
    assert_eq!((full, requests), (Err(MapError::NoRecord { capacity: 2 }), 0));
    domain.reserve(4);
    mapped.extend([map().unwrap(), map().unwrap()]);
    assert!(map().is_err());
    for at in mapped {
        // SAFETY: mapped above.
        unsafe { domain.unmap(at, PAGE) }.unwrap();
    }
    assert_eq!(domain.mapping_count(), 0);
}

#[test]
fn a_refused_map_changes_nothing() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    // The first mapping of a domain is a matter of its own (I12).
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(iova(0x1000), memory.phys, PAGE, RW) }.unwrap();
    for (answer, error) in [
        (Inject::Refuse(4), RequestError::Refused(Status::Inval)),
        (Inject::Refuse(8), RequestError::Refused(Status::NoMem)),
        (Inject::Unwritten, RequestError::NotHandled),
    ] {
        machine.inject([answer]);
        // SAFETY: as above.
        let result = unsafe { domain.map_at(AT, memory.phys, PAGE, RW) };
        let Err(MapError::Request { error: found, .. }) = result else { panic!("{result:?}") };
        assert_eq!(found, error);
        assert!(!machine.reaches(EP, AT.get()));
        assert_eq!((domain.mapping_count(), viommu.stats().quarantined_mappings), (1, 0));
    }
    // SAFETY: as above.
    unsafe { domain.map_at(AT, memory.phys, PAGE, RW) }.unwrap();
}

/// Fails when `uncount` takes off what was never counted: a mapping of unknown outcome.
#[test]
fn bytes_are_counted_as_mapped_or_as_quarantined() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(3 * PAGE);
    // SAFETY: nobody but the test uses the memory.
    let map = |at: u64, pages: u64| unsafe { domain.map_at(iova(at), memory.phys, pages * PAGE, RW) };
    map(0x10_0000, 1).unwrap();
    machine.inject([Inject::UsedLen(3)]);
    assert!(map(0x20_0000, 2).is_err());
    assert!(machine.reaches(EP, 0x20_0000));
    assert_eq!((domain.stats().mapped_bytes, viommu.stats().quarantined_bytes), (PAGE, 2 * PAGE));
    assert_eq!(viommu.reclaim(), 1);
    assert!(!machine.reaches(EP, 0x20_0000));
    assert_eq!(domain.stats().mapped_bytes, PAGE);
    viommu.detach(EP).unwrap();
    assert_eq!(domain.stats().mapped_bytes, 0);
}

#[test]
fn counts_are_those_that_the_device_saw() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    for _ in 0..5 {
        // SAFETY: nobody but the test uses the memory.
        let at = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
        // SAFETY: mapped above.
        unsafe { domain.unmap(at, PAGE) }.unwrap();
    }
    viommu.detach(EP).unwrap();
    let (stats, seen) = (viommu.stats(), machine.device().counters());
    let counted = (stats.attaches, stats.detaches, stats.maps, stats.unmaps, stats.kicks);
    assert_eq!(counted, (seen.attach, seen.detach, seen.map, seen.unmap, seen.kicks[0]));
    assert_eq!(stats.requests, seen.attach + seen.detach + seen.map + seen.unmap + seen.probe);
    assert_eq!((domain.stats().maps, domain.stats().unmaps), (5, 5));
    assert_eq!((domain.stats().requests, domain.stats().kicks), (12, 12));
}
