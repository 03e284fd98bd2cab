//! The bridge for `virtio-drivers`, and its transports under this driver.

mod slots;

use std::cell::RefCell;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE};
use virtio_iommu::bridge::virtio_drivers::{IommuHal, PlatformTransport, Slot};
use virtio_iommu::transport::virtio_drivers::Adapter;
use virtio_iommu::{
    DmaDevice, DmaMemory, DomainOptions, Endpoint, EndpointOptions, Options, PhysAddr, Unattached, Viommu,
};
use virtio_iommu_model::{Config, Execute, Inject, Release, feature};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::support::{EP, Machine, ModelTransport, PAGE, TestPlatform, WatchedLock};

/// The kernel's own `Hal`, with what it did on this thread.
struct KernelHal;

#[derive(Default)]
struct Calls {
    /// Gives memory out, when there is some.
    machine: Option<Arc<Machine>>,
    allocated: usize,
    freed: usize,
    shared: usize,
    unshared: usize,
}

thread_local! {
    static CALLS: RefCell<Calls> = RefCell::default();
}

fn calls() -> (usize, usize, usize, usize) {
    CALLS.with_borrow(|calls| (calls.allocated, calls.freed, calls.shared, calls.unshared))
}

// SAFETY: fresh zeroed page-aligned blocks of the machine's memory, each handed out once.
unsafe impl Hal for KernelHal {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (u64, NonNull<u8>) {
        CALLS.with_borrow_mut(|calls| {
            let Some(machine) = &calls.machine else { return (0, NonNull::dangling()) };
            let memory = machine.memory((pages * PAGE_SIZE) as u64);
            calls.allocated += 1;
            (memory.phys.get(), memory.ptr)
        })
    }

    unsafe fn dma_dealloc(phys: u64, ptr: NonNull<u8>, pages: usize) -> i32 {
        CALLS.with_borrow_mut(|calls| {
            let memory = DmaMemory { phys: PhysAddr::new(phys), ptr, len: pages * PAGE_SIZE };
            calls.machine.as_ref().unwrap().give_back(memory);
            calls.freed += 1;
        });
        0
    }

