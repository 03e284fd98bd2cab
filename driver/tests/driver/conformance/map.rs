//! MAP: D-10, D-17 to D-22, and D-41.

use std::ptr::NonNull;

use virtio_iommu::{
    Direction, DmaDevice, DomainOptions, EndpointOptions, Iova, MapError, PhysAddr, PhysSegment, Prot,
};
use virtio_iommu_model::{AccessKind, Answer, Config, Inject, Request, Status, feature, flag};

use super::{
    AT, IDENTITY, map, map_at, map_identity, new_domain, offset, one_slot, unmap, whole_life, without,
};
use crate::support::{ANYWHERE, EP, Machine, PAGE, RW, Rng};

/// First and last IOVA, and flags, of each MAP in the log.
fn maps(machine: &Machine) -> Vec<(u64, u64, u32)> {
    let fields = |request: Request| match request {
        Request::Map { virt_start, virt_end, flags, .. } => Some((virt_start, virt_end, flags)),
        _ => None,
    };
    machine.requests().into_iter().filter_map(fields).collect()
}

fn flags(machine: &Machine) -> Vec<u32> {
    maps(machine).into_iter().map(|(_, _, flags)| flags).collect()
}

// Seen to fail with a `read_config_once` that leaves the input range at its 64 bits.
#[test]
fn d10_no_iova_outside_of_the_input_range_is_used() {
    let (first, last) = (0x10_0800, 0x17_f7ff);
    let machine = Machine::new(Config { input_range: first..=last, ..Config::default() });
    let (machine, viommu, domain) = machine.attach_one();
    let memory = machine.memory(8 * PAGE).phys;
    let mut rng = Rng::new(10);
    let mut mapped = 0;
    for _ in 0..2000 {
        let (at, len) = (0xf_8000 + PAGE * rng.below(0x90), PAGE * (1 + rng.below(8)));
        let inside = at >= first && at + len - 1 <= last;
        let result = map_at(&domain, at, memory, len, RW);
        assert_eq!(result.is_ok(), inside, "{len:#x} bytes at {at:#x}: {result:?}");
        if inside {
            unmap(&domain, at, len).unwrap();
            mapped += 1;
        }
    }
    assert!((500..1950).contains(&mapped), "one side was hardly tried: {mapped}");
    for (at, len) in [(0, PAGE), (first, u64::MAX - first + 1), (u64::MAX - 0x1fff, PAGE)] {
        map_at(&domain, at, memory, len & !0xfff, RW).unwrap_err();
        map_identity(&domain, PhysAddr::new(at & !0xfff), len & !0xfff).unwrap_err();
    }
    // The addresses of the driver's own choice, until there are no more.
    let endpoint = viommu.open(EP, &domain, EndpointOptions { bounce_bytes: 1, ..Default::default() });
    assert!((first..=last).contains(&endpoint.unwrap().faulting_iova().get()));
    while map(&domain, memory, PAGE, RW).is_ok() {}
    let maps = maps(&machine);
    assert!(maps.iter().all(|(start, end, _)| *start >= first && *end <= last));
    assert_eq!(maps.iter().map(|(start, ..)| *start).min(), Some(0x10_1000));
    assert_eq!(maps.iter().map(|(_, end, _)| *end).max(), Some(0x17_efff));
}

// Seen to fail with a `DomainRecord::check` that takes every flag.
#[test]
fn d17_undefined_flags_of_map_are_zero() {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE).phys;
    for bit in 3..32 {
        let prot = Prot::from_bits_retain(RW.bits() | 1 << bit);
        let (result, requests, _) = machine.traffic(|| map_at(&domain, AT, memory, PAGE, prot));
        assert_eq!((result, requests), (Err(MapError::UnknownFlags(prot.bits())), 0));
        assert_eq!(map(&domain, memory, PAGE, prot), Err(MapError::UnknownFlags(prot.bits())));
    }
    let machine = Machine::new(Config::default());
    whole_life(&machine, one_slot());
    assert!(flags(&machine).len() > 10);
    assert!(flags(&machine).iter().all(|flags| flags & !7 == 0), "{:?}", flags(&machine));
}

