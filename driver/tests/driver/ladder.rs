//! The rungs that a kernel climbs from one domain for all devices to one for each, and bring-up in two phases: the modes
//! that the crate's README names.

use virtio_iommu::{
    DmaDevice, DmaMemory, Domain, DomainKind, DomainOptions, EndpointId, EndpointOptions, Iova, MapError,
    Unattached, Viommu,
};
use virtio_iommu_model::{Config, Endpoint, Request, feature};

use crate::support::{EP, EP2, Machine, PAGE, RW, TestPlatform, fill};

/// A device of another class.
const EP3: EndpointId = EndpointId::new(10);

/// Wide enough for the addresses of the host's memory, which is the machine's.
fn wide() -> Config {
    Config { input_range: 0..=(1 << 52) - 1, ..Config::default() }
}

fn live() -> (Machine, Viommu<TestPlatform>) {
    let machine = Machine::new(wide());
    machine.device().add_endpoint(Endpoint::x86(EP3.get()));
    let staged = machine.start().unwrap();
    for endpoint in [EP, EP2, EP3] {
        staged.introduce(endpoint).unwrap();
    }
    let viommu = staged.go_live().unwrap();
    (machine, viommu)
}

fn domain(viommu: &Viommu<TestPlatform>) -> Domain<TestPlatform> {
    viommu.create_domain(DomainOptions::default()).unwrap()
}

/// What a kernel's allocator does with each piece of DMA memory on the first rung.
fn open_to(all: &Domain<TestPlatform>, memory: &DmaMemory) -> Result<(), MapError> {
    // SAFETY: the machine's memory.
    unsafe { all.map_at(Iova::new(memory.phys.get()), memory.phys, memory.len as u64, RW) }
}

/// Fails when anything but DMA memory is in reach, or DMA memory is not where its address says.
#[test]
fn rung_1_one_domain_with_addresses_as_they_are() {
    let (machine, viommu) = live();
    let all = domain(&viommu);
    for endpoint in [EP, EP2, EP3] {
        viommu.attach(endpoint, &all).unwrap();
    }
    let (dma, kernel) = (machine.memory(2 * PAGE), machine.memory(PAGE));
    open_to(&all, &dma).unwrap();
    fill(&dma, 5);
    for endpoint in [EP, EP2, EP3] {
        assert_eq!(
            machine.dma_read(endpoint, dma.phys.get() + PAGE, 1).unwrap(),
            [5],
            "by its physical address"
        );
        assert!(!machine.reaches(endpoint, kernel.phys.get()), "and nothing else");
    }
    viommu.poll();
    let fault = viommu.next_fault().unwrap();
    assert_eq!((fault.endpoint, fault.address), (EP, Some(Iova::new(kernel.phys.get()))));

    // SAFETY: mapped above.
    unsafe { all.unmap(Iova::new(dma.phys.get()), 2 * PAGE) }.unwrap();
    assert!(!machine.reaches(EP, dma.phys.get()));
    // A whole range at once, for buffers that come from anywhere in it.
    // SAFETY: the machine's memory.
    unsafe { all.map_identity(dma.phys, dma.len as u64, RW) }.unwrap();
    assert!(machine.reaches(EP, dma.phys.get() + PAGE));

    // What cannot be at its own address is named.
    let msi = DmaMemory { phys: virtio_iommu::PhysAddr::new(0xfee0_0000), ..kernel };
    assert!(matches!(open_to(&all, &msi), Err(MapError::InUse(_))));
    let beyond = DmaMemory { phys: virtio_iommu::PhysAddr::new(1 << 52), ..kernel };
    assert!(matches!(open_to(&all, &beyond), Err(MapError::OutsideInputRange { .. })));
}

/// Fails when a class reaches what is another's.
#[test]
fn rung_2_a_domain_for_each_class() {
    let (machine, viommu) = live();
    let (disks, networks) = (domain(&viommu), domain(&viommu));
    let options = EndpointOptions { bounce_bytes: 4 * PAGE as usize, ..EndpointOptions::default() };
    let disk = viommu.open(EP, &disks, options).unwrap();
    viommu.attach(EP2, &disks).unwrap();
    let network = viommu.open(EP3, &networks, options).unwrap();
    let ring = disk.alloc_coherent(1).unwrap();
    let at = ring.iova().get();
    assert!(machine.reaches(EP, at) && machine.reaches(EP2, at), "one view serves the class");
    assert_ne!(ring.ptr().addr().get() as u64, at, "by an address that means nothing elsewhere");
    let other = network.alloc_coherent(1).unwrap();
    assert_eq!(other.iova(), ring.iova(), "as here, where it is other memory");
    machine.dma_write(EP3, at, &[9]).unwrap();
    assert_eq!(machine.dma_read(EP, at, 1).unwrap(), [0]);
    network.free_coherent(other).unwrap();
    assert!(!machine.reaches(EP3, at) && machine.reaches(EP2, at));
    disk.free_coherent(ring).unwrap();
}

