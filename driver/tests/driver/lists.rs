//! Lists of segments: where they go, in how many requests, and what becomes of one that fails.

use virtio_iommu::{
    Direction, DmaDevice, DmaError, DomainOptions, EndpointOptions, Iova, MapError, Options, PhysAddr,
    PhysSegment, RequestError, Status, Unmapped,
};
use virtio_iommu_model::{Config, Execute, Inject, Release, Request};

use crate::support::{EP, Machine, Opened, PAGE, RW, Task, apart, bytes_of};

fn open(config: Config, options: Options) -> Opened {
    Opened::on(Machine::new(config), options, DomainOptions::default(), EndpointOptions::default())
}

fn bench() -> Opened {
    open(Config::default(), Machine::options())
}

fn segment(phys: u64, len: u64) -> PhysSegment {
    PhysSegment { phys: PhysAddr::new(phys), len: len as usize }
}

#[test]
fn a_list_takes_one_doorbell_and_as_few_requests_as_it_can() {
    let bench = bench();
    let base = bench.machine.memory(16 * PAGE).phys.get();
    let list = [
        segment(base + 0x100, 0xf00),
        segment(base + PAGE, PAGE),
        segment(base + 2 * PAGE, 0x10),
        segment(base + 8 * PAGE + 0x800, 0x1000),
        segment(base + 4 * PAGE, 1),
    ];
    let mut iovas = [Iova::new(0); 5];
    // SAFETY: nobody but the test uses the memory.
    let map = || unsafe { bench.endpoint.map_scatter(&list, Direction::Both, &mut iovas) };
    let before = bench.domain.stats();
    let (mapping, requests, kicks) = bench.machine.traffic(map);
    assert_eq!((requests, kicks), (3, 1));
    let stats = bench.domain.stats();
    assert_eq!((stats.requests - before.requests, stats.maps - before.maps), (3, 3));
    for (index, (segment, at)) in list.iter().zip(iovas).enumerate() {
        for offset in [0, segment.len as u64 - 1] {
            bench.machine.dma_write(EP, at.get() + offset, &[index as u8 + 1]).unwrap();
            let phys = bench.domain.translate(at).unwrap();
            assert_eq!(phys.phys.get() + at.get() - phys.range.start().get(), segment.phys.get());
        }
    }
    let (unmapped, requests, kicks) = bench.machine.traffic(|| bench.endpoint.unmap(mapping.unwrap()));
    assert_eq!((unmapped, requests, kicks), (Ok(Unmapped::Now), 1, 1));
    assert!(iovas.iter().all(|at| !bench.machine.reaches(EP, at.get())));
}

/// A list is mapped as one as soon as it is seen that its segments touch. Fails when each is not where its bytes are, or when
/// one that is empty, or a list that goes round all addresses, is not taken back.
#[test]
fn a_list_that_touches_is_looked_at_more_closely() {
    let map = |bench: &Opened, list: &[PhysSegment]| {
        let mut iovas = vec![Iova::new(0); list.len()];
        // SAFETY: nobody but the test uses the memory; what the last lists lead to is taken back before anyone does.
        let mapped = unsafe { bench.endpoint.map_scatter(list, Direction::Both, &mut iovas) };
        (mapped, iovas)
    };
    let halves = [(0, PAGE / 2), (PAGE / 2, PAGE / 2)];
    let uneven = [(0, 2 * PAGE), (2 * PAGE, PAGE), (3 * PAGE, 3 * PAGE)];
    let within = [(0x200, PAGE - 0x200), (PAGE, PAGE), (2 * PAGE, 0x30)];
    let alike: Vec<_> = (0..70).map(|page| (page * PAGE, PAGE)).collect();
    for list in [&halves[..], &uneven, &within, &alike] {
        let bench = bench();
        let memory = bench.machine.memory(70 * PAGE);
        let base = memory.phys.get();
        let segments: Vec<_> = list.iter().map(|(at, len)| segment(base + at, *len)).collect();
        let (mapping, iovas) = map(&bench, &segments);
        for (number, ((at, len), iova)) in list.iter().zip(iovas).enumerate() {
            let bytes = [number as u8 + 1; 4];
            bench.machine.dma_write(EP, iova.get() + len - 4, &bytes).unwrap();
            let end = (at + len) as usize;
            assert_eq!(bytes_of(&memory)[end - 4..end], bytes, "{number} of {list:?}");
        }
        bench.endpoint.unmap(mapping.unwrap()).unwrap();
    }
    for empty in 0..5 {
        let bench = bench();
        let base = bench.machine.memory(4 * PAGE).phys.get();
        let mut list: Vec<_> = (0..4).map(|page| segment(base + page * PAGE, PAGE)).collect();
        list.insert(empty, segment(base + empty as u64 * PAGE, 0));
        let (mapped, _) = map(&bench, &list);
        assert!(matches!(mapped, Err(DmaError::Map(MapError::Empty))), "{list:?}: {mapped:?}");
        assert_eq!(bench.machine.device().mappings(bench.domain.id().get()).count(), 0);
        assert_eq!(bench.domain.mapping_count(), 0);
    }
    let half = 1 << 63;
    let bench = bench();
    let round = [segment(0, half), segment(half, half), segment(0, PAGE)];
    let (mapped, _) = map(&bench, &round);
    assert!(mapped.is_err(), "{mapped:?}");
    assert_eq!(bench.machine.device().mappings(bench.domain.id().get()).count(), 0);
}

