//! Nested address spaces: over the model, and over drivers that are guests of each other.

mod granule;
mod merged;
mod random;
mod stacked;

use virtio_iommu::contexts::nested::{Level, MAX_DEPTH, Nest, NestError, SpaceId, Why};
use virtio_iommu::{FaultAccess, Iova, IovaRange, PhysAddr, Prot, Viommu};
use virtio_iommu_model::{Config, Execute, Inject, Release};

use super::range;
use crate::support::{EP, EP2, Machine, PAGE, RW, TestPlatform, bytes_of};

/// Where guests have their memory.
pub(super) const GUEST: u64 = 0x10_0000;

struct Guest {
    machine: Machine,
    viommu: Viommu<TestPlatform>,
    nest: Nest<TestPlatform>,
    root: SpaceId,
    child: SpaceId,
    memory: virtio_iommu::DmaMemory,
}

/// A guest with four pages of memory, whose endpoint is in a child space.
fn guest() -> Guest {
    let (machine, viommu) = Machine::live(Config::default());
    let mut nest = Nest::new(viommu.clone());
    let memory = machine.memory(4 * PAGE);
    let root = nest.add_root();
    let child = nest.add_child(root).unwrap();
    // SAFETY: the test's own memory, which outlives the machine's device.
    unsafe { nest.map_memory(root, Iova::new(GUEST), memory.phys, 4 * PAGE, RW) }.unwrap();
    nest.attach(EP, child).unwrap();
    Guest { machine, viommu, nest, root, child, memory }
}

impl Guest {
    fn map(&mut self, iova: u64, target: u64, pages: u64, prot: Prot) -> Result<(), NestError> {
        self.nest.map(self.child, Iova::new(iova), Iova::new(target), pages * PAGE, prot)
    }
}

#[test]
fn an_endpoint_reaches_what_both_levels_allow() {
    let mut guest = guest();
    guest.map(0x8000, GUEST + PAGE, 1, RW).unwrap();
    guest.machine.dma_write(EP, 0x8010, &[7]).unwrap();
    assert_eq!(bytes_of(&guest.memory)[PAGE as usize + 0x10], 7);
    // Nothing in the child; nothing in the parent; not allowed in the child.
    guest.map(0xa000, GUEST + 4 * PAGE, 1, RW).unwrap();
    guest.map(0xc000, GUEST, 1, Prot::READ).unwrap();
    assert!(!guest.machine.reaches(EP, 0x9000) && !guest.machine.reaches(EP, 0xa000));
    assert!(guest.machine.reaches(EP, 0xc000) && guest.machine.dma_write(EP, 0xc000, &[1]).is_err());
    // Nor by the addresses of the guest or of memory.
    assert!(!guest.machine.reaches(EP, GUEST) && !guest.machine.reaches(EP, guest.memory.phys.get()));
    guest.nest.unmap(guest.child, range(0x8000, PAGE)).unwrap();
    assert!(!guest.machine.reaches(EP, 0x8000));
}

#[test]
fn faults_are_told_in_the_addresses_of_each_level() {
    let mut guest = guest();
    let (root, child) = (guest.root, guest.child);
    guest.map(0xa000, GUEST + 4 * PAGE, 1, RW).unwrap();
    guest.map(0xc000, GUEST, 1, Prot::READ).unwrap();
    let explained = |iova: u64| {
        assert!(guest.machine.dma_write(EP, iova, &[1]).is_err());
        guest.viommu.poll();
        let fault = guest.viommu.next_fault().unwrap();
        let nested = guest.nest.explain(&fault).unwrap();
        assert_eq!(
            (nested.seen, nested.access),
            (Level { space: child, address: Iova::new(iova) }, FaultAccess::WRITE)
        );
        (nested.blamed.space, nested.blamed.address.get(), nested.why)
    };
    assert_eq!(explained(0x9008), (child, 0x9008, Why::NotMapped));
    assert_eq!(explained(0xa008), (root, GUEST + 4 * PAGE + 8, Why::NotMapped));
    assert_eq!(explained(0xc008), (child, 0xc008, Why::NotAllowed));
}

