//! What random sequences found, as short as it gets, written out so that it does not depend on how sequences are made.

use virtio_iommu::{
    AttachError, DmaDevice, DomainKind, DomainOptions, EndpointOptions, Iova, Leave, PhysAddr,
};
use virtio_iommu_model::{Config, Endpoint, Execute, Inject, Release};

use crate::support::{ANYWHERE, EP, EP2, Machine, PAGE, RW};

/// A domain that lost its endpoints while it had mappings takes over an endpoint of a domain that nobody holds: as
/// [`AttachError::Parked`] says it is refused. Fails when the driver records mappings that the device does not have.
#[test]
fn a_domain_with_mappings_takes_no_endpoint_over() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    let at = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
    viommu.detach(EP).unwrap();
    let other = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP2, &other).unwrap();
    drop(other);
    assert_eq!(viommu.attach(EP2, &domain), Err(AttachError::Parked(EP2)));
    assert!(!machine.reaches(EP2, at.get()));
}

/// The domain that takes the endpoint over has the number of an identity domain then.
#[test]
fn an_identity_domain_is_not_taken_over() {
    let (machine, viommu) = Machine::live(Config::default());
    let identity = DomainOptions { kind: DomainKind::Identity, ..DomainOptions::default() };
    let identity = viommu.create_domain(identity).unwrap();
    viommu.attach(EP, &identity).unwrap();
    drop(identity);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let attached = viommu.attach(EP, &domain);
    assert!(attached.is_err() || !machine.device().bypasses(EP.get()), "{attached:?}");
}

#[test]
fn an_end_that_leaves_endpoints_blocked_closes_the_bypass() {
    let (machine, viommu) = Machine::live(Config::default());
    // SAFETY: the endpoints do nothing.
    unsafe { viommu.open_bypass() }.unwrap();
    // SAFETY: as above.
    unsafe { viommu.shutdown(Leave::Blocked) }.unwrap();
    assert!(!machine.device().bypasses(EP.get()));
}

/// The device carried the DETACH out, and says so to the next one: INVAL, since the endpoint is not in that domain.
#[test]
fn an_endpoint_whose_detach_said_nothing_can_be_used_again() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    machine.inject([Inject::Status(0x77)]);
    assert!(viommu.detach(EP).is_err());
    let _ = viommu.detach(EP);
    assert_eq!(viommu.attach(EP, &domain), Ok(()));
}

/// The mapping went with the first endpoint, whose DETACH was carried out and not answered.
#[test]
fn mappings_are_not_lost_beside_an_unknown_endpoint() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    let at = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
    machine.inject([Inject::Hold(Execute::Now)]);
    assert!(viommu.detach(EP).is_err());
    let attached = viommu.attach(EP2, &domain);
    assert!(attached.is_err() || machine.reaches(EP2, at.get()), "{attached:?}");
}

/// The answer to the ATTACH comes late, and says that the endpoint is there.
#[test]
fn a_late_attach_has_its_mappings() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    let at = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
    viommu.detach(EP).unwrap();
    machine.inject([Inject::Hold(Execute::Now)]);
    assert!(viommu.attach(EP, &domain).is_err());
    machine.release(Release::All);
    viommu.poll();
    let attached = viommu.attach(EP, &domain);
    assert!(attached.is_err() || machine.reaches(EP, at.get()), "{attached:?}");
}

/// The domain gets its endpoint back, and the device does not say whether it mapped the memory again.
#[test]
fn memory_stays_with_its_user_when_it_is_not_mapped_again() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let view = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    let memory = view.alloc_coherent(PAGE as usize).unwrap();
    viommu.detach(EP).unwrap();
    machine.inject([Inject::Pass, Inject::UsedLen(0)]);
    assert!(matches!(viommu.attach(EP, &domain), Err(AttachError::Replay { .. })));
    viommu.poll();
    assert!(machine.is_live(PhysAddr::new(memory.ptr().addr().get() as u64)));
}

/// An endpoint that was unplugged, and is another one when it comes back: it has to be probed again (D-07).
#[test]
fn an_endpoint_that_comes_back_is_probed() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    machine.device().remove_endpoint(EP.get());
    viommu.detach(EP).unwrap();
    machine.device().add_endpoint(Endpoint::new(EP.get()));
    viommu.attach(EP, &domain).unwrap();
    assert_eq!(machine.take_violations(), []);
}

/// No room for the bounce pages; what was taken before is free again.
#[test]
fn a_view_that_was_not_made_leaves_no_trace() {
    let (_machine, viommu, domain) = Machine::attached(Config::default());
    let limit = Iova::new(3 * PAGE - 1);
    let options =
        |pages: u64| EndpointOptions { limit, bounce_bytes: (pages * PAGE) as usize, ..Default::default() };
    assert!(viommu.open(EP, &domain, options(2)).is_err());
    assert!(viommu.open(EP, &domain, options(1)).is_ok());
}
