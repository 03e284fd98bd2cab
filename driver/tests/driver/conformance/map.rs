//! MAP's flags, and what has no mappings: D-17 to D-22.

use std::ptr::NonNull;

use virtio_iommu::{Direction, DmaDevice, DomainOptions, EndpointOptions, Iova, MapError, PhysSegment, Prot};
use virtio_iommu_model::{Answer, Config, Inject, Request, Status, feature, flag};

use super::{
    AT, IDENTITY, map, map_at, map_identity, new_domain, offset, one_slot, unmap, whole_life, without,
};
use crate::support::{ANYWHERE, EP, Machine, PAGE, RW};

/// First and last IOVA, and flags, of each MAP in the log.
pub(super) fn maps(machine: &Machine) -> Vec<(u64, u64, u32)> {
    let fields = |request: Request| match request {
        Request::Map { virt_start, virt_end, flags, .. } => Some((virt_start, virt_end, flags)),
        _ => None,
    };
    machine.requests().into_iter().filter_map(fields).collect()
}

fn flags(machine: &Machine) -> Vec<u32> {
    maps(machine).into_iter().map(|(_, _, flags)| flags).collect()
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

// Seen to fail with a `begin_map` that clears the flag, with one that sets it always, and with a `next_replay` that clears it.
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