// Seen to fail with a `DomainRecord::check` that does not look at the kind of the domain.
#[test]
fn d18_nothing_is_mapped_in_a_bypass_domain() {
    let (machine, viommu) = Machine::live(Config::default());
    let bypass = viommu.create_domain(DomainOptions { mappings: 8, ..IDENTITY }).unwrap();
    let memory = machine.memory(PAGE).phys;
    // Before it exists for the device, and after.
    for attached in [false, true] {
        if attached {
            viommu.attach(EP, &bypass).unwrap();
            assert!(machine.device().is_bypass_domain(bypass.id().get()));
        }
        let (results, requests, _) = machine.traffic(|| {
            let anywhere = map(&bypass, memory, PAGE, RW).map(|_| ());
            [anywhere, map_at(&bypass, AT, memory, PAGE, RW), map_identity(&bypass, memory, PAGE)]
        });
        assert_eq!((results, requests), ([Err(MapError::IdentityDomain); 3], 0));
    }
    // A view for a device driver would have to map.
    for bounce_bytes in [0, 1] {
        let options = EndpointOptions { bounce_bytes, ..EndpointOptions::default() };
        viommu.open(EP, &bypass, options).unwrap_err();
    }
    // What was mapped in a normal domain does not follow its endpoint.
    let normal = new_domain(&viommu);
    viommu.move_endpoint(EP, &normal).unwrap();
    map_at(&normal, AT, memory, PAGE, RW).unwrap();
    viommu.move_endpoint(EP, &bypass).unwrap();
    assert_eq!(machine.device().mappings(bypass.id().get()).count(), 0);
    assert_eq!(maps(&machine).len(), 1);
}

// Seen to fail with a `DomainRecord::check` that lets one byte pass.
#[test]
fn d19_the_end_of_a_map_lies_above_its_start() {
    let machine = Machine::new(Config { page_size_mask: !0, ..Config::default() });
    let (machine, viommu, domain) = machine.attach_one();
    let memory = machine.memory(PAGE).phys;
    let options = EndpointOptions { bounce_bytes: 1, ..EndpointOptions::default() };
    let endpoint = viommu.open(EP, &domain, options).unwrap();
    let one = PhysSegment { phys: memory, len: 1 };
    let two = PhysSegment { phys: offset(memory, 8), len: 2 };
    let mut iovas = [ANYWHERE; 2];
    for len in [0, 1] {
        assert_eq!(map_at(&domain, AT, memory, len, RW), Err(MapError::Empty));
        assert_eq!(map(&domain, memory, len, RW), Err(MapError::Empty));
        map_identity(&domain, memory, len).unwrap_err();
        // SAFETY: refused, or as in `map_at`.
        unsafe {
            endpoint.map(memory, len as usize, Direction::Both).unwrap_err();
            let one = PhysSegment { len: len as usize, ..one };
            endpoint.map_scatter(&[one, two], Direction::Both, &mut iovas).unwrap_err();
            endpoint.map_scatter(&[two, one], Direction::Both, &mut iovas).unwrap_err();
        }
    }
    let (held, _) = machine.lend(1);
    endpoint.adopt(held, Direction::Both).unwrap_err();
    // Nothing is left of the lists of which one part was refused; and what is longer works.
    let before = domain.mapping_count();
    let coherent = endpoint.alloc_coherent(1).unwrap();
    map_at(&domain, AT, memory, 2, RW).unwrap();
    assert_eq!((before, domain.mapping_count()), (1, 3), "the bounce pages, and two more");
    endpoint.free_coherent(coherent).unwrap();
    let maps = maps(&machine);
    assert!(maps.len() >= 3 && maps.iter().all(|(start, end, _)| end > start), "{maps:x?}");
}