#[test]
fn a_mapping_over_two_of_the_parents_is_cut_and_each_part_goes_alone() {
    let mut guest = guest();
    let other = guest.machine.memory(PAGE);
    // SAFETY: the test's own memory.
    unsafe { guest.nest.map_memory(guest.root, Iova::new(GUEST + 4 * PAGE), other.phys, PAGE, Prot::READ) }
        .unwrap();
    let (result, requests, _) = guest.machine.traffic(|| {
        guest.nest.map(guest.child, Iova::new(0x8000), Iova::new(GUEST + 3 * PAGE), 2 * PAGE, RW)
    });
    assert_eq!((result, requests, guest.nest.shadows(guest.child)), (Ok(()), 2, 2));
    assert!(guest.machine.dma_write(EP, 0x8000, &[1]).is_ok());
    assert!(guest.machine.reaches(EP, 0x9000) && guest.machine.dma_write(EP, 0x9000, &[1]).is_err());
    // The parent changes: one part goes, the other never faults meanwhile.
    let part = range(GUEST + 4 * PAGE, PAGE);
    guest.nest.unmap(guest.root, part).unwrap();
    guest.machine.give_back(other);
    assert!(guest.machine.reaches(EP, 0x8000) && !guest.machine.reaches(EP, 0x9000));
    // And comes back as another.
    let third = guest.machine.memory(PAGE);
    // SAFETY: as above.
    unsafe { guest.nest.map_memory(guest.root, part.start(), third.phys, PAGE, RW) }.unwrap();
    guest.machine.dma_write(EP, 0x9000, &[9]).unwrap();
    assert_eq!(bytes_of(&third)[0], 9);
}

#[test]
fn i14_a_parents_unmap_is_confirmed_after_every_shadow_of_it() {
    let mut guest = guest();
    // The same memory three times.
    for iova in [0x8000, 0x9000, 0xf000] {
        guest.map(iova, GUEST, 1, RW).unwrap();
    }
    let whole = range(GUEST, 4 * PAGE);
    for bad in [Inject::Refuse(3), Inject::Hold(Execute::AtRelease)] {
        guest.machine.inject([Inject::Pass, bad, Inject::Refuse(3)]);
        let stuck = guest.nest.unmap(guest.root, whole);
        assert!(matches!(stuck, Err(NestError::Stuck { .. })), "{bad:?}: {stuck:?}");
        assert_eq!(guest.nest.mappings(guest.root).unwrap().count(), 1, "{bad:?}");
        guest.machine.device().inject.script.clear();
        guest.machine.release(Release::All);
        guest.viommu.poll();
    }
    guest.nest.unmap(guest.root, whole).unwrap();
    assert!(![0x8000, 0x9000, 0xf000].iter().any(|iova| guest.machine.reaches(EP, *iova)));
    assert_eq!(guest.machine.device().mappings(0).count(), 0);
    guest.machine.give_back(guest.memory);
    // What the child maps is its own, and still there for other memory.
    assert_eq!(guest.nest.mappings(guest.child).unwrap().count(), 3);
}

#[test]
fn i14_a_childs_map_fails_where_a_shadow_does_and_leaves_none() {
    let mut guest = guest();
    // Two parts, by two mappings of the parent.
    let more = guest.machine.memory(PAGE);
    // SAFETY: the test's own memory.
    unsafe { guest.nest.map_memory(guest.root, Iova::new(GUEST + 4 * PAGE), more.phys, PAGE, RW) }.unwrap();
    guest.machine.inject([Inject::Pass, Inject::Refuse(8)]);
    let refused = guest.map(0x8000, GUEST + 3 * PAGE, 2, RW);
    assert!(matches!(refused, Err(NestError::Shadow { .. })), "{refused:?}");
    assert_eq!((guest.nest.shadows(guest.child), guest.nest.mappings(guest.child).unwrap().count()), (0, 0));
    assert!(!guest.machine.reaches(EP, 0x8000));
    guest.map(0x8000, GUEST + 3 * PAGE, 2, RW).unwrap();
    // The window of interrupts cannot be shadowed.
    let refused = guest.map(0xfee0_0000, GUEST, 1, RW);
    assert!(matches!(refused, Err(NestError::Shadow { .. })), "{refused:?}");
}

