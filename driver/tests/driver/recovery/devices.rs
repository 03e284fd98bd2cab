//! One recovery on each kind of device.

use virtio_iommu::{
    AttachError, DomainKind, DomainOptions, EndpointId, Iova, Leave, Prot, RecoverError, Recovered,
    RequestError, StartError, Status, Unattached,
};
use virtio_iommu_model::{
    Config, Detach, Endpoint, Execute, Inject, Quirks, Request, device_status, feature,
};

use super::{Bench, bench, devices};
use crate::support::{EP, EP2, Machine, PAGE, RW};

const AT: Iova = Iova::new(0x10_0000);
const IDENTITY: EndpointId = EndpointId::new(10);
const READER: EndpointId = EndpointId::new(11);
const OUT: EndpointId = EndpointId::new(12);
const DOUBTFUL: EndpointId = EndpointId::new(13);

fn one_number() -> [Config; 2] {
    let range = 7..=7;
    [
        Config { domain_range: range.clone(), ..Config::default() },
        Config { domain_range: range, ..Config::qemu_10() },
    ]
}

/// Fails when only the first domain is revived, a domain's kind or a mapping's permission is forgotten, or an endpoint of
/// which nothing was known for certain stays in its domain.
#[test]
fn i12_each_endpoint_comes_back_to_where_it_was_for_certain() {
    for config in devices() {
        let ignores_permissions = config.quirks.permissions_ignored;
        let mut bench = bench(config);
        let Bench { machine, viommu, .. } = &bench;
        for id in [IDENTITY, READER, OUT, DOUBTFUL] {
            machine.device().add_endpoint(Endpoint::new(id.get()));
        }
        let identity = DomainOptions { kind: DomainKind::Identity, ..DomainOptions::default() };
        let identity = viommu.create_domain(identity).unwrap();
        let reader = viommu.create_domain(DomainOptions::default()).unwrap();
        viommu.attach(IDENTITY, &identity).unwrap();
        viommu.attach(READER, &reader).unwrap();
        let memory = machine.memory(2 * PAGE).phys;
        // SAFETY: nobody but the test uses the memory.
        unsafe { reader.map_at(AT, memory, 2 * PAGE, Prot::READ) }.unwrap();
        viommu.attach(OUT, &reader).unwrap();
        viommu.detach(OUT).unwrap();
        machine.inject([Inject::Pass, Inject::Drop(Execute::Now)]);
        viommu.attach(DOUBTFUL, &reader).unwrap_err();

        bench.fail();
        let recovered = bench.recover().unwrap();
        assert_eq!(recovered, Recovered { endpoints: 4, detached: 1, lost: vec![] });
        let Bench { machine, viommu, .. } = &bench;
        assert!(machine.reaches(IDENTITY, memory.get()), "by its physical address");
        assert!(machine.reaches(READER, AT.get() + 2 * PAGE - 1) && !machine.reaches(READER, memory.get()));
        assert_eq!(machine.dma_write(READER, AT.get(), &[1]).is_ok(), ignores_permissions);
        for id in [OUT, DOUBTFUL] {
            assert_eq!(machine.device().domain_of(id.get()), None);
            assert!(!machine.reaches(id, AT.get()) && !machine.reaches(id, memory.get()));
        }
        assert_eq!(machine.device().domains().count(), 3, "of the old ones none is left");
        viommu.attach(DOUBTFUL, &reader).unwrap();
        assert!(machine.reaches(DOUBTFUL, AT.get()));
        bench.assert_works();
    }
}

/// Fails when the bypass is written where it was not negotiated, or counts as closed.
#[test]
fn without_the_bypass_field_nothing_is_written() {
    let features = Config::default().features & !feature::BYPASS_CONFIG;
    let mut bench = bench(Config { features, ..Config::default() });
    bench.fail();
    assert_eq!(bench.recover().unwrap().endpoints, 2);
    assert_eq!(bench.machine.device().config_writes().len(), 0);
    assert_eq!(bench.viommu.unattached(), Unattached::BlockedByDevice);
    assert!(bench.machine.is_lent_back(bench.stuck));
    bench.assert_works();
}

