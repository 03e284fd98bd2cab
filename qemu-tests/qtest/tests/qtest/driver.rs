//! The driver's whole life over QEMU's device, with real accesses.

use qtest::{EDU, EDU2, HOST_BRIDGE, IOMMU, Machine, Transfer};
use virtio_iommu::{
    Direction, DmaDevice as _, DomainOptions, EndpointId, EndpointOptions, FaultAccess, FaultReason,
    Introduction, Iova, MapError, Options, PhysAddr, PhysSegment, Prot, ReservedKind, StartError, Unattached,
    Viommu,
};

use crate::Case;
use crate::support::{Dma, PAGE, bring_up, faults, options, pattern};

pub(crate) const CASES: &[Case] = &[
    ("driver/start_reports_what_the_device_has", start_reports_what_the_device_has),
    ("driver/going_live_closes_the_bypass", going_live_closes_the_bypass),
    ("driver/coherent_memory_is_shared_until_freed", coherent_memory_is_shared_until_freed),
    ("driver/mapped_memory_obeys_its_direction", mapped_memory_obeys_its_direction),
    ("driver/both_edges_of_a_mapping_hold", both_edges_of_a_mapping_hold),
    ("driver/scattered_memory_is_read_piece_by_piece", scattered_memory_is_read_piece_by_piece),
    ("driver/shared_buffers_hide_their_neighbours", shared_buffers_hide_their_neighbours),
    ("driver/domains_are_apart", domains_are_apart),
    ("driver/a_domain_is_shared_by_its_endpoints", a_domain_is_shared_by_its_endpoints),
    ("driver/a_second_domain_starts_empty", a_second_domain_starts_empty),
    ("driver/an_endpoint_moves", an_endpoint_moves),
    ("driver/mappings_come_back_with_an_endpoint", mappings_come_back_with_an_endpoint),
    ("driver/nothing_is_left_after_the_last_detach", nothing_is_left_after_the_last_detach),
    ("driver/what_the_device_would_take_is_refused", what_the_device_would_take_is_refused),
];

const RW: Prot = Prot::READ.union(Prot::WRITE);

fn start_reports_what_the_device_has(machine: &Machine) {
    let staged = Viommu::start(machine.transport(), machine.platform(), options()).unwrap();
    let bits = if machine.version().major < 9 { u64::MAX - PAGE } else { (1 << 39) - 1 };
    assert_eq!(staged.granule(), PAGE);
    assert_eq!((staged.input_range().start().get(), staged.input_range().last().get()), (0, bits));
    assert_eq!(staged.domain_range(), (0, u32::MAX));
    for endpoint in [EDU, EDU2, HOST_BRIDGE] {
        assert_eq!(staged.introduce(endpoint), Ok(Introduction::Known));
        let regions = staged.reserved_regions(endpoint).unwrap();
        let [msi] = &*regions else { panic!("{regions:?}") };
        let range = (msi.range.start().get(), msi.range.last().get());
        assert_eq!((msi.kind, range), (ReservedKind::Msi, (0xfee0_0000, 0xfeef_ffff)));
    }
    assert_eq!(staged.introduce(EndpointId::new(444)), Ok(Introduction::Unknown));
    assert_eq!(staged.introduce(IOMMU), Err(StartError::OwnEndpoint(IOMMU)));
    assert_eq!(staged.unattached(), Unattached::Bypasses);
    assert_eq!(staged.go_live().unwrap().unattached(), Unattached::Blocked);
}

fn going_live_closes_the_bypass(machine: &Machine) {
    let staged = Viommu::start(machine.transport(), machine.platform(), options()).unwrap();
    staged.introduce(EDU).unwrap();
    let memory = machine.platform().alloc(PAGE as usize).phys.get();
    let secret = pattern(1, 16);
    machine.ram().write(memory, &secret);
    // The same two accesses before and after.
    let copy = |to: u64| {
        machine.edu.transfer(Transfer::FromMemory, memory, 0, 16);
        machine.edu.transfer(Transfer::ToMemory, memory + to, 0, 16);
    };
    copy(0x100);
    assert_eq!(machine.ram().bytes(memory + 0x100, 16), secret, "it bypasses before");
    let viommu = staged.go_live().unwrap();
    copy(0x200);
    assert_eq!(machine.ram().bytes(memory + 0x200, 16), [0; 16], "it is blocked after");
    let faults = faults(&viommu);
    assert!(faults.len() >= 2, "{faults:?}");
    for fault in &faults {
        // Which of both is QEMU's choice: 10.0 forgets an endpoint that is not attached.
        assert!(matches!(fault.reason, FaultReason::Unknown | FaultReason::Domain), "{fault:?}");
        assert_eq!(fault.endpoint, EDU);
    }
}

