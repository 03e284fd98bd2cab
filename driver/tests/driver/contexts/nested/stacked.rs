//! A virtio-iommu on a virtio-iommu on a virtio-iommu: each guest's driver drives a model whose backend is a nest over the
//! driver of the guest around it. Real accesses go through the outermost device alone.
//!
//! ```text
//!   guest 2   driver 2 --rings--> model 2 --'
//!   guest 1   nest 1, over driver 1 --rings--> model 1 --'
//!   host      nest 0, over driver 0 --rings--> model 0 <--- accesses of the endpoint
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use virtio_iommu::contexts::nested::{Merging, Nest, NestError, SpaceId, Why};
use virtio_iommu::{DomainOptions, EndpointId, Fault, FaultAccess, Iova, IovaRange, PhysAddr, Prot, Viommu};
use virtio_iommu_model::{
    AccessKind, Backend, Config, Fault as Reported, FaultReason, Inject, Mapping, Status,
};

use super::GUEST;
use crate::support::{EP, Machine, PAGE, RW, TestPlatform, bytes_of};

pub(super) type SharedNest = Arc<Mutex<Nest<TestPlatform>>>;

/// A guest's IOMMU: its domains are children of the guest's memory.
struct Behind {
    nest: SharedNest,
    memory: SpaceId,
    domains: Mutex<BTreeMap<u32, SpaceId>>,
}

impl Behind {
    fn space(&self, domain: u32) -> Result<SpaceId, Status> {
        self.domains.lock().unwrap().get(&domain).copied().ok_or(Status::NoEnt)
    }
}

fn refused(error: NestError) -> Status {
    match error {
        NestError::Splits { .. } | NestError::Misaligned { .. } => Status::Range,
        NestError::Shadow { .. } => Status::NoMem,
        _ => Status::DevErr,
    }
}

impl Backend for Behind {
    fn attach(&self, domain: u32, endpoint: u32) -> Result<(), Status> {
        let (mut nest, mut domains) = (self.nest.lock().unwrap(), self.domains.lock().unwrap());
        let space = match domains.get(&domain) {
            Some(space) => *space,
            None => nest.add_child(self.memory).map_err(refused)?,
        };
        domains.insert(domain, space);
        let endpoint = EndpointId::new(endpoint);
        if let Some(left) = nest.space_of(endpoint).filter(|left| *left != space) {
            nest.detach(endpoint).map_err(refused)?;
            // With the last endpoint the domain goes.
            if nest.remove(left).is_ok() {
                domains.retain(|_, other| *other != left);
            }
        }
        nest.attach(endpoint, space).map_err(refused)
    }

    fn detach(&self, domain: u32, endpoint: u32) -> Result<(), Status> {
        let mut nest = self.nest.lock().unwrap();
        nest.detach(EndpointId::new(endpoint)).map_err(refused)?;
        // With the last endpoint the domain goes.
        let space = self.space(domain)?;
        if nest.remove(space).is_ok() {
            self.domains.lock().unwrap().remove(&domain);
        }
        Ok(())
    }

    fn map(&self, domain: u32, mapping: &Mapping) -> Result<(), Status> {
        let len = mapping.virt_last - mapping.virt_first + 1;
        let prot = Prot::from_bits_retain(mapping.flags);
        let (iova, target) = (Iova::new(mapping.virt_first), Iova::new(mapping.phys_first));
        let space = self.space(domain)?;
        self.nest.lock().unwrap().map(space, iova, target, len, prot).map_err(refused)
    }

    fn unmap(&self, domain: u32, first: u64, last: u64) -> Result<(), Status> {
        let space = self.space(domain)?;
        let range = IovaRange::new(Iova::new(first), Iova::new(last)).ok_or(Status::Inval)?;
        self.nest.lock().unwrap().unmap(space, range).map_err(refused)
    }
}

