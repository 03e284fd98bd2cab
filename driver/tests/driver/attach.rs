//! Endpoints and domains: attaching, detaching, numbers.

use virtio_iommu::{
    AttachError, DetachError, DmaDevice, DomainError, DomainOptions, EndpointId, EndpointOptions, Iova,
    MapError, MoveError, Options, RequestError, Status, UnmapError,
};
use virtio_iommu_model::{Config, Endpoint, Execute, Inject, Release, Request, ReservedRegion};

use crate::support::{ANYWHERE, EP, EP2, Machine, PAGE, RW};

const AT: Iova = Iova::new(0x10_0000);

fn request_failed(endpoint: EndpointId, error: RequestError) -> AttachError {
    AttachError::Request { endpoint, error }
}

/// Fails when `begin_attach` sends to the domain that the endpoint is in.
#[test]
fn i07_attaching_again_sends_nothing() {
    // QEMU would drop all mappings.
    let (machine, viommu, domain) = Machine::attached(Config::qemu_10());
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, memory.phys, PAGE, RW) }.unwrap();
    let (again, requests, kicks) = machine.traffic(|| viommu.attach(EP, &domain));
    assert_eq!((again, requests, kicks), (Ok(()), 0, 0));
    assert!(machine.reaches(EP, AT.get()));
}

#[test]
fn an_endpoint_is_in_one_domain_at_a_time() {
    let (machine, viommu, _domain) = Machine::attached(Config::default());
    let other = viommu.create_domain(DomainOptions::default()).unwrap();
    let (result, requests, _) = machine.traffic(|| viommu.attach(EP, &other));
    assert_eq!((result, requests), (Err(AttachError::Busy(EP)), 0));
    viommu.detach(EP).unwrap();
    viommu.attach(EP, &other).unwrap();
    assert_eq!(machine.device().domain_of(EP.get()), Some(other.id().get()));
}

#[test]
fn d12_d16_requests_are_exact() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let id = domain.id().get();
    viommu.attach(EP2, &domain).unwrap();
    viommu.detach(EP2).unwrap();
    let expected = [
        Request::Attach { domain: id, endpoint: 9, flags: 0, reserved: 0 },
        Request::Detach { domain: id, endpoint: 9, reserved: 0 },
    ];
    assert_eq!(machine.requests(), expected);
    assert!(machine.entries().iter().all(|entry| (entry.readable_len, entry.writable_len) == (20, 4)));
}

/// I1: fails when `revoke_if_empty` does not look at `possible`.
#[test]
fn two_endpoints_share_a_domain_until_the_last_one_goes() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, memory.phys, PAGE, RW) }.unwrap();
    viommu.attach(EP2, &domain).unwrap();
    assert!(machine.reaches(EP, AT.get()) && machine.reaches(EP2, AT.get()));

    viommu.detach(EP).unwrap();
    assert!(!machine.reaches(EP, AT.get()) && machine.reaches(EP2, AT.get()));
    // The mapping is still the device's: unmapping it takes a request.
    viommu.detach(EP2).unwrap();
    assert!(!machine.reaches(EP2, AT.get()));
    assert_eq!(domain.mapping_count(), 1, "its owner has not unmapped it yet");
    // SAFETY: it was mapped above.
    let (unmapped, requests, _) = machine.traffic(|| unsafe { domain.unmap(AT, PAGE) });
    assert_eq!((unmapped, requests), (Ok(()), 0), "the domain is dead, and nothing bypasses");
    viommu.attach(EP, &domain).unwrap();
    assert!(!machine.reaches(EP, AT.get()));
    // SAFETY: as above.
    unsafe { domain.map_at(AT, memory.phys, PAGE, RW) }.unwrap();
    assert!(machine.reaches(EP, AT.get()));
}