fn coherent_memory_is_shared_until_freed(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let dma = Dma::open(&viommu, &machine.edu, EDU);
    let memory = dma.endpoint.alloc_coherent(3 * PAGE as usize).unwrap();
    let (iova, ptr, data) = (memory.iova(), memory.ptr(), pattern(2, 3000));
    let at = Iova::new(iova.get() + PAGE + 0x800);
    dma.write(at, &data);
    let mut found = vec![0; data.len()];
    // SAFETY: the device is idle, and the memory is this long.
    unsafe {
        ptr.as_ptr().add(0x1800).copy_to_nonoverlapping(found.as_mut_ptr(), found.len());
    }
    assert_eq!(found, data);
    assert_eq!(dma.read(at, data.len()), Some(data));
    assert_eq!(faults(&viommu), []);

    let blocks = machine.ram().live_blocks();
    dma.endpoint.free_coherent(memory).unwrap();
    assert_eq!(machine.ram().live_blocks(), blocks - 1, "it went back to the platform");
    assert_eq!(dma.read(at, 16), None);
    let faults = faults(&viommu);
    assert!(!faults.is_empty());
    assert!(faults.iter().all(|fault| (fault.reason, fault.endpoint) == (FaultReason::Mapping, EDU)));
    assert_eq!(faults[0].address, Some(at));
}

fn mapped_memory_obeys_its_direction(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let dma = Dma::open(&viommu, &machine.edu, EDU);
    let (before, after) = (pattern(3, 64), pattern(4, 64));
    for direction in [Direction::ToDevice, Direction::FromDevice, Direction::Both] {
        let memory = machine.platform().alloc(PAGE as usize).phys;
        machine.ram().write(memory.get(), &before);
        // SAFETY: nothing of Rust depends on the guest's memory.
        let mapping = unsafe { dma.endpoint.map(memory, PAGE as usize, direction) }.unwrap();
        let iova = mapping.iova();
        let (reads, writes) = (direction != Direction::FromDevice, direction != Direction::ToDevice);

        assert_eq!(dma.read(iova, 64), reads.then(|| before.clone()), "{direction:?}");
        let blocked = faults(&viommu);
        assert_eq!(blocked.is_empty(), reads, "{direction:?}");
        let said = (FaultReason::Mapping, FaultAccess::READ, EDU);
        assert!(blocked.iter().all(|fault| (fault.reason, fault.access, fault.endpoint) == said));

        dma.write(iova, &after);
        assert_eq!(machine.ram().bytes(memory.get(), 64), if writes { &*after } else { &*before });
        let blocked = faults(&viommu);
        assert_eq!(blocked.is_empty(), writes, "{direction:?}");
        let said = (FaultReason::Mapping, FaultAccess::WRITE, EDU);
        assert!(blocked.iter().all(|fault| (fault.reason, fault.access, fault.endpoint) == said));

        dma.endpoint.unmap(mapping).unwrap();
        dma.write(iova, &before);
        let there = machine.ram().bytes(memory.get(), 64);
        assert_eq!(there, if writes { &*after } else { &*before }, "unmapped");
        assert!(!faults(&viommu).is_empty());
    }
}