/// A machine around which another driver is: its device's backend is a nest over that.
pub(super) fn inside(outer: &Viommu<TestPlatform>, config: Config) -> (Machine, SharedNest, SpaceId) {
    let mut nest = Nest::new(outer.clone());
    let memory = nest.add_root();
    let nest = Arc::new(Mutex::new(nest));
    let machine = Machine::new(config);
    let behind = Behind { nest: Arc::clone(&nest), memory, domains: Mutex::default() };
    machine.device().set_backend(Arc::new(behind));
    (machine, nest, memory)
}

/// What a kernel tells its guest of a fault: the endpoint and the address are the guest's own already.
fn pass_on(nest: &SharedNest, fault: &Fault, guest: &Machine) -> (SpaceId, Why) {
    let nested = nest.lock().unwrap().explain(fault).unwrap();
    let report = Reported {
        reason: FaultReason::Mapping,
        kind: nested.access.contains(FaultAccess::WRITE).then_some(AccessKind::Write),
        endpoint: fault.endpoint.get(),
        address: Some(nested.seen.address.get()),
        pasid: None,
    };
    guest.with_device(|device, ram| device.report_fault(ram, &report));
    (nested.blamed.space, nested.why)
}

struct Stack {
    machines: [Machine; 3],
    viommus: [Viommu<TestPlatform>; 3],
    nests: [SharedNest; 2],
    roots: [SpaceId; 2],
    memory: virtio_iommu::DmaMemory,
}

/// Guest 1 has eight pages of memory, of which guest 2 has pages 2 to 5.
fn stack() -> Stack {
    let (host, driver0) = Machine::live(Config::default());
    let memory = host.memory(8 * PAGE);
    let (machine1, nest0, root0) = inside(&driver0, Config::default());
    // SAFETY: the test's own memory, which outlives the devices.
    unsafe { nest0.lock().unwrap().map_memory(root0, Iova::new(GUEST), memory.phys, 8 * PAGE, RW) }.unwrap();
    let driver1 = machine1.bring_up();
    let (machine2, nest1, root1) = inside(&driver1, Config::default());
    let target = PhysAddr::new(GUEST + 2 * PAGE);
    // SAFETY: to guest 1 these are its own memory.
    unsafe { nest1.lock().unwrap().map_memory(root1, Iova::new(2 * GUEST), target, 4 * PAGE, RW) }.unwrap();
    let driver2 = machine2.bring_up();
    Stack {
        machines: [host, machine1, machine2],
        viommus: [driver0, driver1, driver2],
        nests: [nest0, nest1],
        roots: [root0, root1],
        memory,
    }
}

impl Stack {
    /// Has each kernel take the last fault and tell its guest. What guest 2 is told, and whom host and guest 1 blame.
    fn pass_up(&self) -> (Fault, [(SpaceId, Why); 2]) {
        let take = |level: usize| {
            self.viommus[level].poll();
            self.viommus[level].next_fault().unwrap()
        };
        let blamed = [0, 1].map(|level| pass_on(&self.nests[level], &take(level), &self.machines[level + 1]));
        (take(2), blamed)
    }
}

#[test]
fn an_inner_driver_maps_through_the_outer_one() {
    let stack = stack();
    let [host, ..] = &stack.machines;
    let driver = &stack.viommus[1];
    let domain = driver.create_domain(DomainOptions::default()).unwrap();
    driver.attach(EP, &domain).unwrap();
    // SAFETY: the guest's own memory.
    unsafe { domain.map_at(Iova::new(0x4000), PhysAddr::new(GUEST + PAGE), PAGE, RW) }.unwrap();
    host.dma_write(EP, 0x4008, &[5]).unwrap();
    assert_eq!(bytes_of(&stack.memory)[PAGE as usize + 8], 5);
    // SAFETY: mapped above.
    unsafe { domain.unmap(Iova::new(0x4000), PAGE) }.unwrap();
    assert!(!host.reaches(EP, 0x4000));
    driver.detach(EP).unwrap();
}

