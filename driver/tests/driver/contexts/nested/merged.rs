//! How many requests and doorbells a change takes, with shadows merged and not, and what is left when one fails midway.

use virtio_iommu::contexts::nested::{Level, Merging, Nest, NestError, SpaceId, Why};
use virtio_iommu::{DmaMemory, Iova, PhysAddr, Prot, Viommu};
use virtio_iommu_model::{Config, Execute, Inject, Release, Request};

use super::super::range;
use super::GUEST;
use crate::support::{EP, EP2, Machine, PAGE, RW, TestPlatform, bytes_of};

const PAGES: usize = 4;
const LEN: u64 = PAGES as u64 * PAGE;
/// Where the middle space has its mappings, and the child.
const MIDDLE: u64 = 0x20_0000;
const CHILD: u64 = 0x8000;
const MERGINGS: [Merging; 2] = [Merging::Never, Merging::Adjoining];
/// Statuses of the device.
const INVAL: u8 = 4;
const DEVICE_ERROR: u8 = 3;
const NO_MEMORY: u8 = 8;

/// Three levels, of which the first two have a mapping for each page, whose memory adjoins.
struct Levels {
    viommu: Viommu<TestPlatform>,
    nest: Nest<TestPlatform>,
    root: SpaceId,
    middle: SpaceId,
    child: SpaceId,
    memory: DmaMemory,
}

/// With [`EP`] in the child, and nothing mapped there.
fn levels(merging: Merging) -> (Machine, Levels) {
    levels_on(Config::default(), merging, PAGES as u64)
}

fn levels_on(config: Config, merging: Merging, pages: u64) -> (Machine, Levels) {
    let (machine, viommu) = Machine::live(config);
    let mut nest = Nest::new(viommu.clone());
    nest.set_merging(merging);
    let root = nest.add_root();
    let middle = nest.add_child(root).unwrap();
    let child = nest.add_child(middle).unwrap();
    let memory = machine.memory(pages * PAGE);
    let mut levels = Levels { viommu, nest, root, middle, child, memory };
    for page in 0..pages {
        levels.give(page, RW).unwrap();
        let (iova, target) = (Iova::new(MIDDLE + page * PAGE), Iova::new(GUEST + page * PAGE));
        levels.nest.map(middle, iova, target, PAGE, RW).unwrap();
    }
    levels.nest.attach(EP, child).unwrap();
    machine.device().clear_log();
    (machine, levels)
}

impl Levels {
    /// Maps a page of the memory in the root.
    fn give(&mut self, page: u64, prot: Prot) -> Result<(), NestError> {
        let phys = PhysAddr::new(self.memory.phys.get() + page * PAGE);
        // SAFETY: the test's own memory, which outlives the machine's device.
        unsafe { self.nest.map_memory(self.root, Iova::new(GUEST + page * PAGE), phys, PAGE, prot) }
    }

    /// Takes pages of the root's away.
    fn take(&mut self, page: u64, count: u64) -> Result<(), NestError> {
        self.nest.unmap(self.root, range(GUEST + page * PAGE, count * PAGE))
    }

    /// The child maps all pages by one mapping.
    fn map(&mut self) -> Result<(), NestError> {
        self.nest.map(self.child, Iova::new(CHILD), Iova::new(MIDDLE), LEN, RW)
    }

    /// The child maps the first page, every other page of its own.
    fn map_first_often(&mut self) {
        for page in [0, 2, 4] {
            self.nest.map(self.child, Iova::new(CHILD + page * PAGE), Iova::new(MIDDLE), PAGE, RW).unwrap();
        }
    }

    /// Which of the child's pages the endpoint writes to. Where it does, the bytes are in the right place.
    fn written(&self, machine: &Machine) -> [bool; PAGES] {
        core::array::from_fn(|page| {
            let at = page * PAGE as usize;
            let written = machine.dma_write(EP, CHILD + at as u64, &[1 + page as u8]).is_ok();
            assert!(!written || bytes_of(&self.memory)[at] == 1 + page as u8);
            written
        })
    }
}

/// MAP and UNMAP requests since the last call: the first of the child's pages, and how many.
fn log(machine: &Machine) -> Vec<(&'static str, u64, u64)> {
    let pages = |name, first: u64, last: u64| (name, (first - CHILD) / PAGE, (last - first + 1) / PAGE);
    let requests = machine.requests();
    machine.device().clear_log();
    let named = requests.into_iter().filter_map(|request| match request {
        Request::Map { virt_start, virt_end, .. } => Some(pages("MAP", virt_start, virt_end)),
        Request::Unmap { virt_start, virt_end, .. } => Some(pages("UNMAP", virt_start, virt_end)),
        _ => None,
    });
    named.collect()
}