fn both_edges_of_a_mapping_hold(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let dma = Dma::open(&viommu, &machine.edu, EDU);
    let memory = machine.platform().alloc(4 * PAGE as usize).phys.get();
    let iova = Iova::new(0x4000_0000);
    let inner = PhysAddr::new(memory + PAGE);
    // SAFETY: nothing of Rust depends on the guest's memory.
    unsafe { dma.endpoint.domain().map_at(iova, inner, 2 * PAGE, RW) }.unwrap();
    let at = |offset: i64| Iova::new(iova.get().wrapping_add_signed(offset));
    let end = 2 * PAGE as i64;
    for (offset, allowed) in [(0, true), (end - 4, true), (-4, false), (end, false), (PAGE as i64 - 2, true)]
    {
        let bytes = pattern(offset as u64, 4);
        dma.write(at(offset), &bytes);
        let there = machine.ram().bytes((memory + PAGE).wrapping_add_signed(offset), 4);
        assert_eq!(there == bytes, allowed, "offset {offset:#x}");
        let faults = faults(&viommu);
        assert_eq!(faults.is_empty(), allowed, "offset {offset:#x}: {faults:?}");
        if let Some(fault) = faults.first() {
            assert_eq!(fault.address, Some(at(offset)));
        }
    }
    assert_eq!(machine.ram().bytes(memory, PAGE as usize), [0; PAGE as usize]);
    assert_eq!(machine.ram().bytes(memory + 3 * PAGE, PAGE as usize), [0; PAGE as usize]);
}

fn scattered_memory_is_read_piece_by_piece(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let dma = Dma::open(&viommu, &machine.edu, EDU);
    let platform = machine.platform();
    let segments: Vec<PhysSegment> = (0..5)
        .map(|index| {
            let memory = platform.alloc(2 * PAGE as usize).phys.get();
            let len = 100 + 700 * index;
            machine.ram().write(memory + 0x123, &pattern(index as u64, len));
            PhysSegment { phys: PhysAddr::new(memory + 0x123), len }
        })
        .collect();
    let mut iovas = [Iova::new(0); 5];
    let before = viommu.stats();
    // SAFETY: nothing of Rust depends on the guest's memory.
    let mapping = unsafe { dma.endpoint.map_scatter(&segments, Direction::ToDevice, &mut iovas) }.unwrap();
    let after = viommu.stats();
    assert_eq!(after.kicks - before.kicks, 1, "one doorbell for the list");
    for (index, (segment, iova)) in segments.iter().zip(iovas).enumerate() {
        assert_eq!(dma.read(iova, segment.len), Some(pattern(index as u64, segment.len)));
    }
    assert_eq!(faults(&viommu), []);
    dma.endpoint.unmap(mapping).unwrap();
    for iova in iovas {
        assert_eq!(dma.read(iova, 16), None);
    }
    assert_eq!((after.maps - before.maps, viommu.stats().unmaps - before.unmaps), (5, 1));
}

fn shared_buffers_hide_their_neighbours(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let bounce = EndpointOptions { bounce_bytes: 0x8000, ..EndpointOptions::default() };
    let dma = Dma::open_in(&viommu, &domain, &machine.edu, EDU, bounce);
    let requests = viommu.stats().requests;
    let mut buffer = pattern(5, 200);
    let data = buffer.clone();
    // SAFETY: the buffer is this test's own, on the stack, and valid for both calls.
    unsafe {
        let shared = std::ptr::NonNull::from(&mut buffer[..]);
        let iova = dma.endpoint.share(shared, Direction::Both).unwrap();
        assert_eq!(dma.read(iova, 200), Some(data));
        dma.write(iova, &pattern(6, 200));
        dma.endpoint.unshare(iova, shared, Direction::Both);
    }
    assert_eq!(buffer, pattern(6, 200));
    assert_eq!(viommu.stats().requests, requests, "nothing was sent");
    assert_eq!(dma.read(dma.endpoint.faulting_iova(), 4), None);
    assert!(!faults(&viommu).is_empty());
    dma.close();
}

fn domains_are_apart(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU, EDU2]);
    let one = Dma::open(&viommu, &machine.edu, EDU);
    let two = Dma::open(&viommu, &machine.edu2, EDU2);
    let memory = machine.platform().alloc(2 * PAGE as usize).phys.get();
    let iova = Iova::new(0x5000_0000);
    let only = Iova::new(0x6000_0000);
    // SAFETY: nothing of Rust depends on the guest's memory.
    unsafe {
        one.endpoint.domain().map_at(iova, PhysAddr::new(memory), PAGE, RW).unwrap();
        two.endpoint.domain().map_at(iova, PhysAddr::new(memory + PAGE), PAGE, RW).unwrap();
        one.endpoint.domain().map_at(only, PhysAddr::new(memory), PAGE, RW).unwrap();
    }
    one.write(iova, &pattern(7, 32));
    two.write(iova, &pattern(8, 32));
    assert_eq!(machine.ram().bytes(memory, 32), pattern(7, 32));
    assert_eq!(machine.ram().bytes(memory + PAGE, 32), pattern(8, 32));
    assert_eq!(one.read(only, 32), Some(pattern(7, 32)));
    assert_eq!(faults(&viommu), []);
    assert_eq!(two.read(only, 32), None);
    let faults = faults(&viommu);
    assert!(!faults.is_empty() && faults.iter().all(|fault| fault.endpoint == EDU2), "{faults:?}");
    assert_eq!((viommu.fault_count(EDU), viommu.fault_count(EDU2)), (0, faults.len() as u64));
}