    unsafe fn mmio_phys_to_virt(phys: u64, _size: usize) -> NonNull<u8> {
        NonNull::new(std::ptr::with_exposed_provenance_mut(phys as usize)).unwrap()
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> u64 {
        CALLS.with_borrow_mut(|calls| calls.shared += 1);
        buffer.addr().get() as u64
    }

    unsafe fn unshare(_phys: u64, _buffer: NonNull<[u8]>, _direction: BufferDirection) {
        CALLS.with_borrow_mut(|calls| calls.unshared += 1);
    }
}

/// Ends the kernel with the test, so that the machine's last check is part of it.
struct Kernel(Arc<Machine>);

impl Deref for Kernel {
    type Target = Machine;
    fn deref(&self) -> &Machine {
        &self.0
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        CALLS.take();
    }
}

/// A machine whose memory `KernelHal` gives out on this thread, with an endpoint and its bounce pages.
fn machine() -> (Kernel, Viommu<TestPlatform>, Endpoint<TestPlatform>) {
    machine_with(Config::default())
}

fn machine_with(config: Config) -> (Kernel, Viommu<TestPlatform>, Endpoint<TestPlatform>) {
    let (machine, viommu) = Machine::live(config);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let options = EndpointOptions { bounce_bytes: 4 * PAGE_SIZE, ..EndpointOptions::default() };
    let endpoint = viommu.open(EP, &domain, options).unwrap();
    let machine = Arc::new(machine);
    CALLS.with_borrow_mut(|calls| calls.machine = Some(Arc::clone(&machine)));
    (Kernel(machine), viommu, endpoint)
}

const BOTH: BufferDirection = BufferDirection::Both;

#[test]
fn ring_memory_is_the_kernels_mapped_for_the_device() {
    virtio_iommu::dma_slot!(Ring);
    let (machine, _viommu, endpoint) = machine();
    assert!(Ring::fill(endpoint).is_ok());
    let (iova, ptr) = IommuHal::<KernelHal, Ring>::dma_alloc(2, BOTH);
    assert_ne!(iova, ptr.addr().get() as u64, "the device's own address");
    machine.dma_write(EP, iova + PAGE, &[9]).unwrap();
    // SAFETY: inside of the two pages.
    assert_eq!(unsafe { ptr.add(PAGE_SIZE).read_volatile() }, 9);
    // SAFETY: allocated above.
    assert_eq!(unsafe { IommuHal::<KernelHal, Ring>::dma_dealloc(iova, ptr, 2) }, 0);
    assert!(!machine.reaches(EP, iova));
    assert_eq!(calls(), (1, 1, 0, 0));
}

/// Fails when `dma_dealloc` gives the memory back on an error.
#[test]
fn ring_memory_whose_unmapping_was_not_confirmed_is_kept() {
    virtio_iommu::dma_slot!(Kept);
    let (machine, viommu, endpoint) = machine();
    assert!(Kept::fill(endpoint).is_ok());
    let (iova, ptr) = IommuHal::<KernelHal, Kept>::dma_alloc(1, BOTH);
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    // SAFETY: allocated above.
    assert_eq!(unsafe { IommuHal::<KernelHal, Kept>::dma_dealloc(iova, ptr, 1) }, 0, "or the crate panics");
    assert!(machine.reaches(EP, iova) && calls() == (1, 0, 0, 0));
    machine.release(Release::All);
    viommu.poll();
    assert_eq!((machine.reaches(EP, iova), calls()), (false, (1, 1, 0, 0)));
}

#[test]
fn ring_memory_that_cannot_be_mapped_goes_back() {
    virtio_iommu::dma_slot!(Refused);
    let (machine, _viommu, endpoint) = machine();
    assert!(Refused::fill(endpoint).is_ok());
    machine.inject([Inject::Refuse(8)]);
    assert_eq!(IommuHal::<KernelHal, Refused>::dma_alloc(1, BOTH).0, 0);
    assert_eq!(calls(), (1, 1, 0, 0));
    // And memory that may be mapped does not.
    machine.inject([Inject::Hold(Execute::Now)]);
    assert_eq!(IommuHal::<KernelHal, Refused>::dma_alloc(1, BOTH).0, 0);
    assert_eq!(calls(), (2, 1, 0, 0));
    CALLS.with_borrow_mut(|calls| calls.machine = None);
    assert_eq!(IommuHal::<KernelHal, Refused>::dma_alloc(1, BOTH).0, 0, "the kernel has none");
}

#[test]
fn buffers_bounce_and_fault_when_the_pages_run_out() {
    virtio_iommu::dma_slot!(Bounce);
    let (machine, _viommu, endpoint) = machine();
    let faulting = endpoint.faulting_iova().get();
    assert!(Bounce::fill(endpoint).is_ok());
    let mut buffer = [7; 3 * PAGE_SIZE];
    let place = NonNull::from(&mut buffer[..]);
    // SAFETY: the test's own buffer, here and below.
    let iova = unsafe { IommuHal::<KernelHal, Bounce>::share(place, BOTH) };
    assert_eq!(machine.dma_read(EP, iova, 2).unwrap(), [7, 7]);
    machine.dma_write(EP, iova, &[8]).unwrap();
    let mut more = [1; 2 * PAGE_SIZE];
    let second = NonNull::from(&mut more[..]);
    // SAFETY: as above.
    assert_eq!(unsafe { IommuHal::<KernelHal, Bounce>::share(second, BOTH) }, faulting);
    assert_eq!(Bounce::cell().exhausted(), 1);
    assert!(!machine.reaches(EP, faulting));
    // SAFETY: as above.
    unsafe {
        IommuHal::<KernelHal, Bounce>::unshare(faulting, second, BOTH);
        IommuHal::<KernelHal, Bounce>::unshare(iova, place, BOTH);
    }
    assert_eq!((buffer[0], buffer[1], more[0]), (8, 7, 1));
    assert_eq!(calls(), (0, 0, 0, 0));
}

/// Fails when a slot can be filled after its driver began with the kernel's own addresses.
#[test]
fn a_slot_that_is_not_filled_is_the_kernels_own() {
    virtio_iommu::dma_slot!(Empty);
    let (_machine, _viommu, endpoint) = machine();
    let (phys, ptr) = IommuHal::<KernelHal, Empty>::dma_alloc(1, BOTH);
    assert_eq!(phys, ptr.addr().get() as u64);
    let mut byte = [1];
    let buffer = NonNull::from(&mut byte[..]);
    // SAFETY: the test's own buffer and page.
    unsafe {
        let shared = IommuHal::<KernelHal, Empty>::share(buffer, BOTH);
        assert_eq!(shared, buffer.addr().get() as u64);
        IommuHal::<KernelHal, Empty>::unshare(shared, buffer, BOTH);
        let registers = IommuHal::<KernelHal, Empty>::mmio_phys_to_virt(phys, 8);
        assert_eq!(registers, ptr);
        assert_eq!(IommuHal::<KernelHal, Empty>::dma_dealloc(phys, ptr, 1), 0);
    }
    assert_eq!(calls(), (1, 1, 1, 1));
    assert!(Empty::fill(endpoint).is_err(), "too late");
}

/// Fails when a driver's end leaves the endpoint with the slot, or a second life of the device finds the first one's.
#[test]
fn what_a_slot_was_filled_with_comes_back_after_its_driver() {
    virtio_iommu::dma_slot!(Twice);
    // SAFETY: never filled, so that nothing has a type.
    assert!(unsafe { Twice::cell().take::<Endpoint<TestPlatform>>() }.is_none());
    let (machine, viommu, mut endpoint) = machine();
    for life in 1..=2 {
        assert!(Twice::fill(endpoint).is_ok(), "life {life}");
        let (iova, ptr) = IommuHal::<KernelHal, Twice>::dma_alloc(1, BOTH);
        assert!(machine.reaches(EP, iova));
        // SAFETY: allocated above, and used by nobody.
        assert_eq!(unsafe { IommuHal::<KernelHal, Twice>::dma_dealloc(iova, ptr, 1) }, 0);
        // SAFETY: filled with this type, and no driver is left.
        endpoint = unsafe { Twice::cell().take() }.expect("filled above");
    }
    let domain = endpoint.domain().clone();
    endpoint.close().unwrap();
    assert_eq!((domain.mapping_count(), calls()), (0, (2, 2, 0, 0)));
    assert_eq!(viommu.stats().quarantined_mappings, 0);
}

#[test]
fn a_slot_is_filled_once() {
    virtio_iommu::dma_slot!(Once);
    let (_machine, viommu, endpoint) = machine();
    let second = viommu.open(EP, endpoint.domain(), EndpointOptions::default()).unwrap();
    assert!(Once::fill(endpoint).is_ok());
    let back = Once::fill(second).unwrap_err();
    assert_eq!(back.endpoint(), EP);
}

/// The model behind the other crate's transport.
struct Theirs {
    machine: Arc<Machine>,
    ours: ModelTransport,
}

impl Theirs {
    fn new(config: Config) -> Self {
        let machine = Arc::new(Machine::new(config));
        Self { ours: machine.transport(), machine }
    }
}

impl Transport for Theirs {
    fn device_type(&self) -> DeviceType {
        DeviceType::IOMMU
    }
    fn read_device_features(&mut self) -> u64 {
        self.machine.device().device_features()
    }
    fn write_driver_features(&mut self, driver_features: u64) {
        self.machine.device().set_driver_features(driver_features);
    }
    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.machine.device().queue_max_size(queue).into()
    }
    fn notify(&mut self, queue: u16) {
        use virtio_iommu::transport::Transport as _;
        // The adapter has a lock of its own around its doorbell, which is not the driver's.
        crate::support::outside(|| self.ours.notify(queue));
    }
    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.machine.device().read_status().into())
    }
    fn set_status(&mut self, status: DeviceStatus) {
        self.machine.device().set_status(status.bits() as u8);
    }
    fn set_guest_page_size(&mut self, _guest_page_size: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(&mut self, queue: u16, size: u32, descriptors: u64, driver_area: u64, device_area: u64) {
        let size = size as u16;
        self.machine.device().set_queue(queue, size, descriptors, driver_area, device_area).unwrap();
    }
    fn queue_unset(&mut self, _queue: u16) {}
    fn queue_used(&mut self, queue: u16) -> bool {
        self.machine.device().queue_enabled(queue)
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::from_bits_retain(self.machine.device().take_isr().into())
    }
    fn read_config_generation(&self) -> u32 {
        self.machine.device().config_generation()
    }
    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> virtio_drivers::Result<T> {
        let device = self.machine.device();
        let mut value = T::new_zeroed();
        if offset + value.as_mut_bytes().len() > device.config_len() {
            return Err(virtio_drivers::Error::ConfigSpaceTooSmall);
        }
        device.read_config(offset, value.as_mut_bytes());
        Ok(value)
    }
    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        crate::support::outside(|| self.machine.device().write_config(offset, value.as_bytes()));
        Ok(())
    }
}