#[test]
fn a_childs_map_takes_one_doorbell_and_one_request_where_shadows_merge() {
    for (merging, shadows) in [(Merging::Never, 4), (Merging::Adjoining, 1)] {
        let (machine, mut levels) = levels(merging);
        let mapped = machine.traffic(|| levels.map());
        assert_eq!(mapped, (Ok(()), shadows, 1), "{merging:?}");
        assert_eq!((levels.nest.shadows(levels.child), levels.written(&machine)), (shadows, [true; 4]));
        // What touches goes by one request in any case.
        let unmapped = machine.traffic(|| levels.nest.unmap(levels.child, range(CHILD, LEN)));
        assert_eq!(unmapped, (Ok(()), 1, 1), "{merging:?}");
        assert_eq!((levels.nest.shadows(levels.child), levels.written(&machine)), (0, [false; 4]));
    }
}

#[test]
fn what_differs_or_is_apart_is_not_merged() {
    let (machine, mut levels) = levels(Merging::Adjoining);
    // Page 1 may only be read, and page 3 is elsewhere.
    levels.take(1, 1).unwrap();
    levels.give(1, Prot::READ).unwrap();
    levels.take(3, 1).unwrap();
    let other = machine.memory(PAGE);
    // SAFETY: the test's own memory.
    unsafe { levels.nest.map_memory(levels.root, Iova::new(GUEST + 3 * PAGE), other.phys, PAGE, RW) }
        .unwrap();
    levels.map().unwrap();
    assert_eq!(log(&machine), [("MAP", 0, 1), ("MAP", 1, 1), ("MAP", 2, 1), ("MAP", 3, 1)]);
    // Nor are mappings of the child's own, which go one by one.
    levels.nest.unmap(levels.child, range(CHILD, LEN)).unwrap();
    for page in [0, 1] {
        let (iova, target) = (Iova::new(CHILD + page * PAGE), Iova::new(MIDDLE + 2 * PAGE * page));
        levels.nest.map(levels.child, iova, target, PAGE, RW).unwrap();
    }
    assert_eq!(log(&machine), [("UNMAP", 0, 4), ("MAP", 0, 1), ("MAP", 1, 1)]);
}

#[test]
fn a_part_of_a_merged_shadow_goes_and_the_rest_is_mapped_again() {
    for level in 0..2 {
        let (machine, mut levels) = levels(Merging::Adjoining);
        levels.map().unwrap();
        log(&machine);
        let (space, at) = [(levels.root, GUEST), (levels.middle, MIDDLE)][level];
        let ((), requests, kicks) =
            machine.traffic(|| levels.nest.unmap(space, range(at + PAGE, PAGE)).unwrap());
        assert_eq!((requests, kicks, levels.nest.shadows(levels.child)), (3, 2, 2));
        assert_eq!(log(&machine), [("UNMAP", 0, 4), ("MAP", 0, 1), ("MAP", 2, 2)]);
        assert_eq!(levels.written(&machine), [true, false, true, true]);
        // The child is told of the fault in its own addresses, and whose it is.
        levels.viommu.poll();
        let fault = levels.viommu.next_fault().unwrap();
        let nested = levels.nest.explain(&fault).unwrap();
        assert_eq!(nested.seen, Level { space: levels.child, address: Iova::new(CHILD + PAGE) });
        let blamed = Level { space, address: Iova::new(at + PAGE) };
        assert_eq!((nested.blamed, nested.why), (blamed, Why::NotMapped));
        // It comes back, and nothing faults for that.
        match level {
            0 => levels.give(1, RW),
            _ => levels.nest.map(space, Iova::new(at + PAGE), Iova::new(GUEST + PAGE), PAGE, RW),
        }
        .unwrap();
        assert_eq!((log(&machine), levels.written(&machine)), (vec![("MAP", 1, 1)], [true; 4]));
        // All goes, and the shadows with it.
        levels.nest.unmap(space, range(at, LEN)).unwrap();
        assert_eq!(log(&machine), [("UNMAP", 0, 4)]);
    }
}

