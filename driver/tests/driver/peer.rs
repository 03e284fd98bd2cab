//! Registers of other devices, mapped for an endpoint.

use virtio_iommu::{Direction, DmaDevice, DomainOptions, EndpointOptions, PhysAddr, Prot};
use virtio_iommu_model::{Config, Request, feature};

use crate::support::{EP, Opened, PAGE};

/// Another device's BAR, not whole pages.
const BAR: PhysAddr = PhysAddr::new(0xfe00_0800);

fn opened(features: u64) -> Opened {
    let config = Config { features, ..Config::default() };
    Opened::new(config, DomainOptions::default(), EndpointOptions::default())
}

/// Fails when the flag is missing where it is offered, or sent where it is not, or the direction is lost.
#[test]
fn registers_are_mapped_as_what_they_are() {
    for (dropped, flag) in [(0, Prot::MMIO), (feature::MMIO, Prot::empty())] {
        for direction in [Direction::ToDevice, Direction::FromDevice, Direction::Both] {
            let opened = opened(Config::default().features & !dropped);
            // SAFETY: there is no other device in a test.
            let map = || unsafe { opened.endpoint.map_resource(BAR, 0x1000, direction) }.unwrap();
            let (mapping, requests) = opened.requests_of(map);
            let [Request::Map { virt_start, virt_end, phys_start, flags, .. }] = requests[..] else {
                panic!("{requests:?}")
            };
            assert_eq!((phys_start, virt_end - virt_start), (BAR.get() & !(PAGE - 1), 2 * PAGE - 1));
            assert_eq!(flags, (direction.prot() | flag).bits());
            assert_eq!(mapping.iova().get() - virt_start, 0x800, "the offset in the page is kept");
            let found = opened.domain.translate(mapping.iova()).unwrap();
            assert_eq!(found.prot, direction.prot() | flag);
            opened.endpoint.unmap(mapping).unwrap();
            assert_eq!(opened.domain.mapping_count(), 0);
        }
    }
}

/// Fails when a resource is joined to RAM that lies beside it.
#[test]
fn registers_are_never_merged_with_memory() {
    let opened = opened(Config::default().features);
    let memory = opened.machine.memory(2 * PAGE);
    let beside = PhysAddr::new(memory.phys.get() + PAGE);
    // SAFETY: nobody but the test uses the memory, the second page of which stands for registers.
    let (ram, registers) = unsafe {
        let ram = opened.endpoint.map(memory.phys, PAGE as usize, Direction::Both).unwrap();
        (ram, opened.endpoint.map_resource(beside, PAGE as usize, Direction::Both).unwrap())
    };
    let ranges = [ram.iova(), registers.iova()].map(|at| opened.domain.translate(at).unwrap());
    assert_eq!(ranges.map(|found| found.range.len_bytes()), [Some(PAGE); 2]);
    assert_eq!(ranges.map(|found| found.prot.contains(Prot::MMIO)), [false, true]);
    opened.endpoint.unmap(ram).unwrap();
    assert!(opened.domain.translate(registers.iova()).is_some(), "each by itself");
    opened.endpoint.unmap(registers).unwrap();
}

/// A peer's memory is reached through the mapping, and not after it.
#[test]
fn an_endpoint_reaches_a_peer_as_long_as_it_is_mapped() {
    // The flag says that these are registers, which the model does not have: mapped as memory they are there.
    let opened = opened(Config::default().features & !feature::MMIO);
    let peer = opened.machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    let mapping = unsafe { opened.endpoint.map_resource(peer.phys, 16, Direction::FromDevice) }.unwrap();
    let at = mapping.iova().get();
    opened.machine.dma_write(EP, at, &[9]).unwrap();
    assert!(!opened.machine.reaches(EP, at), "for writing only");
    opened.endpoint.unmap(mapping).unwrap();
    assert!(opened.machine.dma_write(EP, at, &[9]).is_err());
}
