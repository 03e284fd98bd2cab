//! Endpoints that do not come back.

use std::ptr::NonNull;

use virtio_iommu::{
    AttachError, DetachError, Direction, DmaDevice, DomainOptions, EndpointId, EndpointOptions, Iova,
    MapError, RequestError, UnmapError, Unmapped,
};
use virtio_iommu_model::{Config, Endpoint, Execute, Inject, Release, ReservedRegion};

use super::{Bench, bench};
use crate::support::{EP, EP2, Machine, PAGE, RW};

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

/// What keeps the ATTACH of the second endpoint from being taken for done. Only the last is carried out.
const FAILURES: [Inject; 5] = [
    Inject::Refuse(3),
    Inject::Refuse(8),
    Inject::Unwritten,
    Inject::Drop(Execute::AtRelease),
    Inject::Status(0x80),
];

/// A bench whose recovery lost the second endpoint: PROBE and ATTACH of the first pass, and the second's PROBE.
fn lost_one(config: Config, failure: Inject) -> Bench {
    let bench = bench(config);
    bench.fail();
    bench.machine.inject([Inject::Pass, Inject::Pass, Inject::Pass, failure]);
    let recovered = bench.recover().unwrap();
    assert_eq!((recovered.endpoints, recovered.detached), (1, 0), "{failure:?}");
    assert!(
        matches!(recovered.lost[..], [(EP2, AttachError::Request { endpoint: EP2, .. })]),
        "{recovered:?}"
    );
    bench
}

/// Domains survive these devices' reset.
fn survivors() -> [Config; 3] {
    [Config::qemu_10(), Config::qemu_11_1(), Config::cloud_hypervisor()]
}

/// Fails when `end_revival` revokes all the same, leaves the records as they were, or `reclaim` takes what is stranded.
#[test]
fn i01_i03_one_endpoint_that_is_lost_keeps_all_of_its_domain_back() {
    for (config, failure) in
        survivors().into_iter().flat_map(|config| FAILURES.map(|it| (config.clone(), it)))
    {
        let mut bench = lost_one(config, failure);
        let at = bench.live_at();
        // The reason for it all: the lost endpoint still reaches what was mapped.
        let executed = matches!(failure, Inject::Status(_));
        assert_eq!(bench.machine.reaches(EP2, at), !executed, "{failure:?}");
        assert!(!bench.machine.reaches(EP, at));
        let free =
            |bench: &Bench| [bench.stuck, bench.live_phys].map(|phys| bench.machine.is_lent_back(phys));
        assert_eq!(free(&bench), [false, false]);
        assert_eq!(bench.viommu.stats().quarantined_mappings, 2);

        // No UNMAP is sent for them, which would say yes, since the new number has none.
        let (reclaimed, requests, _) = bench.machine.traffic(|| bench.viommu.reclaim());
        assert_eq!((reclaimed, requests), (0, 0));
        let live = bench.live.take().unwrap();
        let (unmapped, requests, _) = bench.machine.traffic(|| bench.endpoint.unmap(live));
        assert!(
            matches!(unmapped, Err(UnmapError::Request { error: RequestError::Reset, .. })),
            "{unmapped:?}"
        );
        assert_eq!((requests, free(&bench)), (0, [false, false]));
        for taken in [at, bench.stuck_at] {
            // SAFETY: refused before anything is sent.
            let reused = unsafe { bench.domain.map_at(Iova::new(taken), bench.stuck, PAGE, RW) };
            assert!(matches!(reused, Err(MapError::InUse(_))), "I2: {reused:?}");
        }
        // Others go on.
        let other = bench.endpoint.alloc_coherent(PAGE as usize).unwrap();
        assert!(bench.machine.reaches(EP, other.iova().get()));

        bench.fail();
        let recovered = bench.recover().unwrap();
        assert_eq!((recovered.endpoints, recovered.lost.len()), (2, 0), "{recovered:?}");
        assert_eq!(free(&bench), [true, true], "given up, and in quarantine");
        for id in [EP, EP2] {
            assert!(!bench.machine.reaches(id, at) && bench.machine.reaches(id, other.iova().get()));
        }
        bench.endpoint.free_coherent(other).unwrap();
        bench.assert_clean();
    }
}

