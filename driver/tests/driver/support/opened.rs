//! One endpoint, open in a domain of its own.

use virtio_iommu::{
    Direction, DmaDevice, DmaMapping, Domain, DomainOptions, Endpoint, EndpointOptions, Options, PhysAddr,
    PhysSegment, Viommu,
};
use virtio_iommu_model::{Config, Request};

use super::{EP, Machine, PAGE, TestPlatform};

/// [`EP`] open in a domain, and the log empty.
pub(crate) struct Opened {
    // Before the machine, so that the last check sees what dropping them does.
    pub(crate) endpoint: Endpoint<TestPlatform>,
    pub(crate) domain: Domain<TestPlatform>,
    pub(crate) viommu: Viommu<TestPlatform>,
    pub(crate) machine: Machine,
}

impl Opened {
    pub(crate) fn new(config: Config, domain: DomainOptions, endpoint: EndpointOptions) -> Self {
        Self::on(Machine::new(config), Machine::options(), domain, endpoint)
    }

    pub(crate) fn on(
        machine: Machine,
        options: Options,
        domain: DomainOptions,
        endpoint: EndpointOptions,
    ) -> Self {
        let staged = machine.start_with(options).unwrap();
        staged.introduce(EP).unwrap();
        let viommu = staged.go_live().unwrap();
        let domain = viommu.create_domain(domain).unwrap();
        let endpoint = viommu.open(EP, &domain, endpoint).unwrap();
        machine.device().clear_log();
        Self { endpoint, domain, viommu, machine }
    }

    /// A page that the driver holds while it is mapped.
    pub(crate) fn adopt(&self) -> (DmaMapping, PhysAddr) {
        let (held, phys) = self.machine.lend(PAGE);
        (self.endpoint.adopt(held, Direction::Both).unwrap(), phys)
    }

    /// The MAP and UNMAP requests that the device saw while `work` ran.
    pub(crate) fn requests_of<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<Request>) {
        let before = self.machine.requests().len();
        let result = work();
        (result, self.machine.requests().split_off(before))
    }

    /// What the device has mapped: addresses in memory.
    pub(crate) fn mapped_on_device(&self) -> Vec<u64> {
        let device = self.machine.device();
        device.mappings(self.domain.id().get()).map(|mapping| mapping.phys_first).collect()
    }

    pub(crate) fn reaches(&self, iova: virtio_iommu::Iova) -> bool {
        self.machine.reaches(EP, iova.get())
    }
}

/// Pages of a block with gaps between them, so that each takes a request.
pub(crate) fn apart(base: PhysAddr, count: u64) -> Vec<PhysSegment> {
    let page = |index| PhysAddr::new(base.get() + 2 * index * PAGE);
    (0..count).map(|index| PhysSegment { phys: page(index), len: PAGE as usize }).collect()
}