/// Fails when a recovery closes a bypass that is still open on purpose.
#[test]
fn a_staged_iommu_stays_staged() {
    let machine = Machine::new(Config::qemu_10());
    let staged = machine.start().unwrap();
    let domain = staged.create_domain(DomainOptions::default()).unwrap();
    staged.attach(EP, &domain).unwrap();
    let memory = machine.memory(PAGE).phys;
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, memory, PAGE, RW) }.unwrap();
    machine.device().fail();
    // SAFETY: endpoints of a test do DMA only when it says so.
    assert_eq!(unsafe { staged.recover() }.unwrap().endpoints, 1);
    assert_eq!(staged.unattached(), Unattached::Bypasses);
    assert!(machine.reaches(EP, AT.get()) && machine.reaches(EP2, memory.get()));
    let viommu = staged.go_live().unwrap();
    assert!(machine.reaches(EP, AT.get()) && !machine.reaches(EP2, memory.get()));
    drop((domain, viommu));
}

/// crosvm's device cannot be started twice. Fails when the driver comes back to life all the same.
#[test]
fn a_device_with_one_life_stays_dead() {
    let (machine, viommu, domain) = Machine::attached(Config::crosvm());
    let memory = machine.memory(PAGE).phys;
    // SAFETY: nobody but the test uses the memory.
    let map = |page: u64| unsafe { domain.map_at(Iova::new(page * PAGE), memory, PAGE, RW) };
    map(1).unwrap();
    machine.device().fail();
    for _ in 0..2 {
        // SAFETY: endpoints of a test do DMA only when it says so.
        let error = unsafe { viommu.recover() }.unwrap_err();
        assert!(matches!(error, RecoverError::Start(StartError::FeaturesRefused { .. })), "{error}");
        assert_ne!(machine.device().status() & device_status::FAILED, 0);
        let (mapped, requests, _) = machine.traffic(|| map(2));
        assert!(mapped.is_err() && requests == 0);
    }
    // Nothing there can be detached, nor, before the reset, moved; what is parked is parked again.
    machine.device().change_config(|config| config.quirks.single_life = false);
    // SAFETY: as above.
    assert_eq!(unsafe { viommu.recover() }.unwrap().endpoints, 2);
    assert!(machine.reaches(EP, PAGE) && !machine.reaches(EP2, PAGE));
    let own = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP2, &own).unwrap();
}

fn unmovable(detach: Detach) -> Config {
    let quirks = Quirks { domains_survive_reset: true, move_unsupported: true, detach, ..Quirks::default() };
    Config { quirks, ..Config::default() }
}

/// Fails when `readmit` does not detach an endpoint that cannot be moved.
#[test]
fn endpoints_that_cannot_be_moved_are_detached_first() {
    for detach in [Detach::Strict, Detach::AlwaysOk, Detach::QemuForgetsEndpoint] {
        let mut bench = bench(unmovable(detach));
        bench.fail();
        assert_eq!(bench.recover().unwrap(), Recovered { endpoints: 2, detached: 0, lost: vec![] });
        assert!(bench.machine.is_lent_back(bench.stuck));
        bench.assert_works();
    }
}

/// Fails when an endpoint that cannot be got out of its domain is taken for readmitted.
#[test]
fn i01_endpoints_that_cannot_leave_keep_their_memory() {
    let bench = bench(unmovable(Detach::Strict));
    bench.machine.device().change_config(|config| config.quirks.detach = Detach::Unsupported);
    bench.fail();
    let recovered = bench.recover().unwrap();
    let error = RequestError::Refused(Status::Unsupp);
    let lost = [EP, EP2].map(|endpoint| (endpoint, AttachError::Request { endpoint, error }));
    assert_eq!(recovered, Recovered { endpoints: 0, detached: 0, lost: lost.to_vec() });
    assert!(bench.machine.reaches(EP, bench.stuck_at) && !bench.machine.is_lent_back(bench.stuck));
}

/// Fails when a domain without a fresh number is joined before all of its endpoints left it.
#[test]
fn i12_with_one_number_all_leave_before_the_first_returns() {
    for config in one_number() {
        let mut bench = bench(config);
        bench.fail();
        assert_eq!(bench.recover().unwrap(), Recovered { endpoints: 2, detached: 0, lost: vec![] });
        let requests = bench.machine.requests();
        let attached = requests.iter().position(|it| matches!(it, Request::Attach { .. })).unwrap();
        let left = requests.iter().rposition(|it| matches!(it, Request::Detach { .. })).unwrap();
        assert!(left < attached, "{requests:?}");
        assert!(bench.machine.is_lent_back(bench.stuck));
        bench.assert_works();
    }
}