/// I7: fails when attaching does not replay, or replays only what one doorbell takes.
#[test]
fn a_domain_that_gets_an_endpoint_again_gets_its_mappings_again() {
    let machine = Machine::new(Config::default());
    let options = Options { queue_size: 8, ..Machine::options() };
    let viommu = machine.start_with(options).unwrap().go_live().unwrap();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    let pages: Vec<_> = (0..11).map(|page| Iova::new(AT.get() + 2 * page * PAGE)).collect();
    for iova in &pages {
        // SAFETY: nobody but the test uses the memory.
        unsafe { domain.map_at(*iova, machine.memory(PAGE).phys, PAGE, RW) }.unwrap();
    }
    let before = domain.stats().mapped_bytes;
    viommu.detach(EP).unwrap();
    assert_eq!(domain.stats().mapped_bytes, 0);
    let (attached, requests, kicks) = machine.traffic(|| viommu.attach(EP2, &domain));
    assert_eq!((attached, requests, kicks), (Ok(()), 13, 5), "a PROBE, an ATTACH, and 11 MAPs by fours");
    assert!(pages.iter().all(|iova| machine.reaches(EP2, iova.get()) && !machine.reaches(EP, iova.get())));
    assert_eq!(domain.stats().mapped_bytes, before);
    for iova in &pages {
        // SAFETY: mapped above.
        unsafe { domain.unmap(*iova, PAGE) }.unwrap();
    }
    assert!(pages.iter().all(|iova| !machine.reaches(EP2, iova.get())));
}

/// Fails when a replay that the device refuses leaves the endpoint in a domain with holes.
#[test]
fn a_replay_that_fails_leaves_the_endpoint_detached_and_the_records_as_they_were() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    for page in 0..3 {
        let iova = Iova::new(AT.get() + page * PAGE);
        // SAFETY: nobody but the test uses the memory.
        unsafe { domain.map_at(iova, machine.memory(PAGE).phys, PAGE, RW) }.unwrap();
    }
    viommu.detach(EP).unwrap();
    machine.inject([Inject::Pass, Inject::Pass, Inject::Refuse(8)]);
    assert!(matches!(viommu.attach(EP, &domain), Err(AttachError::Replay { .. })));
    assert_eq!(machine.device().domain_of(EP.get()), None);
    assert_eq!(domain.mapping_count(), 3);
    viommu.attach(EP, &domain).unwrap();
    assert!((0..3).all(|page| machine.reaches(EP, AT.get() + page * PAGE)));
}

/// Fails when the record of the old domain goes with the endpoint, or the new one's is not looked at.
#[test]
fn moving_an_endpoint_leaves_each_domain_its_mappings() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let other = viommu.create_domain(DomainOptions::default()).unwrap();
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, machine.memory(PAGE).phys, PAGE, RW) }.unwrap();
    viommu.move_endpoint(EP, &other).unwrap();
    assert!(!machine.reaches(EP, AT.get()));
    let (moved, requests, _) = machine.traffic(|| viommu.move_endpoint(EP, &other));
    assert_eq!((moved, requests), (Ok(()), 0), "it is there already");
    viommu.move_endpoint(EP, &domain).unwrap();
    assert!(machine.reaches(EP, AT.get()));
    machine.inject([Inject::Refuse(2)]);
    assert!(matches!(viommu.move_endpoint(EP, &other), Err(MoveError::Detach(_))));
    assert!(machine.reaches(EP, AT.get()), "where it was");
}

/// I1: fails when `revoke_if_empty` does not look at `bypass_closed`.
#[test]
fn i01_while_the_bypass_is_open_detaching_frees_nothing() {
    let machine = Machine::new(Config::default());
    let staged = machine.start().unwrap();
    staged.introduce(EP).unwrap();
    let domain = staged.create_domain(DomainOptions::default()).unwrap();
    let options = EndpointOptions { bounce_bytes: PAGE as usize, ..EndpointOptions::default() };
    let endpoint = staged.open(EP, &domain, options).unwrap();
    let (held, phys) = machine.lend(PAGE);
    let mapping = endpoint.adopt(held, virtio_iommu::Direction::Both).unwrap();
    staged.detach(EP).unwrap();
    assert!(machine.reaches(EP, phys.get()), "it bypasses");
    assert!(endpoint.unmap(mapping).is_err());
    assert!(!machine.is_lent_back(phys));

    let viommu = staged.go_live().unwrap();
    viommu.poll();
    assert!(!machine.reaches(EP, phys.get()));
    assert!(machine.is_lent_back(phys));
}

