//! Endpoints that fault too often, or that the embedder wants quiet.

use virtio_iommu::{
    AttachError, DetachError, Direction, DmaDevice, DomainOptions, EndpointOptions, FaultLimit, MapError,
    Options, RequestError, Status,
};
use virtio_iommu_model::{Config, Inject};

use crate::support::{ANYWHERE, EP, EP2, Machine, PAGE, RW};

/// Fails when `suspend` does not detach, `resume` replays nothing, or `begin_attach` takes a suspended endpoint.
#[test]
fn a_suspended_endpoint_reaches_nothing_and_comes_back_as_it_was() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    let at = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
    viommu.suspend(EP).unwrap();
    assert!(viommu.is_suspended(EP) && !machine.reaches(EP, at.get()));
    assert_eq!(machine.quiesced(), [EP]);
    // Its driver finds that it cannot map, and nobody attaches it again by accident.
    // SAFETY: as above.
    let refused = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) };
    assert_eq!(refused, Err(MapError::NoEndpoint));
    assert_eq!(viommu.attach(EP, &domain), Err(AttachError::Suspended(EP)));
    assert_eq!(viommu.suspend(EP), Err(DetachError::NotAttached(EP)));

    viommu.resume(EP).unwrap();
    assert!(!viommu.is_suspended(EP) && machine.reaches(EP, at.get()));
    viommu.resume(EP).unwrap();
    assert_eq!(machine.device().domain_of(EP.get()), Some(domain.id().get()));
}

/// Fails when the first step of attaching, which is for domains without mappings, takes a suspended endpoint.
#[test]
fn a_suspended_endpoint_is_not_attached_to_an_empty_domain() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let empty = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.suspend(EP).unwrap();
    for domain in [&domain, &empty] {
        let (attached, requests, _) = machine.traffic(|| viommu.attach(EP, domain));
        assert_eq!((attached, requests), (Err(AttachError::Suspended(EP)), 0));
    }
    viommu.resume(EP).unwrap();
    assert_eq!(machine.device().domain_of(EP.get()), Some(domain.id().get()));
}

/// Fails when a failed ATTACH ends the suspension, or a failed DETACH does not.
#[test]
fn what_fails_leaves_it_as_it_was() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let nomem = 8;
    machine.inject([Inject::Refuse(nomem)]);
    let error = RequestError::Refused(Status::NoMem);
    assert_eq!(viommu.suspend(EP), Err(DetachError::Request { endpoint: EP, error }));
    assert!(!viommu.is_suspended(EP));
    viommu.suspend(EP).unwrap();
    machine.inject([Inject::Refuse(nomem)]);
    assert_eq!(viommu.resume(EP), Err(AttachError::Request { endpoint: EP, error }));
    assert!(viommu.is_suspended(EP));
    // Detaching it for good takes no request.
    let (detached, requests, _) = machine.traffic(|| viommu.detach(EP));
    assert_eq!((detached, requests), (Ok(()), 0));
    viommu.attach(EP, &domain).unwrap();
}

#[test]
fn a_suspended_endpoint_whose_domain_is_gone_says_so() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    viommu.suspend(EP).unwrap();
    drop(domain);
    assert_eq!(viommu.resume(EP), Err(AttachError::DeadDomain));
    viommu.detach(EP).unwrap();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    assert!(machine.device().domain_of(EP.get()).is_some());
}

/// Fails when `take_fault` marks nobody, everybody, or at another count; or `poll` does not look.
#[test]
fn an_endpoint_that_faults_too_often_is_suspended_and_no_other() {
    for asked in [Some(5), None] {
        let machine = Machine::new(Config::default());
        let limit = FaultLimit { records: 3, window_ns: u64::MAX };
        let options = Options { suspend_after: asked, fault_limit: limit, ..Machine::options() };
        let viommu = machine.start_with(options).unwrap().go_live().unwrap();
        let views = [EP, EP2].map(|id| {
            let domain = viommu.create_domain(DomainOptions::default()).unwrap();
            viommu.open(id, &domain, EndpointOptions::default()).unwrap()
        });
        for _ in 0..4 {
            assert!(!machine.reaches(EP, PAGE) && !machine.reaches(EP2, PAGE));
            viommu.poll();
        }
        assert!(!viommu.is_suspended(EP) && machine.quiesced().is_empty());
        assert!(!machine.reaches(EP, PAGE));
        viommu.poll();
        assert_eq!(viommu.is_suspended(EP), asked.is_some());
        assert!(!viommu.is_suspended(EP2));
        assert_eq!(machine.quiesced().len(), usize::from(asked.is_some()));
        // The other one's driver notices nothing.
        let (held, _) = machine.lend(PAGE);
        let mapping = views[1].adopt(held, Direction::Both).unwrap();
        assert!(machine.reaches(EP2, mapping.iova().get()));
        views[1].unmap(mapping).unwrap();
        let [first, second] = views;
        first.close().unwrap();
        second.close().unwrap();
    }
}