fn adapter(theirs: Theirs) -> Adapter<WatchedLock, Theirs> {
    Adapter::new(theirs)
}

#[test]
fn the_driver_runs_over_their_transport() {
    let theirs = Theirs::new(Config::default());
    let machine = Arc::clone(&theirs.machine);
    let staged = Viommu::start(adapter(theirs), machine.platform(), Machine::options()).unwrap();
    staged.introduce(EP).unwrap();
    let viommu = staged.go_live().unwrap();
    assert_eq!(viommu.unattached(), Unattached::Blocked);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    let memory = endpoint.alloc_coherent(1).unwrap();
    assert!(machine.reaches(EP, memory.iova().get()));
    endpoint.free_coherent(memory).unwrap();
    assert!(!machine.reaches(EP, 0));
    assert_ne!(viommu.on_interrupt(), virtio_iommu::Interrupt::NotOurs);
    assert_eq!(viommu.poll(), 1);
}

#[test]
fn failures_pass_through_their_transport() {
    for (config, text) in [
        (Config { config_len: 20, ..Config::default() }, "configuration"),
        (Config { queue_sizes: [256, 0], ..Config::default() }, "queue 1"),
        (Config { features: feature::VERSION_1, ..Config::default() }, "MAP_UNMAP"),
    ] {
        let theirs = Theirs::new(config);
        let machine = Arc::clone(&theirs.machine);
        let options = Options { max_polls: 10, ..Machine::options() };
        let error = Viommu::start(adapter(theirs), machine.platform(), options).err().unwrap().to_string();
        assert!(error.contains(text), "{error}");
        assert_eq!(machine.outstanding(), 0);
    }
}