fn a_domain_is_shared_by_its_endpoints(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU, EDU2]);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let one = Dma::open_in(&viommu, &domain, &machine.edu, EDU, EndpointOptions::default());
    let two = Dma::open_in(&viommu, &domain, &machine.edu2, EDU2, EndpointOptions::default());
    let memory = one.endpoint.alloc_coherent(PAGE as usize).unwrap();
    let iova = memory.iova();
    one.write(iova, &pattern(9, 32));
    assert_eq!(two.read(iova, 32), Some(pattern(9, 32)));
    one.close();
    assert_eq!(two.read(iova, 32), Some(pattern(9, 32)), "mappings stay for the other one");
    two.endpoint.free_coherent(memory).unwrap();
    assert_eq!(faults(&viommu), []);
    assert_eq!(two.read(iova, 32), None);
    two.close();
    assert_eq!(viommu.stats().quarantined_mappings, 0);
}

fn a_second_domain_starts_empty(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let one = Dma::open(&viommu, &machine.edu, EDU);
    let memory = one.endpoint.alloc_coherent(PAGE as usize).unwrap();
    let iova = memory.iova();
    one.write(iova, &pattern(10, 32));
    one.endpoint.free_coherent(memory).unwrap();
    one.close();
    machine.edu.function.enable_bus_mastering();
    let two = Dma::open(&viommu, &machine.edu, EDU);
    assert_eq!(faults(&viommu), []);
    assert_eq!(two.read(Iova::new(iova.get() - 0x10_0000), 32), None, "a domain of its own");
    let memory = two.endpoint.alloc_coherent(PAGE as usize).unwrap();
    two.write(memory.iova(), &pattern(11, 32));
    assert_eq!(two.read(memory.iova(), 32), Some(pattern(11, 32)));
    two.endpoint.free_coherent(memory).unwrap();
    two.close();
}

fn an_endpoint_moves(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU, EDU2]);
    let [from, to] = [0, 1].map(|_| viommu.create_domain(DomainOptions::default()).unwrap());
    viommu.attach(EDU, &from).unwrap();
    viommu.attach(EDU2, &to).unwrap();
    let memory = machine.platform().alloc(2 * PAGE as usize).phys.get();
    let iova = 0x4000_0000;
    // SAFETY: nothing of Rust depends on the guest's memory.
    unsafe {
        from.map_at(Iova::new(iova), PhysAddr::new(memory), PAGE, RW).unwrap();
        to.map_at(Iova::new(iova), PhysAddr::new(memory + PAGE), PAGE, RW).unwrap();
    }
    let (old, new) = (pattern(13, 16), pattern(14, 16));
    machine.ram().write(memory, &old);
    machine.ram().write(memory + PAGE, &new);
    let read = |at: u64| {
        machine.edu.transfer(Transfer::FromMemory, iova, 0, 16);
        machine.edu.transfer(Transfer::ToMemory, iova + at, 0, 16);
    };
    read(0x100);
    assert_eq!(machine.ram().bytes(memory + 0x100, 16), old);
    viommu.move_endpoint(EDU, &to).unwrap();
    read(0x200);
    assert_eq!(machine.ram().bytes(memory + PAGE + 0x200, 16), new, "it sees its new domain");
    assert_eq!(machine.ram().bytes(memory + 0x200, 16), [0; 16], "and not the old one");
    assert_eq!(faults(&viommu), []);
}