/// As a driver may do that sends ATTACH without DETACH. Fails when the domain that is left stays behind the device.
#[test]
fn a_domain_that_was_left_for_another_one_comes_back_without_its_mappings() {
    let (host, outer) = Machine::live(Config::default());
    let memory = host.memory(PAGE);
    let (guest, nest, root) = inside(&outer, Config::default());
    // SAFETY: the test's own memory, which outlives the devices.
    unsafe { nest.lock().unwrap().map_memory(root, Iova::new(GUEST), memory.phys, PAGE, RW) }.unwrap();
    let behind = Behind { nest, memory: root, domains: Mutex::default() };
    let mapping = Mapping { virt_first: 0x4000, virt_last: 0x4fff, phys_first: GUEST, flags: RW.bits() };
    behind.attach(1, EP.get()).unwrap();
    behind.map(1, &mapping).unwrap();
    assert!(host.reaches(EP, 0x4000));
    behind.attach(2, EP.get()).unwrap();
    behind.attach(1, EP.get()).unwrap();
    assert!(!host.reaches(EP, 0x4000));
    behind.map(1, &mapping).unwrap();
    assert!(host.reaches(EP, 0x4000));
    drop(guest);
}

#[test]
fn three_levels_deep_accesses_and_faults_find_their_way() {
    let stack = stack();
    let host = &stack.machines[0];
    let driver2 = &stack.viommus[2];
    let domain = driver2.create_domain(DomainOptions::default()).unwrap();
    driver2.attach(EP, &domain).unwrap();
    // SAFETY: guest 2's own memory, and what it has not.
    unsafe {
        domain.map_at(Iova::new(0x8000), PhysAddr::new(2 * GUEST + PAGE), PAGE, RW).unwrap();
        domain.map_at(Iova::new(0xa000), PhysAddr::new(2 * GUEST + 4 * PAGE), PAGE, RW).unwrap();
    }
    host.dma_write(EP, 0x8010, &[7]).unwrap();
    assert_eq!(bytes_of(&stack.memory)[3 * PAGE as usize + 0x10], 7);

    // Not mapped by guest 2, and memory that guest 2 has not: each is told to guest 2 in its own addresses.
    for (iova, by_guest_1) in [(0xc008, Why::NotMapped), (0xa008, Why::NotMapped)] {
        assert!(host.dma_write(EP, iova, &[1]).is_err());
        let (fault, [_, (blamed, why)]) = stack.pass_up();
        assert_eq!(why, by_guest_1);
        assert_eq!(blamed == stack.roots[1], iova == 0xa008);
        assert_eq!((fault.endpoint, fault.address), (EP, Some(Iova::new(iova))));
        assert_eq!((fault.access, fault.domain), (FaultAccess::WRITE, Some(domain.id())));
    }

    // The host takes the memory away: every shadow goes first, whoever mapped it.
    let all = IovaRange::from_len(Iova::new(GUEST), 8 * PAGE).unwrap();
    stack.nests[0].lock().unwrap().unmap(stack.roots[0], all).unwrap();
    assert!(!host.reaches(EP, 0x8000));
    host.give_back(stack.memory);
    // And gives other memory: the guests notice nothing.
    let other = host.memory(8 * PAGE);
    // SAFETY: the test's own memory.
    unsafe {
        stack.nests[0].lock().unwrap().map_memory(stack.roots[0], all.start(), other.phys, 8 * PAGE, RW)
    }
    .unwrap();
    host.dma_write(EP, 0x8010, &[9]).unwrap();
    assert_eq!(bytes_of(&other)[3 * PAGE as usize + 0x10], 9);

    // Guest 1 takes it away from guest 2.
    let whole = IovaRange::from_len(Iova::new(2 * GUEST), 4 * PAGE).unwrap();
    stack.nests[1].lock().unwrap().unmap(stack.roots[1], whole).unwrap();
    assert!(!host.reaches(EP, 0x8000));
    driver2.detach(EP).unwrap();
}