#[test]
fn endpoints_come_and_go_and_share_what_is_mapped() {
    let mut guest = guest();
    guest.map(0x8000, GUEST, 1, RW).unwrap();
    guest.nest.attach(EP2, guest.child).unwrap();
    assert!(guest.machine.reaches(EP2, 0x8000));
    guest.nest.detach(EP).unwrap();
    assert!(!guest.machine.reaches(EP, 0x8000) && guest.machine.reaches(EP2, 0x8000));
    guest.nest.detach(EP2).unwrap();
    assert_eq!(guest.nest.shadows(guest.child), 0);
    // In the guest's memory itself, and then in the child again.
    guest.nest.attach(EP, guest.root).unwrap();
    assert!(guest.machine.reaches(EP, GUEST) && !guest.machine.reaches(EP, 0x8000));
    guest.nest.detach(EP).unwrap();
    guest.nest.attach(EP, guest.child).unwrap();
    assert!(guest.machine.reaches(EP, 0x8000));
    assert_eq!(guest.nest.detach(EP2), Err(NestError::NotAttached { endpoint: EP2 }));
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_sent() {
    let mut guest = guest();
    let (root, child) = (guest.root, guest.child);
    guest.machine.device().clear_log();
    // SAFETY: refused.
    let mapped = unsafe { guest.nest.map_memory(child, Iova::new(0), PhysAddr::new(0), PAGE, RW) };
    assert_eq!(mapped, Err(NestError::NotARoot { space: child }));
    let mapped = guest.nest.map(root, Iova::new(0), Iova::new(0), PAGE, RW);
    assert_eq!(mapped, Err(NestError::NotAChild { space: root }));
    assert_eq!(guest.map(8, 0, 1, RW), Err(NestError::Misaligned { value: 8, granule: PAGE }));
    assert_eq!(guest.map(0, 8, 1, RW), Err(NestError::Misaligned { value: 8, granule: PAGE }));
    assert_eq!(guest.map(0, 0, 0, RW), Err(NestError::Empty));
    assert_eq!(guest.map(0, 0, 1, Prot::MMIO), Err(NestError::Prot { prot: Prot::MMIO }));
    assert!(matches!(guest.map(!0xfff, 0, 2, RW), Err(NestError::Wraps { .. })));
    assert!(matches!(guest.map(0, !0xfff, 2, RW), Err(NestError::Wraps { .. })));
    guest.map(0x8000, 0, 2, RW).unwrap();
    assert_eq!(guest.map(0x9000, 0, 2, RW), Err(NestError::Mapped { range: range(0x8000, 2 * PAGE) }));
    let split = guest.nest.unmap(child, range(0x8000, PAGE));
    assert_eq!(split, Err(NestError::Splits { mapping: range(0x8000, 2 * PAGE) }));
    assert_eq!(guest.nest.unmap(child, IovaRange::WHOLE), Ok(()));
    assert_eq!(guest.nest.remove(child), Err(NestError::InUse { space: child }));
    assert_eq!(guest.nest.remove(root), Err(NestError::InUse { space: root }));
    let mut deepest = child;
    for _ in 2..MAX_DEPTH {
        deepest = guest.nest.add_child(deepest).unwrap();
    }
    assert_eq!(guest.nest.add_child(deepest), Err(NestError::TooDeep { limit: MAX_DEPTH }));
    guest.nest.remove(deepest).unwrap();
    assert_eq!(guest.nest.remove(deepest), Err(NestError::NoSpace { space: deepest }));
    assert_eq!(guest.machine.entries().len(), 0);
}
