//! What an endpoint can put on the bus: masks, longest segments, boundaries.

use virtio_iommu::{
    Direction, DmaDevice, DmaError, DmaPool, DmaSegment, DomainOptions, EndpointOptions, Iova, MapError,
    OpenError, PhysAddr, PhysSegment,
};
use virtio_iommu_model::Config;

use crate::support::{EP, Opened, PAGE, Rng, apart};

const BOUNDARIES: [u64; 3] = [0x1000, 0x1_0000, 1 << 32];

/// A device that translates all 64 bits.
fn wide() -> Config {
    Config { input_range: 0..=u64::MAX, ..Config::default() }
}

fn opened(options: EndpointOptions) -> Opened {
    Opened::new(wide(), DomainOptions { mappings: 600, ..DomainOptions::default() }, options)
}

fn last(iova: Iova, len: u64) -> u64 {
    iova.get() + (len - 1)
}

/// Fails when any way to map forgets the limit.
#[test]
fn everything_that_is_mapped_lies_below_the_mask() {
    for bits in [24, 32, 39, 48, 64] {
        let limit = Iova::mask(bits);
        let opened = opened(EndpointOptions { limit, bounce_bytes: 0x4000, ..EndpointOptions::default() });
        let endpoint = &opened.endpoint;
        assert_eq!(endpoint.limit(), limit);
        let memory = opened.machine.memory(64 * PAGE);
        let segments = apart(memory.phys, 8);
        let mut iovas = [Iova::new(0); 8];
        let mut ends = vec![last(endpoint.faulting_iova(), PAGE)];
        let coherent = endpoint.alloc_coherent(0x3000).unwrap();
        ends.push(last(coherent.iova(), 0x3000));
        // SAFETY: nobody but the test uses the memory.
        let single = unsafe { endpoint.map(memory.phys, 0x2345, Direction::Both) }.unwrap();
        ends.push(last(single.iova(), 0x2345));
        // SAFETY: as above.
        let list = unsafe { endpoint.map_scatter(&segments, Direction::Both, &mut iovas) }.unwrap();
        ends.extend(iovas.map(|iova| last(iova, PAGE)));
        // SAFETY: as above.
        let resource = unsafe { endpoint.map_resource(memory.phys, 4, Direction::Both) }.unwrap();
        ends.push(last(resource.iova(), 4));
        let mut buffer = [0; 100];
        let shared = virtio_iommu::Bounced::<virtio_iommu::FromDevice>::new(endpoint, &mut buffer).unwrap();
        ends.push(last(shared.iova(), 100));
        drop(shared);
        assert!(ends.iter().all(|end| *end <= limit.get()), "{bits}: {ends:x?}");
        // Right below it: it is the mask that kept them there.
        assert!(ends.iter().any(|end| *end > limit.get() - 0x1_0000), "{bits}: {ends:x?}");
        endpoint.free_coherent(coherent).unwrap();
        for mapping in [single, list, resource] {
            endpoint.unmap(mapping).unwrap();
        }
    }
}

/// Fails when a limit is not the end of the search.
#[test]
fn what_does_not_fit_below_the_mask_is_refused() {
    let opened = opened(EndpointOptions { limit: Iova::mask(14), ..EndpointOptions::default() });
    // Pages 1 and 2 are left: 0 is never mapped, and one faults.
    let memory = opened.machine.memory(4 * PAGE);
    // SAFETY: nobody but the test uses the memory, or refused.
    let map = |len| unsafe { opened.endpoint.map(memory.phys, len, Direction::Both) };
    let exhausted = |error| matches!(error, DmaError::Map(MapError::IovaExhausted { limit, .. }) if limit == Iova::mask(14));
    assert!(exhausted(map(3 * PAGE as usize).unwrap_err()));
    let mapping = map(2 * PAGE as usize).unwrap();
    assert!(exhausted(map(1).unwrap_err()));
    opened.endpoint.unmap(mapping).unwrap();
    assert!(map(1).is_ok());
}

