//! Mapping again what waits for a flush: what comes back to life, and what does not.

use std::task::Poll;

use super::*;
use crate::support::{EP2, Task};
use virtio_iommu::{DmaError, DmaMapping, PhysAddr, PhysSegment, Prot};
use virtio_iommu_model::{Execute, Inject, Release};

/// Maps pages of memory that the test keeps.
fn map(opened: &Opened, phys: PhysAddr, pages: usize, direction: Direction) -> DmaMapping {
    // SAFETY: nobody but the test uses the memory.
    unsafe { opened.endpoint.map(phys, pages * PAGE as usize, direction) }.unwrap()
}

fn map_list(opened: &Opened, list: &[PhysSegment], direction: Direction) -> (DmaMapping, Vec<Iova>) {
    let mut iovas = vec![Iova::new(0); list.len()];
    // SAFETY: nobody but the test uses the memory.
    let mapping = unsafe { opened.endpoint.map_scatter(list, direction, &mut iovas) }.unwrap();
    (mapping, iovas)
}

/// The requests that `work` takes.
fn requests<R>(opened: &Opened, work: impl FnOnce() -> R) -> (R, usize) {
    let (result, requests, kicks) = opened.machine.traffic(work);
    assert_eq!(requests > 0, kicks > 0);
    (result, requests)
}

fn at(phys: PhysAddr, pages: u64) -> PhysAddr {
    PhysAddr::new(phys.get() + pages * PAGE)
}

/// Fails when mapping again sends anything, the record is not live or goes by the old name, or a flush after the second
/// unmapping leaves the endpoint a way in.
#[test]
fn the_same_memory_is_mapped_again_without_a_request() {
    let opened = opened(LOOSE);
    let memory = opened.machine.memory(PAGE);
    let first = map(&opened, memory.phys, 1, Direction::Both);
    let iova = first.iova();
    defer(&opened, first);
    let mut before = opened.domain.stats();
    for round in 0..50 {
        let view = opened.endpoint.tagged(if round % 2 == 0 { "even" } else { "odd" });
        // SAFETY: nobody but the test uses the memory. The last bytes of a page are rounded to it.
        let again =
            || unsafe { view.map(at(memory.phys, 0), PAGE as usize - round, Direction::Both) }.unwrap();
        let (mapping, requests) = requests(&opened, again);
        assert_eq!((mapping.iova(), mapping.len_bytes(), requests), (iova, PAGE as usize - round, 0));
        let found = opened.domain.translate(iova).unwrap();
        assert_eq!((found.tag, found.range.len_bytes()), (["even", "odd"][round % 2], Some(PAGE)));
        opened.machine.dma_write(EP, iova.get(), &[round as u8]).unwrap();
        assert_eq!(bytes_of(&memory)[0], round as u8);
        let stats = opened.domain.stats();
        assert_eq!((stats.deferred_mappings, stats.deferred_bytes, stats.mapped_bytes), (0, 0, PAGE));
        // Nothing waits: nothing is sent, and what is live again stays.
        assert_eq!(opened.machine.traffic(|| opened.endpoint.flush()), (Ok(()), 0, 0));
        assert!(opened.reaches(iova));
        defer(&opened, mapping);
        before.deferred_mappings = 1;
        assert_eq!(opened.domain.stats(), before, "as after the first time");
    }
    assert_eq!(opened.machine.traffic(|| opened.endpoint.flush()), (Ok(()), 1, 1));
    fill(&memory, 0x55);
    assert!(opened.machine.dma_write(EP, iova.get(), &[0xee]).is_err());
    assert_eq!((bytes_of(&memory)[0], opened.mapped_on_device()), (0x55, vec![]));
    // After the flush it is like any other.
    let (mapping, requests) = requests(&opened, || map(&opened, memory.phys, 1, Direction::Both));
    assert_eq!((requests, opened.reaches(mapping.iova())), (1, true));
}

