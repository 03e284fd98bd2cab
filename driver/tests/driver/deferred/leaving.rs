//! Endpoints that leave, and drivers that end, while something is deferred.

use super::*;
use crate::support::EP2;
use virtio_iommu::{AttachError, Leave, RequestError};
use virtio_iommu_model::{Execute, Inject, Release, feature};

/// Fails when `revoke` forgets what is deferred.
#[test]
fn the_end_of_a_domain_frees_what_waits_without_a_request() {
    for suspended in [false, true] {
        let opened = opened(LOOSE);
        let (mapping, phys) = opened.adopt();
        let (live, live_phys) = opened.adopt();
        let at = mapping.iova();
        defer(&opened, mapping);
        let ((), requests) = opened.requests_of(|| match suspended {
            true => opened.viommu.suspend(EP).unwrap(),
            false => opened.viommu.detach(EP).unwrap(),
        });
        assert!(matches!(requests[..], [Request::Detach { .. }]), "{requests:?}");
        assert!(opened.machine.is_lent_back(phys) && !opened.machine.is_lent_back(live_phys));
        assert_eq!(opened.domain.stats().deferred_mappings, 0);
        assert_eq!(opened.machine.traffic(|| opened.endpoint.flush()), (Ok(()), 0, 0));
        // Back again: what was live is replayed, and what was deferred is not.
        match suspended {
            true => opened.viommu.resume(EP).unwrap(),
            false => opened.viommu.attach(EP, &opened.domain).unwrap(),
        }
        assert!(opened.reaches(live.iova()) && !opened.reaches(at));
    }
}

#[test]
fn while_another_endpoint_stays_what_waits_goes_on_waiting() {
    let opened = opened(LOOSE);
    opened.viommu.attach(EP2, &opened.domain).unwrap();
    let (mapping, phys) = opened.adopt();
    let at = mapping.iova().get();
    defer(&opened, mapping);
    opened.viommu.detach(EP).unwrap();
    assert!(opened.machine.reaches(EP2, at) && !opened.machine.is_lent_back(phys));
    opened.endpoint.flush().unwrap();
    assert!(!opened.machine.reaches(EP2, at) && opened.machine.is_lent_back(phys));
}

/// Fails when `detach` does not flush where the bypass may be open: the end of the domain proves nothing there.
#[test]
fn where_endpoints_may_bypass_what_waits_is_unmapped_before_they_leave() {
    let features = Config::default().features & !feature::BYPASS_CONFIG;
    let config = Config { features, ..Config::default() };
    for refused in [false, true] {
        let opened = Opened::new(config.clone(), policy(LOOSE), EndpointOptions::default());
        let (mapping, phys) = opened.adopt();
        let at = mapping.iova();
        defer(&opened, mapping);
        opened.machine.inject(refused.then_some(Inject::Refuse(4)));
        let ((), requests) = opened.requests_of(|| opened.viommu.detach(EP).unwrap());
        assert!(matches!(requests[..], [Request::Unmap { .. }, Request::Detach { .. }]), "{requests:?}");
        assert_eq!(opened.machine.is_lent_back(phys), !refused);
        assert!(!opened.reaches(at));
    }
}

/// Fails when what is deferred is not in doubt in a domain that lost its endpoints where nothing blocks them.
#[test]
fn a_domain_that_may_have_what_waits_takes_no_endpoint() {
    let features = Config::default().features & !feature::BYPASS_CONFIG;
    let opened =
        Opened::new(Config { features, ..Config::default() }, policy(LOOSE), EndpointOptions::default());
    let (mapping, phys) = opened.adopt();
    opened.machine.inject([Inject::Hold(Execute::AtRelease)]);
    assert!(opened.viommu.detach(EP).is_err());
    defer(&opened, mapping);
    opened.machine.release(Release::All);
    opened.viommu.poll();
    assert_eq!(opened.viommu.attach(EP, &opened.domain), Err(AttachError::DeadDomain));
    assert!(!opened.machine.is_lent_back(phys));
}