/// Fails when answers behind those of a list stay where they were seen, which the next request takes for its own.
#[test]
fn a_list_takes_in_what_came_behind_its_answers() {
    let bench = bench();
    let base = bench.machine.memory(16 * PAGE).phys;
    bench.machine.inject([Inject::Hold(Execute::Now)]);
    // SAFETY: nobody but the test uses the memory.
    let mut other = Task::new(unsafe { bench.endpoint.map_async(base, PAGE as usize, Direction::Both) });
    other.sleep();
    // Nobody waits for it any more.
    drop(other);
    bench.machine.device().inject.pass(2);
    bench.machine.inject([Inject::Twice]);
    let mut iovas = [Iova::new(0); 3];
    // SAFETY: as above.
    let list = unsafe { bench.endpoint.map_scatter(&apart(base, 3), Direction::Both, &mut iovas) };
    assert!(iovas.iter().all(|at| bench.machine.reaches(EP, at.get())));
    bench.endpoint.unmap(list.unwrap()).unwrap();
    assert_eq!(bench.viommu.stats().stray_answers, 1);
}

#[test]
fn lists_that_make_no_sense() {
    let bench = bench();
    let base = bench.machine.memory(PAGE).phys.get();
    let mut iovas = [Iova::new(0); 2];
    for list in [
        &[][..],
        &[segment(base, 1)],
        &[segment(base, 1), segment(base, 0)],
        &[segment(base, PAGE), segment(u64::MAX - 5, 10)],
    ] {
        // SAFETY: refused before anything is sent.
        let map = || unsafe { bench.endpoint.map_scatter(list, Direction::Both, &mut iovas) };
        let (result, requests, _) = bench.machine.traffic(map);
        assert!(result.is_err() && requests == 0);
    }
}

/// Fails when `try_map_runs` leaves out `roll_back`, or gives back what is in doubt.
#[test]
fn a_list_is_mapped_whole_or_not_at_all() {
    const COUNT: u64 = 6;
    let answers = [
        Inject::Refuse(8),
        Inject::Unwritten,
        Inject::UsedLen(0),
        Inject::Status(0x99),
        Inject::Hold(Execute::Now),
        Inject::Hold(Execute::AtRelease),
    ];
    for answer in answers {
        for position in 0..COUNT {
            // Two requests at a time, so that some were not sent when one fails; and all at once.
            for queue_size in [4, 256] {
                let options = Options { queue_size, ..Machine::options() };
                let bench = open(Config::default(), options);
                let base = bench.machine.memory(2 * COUNT * PAGE).phys;
                let mut iovas = [Iova::new(0); COUNT as usize];
                bench.machine.device().inject.pass(position as usize);
                bench.machine.inject([answer]);
                // SAFETY: nobody but the test uses the memory.
                let mapped =
                    unsafe { bench.endpoint.map_scatter(&apart(base, COUNT), Direction::Both, &mut iovas) };
                let Err(DmaError::Map(error)) = mapped else { panic!("{mapped:?}") };
                let top = bench.endpoint.faulting_iova().get();
                // What is left is the one in doubt, and nothing else.
                let doubt = matches!(answer, Inject::UsedLen(_) | Inject::Status(_) | Inject::Hold(_));
                match error {
                    MapError::Request { range, .. } if !doubt => {
                        assert_eq!(range.start().get(), top - (COUNT - position) * PAGE, "which one");
                    }
                    MapError::Quarantined { .. } if doubt => {}
                    error => panic!("{error}"),
                }
                let stats = bench.viommu.stats();
                assert_eq!(stats.quarantined_mappings, usize::from(doubt), "{answer:?} at {position}");
                assert_eq!(bench.domain.mapping_count(), usize::from(doubt));
                let there = bench.machine.device().mappings(bench.domain.id().get()).count();
                assert!(there <= usize::from(doubt));

                bench.machine.release(Release::All);
                bench.viommu.poll();
                bench.viommu.reclaim();
                assert_eq!(bench.viommu.stats().quarantined_mappings, 0);
                assert_eq!(bench.machine.device().mappings(bench.domain.id().get()).count(), 0);
                // All addresses are free again, and one range.
                let (at, len) = (Iova::new(top - COUNT * PAGE), COUNT * PAGE);
                // SAFETY: as above.
                unsafe { bench.domain.map_at(at, base, len, RW) }.unwrap();
            }
        }
    }
}