/// Fails when any of the comparisons is missing: the endpoint would get other memory, more rights, or too few.
#[test]
fn what_differs_is_mapped_anew() {
    let memory_len = 16 * PAGE;
    let scattered = |opened: &Opened, phys, pages| map_list(opened, &apart(phys, pages), Direction::Both).0;
    type Way<'a> = &'a dyn Fn(&Opened, PhysAddr) -> DmaMapping;
    let first: Way<'_> = &|opened, phys| map(opened, phys, 2, Direction::FromDevice);
    let others: [Way<'_>; 6] = [
        &|opened, phys| map(opened, phys, 1, Direction::FromDevice),
        &|opened, phys| map(opened, phys, 3, Direction::FromDevice),
        &|opened, phys| map(opened, at(phys, 1), 2, Direction::FromDevice),
        &|opened, phys| map(opened, phys, 2, Direction::ToDevice),
        &|opened, phys| map(opened, phys, 2, Direction::Both),
        &|opened, phys| scattered(opened, phys, 2),
    ];
    let list: Way<'_> = &|opened, phys| scattered(opened, phys, 4);
    let other_lists: [Way<'_>; 6] = [
        &|opened, phys| scattered(opened, phys, 3),
        &|opened, phys| scattered(opened, phys, 5),
        &|opened, phys| map_list(opened, &apart(phys, 4), Direction::FromDevice).0,
        &|opened, phys| map(opened, phys, 1, Direction::Both),
        // As many bytes, in another order, and with parts of other lengths.
        &|opened, phys| {
            let mut other = apart(phys, 4);
            other.swap(1, 2);
            map_list(opened, &other, Direction::Both).0
        },
        &|opened, phys| {
            let mut other = apart(phys, 3);
            other[1].len *= 2;
            map_list(opened, &other, Direction::Both).0
        },
    ];
    for (first, others) in [(first, others), (list, other_lists)] {
        for (index, other) in others.into_iter().enumerate() {
            let opened = opened(LOOSE);
            let phys = opened.machine.memory(memory_len).phys;
            let old = first(&opened, phys);
            let iova = old.iova();
            defer(&opened, old);
            let (new, requests) = requests(&opened, || other(&opened, phys));
            assert!(requests > 0 && new.iova() != iova, "{index}: {new:?}");
            opened.endpoint.flush().unwrap();
            let there = |at| opened.domain.translate(at).is_some();
            assert!(!there(iova) && there(new.iova()), "{index}");
            assert_eq!(opened.mapped_on_device().len(), opened.domain.mapping_count(), "{index}");
        }
    }
}

/// Fails when only where the parts of a list begin counts, and how long it is in all.
#[test]
fn parts_of_other_lengths_are_another_list() {
    let opened = opened(LOOSE);
    let phys = opened.machine.memory(8 * PAGE).phys;
    let list = |lens: [usize; 3]| {
        let part =
            |(index, len): (u64, usize)| PhysSegment { phys: at(phys, 3 * index), len: len * PAGE as usize };
        (0..).zip(lens).map(part).collect::<Vec<_>>()
    };
    let (first, iovas) = map_list(&opened, &list([2, 1, 1]), Direction::Both);
    defer(&opened, first);
    let ((_, others), sent) = requests(&opened, || map_list(&opened, &list([1, 2, 1]), Direction::Both));
    assert!(sent == 3 && others[0] != iovas[0]);
    let ((_, again), sent) = requests(&opened, || map_list(&opened, &list([2, 1, 1]), Direction::Both));
    assert_eq!((sent, again), (0, iovas), "displaced by nothing, and not flushed");
}