/// Fails when what is stranded forgets that it has an owner: a later recovery gave his memory back under his hands.
#[test]
fn i01_what_was_live_is_live_again_once_all_endpoints_are_back() {
    for config in survivors() {
        let mut bench = lost_one(config, Inject::Drop(Execute::AtRelease));
        let recovered = bench.recover().unwrap();
        assert_eq!((recovered.endpoints, recovered.detached, recovered.lost.len()), (2, 0, 0));
        assert!(bench.machine.is_lent_back(bench.stuck) && !bench.machine.is_lent_back(bench.live_phys));
        bench.assert_works();
        assert!(bench.machine.is_lent_back(bench.live_phys));
    }
}

/// The same for the bounce pages of an endpoint, which it goes on using.
#[test]
fn i01_bounce_pages_outlive_two_recoveries() {
    let (machine, viommu, domain) = Machine::attached(Config::qemu_10());
    viommu.attach(EP2, &domain).unwrap();
    let options = EndpointOptions { bounce_bytes: 2 * PAGE as usize, ..EndpointOptions::default() };
    let endpoint = viommu.open(EP, &domain, options).unwrap();
    let blocks = machine.outstanding();
    machine.inject([Inject::Pass, Inject::Pass, Inject::Pass, Inject::Refuse(3)]);
    for lost in [1, 0] {
        machine.device().fail();
        // SAFETY: endpoints of a test do DMA only when it says so.
        assert_eq!(unsafe { viommu.recover() }.unwrap().lost.len(), lost);
        assert_eq!(machine.outstanding(), blocks);
    }
    let mut buffer = [1, 2, 3];
    let buffer = NonNull::from(&mut buffer[..]);
    // SAFETY: the buffer is the test's own.
    let at = unsafe { endpoint.share(buffer, Direction::ToDevice) }.unwrap();
    assert_eq!(machine.dma_read(EP, at.get(), 3).unwrap(), [1, 2, 3]);
    endpoint.close().unwrap();
}

/// Fails when what is stranded outlives the last endpoint of its domain, or is given back before.
#[test]
fn i01_what_is_stranded_is_free_when_the_last_endpoint_left() {
    let mut bench = lost_one(Config::qemu_10(), Inject::Status(0x80));
    bench.viommu.detach(EP).unwrap();
    assert!(!bench.machine.is_lent_back(bench.stuck));
    bench.viommu.detach(EP2).unwrap();
    assert!(bench.machine.is_lent_back(bench.stuck) && !bench.machine.is_lent_back(bench.live_phys));
    let live = bench.live.take().unwrap();
    let (unmapped, requests, _) = bench.machine.traffic(|| bench.endpoint.unmap(live));
    assert_eq!((unmapped, requests), (Ok(Unmapped::Now), 0));
    assert!(bench.machine.is_lent_back(bench.live_phys));
    bench.assert_clean();
}