/// Fails when a device that moves up takes its old reach along, or the others lose theirs.
#[test]
fn rung_3_a_domain_for_each_device_climbed_to_one_by_one() {
    let (machine, viommu) = live();
    let all = domain(&viommu);
    for endpoint in [EP, EP2, EP3] {
        viommu.attach(endpoint, &all).unwrap();
    }
    let shared = machine.memory(PAGE);
    open_to(&all, &shared).unwrap();
    let mut own = Vec::new();
    for (moved, endpoint) in [EP, EP2, EP3].into_iter().enumerate() {
        let domain = domain(&viommu);
        viommu.move_endpoint(endpoint, &domain).unwrap();
        let view = viommu.open(endpoint, &domain, EndpointOptions::default()).unwrap();
        own.push((view.alloc_coherent(1).unwrap(), view));
        for (number, other) in [EP, EP2, EP3].into_iter().enumerate() {
            assert_eq!(machine.reaches(other, shared.phys.get()), number > moved, "endpoint {other}");
        }
    }
    for (number, (memory, _)) in own.iter().enumerate() {
        machine.dma_write([EP, EP2, EP3][number], memory.iova().get(), &[number as u8 + 1]).unwrap();
    }
    for (number, (memory, _)) in own.iter().enumerate() {
        // SAFETY: coherent memory, which nobody writes to now.
        let first = unsafe { memory.ptr().read_volatile() };
        assert_eq!(first, number as u8 + 1, "its own memory, at the same address");
    }
    for (memory, view) in own {
        view.free_coherent(memory).unwrap();
    }
}

#[test]
fn staged_devices_go_on_and_live_ones_need_a_domain() {
    let machine = Machine::new(wide());
    let memory = machine.memory(PAGE);
    let reaches = || machine.reaches(EP, memory.phys.get());
    assert!(reaches(), "something started it before any driver came");
    let staged = machine.start().unwrap();
    assert!(reaches());
    assert_eq!(staged.unattached(), Unattached::Bypasses);
    staged.introduce(EP2).unwrap();
    assert!(reaches());
    let viommu = staged.go_live().unwrap();
    assert!(!reaches());
    assert_eq!(viommu.unattached(), Unattached::Blocked);
}

/// Fails when an endpoint that is attached without an introduction is put into a scratch domain, or detached.
#[test]
fn a_running_endpoint_is_adopted_by_one_request_without_a_gap() {
    for kind in [DomainKind::Identity, DomainKind::Translated] {
        let machine = Machine::new(wide());
        let memory = machine.memory(PAGE);
        let reaches = || machine.reaches(EP, memory.phys.get());
        let staged = machine.start().unwrap();
        let domain = staged.create_domain(DomainOptions { kind, ..DomainOptions::default() }).unwrap();
        if kind == DomainKind::Translated {
            // A quiet endpoint makes the domain exist, so that what the running one needs is there before it.
            staged.introduce(EP2).unwrap();
            staged.attach(EP2, &domain).unwrap();
            open_to(&domain, &memory).unwrap();
        }
        assert!(reaches());
        machine.device().clear_log();
        staged.attach(EP, &domain).unwrap();
        assert!(reaches());
        let requests = machine.requests();
        assert!(
            matches!(requests[..], [Request::Probe { .. }, Request::Attach { endpoint: 8, .. }]),
            "{requests:?}"
        );
        let _viommu = staged.go_live().unwrap();
        assert!(reaches());
        // The other reaches what the domain has, and nothing where there is none.
        assert_eq!(machine.reaches(EP2, memory.phys.get()), kind == DomainKind::Translated);
    }
}

#[test]
fn without_a_bypass_running_devices_are_cut_off_at_the_start() {
    let features = wide().features & !feature::BYPASS_CONFIG;
    let machine = Machine::new(Config { features, ..wide() });
    let memory = machine.memory(PAGE);
    let _ = machine.reaches(EP, memory.phys.get());
    let staged = machine.start().unwrap();
    assert!(!machine.reaches(EP, memory.phys.get()));
    let viommu = staged.go_live().unwrap();
    assert_eq!(viommu.unattached(), Unattached::BlockedByDevice);
    let domain = domain(&viommu);
    viommu.attach(EP, &domain).unwrap();
    open_to(&domain, &memory).unwrap();
    assert!(machine.reaches(EP, memory.phys.get()));
}