/// Fails when the limit or the boundary of the view that asks is forgotten.
#[test]
fn an_endpoint_gets_back_only_what_it_can_reach() {
    let opened = opened(LOOSE);
    let memory = opened.machine.memory(4 * PAGE);
    let limit = EndpointOptions { limit: Iova::mask(32), ..EndpointOptions::default() };
    let narrow = opened.viommu.open(EP2, &opened.domain, limit).unwrap();
    let first = map(&opened, memory.phys, 1, Direction::Both);
    assert!(first.iova() > Iova::mask(32), "as high as possible");
    defer(&opened, first);
    // SAFETY: nobody but the test uses the memory.
    let low = || unsafe { narrow.map(memory.phys, PAGE as usize, Direction::Both) }.unwrap();
    let (mapping, sent) = requests(&opened, low);
    assert!(sent == 1 && mapping.iova() <= Iova::mask(32));
    defer(&opened, mapping);
    // A list neither.
    let list = apart(opened.machine.memory(8 * PAGE).phys, 3);
    let (high, _) = map_list(&opened, &list, Direction::Both);
    defer(&opened, high);
    let mut iovas = [Iova::new(0); 3];
    // SAFETY: as above.
    let low = || unsafe { narrow.map_scatter(&list, Direction::Both, &mut iovas) }.unwrap();
    let (low, sent) = requests(&opened, low);
    assert!(sent == 3 && low.iova() <= Iova::mask(32));
    // What is low suits both.
    let (mapping, sent) = requests(&opened, || map(&opened, memory.phys, 1, Direction::Both));
    assert!(sent == 0 && mapping.iova() <= Iova::mask(32));

    // Two pages that begin at an odd one, for an endpoint that may not cross between two.
    let opened = self::opened(LOOSE);
    let boundary = EndpointOptions { boundary: Some(2 * PAGE), ..EndpointOptions::default() };
    let strict = opened.viommu.open(EP2, &opened.domain, boundary).unwrap();
    let first = loop {
        let (_, single) =
            (map(&opened, memory.phys, 1, Direction::Both), map(&opened, memory.phys, 2, Direction::Both));
        if single.iova().get() % (2 * PAGE) != 0 {
            break single;
        }
    };
    defer(&opened, first);
    // SAFETY: as above.
    let even = || unsafe { strict.map(memory.phys, 2 * PAGE as usize, Direction::Both) }.unwrap();
    let (mapping, sent) = requests(&opened, even);
    assert_eq!((sent, mapping.iova().get() % (2 * PAGE)), (1, 0));
}

/// What the driver holds goes to its owner at the flush, whoever maps the same memory by his own word meanwhile. Fails when
/// a record that holds memory comes back.
#[test]
fn held_memory_goes_to_its_owner_all_the_same() {
    let opened = opened(LOOSE);
    let (mapping, phys) = opened.adopt();
    let iova = mapping.iova();
    defer(&opened, mapping);
    let (other, requests) = requests(&opened, || map(&opened, phys, 1, Direction::Both));
    assert!(requests == 1 && other.iova() != iova);
    opened.endpoint.flush().unwrap();
    assert!(opened.machine.is_lent_back(phys) && opened.domain.translate(iova).is_none());
    assert_eq!(opened.mapped_on_device(), [phys.get()], "by the caller's word");
}

/// Fails when memory that is lent goes into a mapping that holds none, and is lost.
#[test]
fn memory_that_is_lent_is_mapped_anew() {
    let opened = opened(LOOSE);
    let (held, phys) = opened.machine.lend(PAGE);
    defer(&opened, map(&opened, phys, 1, Direction::Both));
    let (lent, requests) = requests(&opened, || opened.endpoint.adopt(held, Direction::Both).unwrap());
    assert_eq!(requests, 1);
    defer(&opened, lent);
    opened.endpoint.flush().unwrap();
    assert!(opened.machine.is_lent_back(phys) && opened.mapped_on_device().is_empty());
}

/// Registers of a device are no memory.
#[test]
fn registers_do_not_pass_for_memory() {
    let opened = opened(LOOSE);
    let phys = opened.machine.memory(PAGE).phys;
    // SAFETY: nobody but the test uses the memory.
    let resource = || unsafe { opened.endpoint.map_resource(phys, PAGE as usize, Direction::Both) }.unwrap();
    let first = resource();
    let prot = opened.domain.translate(first.iova()).unwrap().prot;
    assert!(prot.contains(Prot::MMIO));
    defer(&opened, first);
    let (memory, sent) = requests(&opened, || map(&opened, phys, 1, Direction::Both));
    assert_eq!(sent, 1);
    assert!(!opened.domain.translate(memory.iova()).unwrap().prot.contains(Prot::MMIO));
}

