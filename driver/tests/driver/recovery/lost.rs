//! Endpoints that do not come back.

use virtio_iommu::{AttachError, DetachError, EndpointId};
use virtio_iommu_model::{Config, Endpoint, ReservedRegion};

use super::bench;
use crate::support::{EP, EP2, Machine, PAGE};

/// Fails when the NOENT of its PROBE leaves an endpoint in its domain: that is never whole again, and what was in
/// quarantine stays there.
#[test]
fn i12_an_endpoint_that_was_unplugged_keeps_nothing_back() {
    let bench = bench(Config::default());
    bench.fail();
    bench.machine.device().remove_endpoint(EP2.get());
    let recovered = bench.recover().unwrap();
    assert_eq!((recovered.endpoints, recovered.lost.as_slice()), (1, [].as_slice()));
    assert!(bench.machine.is_lent_back(bench.stuck));
    assert!(bench.machine.reaches(EP, bench.live_at()));
    assert_eq!(bench.viommu.detach(EP2), Err(DetachError::NotAttached(EP2)));
}

/// Fails when the second life's PROBE is not looked at, or its old list is dropped under the lock.
#[test]
fn what_is_reserved_now_and_mapped_already_keeps_an_endpoint_out() {
    let bench = bench(Config::default());
    bench.fail();
    let at = bench.live_at();
    let region = ReservedRegion::reserved(at, at + PAGE - 1);
    let endpoint = Endpoint { reserved: vec![region], ..Endpoint::new(EP2.get()) };
    bench.machine.device().add_endpoint(endpoint);
    let recovered = bench.recover().unwrap();
    assert_eq!(recovered.endpoints, 1);
    assert!(matches!(recovered.lost[..], [(EP2, AttachError::ReservedInUse { endpoint: EP2, .. })]));
    assert!(!bench.machine.is_lent_back(bench.stuck));
    assert_eq!(bench.machine.device().domain_of(EP2.get()), None);
}

/// Fails when an endpoint that is in no domain is not probed again: what it reserves may be another's.
#[test]
fn d07_endpoints_in_no_domain_are_probed_again() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let gone = EndpointId::new(10);
    machine.device().add_endpoint(Endpoint::new(gone.get()));
    viommu.attach(gone, &domain).unwrap();
    viommu.detach(gone).unwrap();
    machine.device().fail();
    let region = ReservedRegion::reserved(0x5000, 0x5fff);
    machine.device().add_endpoint(Endpoint { reserved: vec![region], ..Endpoint::new(EP2.get()) });
    machine.device().remove_endpoint(gone.get());
    // SAFETY: endpoints of a test do DMA only when it says so.
    let recovered = unsafe { viommu.recover() }.unwrap();
    assert_eq!((recovered.endpoints, recovered.detached, recovered.lost.len()), (1, 0, 0));
    let reserved = viommu.reserved_regions(EP2).unwrap();
    assert_eq!(reserved.len(), 1);
    assert_eq!(reserved[0].range.start().get(), 0x5000);
    assert_eq!(viommu.reserved_regions(gone), None, "unplugged");
    viommu.attach(EP2, &domain).unwrap();
    viommu.attach(gone, &domain).unwrap_err();
}