// Seen to fail with a `begin_map` that clears the flag, and with one that sets it always.
#[test]
fn d20_the_mmio_flag_marks_device_registers_and_nothing_else() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(8 * PAGE).phys;
    // Neighbours of different type are requests of their own, each of one type.
    for (page, prot) in [RW, RW | Prot::MMIO, Prot::WRITE | Prot::MMIO, Prot::READ].into_iter().enumerate() {
        let at = page as u64 * PAGE;
        map_at(&domain, AT + at, offset(memory, at), PAGE, prot).unwrap();
    }
    map(&domain, memory, PAGE, Prot::READ | Prot::MMIO).unwrap();
    assert_eq!(flags(&machine), [3, 7, 6, 1, 5]);
    assert_eq!(domain.translate(Iova::new(AT + PAGE)).unwrap().prot, RW | Prot::MMIO);
    // The same again for an endpoint that comes back.
    viommu.detach(EP).unwrap();
    machine.device().clear_log();
    viommu.attach(EP, &domain).unwrap();
    let mut replayed = flags(&machine);
    replayed.sort_unstable();
    assert_eq!(replayed, [1, 3, 5, 6, 7]);

    // What device drivers map is memory.
    drop((domain, viommu));
    let machine = Machine::new(without(feature::MMIO));
    whole_life(&machine, Machine::options());
    let of_memory = flags(&machine);
    let machine = Machine::new(Config::default());
    whole_life(&machine, Machine::options());
    let with_mmio = flags(&machine).into_iter().filter(|flags| flags & flag::MAP_MMIO != 0).count();
    assert_eq!(with_mmio, 1, "the one that was asked for");
    assert_eq!(flags(&machine).len(), of_memory.len() + 1);
}

// Seen to fail with a `Direction::prot` that gives WRITE alone for `Both`, and with a MAP that drops READ next to WRITE.
#[test]
fn d21_read_is_set_wherever_reads_are_meant() {
    // The model lets no read through a mapping that has only WRITE.
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let block = machine.memory(8 * PAGE);
    let memory = block.phys;
    let options = EndpointOptions { bounce_bytes: PAGE as usize, ..EndpointOptions::default() };
    let endpoint = viommu.open(EP, &domain, options).unwrap();
    let coherent = endpoint.alloc_coherent(1).unwrap();
    assert_eq!(flags(&machine), [3, 3], "bounce pages and coherent memory go both ways");
    assert!(machine.reaches(EP, coherent.iova().get()));
    let buffer = NonNull::slice_from_raw_parts(block.ptr, 16);
    // SAFETY: the buffer is the test's, and nobody else touches it.
    let shared = unsafe { endpoint.share(buffer, Direction::ToDevice) }.unwrap();
    assert!(machine.reaches(EP, shared.get()));

    let directions = [(Direction::ToDevice, 1), (Direction::FromDevice, 2), (Direction::Both, 3)];
    for (direction, expected) in directions {
        machine.device().clear_log();
        let (held, _) = machine.lend(PAGE);
        let segments = [0, 2].map(|page| PhysSegment { phys: offset(memory, page * PAGE), len: 1 });
        let mut iovas = [ANYWHERE; 2];
        let adopted = endpoint.adopt(held, direction).unwrap();
        // SAFETY: as in `map_at`.
        let single = unsafe { endpoint.map(memory, 1, direction) }.unwrap();
        // SAFETY: as in `map_at`.
        let list = unsafe { endpoint.map_scatter(&segments, direction, &mut iovas) }.unwrap();
        assert_eq!(flags(&machine), [expected; 4], "{direction:?}");
        for iova in [adopted.iova(), single.iova(), iovas[0], iovas[1]] {
            assert_eq!(machine.reaches(EP, iova.get()), expected & flag::MAP_READ != 0);
            assert_eq!(machine.dma_write(EP, iova.get(), &[0]).is_ok(), expected & flag::MAP_WRITE != 0);
        }
        for mapping in [adopted, single, list] {
            endpoint.unmap(mapping).unwrap();
        }
    }
    for (prot, readable) in [(Prot::READ, true), (Prot::WRITE, false), (RW, true)] {
        map_at(&domain, AT, memory, PAGE, prot).unwrap();
        assert_eq!(machine.reaches(EP, AT), readable);
        unmap(&domain, AT, PAGE).unwrap();
    }
}

