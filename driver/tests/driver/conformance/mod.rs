//! One test for each requirement of the standard on drivers: D-01 to D-41 of `driver/docs/conformance.md`.
//!
//! Each uses the driver's public face and looks at what the model saw, or at what the driver says. Beyond that, every
//! [`Machine`] checks at its end that the model found no rule broken. The comment on a test says how the driver was broken
//! to see it fail. `cargo xtask ci` compares the names here with the table.

mod attach;
mod envelope;
mod faults;
mod features;
mod map;
mod probe;
mod ranges;
mod unmap;

use virtio_iommu::{
    Direction, DmaDevice, Domain, DomainKind, DomainOptions, EndpointOptions, Features, Introduction, Iova,
    Leave, MapError, Options, PhysAddr, PhysSegment, Prot, UnmapError, UnmapPolicy, Viommu,
};
use virtio_iommu_model::{Config, Inject, feature};

use crate::support::{ANYWHERE, EP, EP2, Machine, PAGE, RW, TestPlatform};

/// What every device must offer.
const CORE: u64 = feature::VERSION_1 | feature::MAP_UNMAP;

/// An address inside of every input range that is used here.
const AT: u64 = 0x10_0000;

/// A domain that bypasses, by the flag of ATTACH.
const IDENTITY: DomainOptions =
    DomainOptions { kind: DomainKind::Identity, mappings: 0, unmap: UnmapPolicy::Strict };

/// Status codes, by the standard's numbers.
const DEVERR: Inject = Inject::Refuse(3);
const INVAL: Inject = Inject::Refuse(4);
const RANGE: Inject = Inject::Refuse(5);
const NOMEM: Inject = Inject::Refuse(8);

/// The default device without these features.
fn without(features: u64) -> Config {
    let config = Config::default();
    Config { features: config.features & !features, ..config }
}

/// Options that leave one request slot, so that each request is written over another one's bytes.
fn one_slot() -> Options {
    Options { queue_size: 2, ..Machine::options() }
}

fn new_domain(viommu: &Viommu<TestPlatform>) -> Domain<TestPlatform> {
    viommu.create_domain(DomainOptions::default()).unwrap()
}

/// Maps what the test has, or what the driver refuses.
fn map_at(
    domain: &Domain<TestPlatform>,
    at: u64,
    phys: PhysAddr,
    len: u64,
    prot: Prot,
) -> Result<(), MapError> {
    // SAFETY: the endpoints of the model do no DMA but what a test asks for, to memory that no reference covers.
    unsafe { domain.map_at(Iova::new(at), phys, len, prot) }
}

/// The same at an address of the driver's choice.
fn map(domain: &Domain<TestPlatform>, phys: PhysAddr, len: u64, prot: Prot) -> Result<u64, MapError> {
    // SAFETY: as in `map_at`.
    unsafe { domain.map(phys, len, prot, ANYWHERE) }.map(Iova::get)
}

/// Maps physical memory at its own addresses.
fn map_identity(domain: &Domain<TestPlatform>, start: PhysAddr, len: u64) -> Result<(), MapError> {
    // SAFETY: as in `map_at`.
    unsafe { domain.map_identity(start, len, RW) }
}

fn unmap(domain: &Domain<TestPlatform>, at: u64, len: u64) -> Result<(), UnmapError> {
    // SAFETY: each test makes the mappings of its domains itself, and waits for no DMA through them.
    unsafe { domain.unmap(Iova::new(at), len) }
}

fn offset(phys: PhysAddr, bytes: u64) -> PhysAddr {
    PhysAddr::new(phys.get() + bytes)
}

/// Does all that the driver's public face has, with success and with failures that make it send what it sends at no other
/// time: to look afterwards at everything that a driver of this device may ever have sent.
fn whole_life(machine: &Machine, options: Options) {
    let staged = machine.start_with(options).unwrap();
    for endpoint in [EP, EP2] {
        assert_eq!(staged.introduce(endpoint), Ok(Introduction::Known));
    }
    let viommu = staged.go_live().unwrap();
    raw_life(machine, &viommu);
    renumbered_life(machine, &viommu);
    device_life(machine, &viommu);
    assert!(!machine.reaches(EP, AT));
    viommu.poll();
    while viommu.next_fault().is_some() {}
    if viommu.features().contains(Features::BYPASS_CONFIG) {
        moved_life(machine, &viommu);
        bypass_life(&viommu);
    }
    // SAFETY: the endpoints do no DMA any more.
    unsafe { viommu.shutdown(Leave::AsFound) }.unwrap();
}

