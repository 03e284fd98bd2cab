//! A device that stopped comes back, and nothing is given back too early meanwhile (I3, I12).

mod devices;
mod failures;
mod futures;
mod hooked;
mod lost;
mod order;
mod queues;

use virtio_iommu::{
    Direction, DmaDevice, DmaMapping, Domain, Endpoint, EndpointOptions, Iova, MapError, PhysAddr,
    RecoverError, RequestError, UnmapError, Viommu,
};
use virtio_iommu_model::{Config, Execute, Inject};

use crate::support::{EP, EP2, Machine, PAGE, RW, TestPlatform};

const AT: Iova = Iova::new(0x10_0000);

/// Two endpoints in one domain, with a mapping that is live and one that is in quarantine.
struct Bench {
    endpoint: Endpoint<TestPlatform>,
    domain: Domain<TestPlatform>,
    viommu: Viommu<TestPlatform>,
    live: Option<DmaMapping>,
    live_phys: PhysAddr,
    stuck: PhysAddr,
    stuck_at: u64,
    machine: Machine,
}

fn bench(config: Config) -> Bench {
    let (machine, viommu, domain) = Machine::attached(config);
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    Bench::furnish(machine, viommu, domain, endpoint)
}

impl Bench {
    fn furnish(
        machine: Machine,
        viommu: Viommu<TestPlatform>,
        domain: Domain<TestPlatform>,
        endpoint: Endpoint<TestPlatform>,
    ) -> Self {
        viommu.attach(EP2, &domain).unwrap();
        let (held, live_phys) = machine.lend(2 * PAGE);
        let live = endpoint.adopt(held, Direction::Both).unwrap();
        let (held, stuck) = machine.lend(PAGE);
        let mapping = endpoint.adopt(held, Direction::Both).unwrap();
        let stuck_at = mapping.iova().get();
        machine.inject([Inject::Drop(Execute::AtRelease)]);
        let lost = endpoint.unmap(mapping);
        assert!(matches!(lost, Err(UnmapError::Request { error: RequestError::TimedOut, .. })), "{lost:?}");
        assert!(!machine.is_lent_back(stuck));
        machine.device().clear_log();
        Self { endpoint, domain, viommu, live: Some(live), live_phys, stuck, stuck_at, machine }
    }

    fn fail(&self) {
        self.machine.device().fail();
    }

    fn recover(&self) -> Result<virtio_iommu::Recovered, RecoverError> {
        // SAFETY: endpoints of a test do DMA only when it says so.
        unsafe { self.viommu.recover() }
    }

    /// Where the live mapping is.
    fn live_at(&self) -> u64 {
        self.live.as_ref().unwrap().iova().get()
    }

    fn assert_works(&mut self) {
        let live = self.live.take().unwrap();
        for id in [EP, EP2] {
            self.machine.dma_write(id, live.iova().get(), &[7]).unwrap();
            self.machine.dma_write(id, live.iova().get() + 2 * PAGE - 2, &[7]).unwrap();
            assert!(!self.machine.reaches(id, self.stuck_at));
        }
        let at = live.iova().get();
        self.endpoint.unmap(live).unwrap();
        assert!(!self.machine.reaches(EP, at));
        let mapping = self.endpoint.alloc_coherent(PAGE as usize).unwrap();
        assert!(self.machine.reaches(EP, mapping.iova().get()));
        self.endpoint.free_coherent(mapping).unwrap();
        self.assert_clean();
    }

    /// Nothing is mapped, and nothing in doubt.
    fn assert_clean(&self) {
        let stats = self.viommu.stats();
        assert_eq!((stats.abandoned_requests, stats.quarantined_mappings), (0, 0));
        assert_eq!((self.domain.mapping_count(), self.domain.stats().mapped_bytes), (0, 0));
    }
}

fn devices() -> [Config; 5] {
    [
        Config::default(),
        Config::qemu_7_2(),
        Config::qemu_10(),
        Config::qemu_11_1(),
        Config::cloud_hypervisor(),
    ]
}

/// Fails when `end_revival` revokes nothing, `revive` replays nothing, or the bypass is not closed again.
#[test]
fn i03_i12_after_a_reset_everything_is_where_it_was() {
    for config in devices() {
        let mut bench = bench(config.clone());
        let outside = bench.machine.memory(PAGE).phys.get();
        bench.fail();
        // SAFETY: nobody but the test uses the memory.
        let refused = unsafe { bench.domain.map_at(AT, PhysAddr::new(outside), PAGE, RW) };
        assert!(
            matches!(refused, Err(MapError::Quarantined { error: RequestError::NeedsReset, .. })),
            "{refused:?}"
        );
        let recovered = bench.recover().unwrap();
        assert_eq!((recovered.endpoints, recovered.detached), (2, 0));
        assert_eq!(recovered.lost, []);
        assert!(bench.machine.is_lent_back(bench.stuck));
        assert!(!bench.machine.reaches(EP, outside));
        bench.assert_works();
    }
}
