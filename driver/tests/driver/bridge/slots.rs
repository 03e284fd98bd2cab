//! Slots: picked while the kernel runs, for a class of devices, for buffers in place, and for another crate's `Hal`.

use super::*;
use crate::support::{EP2, fill};
use virtio_iommu::bridge::virtio_drivers::HalPlatform;
use virtio_iommu::{Direction, Iova, Platform, dma_slot, with_free_slot};

/// The other endpoint, in a domain of its own.
fn second(viommu: &Viommu<TestPlatform>) -> Endpoint<TestPlatform> {
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.open(EP2, &domain, EndpointOptions::default()).unwrap()
}

/// Fails when a slot that is taken is picked, or none is filled.
#[test]
fn devices_that_are_found_late_get_the_slots_that_are_free() {
    dma_slot!(First);
    dma_slot!(Second);
    let (_machine, viommu, endpoint) = machine();
    let other = second(&viommu);
    let third = viommu.open(EP2, other.domain(), EndpointOptions::default()).unwrap();
    let add = |endpoint: Endpoint<TestPlatform>| {
        let found = with_free_slot!(endpoint, [First, Second], S => {
            (std::any::type_name::<S>(), S::cell().get().unwrap().endpoint())
        });
        let found = found.map_err(|endpoint| endpoint.endpoint());
        found.map(|(name, endpoint)| (name.rsplit("::").next().unwrap().to_owned(), endpoint))
    };
    assert_eq!(add(endpoint).unwrap(), ("First".to_owned(), EP));
    assert_eq!(add(other).unwrap(), ("Second".to_owned(), EP2));
    assert_eq!(add(third), Err(EP2), "given back");
}

#[test]
fn a_slot_serves_a_class_of_devices_that_share_a_domain() {
    dma_slot!(Class);
    let (machine, viommu, endpoint) = machine();
    viommu.attach(EP2, endpoint.domain()).unwrap();
    assert!(Class::fill(endpoint).is_ok());
    let (ring, ptr) = IommuHal::<KernelHal, Class>::dma_alloc(1, BOTH);
    let buffer = [5; 16];
    let place = NonNull::from(&buffer[..]);
    // SAFETY: the test's own buffer.
    let shared = unsafe { IommuHal::<KernelHal, Class>::share(place, BufferDirection::DriverToDevice) };
    for member in [EP, EP2] {
        machine.dma_write(member, ring, &[1]).unwrap();
        assert_eq!(machine.dma_read(member, shared, 16).unwrap(), buffer);
    }
    // SAFETY: shared and allocated above.
    unsafe {
        IommuHal::<KernelHal, Class>::unshare(shared, place, BufferDirection::DriverToDevice);
        IommuHal::<KernelHal, Class>::dma_dealloc(ring, ptr, 1);
    }
    assert!(!machine.reaches(EP, ring) && !machine.reaches(EP2, ring));
}

/// Two pages of the machine's, as a buffer that somebody lends.
fn pages(machine: &Machine) -> (DmaMemory, NonNull<[u8]>) {
    let memory = machine.memory(2 * PAGE);
    fill(&memory, 7);
    (memory, NonNull::slice_from_raw_parts(memory.ptr, memory.len))
}

