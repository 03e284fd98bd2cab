//! Many mappings that have nothing to do with each other, by one doorbell.

use virtio_iommu::{
    Direction, DmaDevice, DmaError, DmaMapping, Domain, DomainOptions, Endpoint, EndpointOptions, Iova,
    MapError, Options, PhysAddr, PhysSegment, RequestError, Status, UnmapError, Unmapped, Viommu,
};
use virtio_iommu_model::{Config, Execute, Inject, Release, Request};

use crate::support::{EP, EP2, Machine, PAGE, Task, TestPlatform};

struct Bench {
    endpoint: Endpoint<TestPlatform>,
    domain: Domain<TestPlatform>,
    viommu: Viommu<TestPlatform>,
    machine: Machine,
}

fn bench(queue_size: u16) -> Bench {
    let machine = Machine::new(Config::default());
    let staged = machine.start_with(Options { queue_size, ..Machine::options() }).unwrap();
    staged.introduce(EP).unwrap();
    staged.introduce(EP2).unwrap();
    let viommu = staged.go_live().unwrap();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    machine.device().clear_log();
    Bench { endpoint, domain, viommu, machine }
}

impl Bench {
    /// Pages that do not touch, a few bytes of each.
    fn buffers(&self, count: usize) -> Vec<PhysSegment> {
        let base = self.machine.memory(2 * count as u64 * PAGE).phys.get();
        let buffer = |index| PhysSegment { phys: PhysAddr::new(base + 2 * index * PAGE + 0x40), len: 0x100 };
        (0..count as u64).map(buffer).collect()
    }

    fn map(&self, buffers: &[PhysSegment], list: &mut [Option<DmaMapping>]) -> Result<(), DmaError> {
        // SAFETY: nobody but the test uses the memory.
        unsafe { self.endpoint.map_each(buffers, Direction::Both, list) }
    }

    fn reaches(&self, mapping: &Option<DmaMapping>) -> bool {
        self.machine.reaches(EP, mapping.as_ref().unwrap().iova().get())
    }
}

fn empty(count: usize) -> Vec<Option<DmaMapping>> {
    (0..count).map(|_| None).collect()
}

/// Fails when a request has a doorbell of its own, or mappings are taken for a list.
#[test]
fn sixty_four_take_one_doorbell() {
    let bench = bench(256);
    let (buffers, mut list) = (bench.buffers(64), empty(64));
    let (mapped, requests, kicks) = bench.machine.traffic(|| bench.map(&buffers, &mut list));
    assert_eq!((mapped, requests, kicks), (Ok(()), 64, 1));
    for (buffer, mapping) in buffers.iter().zip(&list) {
        assert!(bench.reaches(mapping));
        let known = bench.domain.translate(mapping.as_ref().unwrap().iova()).unwrap();
        assert_eq!(known.phys.get(), buffer.phys.get() & !(PAGE - 1));
    }
    let iovas: Vec<u64> = list.iter().flatten().map(|mapping| mapping.iova().get()).collect();
    // Each can go by itself.
    bench.endpoint.unmap(list[7].take().unwrap()).unwrap();
    assert!(bench.reaches(&list[6]) && bench.reaches(&list[8]) && !bench.machine.reaches(EP, iovas[7]));
    let (unmapped, requests, kicks) = bench.machine.traffic(|| bench.endpoint.unmap_each(&mut list));
    assert_eq!((unmapped, requests, kicks), (Ok(Unmapped::Now), 63, 1));
    assert!(iovas.iter().all(|at| !bench.machine.reaches(EP, *at)) && list.iter().all(Option::is_none));
    assert_eq!(bench.domain.mapping_count(), 0);
}

#[test]
fn more_than_the_ring_takes() {
    let bench = bench(8);
    let (buffers, mut list) = (bench.buffers(10), empty(10));
    let (mapped, requests, kicks) = bench.machine.traffic(|| bench.map(&buffers, &mut list));
    assert_eq!((mapped, requests, kicks), (Ok(()), 10, 3));
    assert!(list.iter().all(|mapping| bench.reaches(mapping)));
    let (unmapped, requests, kicks) = bench.machine.traffic(|| bench.endpoint.unmap_each(&mut list));
    assert_eq!((unmapped, requests, kicks), (Ok(Unmapped::Now), 10, 3));
}

/// Fails when a list that is unmapped among others is not counted, or counted twice.
#[test]
fn a_list_may_be_one_of_them() {
    let bench = bench(256);
    let (buffers, mut list) = (bench.buffers(2), empty(2));
    let first = bench.domain.stats();
    bench.map(&buffers, &mut list).unwrap();
    let base = bench.machine.memory(8 * PAGE).phys.get();
    let pages =
        [0, 2, 4].map(|page| PhysSegment { phys: PhysAddr::new(base + page * PAGE), len: PAGE as usize });
    let mut iovas = [Iova::new(0); 3];
    // SAFETY: nobody but the test uses the memory.
    let scattered = unsafe { bench.endpoint.map_scatter(&pages, Direction::Both, &mut iovas) }.unwrap();
    list.insert(1, Some(scattered));
    let before = bench.domain.stats();
    assert_eq!((before.maps, before.requests - first.requests, before.mapped_bytes), (5, 5, 5 * PAGE));
    let (unmapped, requests, kicks) = bench.machine.traffic(|| bench.endpoint.unmap_each(&mut list));
    assert_eq!((unmapped, requests, kicks), (Ok(Unmapped::Now), 3, 1));
    let after = bench.domain.stats();
    assert_eq!((after.unmaps, after.requests - before.requests, after.mapped_bytes), (3, 3, 0));
    assert!(iovas.iter().all(|at| !bench.machine.reaches(EP, at.get())));
}

