//! What random sequences found, as short as it gets, written out so that it does not depend on how sequences are made.

use virtio_iommu::{AttachError, DomainOptions};
use virtio_iommu_model::Config;

use crate::support::{EP, EP2, Machine, PAGE, RW};

/// A domain that lost its endpoints while it had mappings takes over an endpoint of a domain that nobody holds: as
/// [`AttachError::Parked`] says it is refused. Fails when the driver records mappings that the device does not have.
#[test]
fn a_domain_with_mappings_takes_no_endpoint_over() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    let at = unsafe { domain.map(memory.phys, PAGE, RW, crate::support::ANYWHERE) }.unwrap();
    viommu.detach(EP).unwrap();
    let other = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP2, &other).unwrap();
    drop(other);
    assert_eq!(viommu.attach(EP2, &domain), Err(AttachError::Parked(EP2)));
    assert!(!machine.reaches(EP2, at.get()));
}