/// Fails when an endpoint that did not leave is passed over in silence, or its domain counts as gone.
#[test]
fn i01_with_one_number_one_that_stays_keeps_everything_back() {
    let mut bench = bench(one_number()[1].clone());
    bench.fail();
    bench.machine.inject([Inject::Pass, Inject::Refuse(3)]);
    let recovered = bench.recover().unwrap();
    assert_eq!(recovered.endpoints, 1);
    assert!(matches!(recovered.lost[..], [(EP2, AttachError::Request { .. })]));
    assert!(bench.machine.reaches(EP2, bench.stuck_at) && !bench.machine.is_lent_back(bench.stuck));
    assert_eq!(bench.machine.traffic(|| bench.viommu.reclaim()).1, 0);
    assert_eq!(bench.recover().unwrap(), Recovered { endpoints: 2, detached: 0, lost: vec![] });
    assert!(bench.machine.is_lent_back(bench.stuck));
    bench.assert_works();
}

/// Fails when a retired number is taken for a fresh one.
#[test]
fn i12_a_retired_number_is_not_fresh() {
    let config = Config { domain_range: 7..=8, ..Config::qemu_10() };
    let (machine, viommu, domain) = Machine::attached(config);
    machine.inject([Inject::Refuse(4)]);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, machine.memory(PAGE).phys, PAGE, RW) }.unwrap();
    let id = domain.id();
    machine.device().fail();
    // SAFETY: endpoints of a test do DMA only when it says so.
    assert_eq!(unsafe { viommu.recover() }.unwrap().endpoints, 1);
    assert_eq!(domain.id(), id, "the other one is somebody else's");
    assert!(machine.reaches(EP, AT.get()));
}

/// A number that the device has mappings under. Fails when the endpoints stay in it.
#[test]
fn i12_a_number_that_is_not_fresh_is_left_again() {
    let mut bench = bench(Config::qemu_10());
    bench.fail();
    bench.machine.inject([Inject::Pass; 4].into_iter().chain([Inject::Refuse(4)]));
    let recovered = bench.recover().unwrap();
    assert_eq!((recovered.endpoints, recovered.detached, recovered.lost.len()), (0, 2, 2));
    assert!(matches!(
        recovered.lost[0].1,
        AttachError::Replay { error: RequestError::Refused(Status::Inval), .. }
    ));
    assert_eq!(bench.machine.device().domains().count(), 0);
    assert!(!bench.machine.is_lent_back(bench.live_phys));
    for id in [EP, EP2] {
        bench.viommu.attach(id, &bench.domain).unwrap();
    }
    bench.assert_works();
}

/// Fails when a domain that nobody holds, but that an endpoint uses, comes back without its mappings.
#[test]
fn a_domain_without_a_handle_comes_back_as_it_was() {
    for config in devices() {
        let (machine, viommu, domain) = Machine::attached(config);
        // SAFETY: nobody but the test uses the memory.
        unsafe { domain.map_at(AT, machine.memory(PAGE).phys, PAGE, RW) }.unwrap();
        drop(domain);
        for _ in 0..2 {
            machine.device().fail();
            // SAFETY: endpoints of a test do DMA only when it says so.
            assert_eq!(unsafe { viommu.recover() }.unwrap().endpoints, 1);
            assert!(machine.reaches(EP, AT.get()));
        }
        viommu.detach(EP).unwrap();
        assert!(!machine.reaches(EP, AT.get()));
        assert_eq!(viommu.stats().quarantined_mappings, 0);
    }
}

/// Fails when what a recovery made is not taken down like the rest.
#[test]
fn after_a_recovery_the_driver_ends_as_ever() {
    for config in devices() {
        let found = config.bypass;
        let bench = bench(config);
        bench.fail();
        bench.recover().unwrap();
        // SAFETY: endpoints of a test do DMA only when it says so.
        unsafe { bench.viommu.shutdown(Leave::AsFound) }.unwrap();
        let Bench { machine, endpoint, domain, viommu, live, .. } = bench;
        let device = machine.device();
        assert_eq!([EP, EP2].map(|id| device.domain_of(id.get())), [None, None]);
        assert_eq!((device.bypasses(EP.get()), device.status()), (found, 0));
        drop(device);
        assert!(live.is_some());
        drop((endpoint, domain, viommu));
        assert_eq!(machine.outstanding(), 0, "the queues' memory");
    }
}
