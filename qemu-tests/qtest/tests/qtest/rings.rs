//! More requests and faults than the queues have room for.

use std::thread;
use std::time::Duration;

use qtest::{EDU, Edu, HostPlatform, Machine, Transfer};
use virtio_iommu::{
    Direction, DmaDevice as _, DomainOptions, EndpointOptions, FaultLimit, Iova, Options, PhysAddr,
    PhysSegment, Viommu,
};

use crate::Case;
use crate::support::{Dma, PAGE, bring_up, faults, options, pattern};

pub(crate) const CASES: &[Case] = &[
    ("rings/a_batch_larger_than_the_ring", a_batch_larger_than_the_ring),
    ("rings/the_smallest_ring", the_smallest_ring),
    ("rings/indices_wrap", indices_wrap),
    ("rings/a_refused_batch_is_rolled_back", a_refused_batch_is_rolled_back),
    ("rings/a_flood_of_faults", a_flood_of_faults),
];

/// `count` pages that do not touch, so that each takes a MAP of its own.
fn apart(machine: &Machine, count: usize) -> Vec<PhysSegment> {
    let base = machine.platform().alloc(2 * count * PAGE as usize).phys.get();
    let page = |index| PhysAddr::new(base + 2 * PAGE * index as u64);
    (0..count).map(|index| PhysSegment { phys: page(index), len: PAGE as usize }).collect()
}

fn open<'a>(viommu: &Viommu<HostPlatform>, edu: &'a Edu, mappings: usize) -> Dma<'a> {
    let domain = viommu.create_domain(DomainOptions { mappings, ..DomainOptions::default() }).unwrap();
    Dma::open_in(viommu, &domain, edu, EDU, EndpointOptions::default())
}

/// Maps a list, checks the last page by an access, and unmaps it. Returns requests and doorbells.
fn map_and_unmap(viommu: &Viommu<HostPlatform>, dma: &Dma<'_>, list: &[PhysSegment]) -> (u64, u64) {
    let mut iovas = vec![Iova::new(0); list.len()];
    let before = viommu.stats();
    // SAFETY: nothing of Rust depends on the guest's memory.
    let mapping = unsafe { dma.endpoint.map_scatter(list, Direction::Both, &mut iovas) }.unwrap();
    dma.write(*iovas.last().unwrap(), &pattern(list.len() as u64, 64));
    assert_eq!(dma.read(*iovas.last().unwrap(), 64), Some(pattern(list.len() as u64, 64)));
    assert_eq!(faults(viommu), []);
    dma.endpoint.unmap(mapping).unwrap();
    assert_eq!(dma.read(iovas[0], 4), None);
    assert!(!faults(viommu).is_empty());
    let after = viommu.stats();
    (after.requests - before.requests, after.kicks - before.kicks)
}

fn a_batch_larger_than_the_ring(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let dma = open(&viommu, &machine.edu, 1024);
    // 256 descriptors are 128 requests at a time, of which one may be kept for PROBE.
    let (requests, kicks) = map_and_unmap(&viommu, &dma, &apart(machine, 600));
    assert_eq!(requests, 601);
    assert!((6..=8).contains(&kicks), "{kicks} doorbells");
}

fn the_smallest_ring(machine: &Machine) {
    for queue_size in [2, 3, 4, 16] {
        let viommu = bring_up(machine, Options { queue_size, ..options() }, &[EDU]);
        machine.edu.function.enable_bus_mastering();
        let dma = open(&viommu, &machine.edu, 64);
        let (requests, kicks) = map_and_unmap(&viommu, &dma, &apart(machine, 40));
        assert_eq!(requests, 41, "{queue_size} descriptors");
        assert!(kicks >= 41 / u64::from(queue_size), "{queue_size} descriptors: {kicks} doorbells");
        dma.close();
    }
}

fn indices_wrap(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let dma = open(&viommu, &machine.edu, 512);
    let list = apart(machine, 250);
    // Twice past 2^16 requests, the second time at another place.
    while viommu.stats().requests < 2 * 65_536 + 1_000 {
        let mut iovas = vec![Iova::new(0); list.len()];
        // SAFETY: nothing of Rust depends on the guest's memory.
        let mapping = unsafe { dma.endpoint.map_scatter(&list, Direction::Both, &mut iovas) }.unwrap();
        dma.endpoint.unmap(mapping).unwrap();
    }
    map_and_unmap(&viommu, &dma, &list);
    assert_eq!(viommu.stats().abandoned_requests, 0);
    assert_eq!(viommu.stats().stray_answers, 0);
    println!("{} requests, {} doorbells", viommu.stats().requests, viommu.stats().kicks);
}

fn a_refused_batch_is_rolled_back(machine: &Machine) {
    let viommu = bring_up(machine, options(), &[EDU]);
    let dma = open(&viommu, &machine.edu, 30);
    let list = apart(machine, 40);
    let mut iovas = vec![Iova::new(0); list.len()];
    let mapped = dma.endpoint.domain().mapping_count();
    let before = viommu.stats();
    // SAFETY: nothing of Rust depends on the guest's memory.
    let refused = unsafe { dma.endpoint.map_scatter(&list, Direction::Both, &mut iovas) };
    assert!(refused.is_err(), "there are 30 records");
    assert_eq!(dma.endpoint.domain().mapping_count(), mapped);
    let after = viommu.stats();
    assert_eq!(
        (after.maps - before.maps, after.unmaps - before.unmaps),
        (29, 1),
        "made, and taken back at once"
    );
    map_and_unmap(&viommu, &dma, &list[..20]);
}

fn a_flood_of_faults(machine: &Machine) {
    let fault_limit = FaultLimit { records: 200, ..FaultLimit::default() };
    let viommu = bring_up(machine, Options { fault_limit, ..options() }, &[EDU]);
    let dma = Dma::open(&viommu, &machine.edu, EDU);
    // A record for every four bytes: four times what there are buffers for.
    for _ in 0..3 {
        machine.edu.transfer(Transfer::ToMemory, 0x7000_0000, 0, Edu::BUFFER_LEN);
    }
    let seen = faults(&viommu);
    assert_eq!(seen.len(), 200, "one endpoint's share");
    assert!(seen.iter().all(|fault| fault.endpoint == EDU));
    let counts = viommu.stats().faults;
    assert_eq!((counts.delivered, counts.limited), (256, 56), "as many as there are buffers");
    assert_eq!((counts.dropped, counts.malformed, viommu.fault_count(EDU)), (0, 0, 256));
    // The buffers are posted again, and nothing else suffered.
    thread::sleep(Duration::from_nanos(FaultLimit::default().window_ns));
    machine.edu.transfer(Transfer::ToMemory, 0x7000_0000, 0, 4);
    assert_eq!(faults(&viommu).len(), 1);
    let memory = dma.endpoint.alloc_coherent(PAGE as usize).unwrap();
    dma.write(memory.iova(), &pattern(1, 64));
    assert_eq!(dma.read(memory.iova(), 64), Some(pattern(1, 64)));
    dma.endpoint.free_coherent(memory).unwrap();
    dma.close();
}
