//! Identity: by the device's own flag, and by mappings.

use virtio_iommu::{
    DomainError, DomainKind, DomainOptions, Features, Iova, MapError, OpenError, PhysAddr, UnmapPolicy,
};
use virtio_iommu_model::{Config, Endpoint, Quirks, Request, ReservedRegion, feature};

use crate::support::{ANYWHERE, EP, EP2, Machine, PAGE, RW};

const IDENTITY: DomainOptions =
    DomainOptions { kind: DomainKind::Identity, mappings: 0, unmap: UnmapPolicy::Strict };

/// Fails when the flag is not sent for each endpoint (D-14), or sent for another kind of domain.
#[test]
fn an_identity_domain_lets_its_endpoints_reach_memory_by_physical_addresses() {
    let (machine, viommu) = Machine::live(Config::default());
    let domain = viommu.create_domain(IDENTITY).unwrap();
    let memory = machine.memory(PAGE);
    assert!(!machine.reaches(EP, memory.phys.get()));
    machine.device().clear_log();
    viommu.attach(EP, &domain).unwrap();
    viommu.attach(EP2, &domain).unwrap();
    let id = domain.id().get();
    let attach = |endpoint| Request::Attach { domain: id, endpoint, flags: 1, reserved: 0 };
    assert_eq!(machine.requests(), [attach(8), attach(9)]);
    assert!(machine.reaches(EP, memory.phys.get()) && machine.reaches(EP2, memory.phys.get()));
    viommu.detach(EP).unwrap();
    assert!(!machine.reaches(EP, memory.phys.get()) && machine.reaches(EP2, memory.phys.get()));
}

/// D-18, D-26: fails when a MAP or UNMAP is sent to an identity domain.
#[test]
fn nothing_is_mapped_in_an_identity_domain() {
    let (machine, viommu) = Machine::live(Config::default());
    let domain = viommu.create_domain(IDENTITY).unwrap();
    viommu.attach(EP, &domain).unwrap();
    let phys = machine.memory(PAGE).phys;
    let (results, requests, _) = machine.traffic(|| {
        // SAFETY: nothing is mapped.
        unsafe {
            let at = Iova::new(0x1000);
            let anywhere = domain.map(phys, PAGE, RW, ANYWHERE).map(|_| ());
            [anywhere, domain.map_at(at, phys, PAGE, RW), domain.map_identity(phys, PAGE, RW)]
        }
    });
    assert_eq!((results, requests), ([Err(MapError::IdentityDomain); 3], 0));
    // SAFETY: nothing is mapped.
    let (unmapped, requests, _) = machine.traffic(|| unsafe { domain.unmap(Iova::new(0x1000), PAGE) });
    assert!(unmapped.is_err() && requests == 0);
    let opened = viommu.open(EP2, &domain, Default::default());
    assert!(matches!(opened, Err(OpenError::Dma(_))), "a view needs addresses to give out");
    assert_eq!(machine.device().domain_of(EP2.get()), None);
}

/// D-15: fails when the kind is not checked against the features.
#[test]
fn without_the_feature_there_are_no_identity_domains() {
    let config =
        Config { features: Config::default().features & !feature::BYPASS_CONFIG, ..Config::default() };
    let (_machine, viommu) = Machine::live(config);
    assert!(!viommu.features().contains(Features::BYPASS_CONFIG));
    assert_eq!(viommu.create_domain(IDENTITY).unwrap_err(), DomainError::NoIdentity);
}

/// Fails when a reserved region is mapped, or a stretch between two of them is left out.
#[test]
fn identity_mappings_go_around_what_is_reserved() {
    let machine = Machine::new(Config { quirks: Quirks::default(), ..Config::default() });
    let reserved =
        [ReservedRegion::reserved(0x10_2800, 0x10_37ff), ReservedRegion::msi(0x10_6000, 0x10_6fff)];
    let endpoint = Endpoint { reserved: reserved.to_vec(), ..Endpoint::new(0x20) };
    machine.device().add_endpoint(endpoint);
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let id = virtio_iommu::EndpointId::new(0x20);
    viommu.attach(id, &domain).unwrap();
    machine.device().clear_log();
    // SAFETY: the model is not asked to reach there.
    unsafe { domain.map_identity(PhysAddr::new(0x10_0000), 0x8000, RW) }.unwrap();
    let mapped: Vec<_> = machine
        .requests()
        .iter()
        .map(|request| match request {
            Request::Map { virt_start, virt_end, phys_start, .. } => (*virt_start, *virt_end, *phys_start),
            other => panic!("{other:?}"),
        })
        .collect();
    let stretch = |start, last| (start, last, start);
    let expected =
        [stretch(0x10_0000, 0x10_1fff), stretch(0x10_4000, 0x10_5fff), stretch(0x10_7000, 0x10_7fff)];
    assert_eq!(mapped, expected);
}
