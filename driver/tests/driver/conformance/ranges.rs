//! Addresses in MAP: D-10 and D-41.

use virtio_iommu::{Direction, DmaDevice, EndpointOptions, MapError, PhysAddr, PhysSegment};
use virtio_iommu_model::{AccessKind, Config};

use super::map::maps;
use super::{AT, map, map_at, map_identity, unmap};
use crate::support::{ANYWHERE, EP, Machine, PAGE, RW, Rng};

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
