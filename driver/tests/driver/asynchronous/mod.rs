//! Operations as futures: polled by hand, woken, late, and dropped.
//!
//! Every waker here tells when it is cloned, called or dropped under the driver's lock (I11), which each test's
//! [`Machine`] looks at when it ends.

mod dropped;
mod ends;
mod kinds;
mod races;
mod twins;
mod wakes;

use std::sync::Mutex;

use virtio_iommu::{
    DmaDevice, DmaMemory, Domain, DomainOptions, Endpoint, EndpointId, EndpointOptions, HeldMemory,
    Interrupt, Iova, MapError, Options, PhysAddr, PhysSegment, Viommu,
};
use virtio_iommu_model::{Config, Endpoint as ModelEndpoint, Execute, Inject, Random, Release};

use crate::support::{ANYWHERE, EP, EP2, Machine, PAGE, RW, Task, TestPlatform};

/// An endpoint that the driver does not know yet.
const UNKNOWN: EndpointId = EndpointId::new(10);
const AT: Iova = Iova::new(0x10_0000);

/// [`EP`] open in a domain, and another domain that is empty.
struct Bench {
    // Before the machine, so that the last check sees what dropping them does.
    endpoint: Endpoint<TestPlatform>,
    domain: Domain<TestPlatform>,
    other: Domain<TestPlatform>,
    viommu: Viommu<TestPlatform>,
    memory: DmaMemory,
    lent: Mutex<Vec<PhysAddr>>,
    /// What the test has mapped in the other domain, to be unmapped at the end.
    kept: Mutex<Vec<(Iova, u64)>>,
    /// Blocks that the driver has while nothing is going on.
    at_rest: usize,
    machine: Machine,
}

impl Bench {
    fn new() -> Self {
        Self::on(Machine::new(Config::default()), Machine::options())
    }

    /// With room for this many requests at a time, and patience for many polls.
    fn with_slots(slots: u16) -> Self {
        let options = Options { queue_size: 2 * slots, max_polls: u64::MAX, ..Machine::options() };
        Self::on(Machine::new(Config::default()), options)
    }

    fn on(machine: Machine, options: Options) -> Self {
        machine.device().add_endpoint(ModelEndpoint::x86(UNKNOWN.get()));
        let staged = machine.start_with(options).unwrap();
        for endpoint in [EP, EP2] {
            staged.introduce(endpoint).unwrap();
        }
        let viommu = staged.go_live().unwrap();
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        let other = viommu.create_domain(DomainOptions::default()).unwrap();
        let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
        let memory = machine.memory(64 * PAGE);
        let at_rest = machine.outstanding();
        let (lent, kept) = Default::default();
        Self { endpoint, domain, other, viommu, memory, lent, kept, at_rest, machine }
    }

    fn phys(&self, page: u64) -> PhysAddr {
        PhysAddr::new(self.memory.phys.get() + page * PAGE)
    }

    /// Pages with gaps between them, so that each takes a request.
    fn segments(&self, count: u64) -> Vec<PhysSegment> {
        (0..count).map(|page| PhysSegment { phys: self.phys(2 * page), len: PAGE as usize }).collect()
    }

    fn lend(&self) -> HeldMemory {
        let (held, phys) = self.machine.lend(PAGE);
        self.lent.lock().unwrap().push(phys);
        held
    }

    fn all_back(&self) -> bool {
        self.lent.lock().unwrap().iter().all(|phys| self.machine.is_lent_back(*phys))
    }

    fn none_back(&self) -> bool {
        !self.lent.lock().unwrap().iter().any(|phys| self.machine.is_lent_back(*phys))
    }

