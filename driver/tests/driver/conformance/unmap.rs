//! UNMAP: D-23 to D-26.

use std::collections::BTreeMap;

use virtio_iommu::{Direction, DmaDevice, DomainOptions, EndpointOptions, Iova, PhysSegment, UnmapError};
use virtio_iommu_model::{Answer, Config, Inject, LogEntry, Request, Status};

use super::{
    AT, DEVERR, IDENTITY, NOMEM, RANGE, map_at, map_identity, new_domain, offset, one_slot, unmap, whole_life,
};
use crate::support::{ANYWHERE, EP, Machine, PAGE, RW, Rng};

/// Mappings of one domain, by their first address.
type Mappings = BTreeMap<u64, u64>;

/// Follows the log from an empty domain on, and shows each UNMAP with the mappings that there were before it.
fn follow(log: &[LogEntry], mut unmap: impl FnMut(&Mappings, u64, u64)) -> usize {
    let mut domains: BTreeMap<u32, Mappings> = BTreeMap::new();
    let mut unmaps = 0;
    for entry in log {
        let done = entry.answer == Answer::Status(Status::Ok);
        match entry.request {
            Request::Map { domain, virt_start, virt_end, .. } if done => {
                domains.entry(domain).or_default().insert(virt_start, virt_end);
            }
            Request::Unmap { domain, virt_start, virt_end, .. } => {
                unmaps += 1;
                let mappings = domains.entry(domain).or_default();
                unmap(mappings, virt_start, virt_end);
                if done {
                    mappings.retain(|first, last| *last < virt_start || *first > virt_end);
                }
            }
            _ => {}
        }
    }
    unmaps
}

/// Maps and unmaps at random in a few pages: whole mappings, parts of them, and ranges with holes.
fn random_unmaps(seed: u64, step: u64) -> Machine {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(4 * PAGE).phys;
    let mut rng = Rng::new(seed);
    for _ in 0..3000 {
        let at = AT + PAGE * rng.below(16);
        if rng.below(3) > 0 {
            let _ = map_at(&domain, at, memory, PAGE * (1 + rng.below(4)), RW);
        } else {
            let step = if rng.below(2) == 0 { step } else { PAGE };
            let at = AT + step * rng.below(16 * PAGE / step);
            let _ = unmap(&domain, at, step * (1 + rng.below(8 * PAGE / step)));
        }
        let recorded = machine.device().mappings(domain.id().get()).count();
        assert_eq!(domain.mapping_count(), recorded, "an error that is none, or the reverse");
    }
    machine
}

// Seen to fail with a 1 in UNMAP's reserved bytes.
#[test]
fn d23_reserved_of_unmap_is_zero() {
    let machine = Machine::new(Config::default());
    whole_life(&machine, one_slot());
    let fields = |request: Request| match request {
        Request::Unmap { reserved, .. } => Some(reserved),
        _ => None,
    };
    let reserved: Vec<_> = machine.requests().into_iter().filter_map(fields).collect();
    assert!(reserved.len() > 10 && reserved.iter().all(|reserved| *reserved == 0), "{reserved:x?}");
}

/// The driver does not use the liberty to spill over holes.
// Seen to fail with a `Space::whole` that does not look whether mappings touch.
#[test]
fn d24_an_unmap_covers_whole_mappings_that_touch() {
    for seed in 0..4 {
        let machine = random_unmaps(seed, PAGE);
        let mut of_several = 0;
        let unmaps = follow(&machine.entries(), |mappings, first, last| {
            let mut next = first;
            let mut count = 0;
            for (start, end) in mappings.range(first..=last) {
                assert_eq!(*start, next, "a hole, or a mapping that begins before: {first:#x}..={last:#x}");
                (next, count) = (end + 1, count + 1);
            }
            assert_eq!(next, last + 1, "a hole, or a mapping that ends behind: {first:#x}..={last:#x}");
            of_several += usize::from(count > 1);
        });
        assert!(unmaps > 100 && of_several > 20, "{unmaps} UNMAPs, {of_several} of several");
    }
}