/// Fails where a shadow goes twice.
#[test]
fn a_shadow_through_two_parts_of_one_mapping_goes_once() {
    let (machine, mut levels) = levels(Merging::Adjoining);
    // The root has pages 0 to 2 in one mapping and page 1 once more, and the middle space passes through both.
    levels.take(0, 4).unwrap();
    let again = GUEST + 8 * PAGE;
    for (at, offset, pages) in [(GUEST, 0, 3), (again, PAGE, 1)] {
        let phys = PhysAddr::new(levels.memory.phys.get() + offset);
        // SAFETY: the test's own memory.
        unsafe { levels.nest.map_memory(levels.root, Iova::new(at), phys, pages * PAGE, RW) }.unwrap();
    }
    levels.nest.unmap(levels.middle, range(MIDDLE + PAGE, PAGE)).unwrap();
    levels.nest.map(levels.middle, Iova::new(MIDDLE + PAGE), Iova::new(again), PAGE, RW).unwrap();
    levels.nest.map(levels.child, Iova::new(CHILD), Iova::new(MIDDLE), 3 * PAGE, RW).unwrap();
    assert_eq!(log(&machine), [("MAP", 0, 3)]);
    levels.take(0, 3).unwrap();
    assert_eq!(log(&machine), [("UNMAP", 0, 3), ("MAP", 1, 1)]);
    assert_eq!((levels.written(&machine), levels.nest.is_lacking()), ([false, true, false, false], false));
}

/// Fails where the parent's mapping goes although the device still has the shadow, or the shadow's other parts do not come
/// back.
#[test]
fn i14_a_merged_shadow_that_is_stuck_keeps_all_that_it_is_made_of() {
    for bad in [Inject::Refuse(DEVICE_ERROR), Inject::Hold(Execute::AtRelease)] {
        let (machine, mut levels) = levels(Merging::Adjoining);
        levels.map().unwrap();
        // By the change, and by whoever tries to empty the quarantine.
        machine.inject([bad, Inject::Refuse(DEVICE_ERROR)]);
        assert!(matches!(levels.take(1, 1), Err(NestError::Stuck { .. })), "{bad:?}");
        machine.device().inject.script.clear();
        assert_eq!(levels.nest.mappings(levels.root).unwrap().count(), PAGES);
        assert_eq!((levels.written(&machine), levels.nest.is_lacking()), ([true; 4], true), "{bad:?}");
        machine.release(Release::All);
        levels.viommu.poll();
        levels.take(1, 1).unwrap();
        assert_eq!(levels.written(&machine), [true, false, true, true], "{bad:?}");
        levels.nest.mend().unwrap();
        assert!(!levels.nest.is_lacking());
    }
}

#[test]
fn what_the_device_does_not_map_again_is_mended_later() {
    let (machine, mut levels) = levels(Merging::Adjoining);
    levels.map().unwrap();
    machine.inject([Inject::Pass, Inject::Refuse(NO_MEMORY)]);
    // Page 1 is gone for certain, which is what was asked for.
    assert_eq!(levels.take(1, 1), Ok(()));
    assert_eq!((levels.written(&machine), levels.nest.is_lacking()), ([false, false, true, true], true));
    // Every level allows it: nobody is to blame.
    levels.viommu.poll();
    let fault = levels.viommu.next_fault().unwrap();
    assert_eq!((fault.address, levels.nest.explain(&fault)), (Some(Iova::new(CHILD)), None));
    machine.inject([Inject::Refuse(NO_MEMORY)]);
    assert!(matches!(levels.nest.mend(), Err(NestError::Shadow { .. })));
    log(&machine);
    assert_eq!((levels.nest.mend(), log(&machine)), (Ok(()), vec![("MAP", 0, 1)]));
    assert_eq!((levels.written(&machine), levels.nest.is_lacking()), ([true, false, true, true], false));
    assert_eq!((levels.nest.mend(), log(&machine)), (Ok(()), vec![]));
}