/// Fails when a list comes back by halves, at other addresses, or under its old name, or when the second of two that begin
/// with the same page is taken for the first.
#[test]
fn a_list_comes_back_as_it_was() {
    let opened = opened(LOOSE);
    let phys = opened.machine.memory(32 * PAGE).phys;
    let list = apart(phys, 5);
    for async_too in [false, true] {
        let (mapping, iovas) = map_list(&opened, &list, Direction::Both);
        defer(&opened, mapping);
        let view = opened.endpoint.tagged("list");
        let mut again = [Iova::new(0); 5];
        // SAFETY: nobody but the test uses the memory.
        let (mapping, sent) = requests(&opened, || unsafe {
            match async_too {
                false => view.map_scatter(&list, Direction::Both, &mut again).unwrap(),
                true => {
                    Task::new(view.map_scatter_async(&list, Direction::Both, &mut again)).finish().unwrap()
                }
            }
        });
        assert_eq!((sent, &again[..]), (0, &iovas[..]));
        assert_eq!((mapping.iova(), mapping.len_bytes()), (iovas[0], 5 * PAGE as usize));
        assert!(again.iter().all(|at| opened.domain.translate(*at).unwrap().tag == "list"));
        assert_eq!(opened.domain.stats().deferred_mappings, 0);
        defer(&opened, mapping);
        assert_eq!(opened.domain.stats().deferred_mappings, 5);
        assert_eq!(opened.machine.traffic(|| opened.endpoint.flush()), (Ok(()), 1, 1));
        assert!(!iovas.iter().any(|at| opened.reaches(*at)));
    }
    // One page alone, and as the first of a list: the later one is found.
    let (list_mapping, _) = map_list(&opened, &list, Direction::Both);
    let single = map(&opened, phys, 1, Direction::Both);
    let iova = single.iova();
    defer(&opened, list_mapping);
    defer(&opened, single);
    let (single, sent) = requests(&opened, || map(&opened, phys, 1, Direction::Both));
    assert_eq!((sent, single.iova()), (0, iova));
    opened.endpoint.flush().unwrap();
    assert_eq!((opened.reaches(iova), opened.domain.mapping_count()), (true, 1));
}

/// Pages that touch come back as the one mapping that they were, by a list as well as by themselves.
#[test]
fn a_list_of_one_run_is_like_any_buffer() {
    let opened = opened(LOOSE);
    let phys = opened.machine.memory(8 * PAGE).phys;
    let list: Vec<_> = (0..4).map(|page| PhysSegment { phys: at(phys, page), len: PAGE as usize }).collect();
    let (mapping, iovas) = map_list(&opened, &list, Direction::Both);
    defer(&opened, mapping);
    let (mapping, sent) = requests(&opened, || map(&opened, phys, 4, Direction::Both));
    assert_eq!((sent, mapping.iova()), (0, iovas[0]));
    defer(&opened, mapping);
    let ((mapping, again), sent) = requests(&opened, || map_list(&opened, &list, Direction::Both));
    assert_eq!((sent, again), (0, iovas));
    defer(&opened, mapping);
}

/// Fails when the place of what moved in the list is forgotten, or a flush takes what is live again, or not what is left.
#[test]
fn each_of_several_is_found_and_the_flush_takes_the_others() {
    let opened = opened(LOOSE);
    let phys = opened.machine.memory(16 * PAGE).phys;
    let mut mappings: Vec<_> =
        (0..8).map(|page| map(&opened, at(phys, 2 * page), 1, Direction::Both)).collect();
    let iovas: Vec<_> = mappings.iter().map(DmaMapping::iova).collect();
    mappings.drain(..).for_each(|mapping| defer(&opened, mapping));
    // All but the last two, from the first on: each time another one takes its place.
    let (again, sent) = requests(&opened, || {
        [0, 1, 2, 5, 3, 4].map(|page| (page, map(&opened, at(phys, 2 * page as u64), 1, Direction::Both)))
    });
    assert_eq!((sent, opened.domain.stats().deferred_mappings), (0, 2));
    assert!(again.iter().all(|(page, mapping)| mapping.iova() == iovas[*page]));
    // The last two adjoin.
    assert_eq!(opened.machine.traffic(|| opened.endpoint.flush()), (Ok(()), 1, 1));
    let reached: Vec<_> = iovas.iter().map(|at| opened.reaches(*at)).collect();
    assert_eq!(reached, [true, true, true, true, true, true, false, false]);
    // Two pieces of what adjoined, with what is live between them.
    for (page, mapping) in again {
        if page != 2 {
            defer(&opened, mapping);
        }
    }
    assert_eq!(opened.machine.traffic(|| opened.endpoint.flush()), (Ok(()), 2, 1));
    assert_eq!(opened.mapped_on_device(), [at(phys, 4).get()]);
}