// Seen to fail with a `Space::whole` that takes a range that ends inside of a mapping.
#[test]
fn d25_an_unmap_begins_and_ends_on_edges_of_mappings() {
    let check = |machine: &Machine| {
        follow(&machine.entries(), |mappings, first, last| {
            let at = |address| mappings.range(..=address).next_back().filter(|(_, end)| **end >= address);
            assert!(at(first).is_none_or(|(start, _)| *start == first), "{first:#x} splits a mapping");
            assert!(at(last).is_none_or(|(_, end)| *end == last), "{last:#x} splits a mapping");
        })
    };
    for (seed, step) in [(1, PAGE), (2, 0x400), (3, 0x800)] {
        assert!(check(&random_unmaps(seed, step)) > 30);
    }
    // Where it is the driver that decides what to unmap: lists that fail, and mappings that stay.
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    let memory = machine.memory(16 * PAGE).phys;
    let segments: Vec<_> = (0..6u64)
        .map(|index| PhysSegment { phys: offset(memory, 2 * index * PAGE), len: (index % 2 + 1) as usize })
        .collect();
    for failing in 0..6 {
        for answer in [NOMEM, Inject::UsedLen(0), Inject::Status(0x80)] {
            machine.inject(std::iter::repeat_n(Inject::Pass, failing).chain([answer]));
            let mut iovas = [ANYWHERE; 6];
            // SAFETY: as in `map_at`.
            unsafe { endpoint.map_scatter(&segments, Direction::Both, &mut iovas) }.unwrap_err();
            viommu.reclaim();
            assert_eq!((domain.mapping_count(), viommu.stats().quarantined_mappings), (0, 0));
        }
    }
    for script in [[RANGE, DEVERR, Inject::Pass], [RANGE, Inject::Pass, RANGE], [DEVERR; 3]] {
        (0..2).for_each(|page| map_at(&domain, AT + page * PAGE, memory, PAGE, RW).unwrap());
        machine.inject(script);
        unmap(&domain, AT, 2 * PAGE).unwrap_err();
        machine.device().inject.script.clear();
        viommu.reclaim();
        assert_eq!(domain.mapping_count(), 0);
    }
    assert!(check(&machine) > 20);
}

// Seen to fail with a `begin_unmap_of` that sends without a record of a mapping.
#[test]
fn d26_nothing_is_unmapped_in_a_bypass_domain() {
    let (machine, viommu) = Machine::live(Config::default());
    let bypass = viommu.create_domain(DomainOptions { mappings: 8, ..IDENTITY }).unwrap();
    let memory = machine.memory(PAGE).phys;
    let nothing = |at| {
        let (result, requests, _) = machine.traffic(|| unmap(&bypass, at, PAGE));
        assert_eq!((result, requests), (Err(UnmapError::NotMapped(Iova::new(at))), 0));
    };
    nothing(AT);
    viommu.attach(EP, &bypass).unwrap();
    nothing(AT);
    // What could not be mapped is not unmapped again either.
    map_at(&bypass, AT, memory, PAGE, RW).unwrap_err();
    map_identity(&bypass, memory, PAGE).unwrap_err();
    nothing(AT);
    nothing(memory.get());
    viommu.open(EP, &bypass, EndpointOptions { bounce_bytes: 1, ..Default::default() }).unwrap_err();
    // Nor what another domain had mapped when its endpoint came from there.
    let normal = new_domain(&viommu);
    viommu.move_endpoint(EP, &normal).unwrap();
    map_at(&normal, AT, memory, PAGE, RW).unwrap();
    viommu.move_endpoint(EP, &bypass).unwrap();
    nothing(AT);
    unmap(&normal, AT, PAGE).unwrap();
    viommu.detach(EP).unwrap();
    assert_eq!(machine.device().counters().unmap, 0);
}