#[test]
fn a_list_that_finds_no_record_is_rolled_back() {
    let bench = bench();
    let base = bench.machine.memory(600 * PAGE).phys;
    let mut iovas = vec![Iova::new(0); 300];
    // SAFETY: nobody but the test uses the memory.
    let mut map = || unsafe { bench.endpoint.map_scatter(&apart(base, 300), Direction::Both, &mut iovas) };
    assert!(matches!(map(), Err(DmaError::Map(MapError::NoRecord { .. }))));
    assert_eq!(bench.machine.device().mappings(bench.domain.id().get()).count(), 0);
    bench.domain.reserve(300);
    let mapping = map().unwrap();
    bench.endpoint.unmap(mapping).unwrap();
}

/// Fails when `submit_runs` publishes each run by itself.
#[test]
fn batches_take_one_doorbell_for_as_many_as_the_ring_holds() {
    for (queue_size, count, rounds) in [(256, 128, 1), (256, 129, 2), (8, 10, 3), (8, 4, 1), (2, 3, 3)] {
        let options = Options { queue_size, ..Machine::options() };
        let bench = open(Config::default(), options);
        bench.domain.reserve(300);
        let base = bench.machine.memory(2 * count * PAGE).phys;
        let mut iovas = vec![Iova::new(0); count as usize];
        // SAFETY: nobody but the test uses the memory.
        let map = || unsafe { bench.endpoint.map_scatter(&apart(base, count), Direction::Both, &mut iovas) };
        let (mapping, requests, kicks) = bench.machine.traffic(map);
        assert_eq!((requests as u64, kicks), (count, rounds));
        assert!(iovas.iter().all(|at| bench.machine.reaches(EP, at.get())));
        bench.endpoint.unmap(mapping.unwrap()).unwrap();
    }
}

/// Fails when `slot_of` takes the next slot in order instead of the one that the answer names.
#[test]
fn answers_in_any_order_belong_to_their_requests() {
    const COUNT: u64 = 8;
    for refused in 0..COUNT {
        for held in [false, true] {
            let bench = bench();
            let base = bench.machine.memory(2 * COUNT * PAGE).phys;
            let mut iovas = [Iova::new(0); COUNT as usize];
            let hold = if held { Inject::Hold(Execute::AtRelease) } else { Inject::Defer };
            let script = (0..COUNT).map(|index| if index == refused { Inject::Refuse(8) } else { hold });
            bench.machine.inject(script);
            bench.machine.on_relax(|device, ram| {
                device.release(Release::AllReversed, ram);
            });
            // SAFETY: nobody but the test uses the memory.
            let mapped =
                unsafe { bench.endpoint.map_scatter(&apart(base, COUNT), Direction::Both, &mut iovas) };
            let Err(DmaError::Map(MapError::Request { range, error })) = mapped else { panic!("{mapped:?}") };
            assert_eq!(error, RequestError::Refused(Status::NoMem));
            let first = bench.machine.requests().iter().find_map(|request| match request {
                Request::Map { virt_start, phys_start, .. } if *phys_start == base.get() => Some(*virt_start),
                _ => None,
            });
            assert_eq!(range.start().get(), first.unwrap() + refused * PAGE);
            assert_eq!(bench.domain.mapping_count(), 0);
            // And all of them well, last first.
            bench.machine.inject([hold; COUNT as usize]);
            // SAFETY: as above.
            let again =
                unsafe { bench.endpoint.map_scatter(&apart(base, COUNT), Direction::Both, &mut iovas) };
            bench.endpoint.unmap(again.unwrap()).unwrap();
        }
    }
}