/// What a flush took is on its way out. Fails when it comes back all the same: the endpoint would lose what it was just
/// given.
#[test]
fn what_a_flush_took_does_not_come_back() {
    for queue_size in [256, 2] {
        let options = virtio_iommu::Options { queue_size, ..Machine::options() };
        let machine = Machine::new(Config::default());
        let opened = Opened::on(machine, options, policy(LOOSE), EndpointOptions::default());
        let phys = opened.machine.memory(8 * PAGE).phys;
        // With what stays between them, so that each takes a request: with one slot two are not sent yet.
        let page = |page| map(&opened, at(phys, page), 1, Direction::Both);
        let (pages, kept): (Vec<_>, Vec<_>) = (0..3).map(|index| (page(index), page(7))).unzip();
        pages.into_iter().for_each(|mapping| defer(&opened, mapping));
        opened.machine.inject([Inject::Hold(Execute::AtRelease)]);
        let mut flush = Task::new(opened.endpoint.flush_async());
        flush.sleep();
        let ((), sent) = opened.requests_of(|| {
            // SAFETY: nobody but the test uses the memory.
            let map =
                |index| unsafe { opened.endpoint.map_async(at(phys, index), PAGE as usize, Direction::Both) };
            let mut again: Vec<_> = (0..3).map(|index| Task::new(map(index))).collect();
            let began: Vec<_> = again.iter_mut().map(|task| task.poll()).collect();
            opened.machine.release(Release::All);
            opened.viommu.poll();
            assert_eq!(flush.finish(), Ok(()));
            for (task, began) in again.iter_mut().zip(began) {
                let mapping = match began {
                    Poll::Ready(mapping) => mapping,
                    Poll::Pending => task.finish(),
                };
                assert!(opened.reaches(mapping.unwrap().iova()));
            }
        });
        let maps = sent.iter().filter(|request| matches!(request, Request::Map { .. })).count();
        assert_eq!((maps, opened.domain.mapping_count()), (3, 3 + kept.len()));
    }
}

/// What a dropped flush left in quarantine does not come back either.
#[test]
fn what_is_in_quarantine_does_not_come_back() {
    let opened = opened(LOOSE);
    let phys = opened.machine.memory(PAGE).phys;
    let first = map(&opened, phys, 1, Direction::Both);
    let iova = first.iova();
    defer(&opened, first);
    opened.machine.inject([Inject::Hold(Execute::AtRelease)]);
    let mut flush = Task::new(opened.endpoint.flush_async());
    flush.sleep();
    drop(flush);
    assert_eq!(opened.viommu.stats().quarantined_mappings, 1);
    let (other, sent) = requests(&opened, || map(&opened, phys, 1, Direction::Both));
    assert!(sent == 1 && other.iova() != iova);
    opened.machine.release(Release::All);
    opened.viommu.poll();
    opened.viommu.reclaim();
    assert!(!opened.reaches(iova) && opened.reaches(other.iova()));
}

/// Fails when a domain that died, or was recovered, gives back what the device does not have any more.
#[test]
fn what_the_device_lost_does_not_come_back() {
    for recovery in [false, true] {
        let opened = opened(LOOSE);
        let phys = opened.machine.memory(PAGE).phys;
        defer(&opened, map(&opened, phys, 1, Direction::Both));
        if recovery {
            opened.machine.device().fail();
            // SAFETY: the endpoint does what the test says.
            unsafe { opened.viommu.recover() }.unwrap();
        } else {
            opened.viommu.detach(EP).unwrap();
            opened.viommu.attach(EP, &opened.domain).unwrap();
        }
        let (mapping, sent) = requests(&opened, || map(&opened, phys, 1, Direction::Both));
        assert_eq!((sent, opened.reaches(mapping.iova())), (1, true));
    }
}

/// Fails when a domain without endpoints maps.
#[test]
fn without_an_endpoint_nothing_comes_back() {
    // Where endpoints may bypass, the domain's end proves nothing, and what waits goes on waiting.
    let features = Config::default().features & !virtio_iommu_model::feature::BYPASS_CONFIG;
    let config = Config { features, ..Config::default() };
    let opened = Opened::new(config, policy(LOOSE), EndpointOptions::default());
    let phys = opened.machine.memory(PAGE).phys;
    let mapping = map(&opened, phys, 1, Direction::Both);
    opened.machine.inject([Inject::Hold(Execute::AtRelease)]);
    assert!(opened.viommu.detach(EP).is_err());
    defer(&opened, mapping);
    opened.machine.release(Release::All);
    opened.viommu.poll();
    // SAFETY: nobody but the test uses the memory.
    let again = unsafe { opened.endpoint.map(phys, PAGE as usize, Direction::Both) };
    assert!(again.is_err(), "{again:?}");
}