    /// A raw mapping of one page, as a future.
    fn map_at(&self, iova: Iova) -> Task<'_, Result<(), MapError>> {
        // SAFETY: the test's own memory, which is never reused.
        Task::new(unsafe { self.domain.map_at_async(iova, self.phys(0), PAGE, RW) })
    }

    /// The same anywhere.
    fn map(&self) -> Task<'_, Result<Iova, MapError>> {
        // SAFETY: as above.
        Task::new(unsafe { self.domain.map_async(self.phys(0), PAGE, RW, ANYWHERE) })
    }

    /// From now on the device answers nothing before it is told to.
    fn hold_all(&self) {
        let hold = vec![Inject::Hold(Execute::AtRelease)];
        self.machine.device().inject.random = Some(Random::new(0, 1, hold));
    }

    fn hold_none(&self) {
        self.machine.device().inject.random = None;
    }

    /// The answers come, and the interrupt's handler has the driver look.
    fn serve(&self) {
        assert!(self.machine.release(Release::All) > 0, "nothing was asked");
        assert_eq!(self.viommu.on_interrupt(), Interrupt::Wake);
        self.viommu.poll();
    }

    fn interrupts(&self) -> u64 {
        self.machine.device().counters().interrupts[0]
    }

    fn reaches(&self, iova: Iova) -> bool {
        self.machine.reaches(EP, iova.get())
    }

    /// What a kernel does about futures that it dropped.
    fn recover(&self) {
        self.hold_none();
        self.machine.release(Release::All);
        self.viommu.poll();
        self.viommu.reclaim();
    }

    fn assert_no_doubt(&self) {
        let stats = self.viommu.stats();
        let doubt = (stats.abandoned_requests, stats.quarantined_mappings, stats.quarantined_bytes);
        assert_eq!(doubt, (0, 0, 0));
    }

    /// All memory is back, once (or lending would have failed), all addresses are free, and the driver knows where
    /// the endpoints are.
    fn assert_nothing_left(&self) {
        self.assert_no_doubt();
        self.assert_all_back();
        for endpoint in [EP2, UNKNOWN] {
            let attached = { self.machine.device().domain_of(endpoint.get()) };
            assert_eq!(self.viommu.detach(endpoint).is_ok(), attached.is_some(), "endpoint {endpoint}");
        }
        self.assert_addresses_free();
    }

    /// The same where the state of endpoints may be unknown to the driver until they are detached.
    fn assert_nothing_left_but_attachments(&self) {
        self.assert_no_doubt();
        self.assert_all_back();
        for endpoint in [EP2, UNKNOWN] {
            let _ = self.viommu.detach(endpoint);
            assert_eq!({ self.machine.device().domain_of(endpoint.get()) }, None, "endpoint {endpoint}");
        }
        self.assert_addresses_free();
    }

    fn assert_all_back(&self) {
        assert!(self.all_back(), "lent memory is kept");
        assert_eq!(self.machine.outstanding(), self.at_rest, "memory of the platform is kept");
        for (iova, len) in self.kept.lock().unwrap().drain(..) {
            // SAFETY: the test mapped it.
            unsafe { self.other.unmap(iova, len) }.unwrap();
        }
    }

    fn assert_addresses_free(&self) {
        self.assert_all_free(&self.domain, Some(self.endpoint.faulting_iova()));
        self.viommu.attach(EP2, &self.other).unwrap();
        self.assert_all_free(&self.other, None);
        self.viommu.detach(EP2).unwrap();
    }

    /// Maps all addresses that can be mapped, but the MSI window and one that faults.
    fn assert_all_free(&self, domain: &Domain<TestPlatform>, faulting: Option<Iova>) {
        let msi = (0xfee0_0000, 0xfeef_ffff);
        let mut holes = vec![msi];
        holes.extend(faulting.map(|iova| (iova.get(), iova.get() + PAGE - 1)));
        holes.sort_unstable();
        let mut start = 0;
        let mut gaps = Vec::new();
        for (first, last) in holes {
            gaps.push((start, first));
            start = last + 1;
        }
        gaps.push((start, 1 << 39));
        for (start, end) in gaps.into_iter().filter(|(start, end)| start < end) {
            let (at, len) = (Iova::new(start), end - start);
            // SAFETY: no endpoint does anything meanwhile.
            let mapped = unsafe { domain.map_at(at, PhysAddr::new(0), len, RW) };
            assert_eq!(mapped, Ok(()), "addresses are kept");
            // SAFETY: mapped just above.
            unsafe { domain.unmap(at, len) }.unwrap();
        }
        let id = domain.id().get();
        assert_eq!((domain.mapping_count(), self.machine.device().mappings(id).count()), (0, 0));
    }
}