/// Fails when a MAP of a replay that is not answered puts an owner's memory on the way back to the platform.
#[test]
fn i01_a_replay_without_answer_leaves_the_owner_his_memory() {
    for execute in [Execute::Now, Execute::AtRelease] {
        let mut bench = bench(Config::default());
        bench.fail();
        // PROBE and ATTACH, twice, and the MAP.
        bench.machine.inject([Inject::Pass; 4].into_iter().chain([Inject::Hold(execute)]));
        let recovered = bench.recover().unwrap();
        assert_eq!((recovered.endpoints, recovered.detached, recovered.lost.len()), (0, 2, 2));
        assert!(matches!(recovered.lost[0].1, AttachError::Replay { error: RequestError::TimedOut, .. }));
        assert!(bench.machine.is_lent_back(bench.stuck) && !bench.machine.is_lent_back(bench.live_phys));
        assert_eq!(bench.viommu.attach(EP, &bench.domain), Err(AttachError::DeadDomain), "it may come late");
        bench.machine.release(Release::All);
        bench.viommu.poll();
        bench.viommu.reclaim();
        assert!(!bench.machine.is_lent_back(bench.live_phys), "its owner did not unmap it");
        for id in [EP, EP2] {
            bench.viommu.attach(id, &bench.domain).unwrap();
        }
        bench.assert_works();
        assert!(bench.machine.is_lent_back(bench.live_phys));
    }
}

/// Fails when a recovery leaves it noted that its endpoints have to join the domain: the next renumbering of that
/// attached one that had left it since.
#[test]
fn an_endpoint_that_left_after_a_recovery_is_not_attached_again() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    viommu.attach(EP2, &domain).unwrap();
    machine.device().fail();
    // SAFETY: endpoints of a test do DMA only when it says so.
    assert_eq!(unsafe { viommu.recover() }.unwrap().endpoints, 2);
    viommu.detach(EP2).unwrap();
    let id = domain.id();
    machine.inject([Inject::Refuse(4)]);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(Iova::new(0x10_0000), machine.memory(PAGE).phys, PAGE, RW) }.unwrap();
    assert_ne!(domain.id(), id, "renumbered");
    assert_eq!(machine.device().domain_of(EP2.get()), None);
}

/// Fails when whoever is told to keep an endpoint out, after a recovery lost it, is overruled by the next one.
#[test]
fn an_endpoint_that_was_lost_and_detached_stays_out() {
    let bench = lost_one(Config::qemu_10(), Inject::Refuse(3));
    // It is still in the old domain, so the device refuses.
    bench.viommu.detach(EP2).unwrap_err();
    let recovered = bench.recover().unwrap();
    assert_eq!((recovered.endpoints, recovered.detached, recovered.lost.len()), (1, 1, 0));
    assert_eq!(bench.machine.device().domain_of(EP2.get()), None);
    assert!(bench.machine.reaches(EP, bench.live_at()) && bench.machine.is_lent_back(bench.stuck));
}

/// The number of a domain that may be left on the device. Fails when it is taken for free.
#[test]
fn i02_the_number_that_a_lost_endpoint_may_be_in_is_not_used_again() {
    let config = Config { domain_range: 1..=4, ..Config::qemu_10() };
    let bench = bench(config);
    let old = bench.domain.id();
    bench.fail();
    bench.machine.inject([Inject::Pass, Inject::Pass, Inject::Pass, Inject::Refuse(3)]);
    assert_eq!(bench.recover().unwrap().lost.len(), 1);
    assert_eq!(bench.machine.device().domain_of(EP2.get()), Some(old.get()));
    let others: Vec<_> =
        std::iter::from_fn(|| bench.viommu.create_domain(DomainOptions::default()).ok()).collect();
    assert_eq!(others.len(), 2);
    assert!(others.iter().all(|domain| domain.id() != old));
}

/// Fails when a recovery that went well leaves it noted where its endpoints were: one that may have left since, and was
/// told to, came back with the next.
#[test]
fn an_endpoint_that_may_have_left_after_a_recovery_is_not_brought_back() {
    let bench = bench(Config::qemu_10());
    assert_eq!(bench.recover().unwrap().endpoints, 2);
    bench.machine.inject([Inject::Drop(Execute::AtRelease)]);
    bench.viommu.detach(EP2).unwrap_err();
    let recovered = bench.recover().unwrap();
    assert_eq!((recovered.endpoints, recovered.detached, recovered.lost.len()), (1, 1, 0));
    assert_eq!(bench.machine.device().domain_of(EP2.get()), None);
}