virtio_iommu::dma_slot!(NoIommu);

/// Negotiates as their drivers do, and returns what the device got.
fn negotiate<S: Slot>(transport: &mut PlatformTransport<Theirs, S>, wanted: u64) -> u64 {
    transport.set_status(DeviceStatus::empty());
    transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
    let offered = transport.read_device_features();
    assert_eq!(offered & feature::RING_EVENT_IDX, 0, "hidden");
    transport.write_driver_features(offered & wanted);
    transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK);
    offered & wanted
}

#[test]
fn access_platform_is_accepted_exactly_when_it_is_offered() {
    for offered in [0, feature::ACCESS_PLATFORM] {
        let features = Config::default().features | offered;
        let theirs = Theirs::new(Config { features, ..Config::default() });
        let machine = Arc::clone(&theirs.machine);
        let mut transport = PlatformTransport::<_, NoIommu>::new(theirs);
        let accepted = negotiate(&mut transport, feature::VERSION_1 | feature::RING_EVENT_IDX);
        assert_eq!(machine.device().negotiated_features(), accepted | offered);
        assert_eq!(accepted, feature::VERSION_1);
        assert_eq!((transport.max_queue_size(0), transport.max_queue_size(7)), (256, 0));
        assert_eq!(transport.device_type(), DeviceType::IOMMU);
        assert_eq!(transport.read_config_space::<u32>(32), Ok(512));
    }
}

/// Fails when `set_status` does not read FEATURES_OK back.
#[test]
fn refused_features_leave_no_queue_and_an_error() {
    let theirs = Theirs::new(Config::default());
    let machine = Arc::clone(&theirs.machine);
    machine.device().inject.refuse_features_ok = 1;
    let transport = PlatformTransport::<_, NoIommu>::new(theirs);
    // The unmodified driver's constructor returns an error.
    assert!(VirtIORng::<KernelHal, _>::new(transport).is_err());
    assert_ne!(machine.device().status() & virtio_iommu_model::device_status::FAILED, 0);
    assert_eq!(machine.device().status() & virtio_iommu_model::device_status::DRIVER_OK, 0);

    let mut transport = PlatformTransport::<_, NoIommu>::new(Theirs { ours: machine.transport(), machine });
    negotiate(&mut transport, feature::VERSION_1);
    assert_eq!(transport.max_queue_size(0), 256, "a reset and another try");
}

#[test]
fn a_device_behind_the_iommu_that_would_ignore_it_is_refused() {
    virtio_iommu::dma_slot!(Behind);
    let (_machine, _viommu, endpoint) = machine();
    assert!(Behind::fill(endpoint).is_ok());
    let theirs = Theirs::new(Config::default());
    let device = Arc::clone(&theirs.machine);
    let mut transport = PlatformTransport::<_, Behind>::new(theirs);
    negotiate(&mut transport, feature::VERSION_1);
    assert_eq!(transport.max_queue_size(0), 0);
    assert_ne!(device.device().status() & virtio_iommu_model::device_status::FAILED, 0);
    let features = Config::default().features | feature::ACCESS_PLATFORM;
    let mut transport =
        PlatformTransport::<_, Behind>::new(Theirs::new(Config { features, ..Config::default() }));
    negotiate(&mut transport, feature::VERSION_1);
    assert_eq!(transport.max_queue_size(0), 256);
}

#[test]
fn their_lock_is_free_after_each_call() {
    let adapter = adapter(Theirs::new(Config::default()));
    use virtio_iommu::transport::Transport as _;
    for _ in 0..2 {
        assert_eq!(adapter.max_queue_size(0), 256);
        assert!(adapter.read_config_u8(40).is_err() && adapter.read_config_u32(37).is_err());
        assert!(!adapter.acknowledge_interrupt().queue);
    }
}
