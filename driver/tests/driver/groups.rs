//! Endpoints that cannot be isolated from each other: one domain for all, or none (D-13).

use virtio_iommu::{
    AttachError, DetachError, DomainOptions, EndpointId, EndpointOptions, GroupError, MoveError,
    RequestError, Status,
};
use virtio_iommu_model::{Config, Endpoint, Inject};

use crate::support::{EP, EP2, Machine};

/// A third endpoint, which is in no group.
const ALONE: EndpointId = EndpointId::new(10);

fn machine() -> Machine {
    let machine = Machine::new(Config::default());
    machine.device().add_endpoint(Endpoint::x86(ALONE.get()));
    machine
}

fn places(machine: &Machine) -> [Option<u32>; 3] {
    [EP, EP2, ALONE].map(|endpoint| machine.device().domain_of(endpoint.get()))
}

/// Fails when `attach_known` attaches only the endpoint that it was asked for.
#[test]
fn attaching_one_attaches_all_and_the_last_one_detaches_all() {
    let machine = machine();
    let viommu = machine.bring_up();
    viommu.group(&[EP, EP2]).unwrap();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let id = Some(domain.id().get());

    let (first, requests, _) = machine.traffic(|| viommu.open(EP, &domain, EndpointOptions::default()));
    let first = first.unwrap();
    assert_eq!((requests, places(&machine)), (2, [id, id, None]));
    let (second, requests, _) = machine.traffic(|| viommu.open(EP2, &domain, EndpointOptions::default()));
    assert_eq!(requests, 0, "it is there already");
    first.close().unwrap();
    assert_eq!(places(&machine), [id, id, None], "the other one is still asked for");
    second.unwrap().close().unwrap();
    assert_eq!(places(&machine), [None; 3]);
    assert_eq!(viommu.detach(EP), Err(DetachError::NotAttached(EP)));
}

/// Fails when `begin_attach` does not look at the group.
#[test]
fn a_group_is_never_in_two_domains() {
    let machine = machine();
    let viommu = machine.bring_up();
    viommu.group(&[EP2, EP]).unwrap();
    let domains = [(); 2].map(|()| viommu.create_domain(DomainOptions::default()).unwrap());
    let ids = [0, 1].map(|index: usize| Some(domains[index].id().get()));
    viommu.attach(EP, &domains[0]).unwrap();
    let (refused, requests, _) = machine.traffic(|| viommu.attach(EP2, &domains[1]));
    assert!(matches!(refused, Err(AttachError::GroupElsewhere { .. })), "{refused:?}");
    assert_eq!((requests, places(&machine)), (0, [ids[0], ids[0], None]));
    // One that is alone goes where it wants.
    viommu.attach(ALONE, &domains[1]).unwrap();
    // Moving one moves all.
    viommu.move_endpoint(EP2, &domains[1]).unwrap();
    assert_eq!(places(&machine), [ids[1]; 3]);
    viommu.detach(ALONE).unwrap();
    assert_eq!(places(&machine), [ids[1], ids[1], None]);
}

/// Fails when a failure in the middle leaves the first ones attached.
#[test]
fn where_one_cannot_be_attached_none_is() {
    let machine = machine();
    let viommu = machine.bring_up();
    viommu.group(&[EP, EP2]).unwrap();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let nomem = 8;
    machine.inject([Inject::Pass, Inject::Refuse(nomem)]);
    let error = RequestError::Refused(Status::NoMem);
    assert_eq!(viommu.attach(EP, &domain), Err(AttachError::Request { endpoint: EP2, error }));
    assert_eq!(places(&machine), [None; 3]);
    viommu.attach(EP, &domain).unwrap();
    // Moving fails half-way too: then all are nowhere, and not in two places.
    let other = viommu.create_domain(DomainOptions::default()).unwrap();
    machine.inject([Inject::Pass, Inject::Pass, Inject::Pass, Inject::Refuse(nomem)]);
    let moved = viommu.move_endpoint(EP, &other);
    assert!(matches!(moved, Err(MoveError::Attach(AttachError::Request { endpoint: EP2, .. }))), "{moved:?}");
    assert_eq!(places(&machine), [None; 3]);
}

#[test]
fn a_group_is_made_of_what_is_known_and_free() {
    let machine = machine();
    let viommu = machine.bring_up();
    assert_eq!(viommu.group(&[EP, ALONE]), Err(GroupError::Unknown(ALONE)));
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    assert_eq!(viommu.group(&[EP2, EP]), Err(GroupError::Attached(EP)));
    viommu.detach(EP).unwrap();
    // Nothing was done by the failures.
    viommu.group(&[EP2, EP]).unwrap();
    assert_eq!(viommu.group(&[EP]), Err(GroupError::Grouped(EP)));
}