#[test]
fn i14_a_childs_map_that_fails_midway_is_taken_back() {
    for at in 0..PAGES {
        let (machine, mut levels) = levels(Merging::Never);
        machine
            .inject((0..PAGES).map(|page| if page == at { Inject::Refuse(NO_MEMORY) } else { Inject::Pass }));
        let (result, _, kicks) = machine.traffic(|| levels.map());
        let first = range(CHILD + at as u64 * PAGE, PAGE);
        assert!(matches!(result, Err(NestError::Shadow { range, .. }) if range == first), "{at}: {result:?}");
        assert_eq!(kicks, 2);
        let left = (levels.nest.shadows(levels.child), machine.device().mappings(0).count());
        assert_eq!((left, levels.nest.is_lacking(), levels.written(&machine)), ((0, 0), false, [false; 4]));
        assert_eq!(levels.nest.mappings(levels.child).unwrap().count(), 0);
        // And is possible still.
        levels.map().unwrap();
        assert_eq!(levels.written(&machine), [true; 4]);
    }
}

#[test]
fn i14_a_map_without_an_answer_counts_as_mapped() {
    let (machine, mut levels) = levels(Merging::Never);
    machine.inject([Inject::Pass, Inject::Hold(Execute::AtRelease)]);
    assert_eq!(levels.map(), Err(NestError::Stuck { range: range(CHILD, LEN) }));
    assert_eq!(levels.nest.mappings(levels.child).unwrap().count(), 1);
    // The memory stays where it is, since the device may come to it.
    assert!(matches!(levels.take(1, 1), Err(NestError::Stuck { .. })));
    machine.release(Release::All);
    levels.viommu.poll();
    levels.nest.mend().unwrap();
    assert_eq!((levels.written(&machine), levels.nest.is_lacking()), ([true; 4], false));
    levels.take(0, 4).unwrap();
    assert_eq!(levels.written(&machine), [false; 4]);
}

#[test]
fn i14_a_parents_unmap_that_fails_midway_is_taken_back() {
    let (machine, mut levels) = levels(Merging::Never);
    levels.map_first_often();
    log(&machine);
    machine.inject([Inject::Pass, Inject::Refuse(DEVICE_ERROR), Inject::Pass, Inject::Refuse(DEVICE_ERROR)]);
    let (result, _, kicks) = machine.traffic(|| levels.take(0, 1));
    // The change, another try, and what went and comes back.
    assert!(
        matches!(result, Err(NestError::Stuck { range: stuck }) if stuck == range(CHILD + 2 * PAGE, PAGE))
    );
    assert_eq!(kicks, 3);
    let (gone, back) = (
        [("UNMAP", 0, 1), ("UNMAP", 2, 1), ("UNMAP", 4, 1), ("UNMAP", 2, 1)],
        [("MAP", 0, 1), ("MAP", 4, 1)],
    );
    assert_eq!(log(&machine), [&gone[..], &back].concat());
    for page in [0, 2, 4] {
        assert!(machine.reaches(EP, CHILD + page * PAGE), "{page}");
    }
    assert_eq!(machine.traffic(|| levels.take(0, 1)).0, Ok(()));
    assert_eq!((levels.nest.shadows(levels.child), machine.device().mappings(0).count()), (0, 0));
}

/// Fails where a shadow that is stuck goes by the same request as those that it touches.
#[test]
fn what_touches_a_shadow_that_is_stuck_goes_without_it() {
    let (machine, mut levels) = levels(Merging::Never);
    levels.map().unwrap();
    machine.inject([Inject::Refuse(DEVICE_ERROR), Inject::Refuse(DEVICE_ERROR)]);
    assert!(matches!(levels.take(1, 1), Err(NestError::Stuck { .. })));
    log(&machine);
    assert_eq!(levels.nest.unmap(levels.child, range(CHILD, LEN)), Ok(()));
    assert_eq!(log(&machine), [("UNMAP", 0, 1), ("UNMAP", 2, 2), ("UNMAP", 1, 1)]);
    assert_eq!((levels.nest.shadows(levels.child), levels.written(&machine)), (0, [false; 4]));
}

#[test]
fn shadows_of_one_change_in_several_domains_take_one_doorbell() {
    for merging in MERGINGS {
        let (machine, mut levels) = levels(merging);
        let other = levels.nest.add_child(levels.root).unwrap();
        levels.nest.attach(EP2, other).unwrap();
        levels.map_first_often();
        levels.nest.map(other, Iova::new(CHILD), Iova::new(GUEST), PAGE, RW).unwrap();
        assert_eq!(machine.traffic(|| levels.take(0, 1)), (Ok(()), 4, 1), "{merging:?}");
        assert!(!machine.reaches(EP, CHILD) && !machine.reaches(EP2, CHILD));
        assert_eq!(machine.traffic(|| levels.give(0, RW)), (Ok(()), 4, 1), "{merging:?}");
        assert!(machine.reaches(EP, CHILD) && machine.reaches(EP2, CHILD));
        // One of both domains refuses: the other has nothing either.
        levels.take(0, 1).unwrap();
        machine.inject([Inject::Pass, Inject::Pass, Inject::Pass, Inject::Refuse(NO_MEMORY)]);
        assert!(matches!(levels.give(0, RW), Err(NestError::Shadow { .. })), "{merging:?}");
        assert!(!machine.reaches(EP, CHILD) && !machine.reaches(EP2, CHILD));
        assert_eq!((levels.nest.shadows(levels.child), levels.nest.shadows(other)), (0, 0));
    }
}