/// Fails when what was refused keeps its address, is handed out, or takes its neighbours along.
#[test]
fn one_that_is_refused_leaves_the_others_alone() {
    for at in [0, 3, 5] {
        let bench = bench(256);
        let (buffers, mut list) = (bench.buffers(6), empty(6));
        bench.machine.device().inject.pass(at);
        bench.machine.inject([Inject::Refuse(8)]);
        let refused = RequestError::Refused(Status::NoMem);
        let mapped = bench.map(&buffers, &mut list);
        assert!(
            matches!(mapped, Err(DmaError::Map(MapError::Request { error, .. })) if error == refused),
            "{mapped:?}"
        );
        for (index, mapping) in list.iter().enumerate() {
            assert_eq!(mapping.is_none(), index == at);
            assert!(index == at || bench.reaches(mapping));
        }
        assert_eq!((bench.domain.mapping_count(), bench.viommu.stats().quarantined_mappings), (5, 0));
        bench.endpoint.unmap_each(&mut list).unwrap();
        assert_eq!(bench.domain.mapping_count(), 0);
    }
}

/// Fails when an UNMAP that was refused frees its mapping, or keeps another's.
#[test]
fn i01_one_that_cannot_be_unmapped_is_in_quarantine() {
    let bench = bench(256);
    let (buffers, mut list) = (bench.buffers(4), empty(4));
    bench.map(&buffers, &mut list).unwrap();
    let stuck = list[2].as_ref().unwrap().iova().get();
    bench.machine.device().inject.pass(2);
    bench.machine.inject([Inject::Refuse(3)]);
    let unmapped = bench.endpoint.unmap_each(&mut list);
    assert!(matches!(unmapped, Err(UnmapError::Request { .. })), "{unmapped:?}");
    assert!(list.iter().all(Option::is_none) && bench.machine.reaches(EP, stuck));
    assert_eq!((bench.domain.mapping_count(), bench.viommu.stats().quarantined_mappings), (1, 1));
    assert_eq!(bench.viommu.reclaim(), 1);
    assert!(!bench.machine.reaches(EP, stuck));
}

#[test]
fn lists_that_do_not_fit_are_refused() {
    let bench = bench(256);
    let buffers = bench.buffers(2);
    for mut list in [empty(1), empty(3)] {
        let (mapped, requests, _) = bench.machine.traffic(|| bench.map(&buffers, &mut list));
        assert_eq!((mapped, requests), (Err(DmaError::ListLength { segments: 2, room: list.len() }), 0));
    }
    let mut list = empty(2);
    bench.map(&buffers, &mut list).unwrap();
    // Not over what is there.
    assert!(matches!(bench.map(&buffers, &mut list), Err(DmaError::ListLength { .. })));
    // Of another domain: nothing happens.
    let other = bench.viommu.create_domain(DomainOptions::default()).unwrap();
    let foreign = bench.viommu.open(EP2, &other, EndpointOptions::default()).unwrap();
    let (unmapped, requests, _) = bench.machine.traffic(|| foreign.unmap_each(&mut list));
    assert!(matches!(unmapped, Err(UnmapError::NotMapped(_))) && requests == 0);
    assert!(list.iter().all(|mapping| bench.reaches(mapping)));
    bench.endpoint.unmap_each(&mut list).unwrap();
}

/// Fails when `Each` does nothing when it is dropped.
#[test]
fn i03_a_dropped_future_leaves_what_it_sent_in_quarantine() {
    let bench = bench(256);
    let (buffers, mut list) = (bench.buffers(3), empty(3));
    bench.machine.inject([Inject::Hold(Execute::Now)]);
    // SAFETY: nobody but the test uses the memory.
    let mapping = unsafe { bench.endpoint.map_each_async(&buffers, Direction::Both, &mut list) };
    let mut task = Task::new(mapping);
    task.sleep();
    drop(task);
    assert!(list.iter().all(Option::is_none));
    assert_eq!((bench.domain.mapping_count(), bench.viommu.stats().quarantined_mappings), (3, 3));
    bench.machine.release(Release::All);
    bench.viommu.poll();
    assert_eq!(bench.viommu.reclaim(), 3);
    assert_eq!(bench.domain.mapping_count(), 0);

    bench.map(&buffers, &mut list).unwrap();
    bench.machine.inject([Inject::Hold(Execute::AtRelease)]);
    let mut task = Task::new(bench.endpoint.unmap_each_async(&mut list));
    task.sleep();
    drop(task);
    assert!(list.iter().all(Option::is_none));
    assert!(bench.domain.mapping_count() >= 1);
    bench.machine.release(Release::All);
    bench.viommu.poll();
    assert_eq!((bench.domain.mapping_count(), bench.viommu.stats().quarantined_mappings), (0, 0));
    let unmaps = bench.machine.requests().iter().filter(|one| matches!(one, Request::Unmap { .. })).count();
    assert_eq!(unmaps, 6);
}