#[test]
fn closing_and_shutting_down_give_everything_back() {
    for shutdown in [false, true] {
        let bounce = EndpointOptions { bounce_bytes: 0x4000, ..EndpointOptions::default() };
        let Opened { endpoint, domain, viommu, machine } =
            Opened::new(Config::default(), policy(LOOSE), bounce);
        let memory = endpoint.alloc_coherent(1).unwrap();
        let at = memory.iova().get();
        endpoint.free_coherent(memory).unwrap();
        assert!(machine.reaches(EP, at));
        match shutdown {
            // SAFETY: the endpoint does what the test says.
            true => unsafe { viommu.shutdown(Leave::Blocked) }.unwrap(),
            false => endpoint.close().unwrap(),
        }
        assert!(!machine.reaches(EP, at));
        if shutdown {
            drop((endpoint, domain));
            viommu.reclaim();
            drop(viommu);
            assert_eq!(machine.outstanding(), 0);
        } else {
            assert_eq!((machine.outstanding(), domain.mapping_count()), (2, 0));
        }
    }
}

/// A recovery brings back what is live, and gives back what waits when every endpoint came back. Fails when a flush
/// says after one that lost an endpoint that nothing is left.
#[test]
fn a_recovery_ends_what_waits() {
    for lost in [false, true] {
        let opened = opened(LOOSE);
        opened.viommu.attach(EP2, &opened.domain).unwrap();
        let (mapping, phys) = opened.adopt();
        let (live, _) = opened.adopt();
        let at = mapping.iova();
        defer(&opened, mapping);
        opened.machine.device().fail();
        if lost {
            // One of the two does not come back into its domain.
            opened.machine.inject([Inject::Pass, Inject::Pass, Inject::Pass, Inject::Refuse(3)]);
        }
        // SAFETY: the endpoints do what the test says.
        let recovered = unsafe { opened.viommu.recover() }.unwrap();
        assert_eq!(recovered.lost.len(), usize::from(lost), "{recovered:?}");
        assert_eq!(opened.machine.is_lent_back(phys), !lost);
        assert_eq!(opened.domain.stats().deferred_mappings, 0);
        if lost {
            // An endpoint may be where the device knows both still.
            assert_eq!(opened.viommu.stats().quarantined_mappings, 2);
            // So whoever asks is told, until another recovery brings both back.
            let flushed = opened.endpoint.flush();
            let reset = RequestError::Reset;
            assert!(
                matches!(flushed, Err(UnmapError::Request { error, .. }) if error == reset),
                "{flushed:?}"
            );
            opened.machine.device().fail();
            // SAFETY: as above.
            let recovered = unsafe { opened.viommu.recover() }.unwrap();
            assert_eq!((recovered.lost.len(), opened.endpoint.flush()), (0, Ok(())));
            assert!(opened.machine.is_lent_back(phys));
            continue;
        }
        assert!(opened.reaches(live.iova()) && !opened.reaches(at));
        let (mapping, phys) = opened.adopt();
        defer(&opened, mapping);
        assert_eq!((opened.endpoint.flush(), opened.machine.is_lent_back(phys)), (Ok(()), true));
    }
}

/// The last handle of a domain goes, its endpoint stays: what waits is not forgotten.
#[test]
fn a_domain_without_a_handle_is_flushed_by_its_age() {
    let Opened { endpoint, domain, viommu, machine } = opened(DeferredBounds { age_ns: 1_000_000, ..LOOSE });
    let (held, phys) = machine.lend(PAGE);
    let mapping = endpoint.adopt(held, Direction::Both).unwrap();
    let at = mapping.iova().get();
    assert_eq!(endpoint.unmap(mapping), Ok(Unmapped::AtFlush));
    drop((endpoint, domain));
    assert!(machine.reaches(EP, at) && !machine.is_lent_back(phys));
    machine.pass_time(1_000_001);
    viommu.poll();
    assert!(!machine.reaches(EP, at) && machine.is_lent_back(phys));
}