/// Fails when whole granules bounce, or when a part of one is mapped.
#[test]
fn whole_granules_go_in_place_where_that_was_asked_for() {
    dma_slot!(InPlace);
    let (machine, _viommu, endpoint) = machine();
    // SAFETY: the buffers are the test's own.
    assert!(unsafe { InPlace::cell().fill_in_place(endpoint) }.is_ok());
    let (memory, buffer) = pages(&machine);
    // SAFETY: a block of the machine's, here and below.
    let (iova, maps, kicks) =
        machine.traffic(|| unsafe { IommuHal::<KernelHal, InPlace>::share(buffer, BOTH) });
    assert_eq!((maps, kicks, calls()), (1, 1, (0, 0, 1, 0)), "a MAP of what the kernel's Hal shared");
    assert_ne!(iova, memory.phys.get());
    machine.dma_write(EP, iova + PAGE, &[9]).unwrap();
    // SAFETY: as above.
    unsafe {
        assert_eq!(memory.ptr.add(PAGE_SIZE).read_volatile(), 9, "before it was unshared");
        IommuHal::<KernelHal, InPlace>::unshare(iova, buffer, BOTH);
    }
    assert!(!machine.reaches(EP, iova));
    assert_eq!((calls(), InPlace::cell().unconfirmed()), ((0, 0, 1, 1), 0));

    let part = NonNull::slice_from_raw_parts(memory.ptr, PAGE_SIZE - 1);
    // SAFETY: as above.
    let (iova, requests, _) =
        machine.traffic(|| unsafe { IommuHal::<KernelHal, InPlace>::share(part, BOTH) });
    assert_eq!((requests, calls()), (0, (0, 0, 1, 1)), "through a bounce page");
    assert_eq!(machine.dma_read(EP, iova + PAGE - 2, 2).unwrap(), [7, 0], "nothing of its neighbour");
    // SAFETY: as above.
    unsafe { IommuHal::<KernelHal, InPlace>::unshare(iova, part, BOTH) };
    machine.give_back(memory);
}

#[test]
fn a_buffer_that_cannot_be_mapped_in_place_faults_and_one_that_stays_mapped_is_counted() {
    dma_slot!(Unlucky);
    let (machine, viommu, endpoint) = machine();
    let faulting = endpoint.faulting_iova().get();
    // SAFETY: the buffer is not reused before the quarantine is empty.
    assert!(unsafe { Unlucky::cell().fill_in_place(endpoint) }.is_ok());
    let (memory, buffer) = pages(&machine);
    machine.inject([Inject::Refuse(8)]);
    // SAFETY: a block of the machine's, here and below.
    unsafe {
        assert_eq!(IommuHal::<KernelHal, Unlucky>::share(buffer, BOTH), faulting);
        IommuHal::<KernelHal, Unlucky>::unshare(faulting, buffer, BOTH);
    }
    assert_eq!((Unlucky::cell().exhausted(), calls()), (1, (0, 0, 1, 1)));
    assert_eq!(Unlucky::cell().unconfirmed(), 0);

    // A MAP that may have come to something: the kernel's Hal still shares the buffer.
    machine.inject([Inject::Hold(Execute::Now)]);
    // SAFETY: as above.
    assert_eq!(unsafe { IommuHal::<KernelHal, Unlucky>::share(buffer, BOTH) }, faulting);
    assert_eq!((Unlucky::cell().unconfirmed(), calls()), (1, (0, 0, 2, 1)));
    machine.release(Release::All);
    viommu.poll();
    viommu.reclaim();

    // SAFETY: as above.
    let iova = unsafe { IommuHal::<KernelHal, Unlucky>::share(buffer, BOTH) };
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    // SAFETY: as above.
    unsafe { IommuHal::<KernelHal, Unlucky>::unshare(iova, buffer, BOTH) };
    assert_eq!(Unlucky::cell().unconfirmed(), 2);
    assert_eq!(calls(), (0, 0, 3, 1), "what the kernel's Hal shared is in use still");
    assert!(machine.reaches(EP, iova));
    machine.release(Release::All);
    viommu.poll();
    assert_eq!((machine.reaches(EP, iova), viommu.stats().quarantined_mappings), (false, 0));
    machine.give_back(memory);
}