// Seen to fail with a `check_config` that takes the feature for given.
#[test]
fn d22_the_mmio_flag_is_not_sent_without_its_feature() {
    let machine = Machine::new(without(feature::MMIO));
    let (machine, _viommu, domain) = machine.attach_one();
    let memory = machine.memory(PAGE).phys;
    for prot in [Prot::MMIO | RW, Prot::MMIO | Prot::READ, Prot::MMIO | Prot::WRITE] {
        let (result, requests, _) = machine.traffic(|| map_at(&domain, AT, memory, PAGE, prot));
        assert_eq!((result, requests), (Err(MapError::NoMmioFlag), 0));
        assert_eq!(map(&domain, memory, PAGE, prot), Err(MapError::NoMmioFlag));
    }
    // The same registers without the flag are the embedder's choice.
    map_at(&domain, AT, memory, PAGE, RW).unwrap();
    assert_eq!(flags(&machine), [3]);
    let entry = machine.entries()[0];
    assert_eq!((entry.answer, entry.inject), (Answer::Status(Status::Ok), Inject::Pass));
}

/// What is guest-physical memory only the embedder knows: `map` and `map_at` are `unsafe` for it. What the driver sees is
/// a range that does not exist.
// Seen to fail with a `DomainRecord::check` that does not look where the physical range ends.
#[test]
fn d41_physical_ranges_do_not_wrap_and_virtual_ones_are_usable() {
    let machine = Machine::new(Config { input_range: 0..=u64::MAX, ..Config::default() });
    let (machine, viommu, domain) = machine.attach_one();
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    let top = PhysAddr::new(u64::MAX - 0xfff);
    for pages in [2, 3, 1 << 20] {
        let len = pages * PAGE;
        let wraps = MapError::PhysicalWraps { phys: top, len };
        let call = || (map_at(&domain, AT, top, len, RW), map(&domain, top, len, RW));
        let (results, requests, _) = machine.traffic(call);
        assert_eq!((results, requests), ((Err(wraps), Err(wraps)), 0));
        let (result, requests, _) = machine.traffic(|| map_identity(&domain, top, len));
        assert_eq!((result, requests), (Err(wraps), 0));
        let segments = [PhysSegment { phys: top, len: len as usize }];
        // SAFETY: refused before anything is sent.
        let call = || unsafe {
            let list = endpoint.map_scatter(&segments, Direction::Both, &mut [ANYWHERE]);
            (endpoint.map(top, len as usize, Direction::Both).is_err(), list.is_err())
        };
        assert_eq!(machine.traffic(call), ((true, true), 0, 0));
    }
    // Virtual ranges that would pass the end, or take the last granule, of an input range of 64 bits.
    let memory = machine.memory(2 * PAGE).phys;
    for (at, len) in [(top.get(), PAGE), (top.get(), 2 * PAGE), (top.get() - PAGE, 2 * PAGE), (PAGE, !0xfff)]
    {
        let (result, requests, _) = machine.traffic(|| map_at(&domain, at, memory, len, RW));
        let outside = matches!(result, Err(MapError::OutsideInputRange { .. }));
        assert!((outside || result == Err(MapError::PhysicalWraps { phys: memory, len })) && requests == 0);
    }
    // The last page of the physical space is one like others.
    let (at, last) = (endpoint.faulting_iova().get() - PAGE, endpoint.faulting_iova().get() - 1);
    map_at(&domain, at, top, PAGE, RW).unwrap();
    assert_eq!(machine.device().translate(EP.get(), last, AccessKind::Write), Ok(u64::MAX));
}