fn mappings_come_back_with_an_endpoint(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let memory = machine.platform().alloc(20 * PAGE as usize).phys.get();
    viommu.attach(EDU, &domain).unwrap();
    let iova = |index: u64| 0x4000_0000 + 2 * PAGE * index;
    for index in 0..20 {
        let phys = PhysAddr::new(memory + PAGE * index);
        // SAFETY: nothing of Rust depends on the guest's memory.
        unsafe { domain.map_at(Iova::new(iova(index)), phys, PAGE, RW) }.unwrap();
    }
    machine.ram().write(memory, &pattern(15, 16));
    machine.edu.transfer(Transfer::FromMemory, iova(0), 0, 16);
    assert_eq!(faults(&viommu), []);
    viommu.detach(EDU).unwrap();
    machine.edu.transfer(Transfer::ToMemory, iova(19), 0, 16);
    assert!(!faults(&viommu).is_empty());
    assert_eq!(machine.ram().bytes(memory + 19 * PAGE, 16), [0; 16]);
    viommu.attach(EDU, &domain).unwrap();
    for index in [1, 19] {
        machine.edu.transfer(Transfer::ToMemory, iova(index), 0, 16);
        assert_eq!(machine.ram().bytes(memory + PAGE * index, 16), pattern(15, 16));
    }
    assert_eq!(faults(&viommu), []);
}

fn nothing_is_left_after_the_last_detach(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let queues = machine.ram().live_blocks();
    let dma = Dma::open(&viommu, &machine.edu, EDU);
    let domain = dma.endpoint.domain().clone();
    // Still mapped when the endpoint goes.
    let left: Vec<_> = (0..20).map(|_| dma.endpoint.alloc_coherent(PAGE as usize).unwrap()).collect();
    let iova = left[0].iova();
    dma.write(iova, &pattern(12, 16));
    assert_eq!(dma.read(iova, 16), Some(pattern(12, 16)));
    assert_eq!(faults(&viommu), []);
    dma.close();
    machine.edu.function.enable_bus_mastering();
    for memory in &left {
        machine.edu.transfer(Transfer::ToMemory, memory.iova().get(), 0, 16);
    }
    assert!(faults(&viommu).len() >= 20, "nothing is reached any more");

    let requests = viommu.stats().requests;
    for memory in left {
        // SAFETY: this test's own mapping.
        unsafe { domain.unmap(memory.iova(), PAGE) }.unwrap();
    }
    assert_eq!(viommu.stats().requests, requests, "the device had forgotten them");
    assert_eq!(machine.ram().live_blocks(), queues, "all memory went back");
    assert_eq!(viommu.stats().quarantined_mappings, 0);
}

fn what_the_device_would_take_is_refused(machine: &Machine) {
    let viommu = bring_up(machine, Options::default(), &[EDU]);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EDU, &domain).unwrap();
    let memory = machine.platform().alloc(PAGE as usize).phys;
    let requests = viommu.stats().requests;
    // SAFETY: nothing of Rust depends on the guest's memory, and nothing is to be mapped.
    let map = |iova, phys, len, prot| unsafe { domain.map_at(Iova::new(iova), phys, len, prot) };
    assert!(matches!(map(0x800, memory, PAGE, RW), Err(MapError::Misaligned { .. })));
    assert!(matches!(map(0x1000, memory, 0x800, RW), Err(MapError::Misaligned { .. })));
    assert!(matches!(map(0x1000, PhysAddr::new(0x10), PAGE, RW), Err(MapError::Misaligned { .. })));
    assert!(matches!(map(0x1000, memory, 0, RW), Err(MapError::Empty)));
    assert!(matches!(map(0x1000, memory, PAGE, Prot::empty()), Err(MapError::NoPermission)));
    assert!(matches!(map(0xfee0_0000, memory, PAGE, RW), Err(MapError::InUse(_))));
    let last = u64::MAX - PAGE + 1;
    assert!(matches!(map(last, memory, PAGE, RW), Err(MapError::OutsideInputRange { .. })));
    let wraps = PhysAddr::new(last);
    assert!(matches!(map(0x1000, wraps, 2 * PAGE, RW), Err(MapError::PhysicalWraps { .. })));
    assert_eq!(viommu.stats().requests, requests, "the device saw none of it");
    assert_eq!(map(0x1000, memory, PAGE, RW), Ok(()));
    assert!(matches!(map(0x1000, memory, PAGE, RW), Err(MapError::InUse(_))));
}