/// Fails when placement takes no heed of the boundary.
#[test]
fn what_fits_between_two_boundaries_crosses_none() {
    let mut random = Rng::new(0xb0da);
    for boundary in BOUNDARIES {
        let options = EndpointOptions { boundary: Some(boundary), ..EndpointOptions::default() };
        let opened = opened(options);
        assert_eq!(opened.endpoint.boundary(), Some(boundary));
        let memory = opened.machine.memory(64 * PAGE);
        let mut live = Vec::new();
        for _ in 0..300 {
            let offset = random.below(PAGE);
            let pages = 1 + random.below((boundary / PAGE).min(32));
            let len = (pages * PAGE - offset).max(1) as usize;
            let phys = PhysAddr::new(memory.phys.get() + offset);
            // SAFETY: nobody but the test uses the memory.
            let mapping = unsafe { opened.endpoint.map(phys, len, Direction::Both) }.unwrap();
            let (first, last) = (mapping.iova().get(), last(mapping.iova(), len as u64));
            assert_eq!(first / boundary, last / boundary, "{first:#x}..={last:#x}");
            let whole = DmaSegment { iova: mapping.iova(), len: len as u64 };
            assert_eq!(mapping.segments(&opened.endpoint).collect::<Vec<_>>(), [whole]);
            live.push(mapping);
            if random.below(3) == 0 {
                let mapping = live.swap_remove(random.below(live.len() as u64) as usize);
                opened.endpoint.unmap(mapping).unwrap();
            }
        }
    }
}

/// Fails when `DmaSegments` merges what does not touch, splits where it need not, or loses a byte.
#[test]
fn lists_become_segments_that_the_endpoint_takes() {
    let mut random = Rng::new(0x5e6);
    for boundary in BOUNDARIES.map(Some).into_iter().chain([None]) {
        for max_segment in [0x10, 0x800, 0xfff, 0x1_0000, u64::MAX] {
            let options = EndpointOptions { max_segment, boundary, ..EndpointOptions::default() };
            let opened = opened(options);
            let base = opened.machine.memory(64 * PAGE).phys.get();
            let list: Vec<_> = (0..20)
                .map(|index| {
                    let whole = random.below(2) == 0;
                    let offset = if whole { 0 } else { random.below(PAGE - 1) };
                    let len = if whole { PAGE } else { 1 + random.below(PAGE - offset) };
                    PhysSegment { phys: PhysAddr::new(base + 2 * index * PAGE + offset), len: len as usize }
                })
                .collect();
            let mut iovas = [Iova::new(0); 20];
            // SAFETY: nobody but the test uses the memory.
            let mapping = unsafe { opened.endpoint.map_scatter(&list, Direction::Both, &mut iovas) }.unwrap();
            let segments: Vec<_> = opened.endpoint.segments(&list, &iovas).collect();
            let edge = |at: u64| boundary.is_some_and(|boundary| at.is_multiple_of(boundary));
            for DmaSegment { iova, len } in &segments {
                assert!(*len > 0 && *len <= max_segment);
                let crossed = boundary.is_some_and(|size| iova.get() / size != last(*iova, *len) / size);
                assert!(!crossed, "{iova} {len:#x}");
            }
            for pair in segments.windows(2) {
                let end = pair[0].iova.get() + pair[0].len;
                let needed = pair[0].len == max_segment || edge(end);
                assert!(end != pair[1].iova.get() || needed, "two where one would do");
            }
            // Byte for byte what was mapped, in order.
            let bytes = |parts: Vec<(u64, u64)>| -> Vec<u64> {
                parts.into_iter().flat_map(|(at, len)| at..at + len).collect()
            };
            let expected =
                list.iter().zip(&iovas).map(|(part, iova)| (iova.get(), part.len as u64)).collect();
            let found = segments.iter().map(|part| (part.iova.get(), part.len)).collect();
            assert_eq!(bytes(found), bytes(expected));
            opened.endpoint.unmap(mapping).unwrap();
        }
    }
}

