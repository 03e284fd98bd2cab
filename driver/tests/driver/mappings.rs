//! The list of what is mapped.

use virtio_iommu::{MappingStatus, PhysAddr, Prot};
use virtio_iommu_model::{Config, Execute, Inject, Release};

use crate::support::{ANYWHERE, EP, Machine, PAGE, RW};

/// Fails when a mapping is left out, or the lock is held while the caller looks at one.
#[test]
fn what_was_not_unmapped_is_found() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(8 * PAGE);
    let at = |page: u64| PhysAddr::new(memory.phys.get() + page * PAGE);
    // SAFETY: nobody but the test uses the memory.
    let mapped: Vec<_> =
        (0..5).map(|page| unsafe { domain.map(at(page), PAGE, RW, ANYWHERE) }.unwrap()).collect();
    for forgiven in [0, 1, 4] {
        // SAFETY: mapped above.
        unsafe { domain.unmap(mapped[forgiven], PAGE) }.unwrap();
    }
    machine.inject([Inject::Hold(Execute::Now)]);
    // SAFETY: as above, also when the outcome is unknown.
    assert!(unsafe { domain.map(at(7), PAGE, Prot::READ, ANYWHERE) }.is_err());
    let mut found = Vec::new();
    for mapping in domain.mappings() {
        // The lock is free: this takes it.
        assert_eq!(domain.translate(mapping.range.last()), Some(mapping));
        found.push((mapping.phys, mapping.status, mapping.prot));
    }
    found.sort_by_key(|(phys, ..)| *phys);
    let expected = [
        (at(2), MappingStatus::Mapped, RW),
        (at(3), MappingStatus::Mapped, RW),
        (at(7), MappingStatus::Quarantined, Prot::READ),
    ];
    assert_eq!(found, expected);
    // Without an endpoint the device has none.
    machine.release(Release::All);
    viommu.detach(EP).unwrap();
    assert!(domain.mappings().all(|mapping| mapping.status == MappingStatus::Lost));
    assert_eq!(domain.mappings().count(), 2);
}