/// I7: fails when `begin_attach` takes a domain with records of mappings that died with its last endpoint.
#[test]
fn i07_a_domain_that_died_while_the_bypass_was_open_has_no_stale_records() {
    let machine = Machine::new(Config::default());
    let staged = machine.start().unwrap();
    let domain = staged.create_domain(DomainOptions::default()).unwrap();
    staged.attach(EP, &domain).unwrap();
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, memory.phys, PAGE, RW) }.unwrap();
    staged.detach(EP).unwrap();
    assert_eq!(staged.attach(EP, &domain), Err(AttachError::DeadDomain));
}

#[test]
fn a_domain_whose_handle_is_gone_lives_until_its_endpoint_is_detached() {
    let machine = Machine::new(Config { domain_range: 5..=6, ..Config::default() });
    let viommu = machine.bring_up();
    let first = viommu.create_domain(DomainOptions::default()).unwrap();
    let id = first.id();
    viommu.attach(EP, &first).unwrap();
    drop(first);
    assert_eq!(machine.device().domain_of(EP.get()), Some(id.get()));
    let second = viommu.create_domain(DomainOptions::default()).unwrap();
    assert_ne!(second.id(), id);
    let third = viommu.create_domain(DomainOptions::default());
    assert_eq!(third.err(), Some(DomainError::IdsExhausted { ids: 2 }));
    viommu.detach(EP).unwrap();
    assert_eq!(viommu.create_domain(DomainOptions::default()).unwrap().id(), id);
}

/// Fails when a domain's record goes with its handle, or when an unanswered DETACH counts as done.
#[test]
fn i02_a_number_is_free_only_after_its_last_detach_completed() {
    for execute in [Execute::Now, Execute::AtRelease] {
        let machine = Machine::new(Config { domain_range: 5..=5, ..Config::default() });
        let viommu = machine.bring_up();
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        viommu.attach(EP, &domain).unwrap();
        drop(domain);
        let create = || viommu.create_domain(DomainOptions::default()).err();
        let exhausted = Some(DomainError::IdsExhausted { ids: 1 });
        machine.inject([Inject::Hold(execute)]);
        let error = RequestError::TimedOut;
        assert_eq!(viommu.detach(EP), Err(DetachError::Request { endpoint: EP, error }));
        viommu.poll();
        assert_eq!(create(), exhausted);
        machine.release(Release::All);
        viommu.poll();
        assert_eq!(create(), None);
    }
}

#[test]
fn numbers_go_round_and_all_are_used() {
    let machine = Machine::new(Config { domain_range: 0xffff_fffe..=u32::MAX, ..Config::default() });
    let viommu = machine.bring_up();
    let first = viommu.create_domain(DomainOptions::default()).unwrap();
    let second = viommu.create_domain(DomainOptions::default()).unwrap();
    assert_eq!(first.id().get().min(second.id().get()), 0xffff_fffe);
    assert_ne!(first.id(), second.id());
    drop(first);
    assert!(viommu.create_domain(DomainOptions::default()).is_ok());
}