/// The raw layer: two endpoints in one domain, lists of mappings, and UNMAP in all its ways.
fn raw_life(machine: &Machine, viommu: &Viommu<TestPlatform>) {
    let memory = machine.memory(4 * PAGE).phys;
    let domain = new_domain(viommu);
    machine.inject([NOMEM]);
    viommu.attach(EP, &domain).unwrap_err();
    viommu.attach(EP, &domain).unwrap();
    viommu.attach(EP2, &domain).unwrap();
    viommu.attach(EP2, &domain).unwrap();

    let at = map(&domain, memory, 4 * PAGE, Prot::READ).unwrap();
    unmap(&domain, at, 4 * PAGE).unwrap();
    let neighbours = || (0..3).for_each(|page| map_at(&domain, AT + page * PAGE, memory, PAGE, RW).unwrap());
    neighbours();
    unmap(&domain, AT, 3 * PAGE).unwrap();
    // The device refuses the three together: they are unmapped one by one.
    neighbours();
    machine.inject([RANGE]);
    unmap(&domain, AT, 3 * PAGE).unwrap();
    // It refuses one for good: that one goes through the quarantine.
    map_at(&domain, AT, memory, PAGE, Prot::WRITE).unwrap();
    machine.inject([DEVERR]);
    unmap(&domain, AT, PAGE).unwrap_err();
    assert_eq!(viommu.reclaim(), 1);
    if viommu.features().contains(Features::MMIO) {
        map_at(&domain, AT, memory, PAGE, RW | Prot::MMIO).unwrap();
        unmap(&domain, AT, PAGE).unwrap();
    }
    machine.inject([DEVERR]);
    viommu.detach(EP).unwrap_err();
    viommu.detach(EP).unwrap();
    viommu.detach(EP2).unwrap();
}

/// A domain whose first mapping is refused, so that it gets another number.
fn renumbered_life(machine: &Machine, viommu: &Viommu<TestPlatform>) {
    let memory = machine.memory(PAGE).phys;
    let domain = new_domain(viommu);
    viommu.attach(EP, &domain).unwrap();
    viommu.attach(EP2, &domain).unwrap();
    let before = domain.id();
    machine.inject([INVAL]);
    map_at(&domain, AT, memory, PAGE, RW).unwrap();
    assert_ne!(domain.id(), before);
    unmap(&domain, AT, PAGE).unwrap();
    viommu.detach(EP2).unwrap();
    viommu.detach(EP).unwrap();
}

/// What device drivers use.
fn device_life(machine: &Machine, viommu: &Viommu<TestPlatform>) {
    let memory = machine.memory(8 * PAGE).phys;
    let segments =
        [0, 2, 4].map(|page| PhysSegment { phys: offset(memory, page * PAGE), len: PAGE as usize });
    let options = EndpointOptions { bounce_bytes: 2 * PAGE as usize, ..EndpointOptions::default() };
    let endpoint = viommu.open(EP, &new_domain(viommu), options).unwrap();
    let coherent = endpoint.alloc_coherent(100).unwrap();
    let (held, _) = machine.lend(PAGE);
    let adopted = endpoint.adopt(held, Direction::FromDevice).unwrap();
    let mut iovas = [ANYWHERE; 3];
    // SAFETY: as in `map_at`.
    let list = |iovas: &mut [Iova]| unsafe { endpoint.map_scatter(&segments, Direction::Both, iovas) };
    let mapped = list(&mut iovas).unwrap();
    machine.inject([Inject::Pass, NOMEM]);
    list(&mut iovas).unwrap_err();
    // SAFETY: as in `map_at`.
    let single = unsafe { endpoint.map(offset(memory, 0x123), 0x2000, Direction::ToDevice) }.unwrap();
    for mapping in [mapped, adopted, single] {
        endpoint.unmap(mapping).unwrap();
    }
    endpoint.free_coherent(coherent).unwrap();
    endpoint.close().unwrap();
}

/// An endpoint that goes from domain to domain, and back to what it had mapped. Where the driver cannot know that the
/// bypass is closed, a domain that lost its endpoint is not mapped again.
fn moved_life(machine: &Machine, viommu: &Viommu<TestPlatform>) {
    let memory = machine.memory(PAGE).phys;
    let (first, second) = (new_domain(viommu), new_domain(viommu));
    viommu.attach(EP, &first).unwrap();
    map_identity(&first, PhysAddr::new(AT), PAGE).unwrap();
    map_at(&first, AT + PAGE, memory, PAGE, Prot::WRITE).unwrap();
    viommu.move_endpoint(EP, &second).unwrap();
    viommu.move_endpoint(EP, &first).unwrap();
    assert_eq!(machine.device().mappings(first.id().get()).count(), 2);
    unmap(&first, AT, 2 * PAGE).unwrap();
    viommu.detach(EP).unwrap();
}

/// What bypasses: identity domains, and endpoints without a domain.
fn bypass_life(viommu: &Viommu<TestPlatform>) {
    let identity = viommu.create_domain(IDENTITY).unwrap();
    viommu.attach(EP, &identity).unwrap();
    viommu.attach(EP2, &identity).unwrap();
    viommu.move_endpoint(EP, &new_domain(viommu)).unwrap();
    viommu.detach(EP).unwrap();
    // SAFETY: the endpoints do no DMA.
    unsafe { viommu.open_bypass() }.unwrap();
    viommu.close_bypass().unwrap();
}