/// Fails when the crate's pages of 4 KiB are taken to a granule of 64 KiB as they are.
#[test]
fn ring_memory_is_the_platforms_where_the_granule_is_larger_than_a_page() {
    dma_slot!(Large);
    let (machine, _viommu, endpoint) = machine_with(Config { page_size_mask: !0xffff, ..Config::default() });
    assert!(Large::fill(endpoint).is_ok());
    let before = machine.outstanding();
    let (iova, ptr) = IommuHal::<KernelHal, Large>::dma_alloc(2, BOTH);
    assert!(iova != 0 && iova.is_multiple_of(0x1_0000));
    machine.dma_write(EP, iova + PAGE, &[9]).unwrap();
    // SAFETY: inside of the two pages.
    assert_eq!(unsafe { ptr.add(PAGE_SIZE).read_volatile() }, 9);
    assert_eq!((machine.outstanding(), calls()), (before + 1, (0, 0, 0, 0)));
    // SAFETY: allocated above.
    assert_eq!(unsafe { IommuHal::<KernelHal, Large>::dma_dealloc(iova, ptr, 2) }, 0);
    assert_eq!((machine.outstanding(), machine.reaches(EP, iova)), (before, false));
    machine.limit_allocations(0);
    assert_eq!(IommuHal::<KernelHal, Large>::dma_alloc(1, BOTH).0, 0);
}

/// Fails when memory is not given back, or an alignment is promised that `Hal` has no word for.
#[test]
fn a_kernels_hal_is_all_that_the_driver_needs() {
    let machine = Arc::new(Machine::new(Config::default()));
    CALLS.with_borrow_mut(|calls| calls.machine = Some(Arc::clone(&machine)));
    let kernel = Kernel(machine);
    let options = Options { max_polls: 50, ..Machine::options() };
    let platform = HalPlatform::<KernelHal, WatchedLock>::new();
    assert!(platform.dma_alloc(1, 2 * PAGE_SIZE).is_none());
    let staged = Viommu::start(kernel.transport(), platform, options).unwrap();
    staged.introduce(EP).unwrap();
    let viommu = staged.go_live().unwrap();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    let queues = calls().0;
    let memory = endpoint.alloc_coherent(3 * PAGE_SIZE).unwrap();
    assert!(kernel.reaches(EP, memory.iova().get()));
    endpoint.free_coherent(memory).unwrap();
    assert_eq!(calls(), (queues + 1, 1, 0, 0));
    // Without a clock the polls are counted.
    kernel.inject([Inject::Hold(Execute::Now)]);
    assert!(endpoint.alloc_coherent(1).is_err());
    let timed = HalPlatform::<KernelHal, WatchedLock>::with_clock(|| 7);
    assert_eq!(timed.now_ns(), Some(7));
    kernel.release(Release::All);
    viommu.poll();
    // The driver's last handles give the queues' memory back to this thread's `Hal`.
    drop((endpoint, domain, viommu));
}

/// What a fork's `Hal` does, as the documentation of `bridge::slot` shows it.
#[test]
fn another_hal_takes_a_line_for_each_function() {
    dma_slot!(Fork);
    let (machine, _viommu, endpoint) = machine();
    let faulting = endpoint.faulting_iova();
    assert!(Fork::fill(endpoint).is_ok());
    let device = Fork::cell().get().unwrap();
    let ring = device.alloc_coherent(2 * PAGE_SIZE).map(|memory| memory.iova()).unwrap();
    machine.dma_write(EP, ring.get(), &[3]).unwrap();
    assert_eq!(device.translate(ring).map(|found| found.range.start()), Some(ring));

    let mut buffer = [1; 3 * PAGE_SIZE];
    let place = NonNull::from(&mut buffer[..]);
    // SAFETY: the test's own buffer, here and below.
    let shared = unsafe { device.share_or_fault(place, Direction::FromDevice) };
    machine.dma_write(EP, shared.get(), &[2]).unwrap();
    // SAFETY: as above.
    let none_left = unsafe { device.share_or_fault(place, Direction::ToDevice) };
    assert_eq!(none_left, faulting);
    // SAFETY: as above; the ring's handle was forgotten.
    unsafe {
        device.unshare(none_left, place, Direction::ToDevice);
        device.unshare(shared, place, Direction::FromDevice);
        device.unmap_at(ring).unwrap();
    }
    assert_eq!(buffer[..2], [2, 0]);
    assert_eq!((machine.reaches(EP, ring.get()), device.translate(ring)), (false, None));
    assert_eq!(device.translate(Iova::new(0)), None);
}