/// Fails when a view that was closed gets a mapping back for as long as another endpoint keeps the domain alive.
#[test]
fn a_closed_view_gets_nothing_back() {
    let opened = opened(LOOSE);
    let other = opened.viommu.open(EP2, &opened.domain, EndpointOptions::default()).unwrap();
    let memory = opened.machine.memory(8 * PAGE);
    let list = apart(memory.phys, 3);
    let page = at(memory.phys, 7);
    defer(&opened, map(&opened, page, 1, Direction::Both));
    defer(&opened, map_list(&opened, &list, Direction::Both).0);
    opened.endpoint.close().unwrap();
    let mut iovas = [Iova::new(0); 3];
    // SAFETY: nobody but the test uses the memory.
    let (single, several) = unsafe {
        let single = opened.endpoint.map(page, PAGE as usize, Direction::Both);
        (single, opened.endpoint.map_scatter(&list, Direction::Both, &mut iovas))
    };
    assert_eq!((single.unwrap_err(), several.unwrap_err()), (DmaError::Closed, DmaError::Closed));
    assert_eq!(opened.domain.stats().deferred_mappings, 4);
    other.flush().unwrap();
}

/// An address that the raw layer chose to be 0 stays its own.
#[test]
fn nothing_comes_back_at_address_0() {
    let opened = opened(LOOSE);
    let phys = opened.machine.memory(PAGE).phys;
    // SAFETY: nobody but the test uses the memory.
    unsafe { opened.domain.map_at(Iova::new(0), phys, PAGE, RW) }.unwrap();
    // SAFETY: mapped above.
    assert_eq!(unsafe { opened.endpoint.unmap_at(Iova::new(0)) }, Ok(Unmapped::AtFlush));
    let (mapping, sent) = requests(&opened, || map(&opened, phys, 1, Direction::Both));
    assert!(sent == 1 && mapping.iova() != Iova::new(0));
}

/// Bounds count what waits. Fails when what is live again counts, or what waits once more does not.
#[test]
fn bounds_count_what_waits() {
    for bounds in [DeferredBounds { mappings: 3, ..LOOSE }, DeferredBounds { bytes: 3 * PAGE, ..LOOSE }] {
        let opened = opened(bounds);
        let phys = opened.machine.memory(8 * PAGE).phys;
        for _ in 0..20 {
            for page in 0..2 {
                defer(&opened, map(&opened, at(phys, page), 1, Direction::Both));
            }
        }
        assert_eq!(opened.domain.stats().maps, 2);
        let third = map(&opened, at(phys, 2), 1, Direction::Both);
        assert_eq!(opened.endpoint.unmap(third), Ok(Unmapped::Now));
        assert!(opened.mapped_on_device().is_empty());
    }
}

/// Fails when what comes and goes puts its flush off, or all being mapped again makes for one that has nothing to do.
#[test]
fn mapping_again_does_not_put_a_flush_off() {
    let opened = opened(DeferredBounds { age_ns: 1_000_000, ..LOOSE });
    let phys = opened.machine.memory(2 * PAGE).phys;
    let mut flushed = Vec::new();
    for round in 0..30 {
        let mapping = map(&opened, phys, 1, Direction::Both);
        opened.machine.pass_time(100_000);
        if opened.endpoint.unmap(mapping) == Ok(Unmapped::Now) {
            flushed.push(round);
        }
    }
    assert_eq!(flushed, [10, 21], "as long after the first unmapping, and after the first after that");
    let mapping = map(&opened, phys, 1, Direction::Both);
    opened.machine.pass_time(10_000_000);
    assert_eq!(opened.viommu.poll(), 0);
    let (other, sent) = requests(&opened, || map(&opened, at(phys, 1), 1, Direction::Both));
    assert_eq!(sent, 1, "the MAP");
    assert!(opened.reaches(mapping.iova()) && opened.reaches(other.iova()));
    defer(&opened, mapping);
}