#[test]
fn more_shadows_than_the_ring_takes_need_a_doorbell_for_each_ring() {
    let (pages, slots) = (50, 8);
    let config = Config { queue_sizes: [slots, 8], ..Config::default() };
    let (machine, mut levels) = levels_on(config, Merging::Never, pages);
    let map = |levels: &mut Levels| {
        levels.nest.map(levels.child, Iova::new(CHILD), Iova::new(MIDDLE), pages * PAGE, RW)
    };
    let (mapped, requests, kicks) = machine.traffic(|| map(&mut levels));
    assert_eq!((mapped, requests), (Ok(()), pages as usize));
    assert!((pages / u64::from(slots)..=pages / 2).contains(&kicks), "{kicks} doorbells");
    levels.nest.unmap(levels.child, range(CHILD, pages * PAGE)).unwrap();
    // The status of the very last is looked at.
    machine.inject((1..pages).map(|_| Inject::Pass).chain([Inject::Refuse(NO_MEMORY)]));
    assert!(matches!(map(&mut levels), Err(NestError::Shadow { .. })));
    assert_eq!((levels.nest.shadows(levels.child), machine.device().mappings(0).count()), (0, 0));
}

/// I12: the number of a domain that was never mapped may have mappings of an earlier life.
#[test]
fn i12_a_space_gets_another_number_where_its_own_is_not_fresh() {
    let (machine, mut levels) = levels(Merging::Never);
    let before = machine.device().domain_of(EP.get());
    // All of the batch, and the first of them once more.
    machine.inject([Inject::Refuse(INVAL); PAGES + 1]);
    assert_eq!(levels.map(), Ok(()));
    assert_ne!(machine.device().domain_of(EP.get()), before);
    assert_eq!((levels.nest.shadows(levels.child), levels.written(&machine)), (PAGES, [true; 4]));
}

/// Fails where a shadow that was mapped by itself, and has no answer, is forgotten.
#[test]
fn i14_a_first_map_without_an_answer_counts_as_mapped() {
    let (machine, mut levels) = levels(Merging::Adjoining);
    machine.inject([Inject::Refuse(INVAL), Inject::Hold(Execute::AtRelease)]);
    assert_eq!(levels.map(), Err(NestError::Stuck { range: range(CHILD, LEN) }));
    machine.release(Release::All);
    levels.viommu.poll();
    assert_eq!(levels.written(&machine), [true; 4]);
    levels.take(0, 4).unwrap();
    assert_eq!(levels.written(&machine), [false; 4]);
}

#[test]
fn a_space_that_its_endpoint_left_with_something_stuck_is_free_once_it_is_mended() {
    let (machine, mut levels) = levels(Merging::Adjoining);
    levels.map().unwrap();
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    assert!(matches!(levels.take(0, 1), Err(NestError::Stuck { .. })));
    assert_eq!(levels.nest.detach(EP), Err(NestError::Stuck { range: range(CHILD, LEN) }));
    assert_eq!(levels.nest.remove(levels.child), Err(NestError::InUse { space: levels.child }));
    machine.release(Release::All);
    levels.viommu.poll();
    assert_eq!((levels.nest.mend(), levels.nest.is_lacking()), (Ok(()), false));
    levels.nest.remove(levels.child).unwrap();
}

#[test]
fn in_a_dead_domain_shadows_go_without_a_device() {
    let (machine, mut levels) = levels(Merging::Never);
    levels.map_first_often();
    levels.viommu.detach(EP).unwrap();
    machine.device().fail();
    levels.viommu.on_interrupt();
    levels.viommu.poll();
    assert_eq!(machine.traffic(|| levels.take(0, 4)), (Ok(()), 0, 0));
    assert_eq!(levels.nest.shadows(levels.child), 0);
}