/// Fails when `settle_detach` takes a refusal for a success.
#[test]
fn a_refused_detach_leaves_the_endpoint_attached() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(2 * PAGE);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, memory.phys, PAGE, RW) }.unwrap();
    for refusal in [Inject::Refuse(2), Inject::Unwritten] {
        machine.inject([refusal]);
        assert!(viommu.detach(EP).is_err());
        assert_eq!(viommu.attach(EP, &domain), Ok(()), "it still is");
        // SAFETY: as above.
        unsafe { domain.map_at(Iova::new(0x20_0000), memory.phys, PAGE, RW) }.unwrap();
        assert!(machine.reaches(EP, 0x20_0000));
        // SAFETY: mapped just above.
        unsafe { domain.unmap(Iova::new(0x20_0000), PAGE) }.unwrap();
    }
    viommu.detach(EP).unwrap();
    assert_eq!(viommu.detach(EP), Err(DetachError::NotAttached(EP)));
}

#[test]
fn a_refused_attach_leaves_the_endpoint_detached() {
    let machine = Machine::new(Config::default());
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    machine.inject([Inject::Refuse(8), Inject::Unwritten]);
    let refused = request_failed(EP, RequestError::Refused(Status::NoMem));
    assert_eq!(viommu.attach(EP, &domain), Err(refused));
    assert_eq!(viommu.attach(EP, &domain), Err(request_failed(EP, RequestError::NotHandled)));
    assert_eq!(viommu.detach(EP), Err(DetachError::NotAttached(EP)));
    // SAFETY: refused before anything is sent.
    let mapped = unsafe { domain.map_at(AT, virtio_iommu::PhysAddr::new(0), PAGE, RW) };
    assert_eq!(mapped, Err(MapError::NoEndpoint));
    viommu.attach(EP, &domain).unwrap();
}

#[test]
fn an_unknown_endpoint_cannot_be_attached() {
    let machine = Machine::new(Config::default());
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let unknown = EndpointId::new(77);
    let refused = request_failed(unknown, RequestError::Refused(Status::NoEnt));
    assert_eq!(viommu.attach(unknown, &domain), Err(refused));
}

/// I3, I7: fails when a DETACH that was refused makes an endpoint of unknown state an attached one.
#[test]
fn an_attach_of_unknown_outcome_is_not_taken_for_a_success() {
    let machine = Machine::new(Config::default());
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    // Not carried out, and answered with a status that nothing defines.
    machine.inject([Inject::Refuse(0x80)]);
    assert!(viommu.attach(EP, &domain).is_err());
    assert_eq!(viommu.attach(EP, &domain), Err(AttachError::Busy(EP)));
    // A refusal that says nothing about it, and INVAL: it is not in that domain.
    machine.inject([Inject::Refuse(8)]);
    let error = RequestError::Refused(Status::NoMem);
    assert_eq!(viommu.detach(EP), Err(DetachError::Request { endpoint: EP, error }));
    assert_eq!(viommu.attach(EP, &domain), Err(AttachError::Busy(EP)), "it is in no domain");
    viommu.detach(EP).unwrap();
    viommu.attach(EP, &domain).unwrap();

    // Carried out, and answered the same way: detaching it puts that right.
    machine.inject([Inject::Status(0x80)]);
    assert!(viommu.attach(EP2, &domain).is_err());
    viommu.detach(EP2).unwrap();
    viommu.attach(EP2, &domain).unwrap();
}

fn with_region(machine: &Machine, endpoint: EndpointId, first: u64, last: u64) {
    let mut with_region = Endpoint::x86(endpoint.get());
    with_region.reserved.push(ReservedRegion::reserved(first, last));
    machine.device().add_endpoint(with_region);
}

#[test]
fn d33_an_endpoint_with_a_region_where_something_is_mapped_stays_out() {
    let machine = Machine::new(Config::default());
    with_region(&machine, EP2, AT.get() + 0x10, AT.get() + 0x20);
    let (machine, viommu, domain) = machine.attach_one();
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, memory.phys, PAGE, RW) }.unwrap();
    let (result, requests, _) = machine.traffic(|| viommu.attach(EP2, &domain));
    assert!(matches!(result, Err(AttachError::ReservedInUse { endpoint: EP2, .. })));
    assert_eq!(requests, 0);
    // SAFETY: mapped above.
    unsafe { domain.unmap(AT, PAGE) }.unwrap();
    viommu.attach(EP2, &domain).unwrap();
    // SAFETY: refused before anything is sent.
    let refused = unsafe { domain.map_at(AT, memory.phys, PAGE, RW) };
    assert!(matches!(refused, Err(MapError::InUse(_))));
}

