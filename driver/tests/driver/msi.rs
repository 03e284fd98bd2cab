//! Doorbells of interrupt controllers: windows that pass untranslated, or mappings.

use virtio_iommu::{DmaDevice, DomainOptions, EndpointId, EndpointOptions, PhysAddr, Prot, UnmapError};
use virtio_iommu_model::{Config, Endpoint, Request, ReservedRegion, feature};

use crate::support::{EP, Machine, PAGE};

/// An endpoint without an MSI window.
const PLAIN: EndpointId = EndpointId::new(10);
/// Where QEMU's GICv3 ITS has its doorbell, not at the start of a page.
const DOORBELL: PhysAddr = PhysAddr::new(0x0809_0040);

fn open(features: u64, id: EndpointId) -> (Machine, virtio_iommu::Endpoint<crate::support::TestPlatform>) {
    let machine = Machine::new(Config { features, ..Config::default() });
    machine.device().add_endpoint(Endpoint::new(PLAIN.get()));
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let endpoint = viommu.open(id, &domain, EndpointOptions::default()).unwrap();
    machine.device().clear_log();
    (machine, endpoint)
}

/// Fails when `map_msi` does not look at the windows.
#[test]
fn in_a_window_the_doorbell_is_where_it_is() {
    let (machine, endpoint) = open(Config::default().features, EP);
    let doorbell = PhysAddr::new(0xfee0_1000);
    // SAFETY: there is no interrupt controller in a test.
    let msi = unsafe { endpoint.map_msi(doorbell) }.unwrap();
    assert_eq!((msi.iova().get(), msi.is_mapped()), (doorbell.get(), false));
    assert_eq!(machine.requests(), []);
    machine.dma_write(EP, msi.iova().get(), &[1, 2, 3, 4]).unwrap();
    assert_eq!(machine.device().take_doorbells().len(), 1);
    endpoint.unmap_msi(msi).unwrap();

    // The window's last bytes do not hold a doorbell that begins there.
    // SAFETY: as above.
    let edge = unsafe { endpoint.map_msi(PhysAddr::new(0xfeef_fffe)) }.unwrap();
    assert!(edge.is_mapped());
    endpoint.unmap_msi(edge).unwrap();
}

/// Fails when the mapping is not for writing only, lacks the MMIO flag, has it without the feature, or when the offset in
/// the granule is lost.
#[test]
fn d20_without_a_window_the_doorbell_is_mapped_as_what_it_is() {
    for (dropped, expected) in [(0, Prot::WRITE | Prot::MMIO), (feature::MMIO, Prot::WRITE)] {
        let features = Config::default().features & !dropped;
        let (machine, endpoint) = open(features, PLAIN);
        // SAFETY: as above.
        let msi = unsafe { endpoint.map_msi(DOORBELL) }.unwrap();
        assert!(msi.is_mapped());
        let at = msi.iova();
        let page = at.get() & !(PAGE - 1);
        let phys_start = DOORBELL.get() & !(PAGE - 1);
        let domain = endpoint.domain().id().get();
        let flags = expected.bits();
        let map = Request::Map { domain, virt_start: page, virt_end: page + PAGE - 1, phys_start, flags };
        assert_eq!(machine.requests(), [map]);
        assert_eq!(at.get() & (PAGE - 1), DOORBELL.get() & (PAGE - 1));
        endpoint.unmap_msi(msi).unwrap();
        assert_eq!(endpoint.domain().translate(at), None);
    }
}

#[test]
fn a_doorbell_of_another_domain_is_not_unmapped() {
    let (_machine, endpoint) = open(Config::default().features, PLAIN);
    let (_other, foreign) = open(Config::default().features, PLAIN);
    // SAFETY: as above.
    let msi = unsafe { endpoint.map_msi(DOORBELL) }.unwrap();
    let at = msi.iova();
    assert_eq!(foreign.unmap_msi(msi), Err(UnmapError::NotMapped(at)));
    assert!(endpoint.domain().translate(at).is_some());
}

/// Fails when any reserved region counts as a window: what lies in others faults.
#[test]
fn a_region_that_is_only_reserved_is_no_window() {
    let machine = Machine::new(Config::default());
    let mut plain = Endpoint::new(PLAIN.get());
    plain.reserved.push(ReservedRegion::reserved(0x0800_0000, 0x0fff_ffff));
    machine.device().add_endpoint(plain);
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let endpoint = viommu.open(PLAIN, &domain, EndpointOptions::default()).unwrap();
    // SAFETY: as above.
    let msi = unsafe { endpoint.map_msi(DOORBELL) }.unwrap();
    assert!(msi.is_mapped());
    endpoint.unmap_msi(msi).unwrap();
}
