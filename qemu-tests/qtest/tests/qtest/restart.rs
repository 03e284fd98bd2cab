//! What an earlier life of the device leaves behind (I12): domains outlive a device reset in QEMU 10 and 11.

use qtest::{EDU, EDU2, HOST_BRIDGE, HostPlatform, Machine, QemuPeer, Request, Requester, Transfer};
use virtio_iommu::{
    DmaDevice as _, Domain, DomainOptions, EndpointId, EndpointOptions, Iova, PhysAddr, Prot, Viommu,
};

use crate::Case;
use crate::support::{Dma, PAGE, bring_up, faults, imitation, options, pattern};

pub(crate) const CASES: &[Case] = &[
    ("restart/domains_outlive_a_reset_where_the_model_says_so", domains_outlive_a_reset),
    ("restart/stale_domains_die_when_endpoints_are_introduced", stale_domains_die),
    ("restart/a_stale_number_is_retired", a_stale_number_is_retired),
    ("restart/the_driver_after_the_driver", the_driver_after_the_driver),
];

const RW: u32 = 3;
/// Where the earlier life maps memory.
const OLD: (u64, u64) = (0x4000_0000, 0x4000_0fff);

/// An earlier driver, which attaches endpoints and maps [`OLD`] for each, and is gone without a word.
fn earlier_life(machine: &Machine, attachments: &[(u32, EndpointId)], phys: u64) {
    let mut peer = QemuPeer::new(machine);
    let mut requester = Requester::start(&mut peer);
    for (domain, endpoint) in attachments {
        for request in [Request::attach(*domain, endpoint.get()), Request::map(*domain, OLD, phys, RW)] {
            assert_eq!(requester.status(&mut peer, &request), Some(0), "{request:x?}");
        }
    }
}

fn survive(machine: &Machine) -> bool {
    imitation(machine.version()).0.quirks.domains_survive_reset
}

fn domains_outlive_a_reset(machine: &Machine) {
    let memory = machine.platform().alloc(PAGE as usize).phys.get();
    earlier_life(machine, &[(1, EDU)], memory);
    let mut peer = QemuPeer::new(machine);
    let mut requester = Requester::start(&mut peer);
    // 4: overlaps a mapping. 6: no such domain.
    let again = requester.status(&mut peer, &Request::map(1, OLD, memory, RW));
    assert_eq!(again, Some(if survive(machine) { 4 } else { 6 }));
    machine.ram().write(memory, &pattern(1, 16));
    machine.edu.transfer(Transfer::FromMemory, OLD.0, 0, 16);
    machine.edu.transfer(Transfer::ToMemory, OLD.0 + 0x100, 0, 16);
    let reached = machine.ram().bytes(memory + 0x100, 16) == pattern(1, 16);
    assert_eq!(reached, survive(machine), "whether the old mapping still leads there");
}

fn stale_domains_die(machine: &Machine) {
    let memory = machine.platform().alloc(PAGE as usize).phys.get();
    let old = [(8, EDU), (9, EDU2), (11, HOST_BRIDGE)];
    earlier_life(machine, &old, memory);
    let viommu = bring_up(machine, options(), &[EDU, EDU2, HOST_BRIDGE]);
    // Nobody is attached, and nobody reaches anything.
    machine.edu.transfer(Transfer::ToMemory, OLD.0, 0, 16);
    machine.edu2.transfer(Transfer::ToMemory, OLD.0, 0, 16);
    let blocked = faults(&viommu);
    assert!(blocked.iter().any(|fault| fault.endpoint == EDU), "{blocked:?}");
    assert!(blocked.iter().any(|fault| fault.endpoint == EDU2), "{blocked:?}");
    // Every number is usable at once, at the very addresses of before.
    let phys = PhysAddr::new(memory);
    let mut domains = Vec::new();
    for (edu, id, number) in [(&machine.edu, EDU, 8), (&machine.edu2, EDU2, 11)] {
        let domain = domain_numbered(&viommu, number);
        let dma = Dma::open_in(&viommu, &domain, edu, id, EndpointOptions::default());
        // SAFETY: nothing of Rust depends on the guest's memory.
        unsafe { dma.endpoint.domain().map_at(Iova::new(OLD.0), phys, PAGE, Prot::READ) }.unwrap();
        assert_eq!(domain.id().get(), number, "no number had to be given up");
        dma.write(Iova::new(OLD.0), &pattern(2, 16));
        assert_eq!(machine.ram().bytes(memory, 16), [0; 16], "the old permission is gone");
        assert!(!faults(&viommu).is_empty());
        domains.push(dma);
    }
}

/// An endpoint that nobody introduced keeps a domain alive under a number that the driver then wants.
fn a_stale_number_is_retired(machine: &Machine) {
    let memory = machine.platform().alloc(PAGE as usize).phys.get();
    earlier_life(machine, &[(8, EDU2), (9, HOST_BRIDGE)], memory);
    let viommu = bring_up(machine, options(), &[EDU]);
    // Neighbours, as an earlier driver leaves them: the next number is not fresh either.
    let number = 8;
    let domain = domain_numbered(&viommu, number);
    viommu.attach(EDU, &domain).unwrap();
    // SAFETY: nothing of Rust depends on the guest's memory.
    unsafe { domain.map_at(Iova::new(OLD.0), PhysAddr::new(memory), PAGE, Prot::READ) }.unwrap();
    assert_eq!(domain.id().get() != number, survive(machine), "{number} became {}", domain.id());
    machine.edu.transfer(Transfer::FromMemory, OLD.0, 0, 16);
    assert_eq!(faults(&viommu), [], "the new mapping works");
    machine.edu.transfer(Transfer::ToMemory, OLD.0, 0, 16);
    assert!(!faults(&viommu).is_empty(), "and the old one is not there");
    viommu.detach(EDU).unwrap();
}

/// A new domain that has this number.
fn domain_numbered(viommu: &Viommu<HostPlatform>, number: u32) -> Domain<HostPlatform> {
    let mut others = Vec::new();
    for _ in 0..100 {
        let domain = viommu.create_domain(DomainOptions::default()).unwrap();
        if domain.id().get() == number {
            return domain;
        }
        others.push(domain);
    }
    panic!("no domain gets the number {number}");
}

fn the_driver_after_the_driver(machine: &Machine) {
    let mut secret = None;
    for life in 0..4 {
        let viommu = bring_up(machine, options(), &[EDU, EDU2]);
        if let Some(iova) = secret {
            machine.edu.transfer(Transfer::ToMemory, iova, 0, 16);
            assert!(!faults(&viommu).is_empty(), "life {life} begins with nothing mapped");
        }
        let one = Dma::open(&viommu, &machine.edu, EDU);
        let two = Dma::open(&viommu, &machine.edu2, EDU2);
        let memory = one.endpoint.alloc_coherent(PAGE as usize).unwrap();
        one.write(memory.iova(), &pattern(life, 64));
        assert_eq!(one.read(memory.iova(), 64), Some(pattern(life, 64)));
        assert_eq!(faults(&viommu), []);
        secret = Some(memory.iova().get());
        // Nothing is closed: the next life comes like a warm reboot.
        std::mem::forget((one, two, memory));
    }
}
