//! The global bypass, and the end of the driver.

use virtio_iommu::{
    BypassError, DetachError, Direction, DmaDevice, DomainOptions, EndpointOptions, Features, Leave,
    MapError, Options, RequestError, ShutdownError, Unattached,
};
use virtio_iommu_model::{Config, Inject, feature};

use crate::support::{ANYWHERE, EP, EP2, Machine, PAGE, RW};

/// Fails when the bypass is not written, or what the driver knows of it does not follow.
#[test]
fn the_bypass_opens_and_closes() {
    let (machine, viommu) = Machine::live(Config::default());
    let phys = machine.memory(PAGE).phys.get();
    assert_eq!((viommu.read_bypass(), machine.reaches(EP, phys)), (Ok(0), false));
    // SAFETY: the endpoints do what the test says.
    unsafe { viommu.open_bypass() }.unwrap();
    assert_eq!((viommu.read_bypass(), machine.reaches(EP, phys)), (Ok(1), true));
    assert_eq!(viommu.unattached(), Unattached::Bypasses);
    viommu.close_bypass().unwrap();
    assert_eq!((viommu.unattached(), machine.reaches(EP, phys)), (Unattached::Blocked, false));
    let device = machine.device();
    let writes: Vec<_> =
        device.config_writes().map(|write| (write.offset, write.len_bytes, write.value)).collect();
    assert_eq!(writes, [(36, 1, 0), (36, 1, 1), (36, 1, 0)]);
    drop(device);
}

#[test]
fn without_the_feature_the_bypass_is_left_alone() {
    let config =
        Config { features: Config::default().features & !feature::BYPASS_CONFIG, ..Config::default() };
    let (machine, viommu) = Machine::live(config);
    assert_eq!(viommu.close_bypass(), Err(BypassError::NoFeature));
    assert_eq!(viommu.unattached(), Unattached::BlockedByDevice);
    assert_eq!(machine.device().config_writes().len(), 0);
}

/// Fails when shutting down detaches only some endpoints, forgets to restore the bypass, or loses the queues' memory.
#[test]
fn endpoints_are_left_as_asked() {
    for (leave, found, reaches) in [
        (Leave::Blocked, true, false),
        (Leave::AsFound, true, true),
        (Leave::Blocked, false, false),
        (Leave::AsFound, false, false),
    ] {
        let machine = Machine::new(Config { bypass: found, ..Config::default() });
        let phys = machine.memory(PAGE).phys.get();
        let viommu = machine.bring_up();
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        let bounce = EndpointOptions { bounce_bytes: 0x4000, ..EndpointOptions::default() };
        let endpoint = viommu.open(EP, &domain, bounce).unwrap();
        viommu.attach(EP2, &domain).unwrap();
        let memory = endpoint.alloc_coherent(1).unwrap();
        let at = memory.iova().get();
        // SAFETY: the endpoints do what the test says.
        unsafe { viommu.shutdown(leave) }.unwrap();
        let left = [EP, EP2].map(|endpoint| machine.device().domain_of(endpoint.get()));
        assert_eq!(left, [None, None]);
        assert!(found && leave == Leave::AsFound || !machine.reaches(EP, at));
        assert_eq!(machine.reaches(EP, phys), reaches, "{leave:?}, found {found}");
        // The domain died, so the memory is free without a request, which could not be sent any more.
        endpoint.free_coherent(memory).unwrap();
        // SAFETY: nothing is mapped.
        let map = unsafe { domain.map(machine.memory(PAGE).phys, PAGE, RW, ANYWHERE) };
        assert_eq!(map, Err(MapError::NotSent(RequestError::ShutDown)));
        drop(endpoint);
        drop(domain);
        drop(viommu);
        assert_eq!(
            machine.outstanding(),
            0,
            "the bounce pages of a view that was not closed, in a dead domain"
        );
    }
}

/// Fails when one refused DETACH ends the shutdown.
#[test]
fn an_endpoint_that_cannot_be_detached_is_reported_and_the_rest_is_done() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    viommu.attach(EP2, &domain).unwrap();
    machine.inject([Inject::Refuse(2)]);
    // SAFETY: the endpoints do what the test says.
    let error = unsafe { viommu.shutdown(Leave::Blocked) }.unwrap_err();
    let refused = RequestError::Refused(virtio_iommu::Status::Unsupp);
    assert_eq!(error, ShutdownError::Detach(DetachError::Request { endpoint: EP, error: refused }));
    assert_eq!(machine.device().status(), 0);
    let again = viommu.attach(EP2, &domain).unwrap_err();
    assert!(again.to_string().contains("shut down"), "{again}");
}

/// Fails when anything reaches the device after it was given up: a driver that comes after may have it.
#[test]
fn nothing_touches_the_device_after_the_shutdown() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    // SAFETY: the endpoints do what the test says.
    unsafe { viommu.shutdown(Leave::AsFound) }.unwrap();
    assert_eq!(viommu.unattached(), Unattached::Bypasses, "as it was found");
    assert_eq!(viommu.close_bypass(), Err(BypassError::ShutDown));
    // SAFETY: as above.
    unsafe { (viommu.open_bypass().unwrap_err(), viommu.shutdown(Leave::Blocked).unwrap()) };
    viommu.poll();
    viommu.reclaim();
    drop(domain);
    assert_eq!(machine.device().config_writes().len(), 2, "closed at the start, and opened again at the end");
}

/// Devices before virtio 1.2: the feature, once accepted, lets unattached endpoints pass for good. Fails when it is
/// accepted unasked, beside BYPASS_CONFIG, or when the driver takes such endpoints for blocked.
#[test]
fn legacy_bypass_is_what_the_embedder_makes_of_it() {
    let legacy = Config::default().features & !feature::BYPASS_CONFIG | feature::BYPASS;
    for (features, accept, passes) in [
        (legacy, false, false),
        (legacy, true, true),
        (legacy | feature::BYPASS_CONFIG, true, false),
        (legacy & !feature::BYPASS, true, false),
    ] {
        let machine = Machine::new(Config { features, ..Config::default() });
        let options = Options { accept_legacy_bypass: accept, ..Machine::options() };
        let staged = machine.start_with(options).unwrap();
        for endpoint in [EP, EP2] {
            staged.introduce(endpoint).unwrap();
        }
        let viommu = staged.go_live().unwrap();
        let phys = machine.memory(PAGE).phys.get();
        assert_eq!(viommu.features().contains(Features::BYPASS), passes);
        assert_eq!(machine.reaches(EP, phys), passes, "{features:#x}");
        assert_eq!(viommu.unattached() == Unattached::Bypasses, passes);
        // What is attached is confined even so, and what leaves passes again: nothing may be given back for that.
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
        assert!(!machine.reaches(EP, phys));
        let (held, lent) = machine.lend(PAGE);
        let mapping = endpoint.adopt(held, Direction::Both).unwrap();
        viommu.detach(EP).unwrap();
        assert!(!machine.is_lent_back(lent));
        assert_eq!(machine.reaches(EP, phys), passes);
        drop(mapping);
    }
}