#[test]
fn three_levels_deep_shadows_merge_and_come_apart() {
    let stack = stack();
    let host = &stack.machines[0];
    // Both kernels give the memory anew, by a mapping for each page.
    let whole = [(GUEST, 8, stack.memory.phys.get()), (2 * GUEST, 4, GUEST + 2 * PAGE)];
    for (level, (at, pages, phys)) in whole.into_iter().enumerate() {
        let (mut nest, root) = (stack.nests[level].lock().unwrap(), stack.roots[level]);
        nest.set_merging(Merging::Adjoining);
        nest.unmap(root, IovaRange::from_len(Iova::new(at), pages * PAGE).unwrap()).unwrap();
        for offset in (0..pages).map(|page| page * PAGE) {
            // SAFETY: the test's own memory, which outlives the devices.
            unsafe { nest.map_memory(root, Iova::new(at + offset), PhysAddr::new(phys + offset), PAGE, RW) }
                .unwrap();
        }
    }
    let driver = &stack.viommus[2];
    let domain = driver.create_domain(DomainOptions::default()).unwrap();
    driver.attach(EP, &domain).unwrap();
    // SAFETY: guest 2's own memory.
    let map = || unsafe { domain.map_at(Iova::new(0x8000), PhysAddr::new(2 * GUEST), 4 * PAGE, RW) };
    assert_eq!(host.traffic(map), (Ok(()), 1, 1));
    let reached = || [0, 1, 2, 3].map(|page| host.dma_write(EP, 0x8000 + page * PAGE, &[7]).is_ok());
    assert_eq!(reached(), [true; 4]);
    // First the host takes a page, then guest 1.
    let parts = [(0, GUEST + 3 * PAGE), (1, 2 * GUEST + 2 * PAGE)];
    for ((level, at), left) in parts.into_iter().zip([[true, false, true, true], [true, false, false, true]])
    {
        let part = IovaRange::from_len(Iova::new(at), PAGE).unwrap();
        stack.nests[level].lock().unwrap().unmap(stack.roots[level], part).unwrap();
        assert_eq!(reached(), left, "level {level}");
    }
    // What is taken at either level guest 2 is told in its own addresses.
    for driver in &stack.viommus {
        driver.poll();
        while driver.next_fault().is_some() {}
    }
    assert!(host.dma_write(EP, 0xa010, &[1]).is_err());
    let (fault, [_, blamed]) = stack.pass_up();
    assert_eq!((fault.address, blamed), (Some(Iova::new(0xa010)), (stack.roots[1], Why::NotMapped)));
    // SAFETY: mapped above.
    unsafe { domain.unmap(Iova::new(0x8000), 4 * PAGE) }.unwrap();
    assert_eq!((reached(), host.device().mappings(0).count()), ([false; 4], 0));
    driver.detach(EP).unwrap();
}

#[test]
fn i14_a_refusal_at_the_bottom_is_a_refusal_at_the_top() {
    let stack = stack();
    let host = &stack.machines[0];
    let driver = &stack.viommus[2];
    let domain = driver.create_domain(DomainOptions::default()).unwrap();
    driver.attach(EP, &domain).unwrap();
    host.inject([Inject::Refuse(8)]);
    // SAFETY: refused.
    let mapped = unsafe { domain.map_at(Iova::new(0x8000), PhysAddr::new(2 * GUEST), PAGE, RW) };
    assert!(mapped.is_err());
    // SAFETY: guest 2's own memory.
    unsafe { domain.map_at(Iova::new(0x8000), PhysAddr::new(2 * GUEST), PAGE, RW) }.unwrap();
    // The host's device does not unmap, and again when it is asked once more: nobody is told that it did.
    host.inject([Inject::Refuse(3), Inject::Refuse(3), Inject::Refuse(3), Inject::Refuse(3)]);
    // SAFETY: mapped above.
    assert!(unsafe { domain.unmap(Iova::new(0x8000), PAGE) }.is_err());
    assert!(host.reaches(EP, 0x8000));
    host.device().inject.script.clear();
    driver.reclaim();
    assert!(!host.reaches(EP, 0x8000));
    driver.detach(EP).unwrap();
}
