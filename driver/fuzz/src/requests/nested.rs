//! The inner side of nesting: the guest's device hands what it is asked to a nest, over a driver and a device that are well.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use virtio_iommu::contexts::nested::{Nest, NestError, SpaceId};
use virtio_iommu::{EndpointId, Iova, IovaRange, Options, PhysAddr, Prot, Viommu};
use virtio_iommu_model::{AccessKind, Backend, Config, Mapping, Status};

use super::account::Account;
use crate::kernel::Kernel;
use crate::session::ENDPOINTS;
use crate::truthful::world::{ModelTransport, Truthful};

/// Where the guest has memory, and how much.
pub const GUEST: u64 = 0x2000_0000;
const PAGE: u64 = 4096;
const GUEST_PAGES: u64 = 8;
/// Where that is in the machine's memory. No access is made, so that it need not exist.
const MEMORY: u64 = 1 << 40;
/// Pages that are tried: more than a request of a [`Form`](super::form::Form) maps.
const TRIED: u64 = 19;
const BLOCKS: usize = 256;

/// The machine around the guest.
pub struct Outer {
    world: Arc<Truthful>,
    behind: Arc<Behind>,
}

/// What carries requests out.
struct Behind {
    nest: Mutex<Nest<Kernel<Truthful>>>,
    memory: SpaceId,
    domains: Mutex<BTreeMap<u32, SpaceId>>,
}

impl Outer {
    /// A machine whose IOMMU works, and a guest with memory.
    pub fn new() -> Option<Self> {
        let world = Arc::new(Truthful::new(Config { log_limit: 0, ..Config::default() }));
        let kernel = Kernel::new(Arc::clone(&world), BLOCKS);
        let options = Options { queue_size: 16, max_polls: 6, ..Options::default() };
        let staged = Viommu::start(ModelTransport(Arc::clone(&world)), kernel, options).ok()?;
        for endpoint in ENDPOINTS {
            staged.introduce(endpoint).ok()?;
        }
        let mut nest = Nest::new(staged.go_live().ok()?);
        let memory = nest.add_root();
        let (iova, phys) = (Iova::new(GUEST), PhysAddr::new(MEMORY));
        // SAFETY: no access is made, so that the memory need not exist.
        unsafe { nest.map_memory(memory, iova, phys, PAGE * GUEST_PAGES, Prot::READ | Prot::WRITE) }.ok()?;
        let behind = Behind { nest: Mutex::new(nest), memory, domains: Mutex::default() };
        Some(Self { world, behind: Arc::new(behind) })
    }

    /// What the guest's device has behind it.
    pub fn backend(&self) -> Arc<dyn Backend> {
        Arc::clone(&self.behind) as Arc<dyn Backend>
    }

    /// Tries every page of every endpoint against what the guest was told.
    ///
    /// # Panics
    /// When one is reached that must not be, or is not that must, or when the driver broke a rule.
    pub fn check(&self, account: &Account) {
        self.world.check_rules();
        for endpoint in ENDPOINTS {
            for address in (0..TRIED).map(|page| PAGE * page) {
                for kind in [AccessKind::Read, AccessKind::Write] {
                    let inner = account.lookup(endpoint.get(), address, kind);
                    let offset = inner.and_then(|inner| inner.checked_sub(GUEST));
                    let expected = offset.filter(|offset| *offset < PAGE * GUEST_PAGES);
                    let found = self.world.reached(endpoint, None, address, kind);
                    let expected = expected.map(|offset| MEMORY + offset);
                    assert_eq!(found, expected, "{endpoint} at {address:#x}, {kind:?}");
                }
            }
        }
    }
}

impl Drop for Outer {
    fn drop(&mut self) {
        Kernel::<Truthful>::end();
    }
}

fn refused(error: NestError) -> Status {
    match error {
        NestError::Splits { .. } | NestError::Misaligned { .. } => Status::Range,
        NestError::Shadow { .. } => Status::NoMem,
        _ => Status::DevErr,
    }
}

impl Behind {
    fn with<R>(
        &self,
        work: impl FnOnce(&mut Nest<Kernel<Truthful>>) -> Result<R, NestError>,
    ) -> Result<R, Status> {
        let mut nest = self.nest.lock().map_err(|_| Status::DevErr)?;
        work(&mut nest).map_err(refused)
    }

    fn space(&self, domain: u32) -> Result<SpaceId, Status> {
        let domains = self.domains.lock().map_err(|_| Status::DevErr)?;
        domains.get(&domain).copied().ok_or(Status::NoEnt)
    }
}

impl Behind {
    /// With its last endpoint a domain goes, and what is mapped there.
    fn forget_empty(&self, space: SpaceId) -> Result<(), Status> {
        if self.with(|nest| nest.remove(space)).is_ok() {
            self.domains.lock().map_err(|_| Status::DevErr)?.retain(|_, other| *other != space);
        }
        Ok(())
    }
}

impl Backend for Behind {
    fn attach(&self, domain: u32, endpoint: u32) -> Result<(), Status> {
        let endpoint = EndpointId::new(endpoint);
        let (known, mut left) = (self.space(domain).ok(), None);
        let space = self.with(|nest| {
            let space = known.map_or_else(|| nest.add_child(self.memory), Ok)?;
            left = nest.space_of(endpoint).filter(|left| *left != space);
            if left.is_some() {
                nest.detach(endpoint)?;
            }
            nest.attach(endpoint, space).map(|()| space)
        })?;
        self.domains.lock().map_err(|_| Status::DevErr)?.insert(domain, space);
        left.map_or(Ok(()), |left| self.forget_empty(left))
    }

    fn detach(&self, domain: u32, endpoint: u32) -> Result<(), Status> {
        let space = self.space(domain)?;
        self.with(|nest| nest.detach(EndpointId::new(endpoint)))?;
        self.forget_empty(space)
    }

    fn map(&self, domain: u32, mapping: &Mapping) -> Result<(), Status> {
        let space = self.space(domain)?;
        let len = (mapping.virt_last - mapping.virt_first).checked_add(1).ok_or(Status::Range)?;
        let (iova, target) = (Iova::new(mapping.virt_first), Iova::new(mapping.phys_first));
        self.with(|nest| nest.map(space, iova, target, len, Prot::from_bits_retain(mapping.flags)))
    }

    fn unmap(&self, domain: u32, first: u64, last: u64) -> Result<(), Status> {
        let space = self.space(domain)?;
        let range = IovaRange::new(Iova::new(first), Iova::new(last)).ok_or(Status::Inval)?;
        self.with(|nest| nest.unmap(space, range))
    }
}
