//! What several groups of cases use.

use qemu_tests::qemu::Version;
use qtest::{EDU, EDU2, Edu, HOST_BRIDGE, HostPlatform, Machine, Transfer};
use virtio_iommu::{
    CoherentMemory, DmaDevice, Domain, DomainOptions, Endpoint, EndpointId, EndpointOptions, Fault, Iova,
    Options, Viommu,
};
use virtio_iommu_model::Config;

pub(crate) const PAGE: u64 = 0x1000;
/// The endpoints that tests attach.
pub(crate) const ENDPOINTS: [EndpointId; 3] = [EDU, EDU2, HOST_BRIDGE];
/// What the device's buffer is filled with before it reads.
const FILLER: u8 = 0x5a;

/// The model's imitation of a version of QEMU.
///
/// Between the versions that were measured the line is where QEMU 9.0 changed the input range of q35, and 11
/// the inverted ranges.
pub(crate) fn imitation(version: Version) -> (Config, &'static str) {
    match version.major {
        ..=8 => (Config::qemu_7_2(), "QEMU 7.2"),
        9 | 10 => (Config::qemu_10(), "QEMU 10.0"),
        11.. => (Config::qemu_11_1(), "QEMU 11.1"),
    }
}

pub(crate) fn options() -> Options {
    Options { own_endpoint: Some(qtest::IOMMU), ..Options::default() }
}

/// Brings the driver up with these endpoints introduced, and closes the bypass.
pub(crate) fn bring_up(
    machine: &Machine,
    options: Options,
    endpoints: &[EndpointId],
) -> Viommu<HostPlatform> {
    let staged = Viommu::start(machine.transport(), machine.platform(), options).unwrap();
    for endpoint in endpoints {
        staged.introduce(*endpoint).unwrap();
    }
    staged.go_live().unwrap()
}

/// An endpoint in a domain, told to access what a test wants.
///
/// It has a page of its own, through which data gets into and out of the device.
pub(crate) struct Dma<'a> {
    edu: &'a Edu,
    pub(crate) endpoint: Endpoint<HostPlatform>,
    stage: CoherentMemory,
}

impl<'a> Dma<'a> {
    /// Opens the endpoint in a domain of its own.
    pub(crate) fn open(viommu: &Viommu<HostPlatform>, edu: &'a Edu, id: EndpointId) -> Self {
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        Self::open_in(viommu, &domain, edu, id, EndpointOptions::default())
    }

    pub(crate) fn open_in(
        viommu: &Viommu<HostPlatform>,
        domain: &Domain<HostPlatform>,
        edu: &'a Edu,
        id: EndpointId,
        options: EndpointOptions,
    ) -> Self {
        let endpoint = viommu.open(id, domain, options).unwrap();
        let stage = endpoint.alloc_coherent(PAGE as usize).unwrap();
        Self { edu, endpoint, stage }
    }

    fn fill_stage(&self, bytes: &[u8]) {
        // SAFETY: the device is idle, and nobody else has the memory.
        unsafe { self.stage.ptr().as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Lets the device write to `iova`, whether it may or not.
    pub(crate) fn write(&self, iova: Iova, bytes: &[u8]) {
        self.fill_stage(bytes);
        self.edu.transfer(Transfer::FromMemory, self.stage.iova().get(), 0, bytes.len());
        self.edu.transfer(Transfer::ToMemory, iova.get(), 0, bytes.len());
    }

    /// Lets the device read `len` bytes at `iova`, and gives what it got: `None` if nothing. Where a read
    /// fails QEMU gives the device zeros, so that memory that may be read has to hold something else.
    pub(crate) fn read(&self, iova: Iova, len: usize) -> Option<Vec<u8>> {
        let filler = vec![FILLER; len];
        self.fill_stage(&filler);
        self.edu.transfer(Transfer::FromMemory, self.stage.iova().get(), 0, len);
        self.edu.transfer(Transfer::FromMemory, iova.get(), 0, len);
        self.edu.transfer(Transfer::ToMemory, self.stage.iova().get(), 0, len);
        let mut bytes = vec![0; len];
        // SAFETY: the device is idle, and the memory is this long.
        unsafe { self.stage.ptr().as_ptr().copy_to_nonoverlapping(bytes.as_mut_ptr(), len) };
        assert_ne!(bytes, filler, "the device did not even try");
        (bytes != vec![0; len]).then_some(bytes)
    }

    /// Frees the page and detaches.
    pub(crate) fn close(self) {
        self.endpoint.free_coherent(self.stage).unwrap();
        self.edu.function.disable_bus_mastering();
        self.endpoint.close().unwrap();
    }
}

/// Takes in all faults that the device reported.
pub(crate) fn faults(viommu: &Viommu<HostPlatform>) -> Vec<Fault> {
    viommu.poll();
    std::iter::from_fn(|| viommu.next_fault()).collect()
}

/// Bytes that differ from those of other seeds.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}
