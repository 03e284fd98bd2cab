//! What carries out for real endpoints what a guest asks of its virtio-iommu: spaces nested in the guest's memory.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use spin::Mutex;
use virtio_iommu::contexts::nested::{Nest, NestError, NestedFault, SpaceId};
use virtio_iommu::{EndpointId, Fault, FaultAccess, Iova, IovaRange, Platform, Prot, ReservedKind, Viommu};
use virtio_iommu_model::{
    AccessKind, Backend, Config, Device, Endpoint, Fault as Report, FaultReason, Mapping, ReservedRegion,
    Status,
};

use super::device::VirtualIommu;
use super::memory::Guest;
use super::work::Work;
use crate::iommu::KernelPlatform;

/// A virtio-iommu that is offered to a guest and stacked on another one: the machine's, or, where a guest has a guest of its
/// own, that guest's. Clones are handles to the same one.
#[derive(Clone)]
pub struct NestedIommu<P: Platform = KernelPlatform> {
    outer: Viommu<P>,
    device: VirtualIommu,
    behind: Arc<Behind<P>>,
}

/// A fault of an endpoint of the guest's, which was told to the guest.
#[derive(Clone, Copy, Debug)]
pub struct PassedOn {
    /// As the outer IOMMU reported it.
    pub fault: Fault,
    /// What it means at the guest's levels; `None` where by now every level allows the access, and nobody was told.
    pub nested: Option<NestedFault>,
}

impl<P: Platform> fmt::Debug for NestedIommu<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NestedIommu").field("device", &self.device).finish_non_exhaustive()
    }
}

impl<P: Platform> NestedIommu<P> {
    /// Offers a virtio-iommu to a guest, with these endpoints of the outer one behind it, whose reserved regions the guest
    /// is told. The guest's memory is a space without mappings as yet.
    pub fn new(outer: &Viommu<P>, guest: Guest, endpoints: &[EndpointId]) -> Self {
        let mut nest = Nest::new(outer.clone());
        let memory = nest.add_root();
        let range = outer.input_range();
        let mut device = Device::new(Config {
            // What the machine's cannot map the guest is not offered.
            page_size_mask: !(nest.granule() - 1),
            input_range: range.start().get()..=range.last().get(),
            ..Config::default()
        });
        let behind = Arc::new(Behind {
            nest: Mutex::new(nest),
            memory,
            domains: Mutex::new(BTreeMap::new()),
            mapping: Work::default(),
        });
        for endpoint in endpoints {
            let regions = outer.reserved_regions(*endpoint);
            let reserved = regions.iter().flat_map(|regions| regions.iter()).map(|region| {
                let (first, last) = (region.range.start().get(), region.range.last().get());
                match region.kind {
                    ReservedKind::Msi => ReservedRegion::msi(first, last),
                    ReservedKind::Reserved => ReservedRegion::reserved(first, last),
                }
            });
            let reserved = reserved.collect();
            device.add_endpoint(Endpoint { reserved, ..Endpoint::new(endpoint.get()) });
        }
        device.set_backend(behind.clone());
        Self { outer: outer.clone(), device: VirtualIommu::new(device, guest), behind }
    }

    /// The driver of the outer one.
    pub fn outer(&self) -> &Viommu<P> {
        &self.outer
    }

    /// The device, as the guest has it.
    pub fn device(&self) -> &VirtualIommu {
        &self.device
    }

    /// The space that is the guest's memory.
    pub fn memory(&self) -> SpaceId {
        self.behind.memory
    }

    /// The space of a domain of the guest's, while an endpoint is in it.
    pub fn space(&self, domain: u32) -> Option<SpaceId> {
        self.behind.domains.lock().get(&domain).copied()
    }

    /// The part of MAP and UNMAP that is carried out by the outer IOMMU.
    pub fn mapping(&self) -> &Work {
        &self.behind.mapping
    }

    /// What this kernel does to the guest's memory. `work` must not call the guest's driver.
    pub fn with_nest<R>(&self, work: impl FnOnce(&mut Nest<P>) -> R) -> R {
        work(&mut self.behind.nest.lock())
    }