/// I5: fails when `reserve` takes only what is free: the rest would come back later, and be mapped.
#[test]
fn i05_addresses_that_are_taken_cannot_be_reserved_for_a_new_endpoint() {
    let machine = Machine::new(Config::default());
    let top = (1 << 39) - 1;
    with_region(&machine, EP2, top - 0x3fff, top);
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    // The address that always faults was taken from where the other endpoint has a region.
    assert!(endpoint.faulting_iova().get() > top - 0x3fff);
    let refused = viommu.attach(EP2, &domain);
    assert!(matches!(refused, Err(AttachError::ReservedInUse { endpoint: EP2, .. })));
    endpoint.close().unwrap();
    viommu.attach(EP2, &domain).unwrap();
    let memory = machine.memory(PAGE);
    for _ in 0..8 {
        // SAFETY: nobody but the test uses the memory.
        let iova = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
        assert!(iova.get() < top - 0x3fff);
    }
}

#[test]
fn a_domain_without_endpoint_maps_nothing() {
    let machine = Machine::new(Config::default());
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let memory = machine.memory(PAGE);
    // SAFETY: refused before anything is sent.
    let (result, requests, _) = machine.traffic(|| unsafe { domain.map_at(AT, memory.phys, PAGE, RW) });
    assert_eq!((result, requests), (Err(MapError::NoEndpoint), 0));
    // SAFETY: as above.
    let unmapped = unsafe { domain.unmap(AT, PAGE) };
    assert_eq!(unmapped, Err(UnmapError::NotMapped(AT)));
}

#[test]
fn more_domains_than_records() {
    let machine = Machine::new(Config::default());
    let options = virtio_iommu::Options { max_domains: 2, ..Machine::options() };
    let staged = machine.start_with(options).unwrap();
    let _domains = [(); 2].map(|()| staged.create_domain(DomainOptions::default()).unwrap());
    let third = staged.create_domain(DomainOptions::default());
    assert_eq!(third.err(), Some(DomainError::TooMany { limit: 2 }));
}

/// Fails when `begin_attach` lets another domain take over one that nobody holds but that has mappings.
#[test]
fn an_endpoint_whose_domain_was_let_go_of_takes_no_mappings_along() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, memory.phys, PAGE, RW) }.unwrap();
    drop(domain);
    let other = viommu.create_domain(DomainOptions::default()).unwrap();
    assert_eq!(viommu.attach(EP, &other), Err(AttachError::Busy(EP)));
    viommu.detach(EP).unwrap();
    viommu.attach(EP, &other).unwrap();
    assert!(!machine.reaches(EP, AT.get()));
    assert_eq!(other.mapping_count(), 0);
}

/// Fails when `revoke_if_empty` waits for an owner who is gone: number, addresses and memory would be lost.
#[test]
fn a_domain_that_was_let_go_of_gives_everything_back_with_its_last_endpoint() {
    for detach_first in [false, true] {
        let machine = Machine::new(Config { domain_range: 5..=5, ..Config::default() });
        let viommu = machine.bring_up();
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
        let (held, phys) = machine.lend(PAGE);
        let at = endpoint.adopt(held, virtio_iommu::Direction::Both).unwrap().iova().get();
        if detach_first {
            viommu.detach(EP).unwrap();
        }
        drop((endpoint, domain));
        assert!(detach_first || machine.reaches(EP, at) && !machine.is_lent_back(phys));
        if !detach_first {
            viommu.detach(EP).unwrap();
        }
        viommu.poll();
        assert!(!machine.reaches(EP, at) && machine.is_lent_back(phys));
        assert_eq!(viommu.create_domain(DomainOptions::default()).err(), None);
    }
}