/// Scattered pages are one segment for the endpoint.
#[test]
fn pages_that_lie_apart_are_merged_by_their_addresses() {
    let opened = opened(EndpointOptions::default());
    let list = apart(opened.machine.memory(64 * PAGE).phys, 32);
    let mut iovas = [Iova::new(0); 32];
    // SAFETY: nobody but the test uses the memory.
    let mapping = unsafe { opened.endpoint.map_scatter(&list, Direction::Both, &mut iovas) }.unwrap();
    let segments: Vec<_> = opened.endpoint.segments(&list, &iovas).collect();
    assert_eq!(segments, [DmaSegment { iova: mapping.iova(), len: 32 * PAGE }]);
    opened.machine.dma_write(EP, mapping.iova().get(), &vec![7; 32 * PAGE as usize]).unwrap();
}

/// What is longer than the boundary begins at one, and is split at the others.
#[test]
fn what_is_longer_than_the_boundary_is_split() {
    let options = EndpointOptions { boundary: Some(0x4000), ..EndpointOptions::default() };
    let opened = opened(options);
    let coherent = opened.endpoint.alloc_coherent(0xa000).unwrap();
    assert!(coherent.iova().get().is_multiple_of(0x4000));
    let memory = opened.machine.memory(16 * PAGE);
    // SAFETY: nobody but the test uses the memory.
    let mapping = unsafe { opened.endpoint.map(memory.phys, 0xa000, Direction::Both) }.unwrap();
    let lens: Vec<_> = mapping.segments(&opened.endpoint).map(|segment| segment.len).collect();
    assert_eq!(lens, [0x4000, 0x4000, 0x2000]);
}

/// Fails when the stride of a pool takes no heed of the boundary.
#[test]
fn buffers_of_a_pool_cross_no_boundary_and_are_no_longer_than_a_segment() {
    for (boundary, len) in [(0x1000, 0x900), (0x1000, 0x1000), (0x1_0000, 0x3001), (1 << 32, 5)] {
        let options =
            EndpointOptions { boundary: Some(boundary), max_segment: 0x4000, ..EndpointOptions::default() };
        let opened = opened(options);
        let pool = DmaPool::new(&opened.endpoint, 20, len, Direction::Both).unwrap();
        let buffers: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(buffers.len(), 20);
        for buffer in &buffers {
            let (first, last) = (buffer.iova().get(), last(buffer.iova(), len as u64));
            assert_eq!(first / boundary, last / boundary, "{first:#x}..={last:#x} of {boundary:#x}");
        }
        let error = DmaPool::new(&opened.endpoint, 1, 0x4001, Direction::Both).unwrap_err();
        assert_eq!(error, DmaError::TooLong { len: 0x4001, max: 0x4000 });
    }
}

#[test]
fn constraints_that_make_no_sense_are_refused() {
    let Opened { endpoint, domain, viommu, machine } = opened(EndpointOptions::default());
    let open = |options| match viommu.open(EP, &domain, options) {
        Err(OpenError::Dma(error)) => error,
        other => panic!("{other:?}"),
    };
    for boundary in [0, 3, 0x1800] {
        let options = EndpointOptions { boundary: Some(boundary), ..EndpointOptions::default() };
        assert_eq!(open(options), DmaError::BadConstraint { option: "boundary", value: boundary });
    }
    let options = EndpointOptions { max_segment: 0, ..EndpointOptions::default() };
    assert_eq!(open(options), DmaError::BadConstraint { option: "max_segment", value: 0 });
    let limit = Iova::mask(12);
    let options = EndpointOptions { limit, ..EndpointOptions::default() };
    assert!(
        matches!(open(options), DmaError::Map(MapError::IovaExhausted { .. })),
        "not even one that faults"
    );
    assert!(machine.device().domain_of(EP.get()).is_some(), "its first view is as it was");
    assert!(endpoint.alloc_coherent(1).is_ok());
}