    /// Takes the machine's faults and tells the guest, in the guest's own addresses. Those of others are among what is
    /// returned, with nobody told.
    pub fn pass_faults_on(&self) -> Vec<PassedOn> {
        self.outer.poll();
        let mut passed = Vec::new();
        while let Some(fault) = self.outer.next_fault() {
            let nested = self.with_nest(|nest| nest.explain(&fault));
            if let Some(nested) = nested {
                self.report(&fault, &nested);
            }
            passed.push(PassedOn { fault, nested });
        }
        passed
    }

    /// Endpoints have the same numbers in the guest.
    fn report(&self, fault: &Fault, nested: &NestedFault) {
        let kind = match nested.access {
            access if access.contains(FaultAccess::WRITE) => Some(AccessKind::Write),
            access if access.contains(FaultAccess::READ) => Some(AccessKind::Read),
            _ => None,
        };
        let report = Report {
            reason: FaultReason::Mapping,
            kind,
            endpoint: fault.endpoint.get(),
            address: Some(nested.seen.address.get()),
            pasid: None,
        };
        self.device.with(|device, guest| device.report_fault(guest, &report));
    }
}

/// The guest's memory, and its domains as children of that.
struct Behind<P: Platform> {
    nest: Mutex<Nest<P>>,
    memory: SpaceId,
    domains: Mutex<BTreeMap<u32, SpaceId>>,
    mapping: Work,
}

impl<P: Platform> Behind<P> {
    fn space(&self, domain: u32) -> Result<SpaceId, Status> {
        self.domains.lock().get(&domain).copied().ok_or(Status::NoEnt)
    }

    /// With its last endpoint a domain goes, and what is mapped there.
    fn forget_empty(&self, nest: &mut Nest<P>, space: SpaceId) {
        if nest.remove(space).is_ok() {
            self.domains.lock().retain(|_, other| *other != space);
        }
    }
}

/// What the guest is answered.
fn refused(error: NestError) -> Status {
    match error {
        NestError::Splits { .. } | NestError::Misaligned { .. } => Status::Range,
        NestError::Shadow { .. } => Status::NoMem,
        _ => Status::DevErr,
    }
}

impl<P: Platform> Backend for Behind<P> {
    fn attach(&self, domain: u32, endpoint: u32) -> Result<(), Status> {
        let mut nest = self.nest.lock();
        let known = self.space(domain).ok();
        let space = match known {
            Some(space) => space,
            None => nest.add_child(self.memory).map_err(refused)?,
        };
        let endpoint = EndpointId::new(endpoint);
        if let Some(left) = nest.space_of(endpoint).filter(|left| *left != space) {
            nest.detach(endpoint).map_err(refused)?;
            self.forget_empty(&mut nest, left);
        }
        nest.attach(endpoint, space).map_err(refused)?;
        self.domains.lock().insert(domain, space);
        Ok(())
    }

    fn detach(&self, domain: u32, endpoint: u32) -> Result<(), Status> {
        let mut nest = self.nest.lock();
        nest.detach(EndpointId::new(endpoint)).map_err(refused)?;
        let space = self.space(domain)?;
        self.forget_empty(&mut nest, space);
        Ok(())
    }

    fn map(&self, domain: u32, mapping: &Mapping) -> Result<(), Status> {
        self.mapping.count(|| {
            let space = self.space(domain)?;
            let len = (mapping.virt_last - mapping.virt_first).checked_add(1).ok_or(Status::Range)?;
            let prot = Prot::from_bits_retain(mapping.flags);
            let (iova, target) = (Iova::new(mapping.virt_first), Iova::new(mapping.phys_first));
            self.nest.lock().map(space, iova, target, len, prot).map_err(refused)
        })
    }

    fn unmap(&self, domain: u32, first: u64, last: u64) -> Result<(), Status> {
        self.mapping.count(|| {
            let space = self.space(domain)?;
            let range = IovaRange::new(Iova::new(first), Iova::new(last)).ok_or(Status::Inval)?;
            self.nest.lock().unmap(space, range).map_err(refused)
        })
    }
}
