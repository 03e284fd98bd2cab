//! Guests whose pages are smaller than what the IOMMU below can map.

use virtio_iommu::contexts::nested::NestError;
use virtio_iommu::{DomainOptions, Iova, MapError, PhysAddr, RequestError, Status};
use virtio_iommu_model::Config;

use super::GUEST;
use super::stacked::inside;
use crate::support::{EP, Machine, PAGE, RW, bytes_of};

/// The IOMMU's.
const OUTER: u64 = 16 * PAGE;

fn config(granule: u64) -> Config {
    Config { page_size_mask: !(granule - 1), ..Config::default() }
}

#[test]
fn an_inner_device_offers_the_outer_granule_and_works_at_every_level() {
    let (host, driver0) = Machine::live(config(OUTER));
    let memory = host.memory(4 * OUTER);
    let granule = driver0.granule();
    let (machine1, nest0, root0) = inside(&driver0, config(granule));
    assert_eq!((granule, nest0.lock().unwrap().granule()), (OUTER, OUTER));
    // SAFETY: the test's own memory, which outlives the device.
    unsafe { nest0.lock().unwrap().map_memory(root0, Iova::new(GUEST), memory.phys, 4 * OUTER, RW) }.unwrap();
    let driver1 = machine1.bring_up();
    let (machine2, nest1, root1) = inside(&driver1, config(driver1.granule()));
    // SAFETY: to guest 1 this is its own memory.
    unsafe {
        nest1.lock().unwrap().map_memory(root1, Iova::new(GUEST), PhysAddr::new(GUEST + OUTER), OUTER, RW)
    }
    .unwrap();
    let driver2 = machine2.bring_up();
    assert_eq!(driver2.granule(), OUTER);
    let domain = driver2.create_domain(DomainOptions::default()).unwrap();
    driver2.attach(EP, &domain).unwrap();
    // SAFETY: refused, since the device says that it cannot.
    let fine = unsafe { domain.map_at(Iova::new(PAGE), PhysAddr::new(GUEST), PAGE, RW) };
    assert_eq!(fine, Err(MapError::Misaligned { value: PAGE, granule: OUTER }));
    // SAFETY: guest 2's own memory.
    unsafe { domain.map_at(Iova::new(OUTER), PhysAddr::new(GUEST), OUTER, RW) }.unwrap();
    host.dma_write(EP, OUTER + 8, &[5]).unwrap();
    assert_eq!(bytes_of(&memory)[OUTER as usize + 8], 5);
    driver2.detach(EP).unwrap();
}

#[test]
fn a_device_that_offers_smaller_pages_than_there_are_answers_range() {
    let (host, driver0) = Machine::live(config(OUTER));
    let memory = host.memory(OUTER);
    let (machine1, nest0, root0) = inside(&driver0, config(PAGE));
    // SAFETY: the test's own memory, which outlives the device.
    let fine = unsafe { nest0.lock().unwrap().map_memory(root0, Iova::new(GUEST), memory.phys, PAGE, RW) };
    assert_eq!(fine, Err(NestError::Misaligned { value: PAGE, granule: OUTER }));
    // SAFETY: as above.
    unsafe { nest0.lock().unwrap().map_memory(root0, Iova::new(GUEST), memory.phys, OUTER, RW) }.unwrap();
    let driver1 = machine1.bring_up();
    let domain = driver1.create_domain(DomainOptions::default()).unwrap();
    driver1.attach(EP, &domain).unwrap();
    for (iova, phys, len) in [(OUTER, GUEST, PAGE), (PAGE, GUEST, OUTER), (OUTER, GUEST + PAGE, OUTER)] {
        // SAFETY: refused.
        let fine = unsafe { domain.map_at(Iova::new(iova), PhysAddr::new(phys), len, RW) };
        let refused = RequestError::Refused(Status::Range);
        assert!(matches!(fine, Err(MapError::Request { error, .. }) if error == refused), "{fine:?}");
        assert!(!host.reaches(EP, iova));
    }
    // SAFETY: the guest's own memory.
    unsafe { domain.map_at(Iova::new(OUTER), PhysAddr::new(GUEST), OUTER, RW) }.unwrap();
    assert!(host.reaches(EP, OUTER));
    driver1.detach(EP).unwrap();
}
