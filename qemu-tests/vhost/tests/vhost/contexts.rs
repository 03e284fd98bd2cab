//! Our driver over the socket: contexts, and what agents reach through them.

use std::sync::Arc;

use virtio_iommu::contexts::table::{PageTable, TableFormat, TableOptions};
use virtio_iommu::contexts::{ContextsOptions, Pasid};
use virtio_iommu::{EndpointId, Features, Iova, IovaRange, Options, PhysAddr, Prot, Viommu};
use virtio_iommu_vhost::window::outcome::{BLOCKED, DONE, NOT_MEMORY};
use virtio_iommu_vhost::{End, window};

use crate::front_end::{AGENT, BASE, OTHER_AGENT, Running, Vmm};
use crate::rings::{Bus, Guest};

const PAGE: u64 = 4096;
const IOVA: u64 = 0x40_0000;

/// A driver that is live on the backend.
fn live(vmm: &Arc<Vmm>) -> Viommu<Guest> {
    let options = Options { accept_contexts: true, ..Options::default() };
    let staged = Viommu::start(Bus::new(vmm), Guest::new(vmm), options).unwrap();
    for agent in [AGENT, OTHER_AGENT] {
        staged.introduce(EndpointId::new(agent)).unwrap();
    }
    staged.go_live().unwrap()
}

fn pasid(number: u32) -> Pasid {
    Pasid::new(number).unwrap()
}

#[test]
fn each_context_lets_through_what_is_its_own() {
    let running = Running::start();
    let vmm = Arc::new(Vmm::connect(&running));
    // No driver has come, and the device bypasses; but to no memory, which comes with a driver.
    assert_eq!(vmm.agent_writes(AGENT, None, BASE, 1), NOT_MEMORY);
    let viommu = live(&vmm);
    assert!(viommu.features().contains(Features::CONTEXTS));
    // The bypass is closed by a write of one byte, which came as one of the whole space.
    assert_eq!(vmm.agent_writes(AGENT, None, BASE, 1), BLOCKED);

    let contexts = viommu.create_contexts(ContextsOptions::default()).unwrap();
    let agent = EndpointId::new(AGENT);
    viommu.attach(agent, contexts.domain()).unwrap();
    let mut mapped = contexts.add_mapped(pasid(4)).unwrap();
    let table = PageTable::new(TableFormat::X86_64, viommu.clone(), TableOptions::default()).unwrap();
    let mut owned = contexts.add_owned(pasid(1), table, 0).map_err(|not_added| not_added.error).unwrap();
    let [one, other] = [vmm.allocate(PAGE, PAGE).unwrap(), vmm.allocate(PAGE, PAGE).unwrap()];
    let both = Prot::READ | Prot::WRITE;
    // SAFETY: pages that nothing else has.
    unsafe {
        mapped.map(Iova::new(IOVA), PhysAddr::new(one), PAGE, both).unwrap();
        owned.map(Iova::new(IOVA), PhysAddr::new(other), PAGE, both).unwrap();
    }
    // That of the bypass.
    viommu.poll();
    assert!(viommu.next_fault().is_some_and(|fault| fault.address == Some(Iova::new(BASE))));

    assert_eq!(vmm.agent_writes(AGENT, Some(4), IOVA, 0xa4), DONE);
    assert_eq!(vmm.agent_writes(AGENT, Some(1), IOVA, 0xa1), DONE);
    assert_eq!(vmm.bytes(one, 17)[..], [&[0xa4; window::DATA_LEN][..], &[0]].concat());
    assert_eq!(vmm.bytes(other, 17)[..], [&[0xa1; window::DATA_LEN][..], &[0]].concat());
    viommu.poll();
    assert!(viommu.next_fault().is_none());

    for (from, context) in [(AGENT, None), (AGENT, Some(2)), (OTHER_AGENT, Some(4))] {
        assert_eq!(vmm.agent_writes(from, context, IOVA, 0xee), BLOCKED, "{from} {context:?}");
        viommu.poll();
        let fault = viommu.next_fault().expect("a record of what was blocked");
        assert_eq!((fault.endpoint.get(), fault.pasid.map(Pasid::get)), (from, context));
        assert_eq!(fault.address, Some(Iova::new(IOVA)));
    }

    let range = IovaRange::from_len(Iova::new(IOVA), PAGE).unwrap();
    owned.unmap(range).unwrap();
    assert_eq!(vmm.agent_writes(AGENT, Some(1), IOVA, 0xee), BLOCKED);
    assert_eq!(vmm.agent_writes(AGENT, Some(4), IOVA, 0xb4), DONE);
    mapped.unmap(range).unwrap();
    assert_eq!(vmm.agent_writes(AGENT, Some(4), IOVA, 0xee), BLOCKED);
    assert_eq!((vmm.bytes(one, 1), vmm.bytes(other, 1)), (vec![0xb4], vec![0xa1]));

    let stats = viommu.stats();
    let asked = running.backend.lock().requests();
    assert_eq!((asked.requests, asked.map, asked.violations), (stats.requests, stats.maps, 0));
    assert_eq!(running.backend.lock().trouble(), None);
    drop((owned, mapped, contexts, viommu, vmm));
    assert_eq!(running.end().unwrap(), End::Closed);
}

#[test]
fn a_driver_that_comes_anew_finds_nothing_of_the_last_one() {
    let running = Running::start();
    let vmm = Arc::new(Vmm::connect(&running));
    let page = vmm.allocate(PAGE, PAGE).unwrap();
    for life in 1..=3_u8 {
        let viommu = live(&vmm);
        assert_eq!(vmm.agent_writes(AGENT, None, IOVA, 0xee), BLOCKED, "life {life}");
        let domain = viommu.create_domain(virtio_iommu::DomainOptions::default()).unwrap();
        viommu.attach(EndpointId::new(AGENT), &domain).unwrap();
        // SAFETY: a page that nothing else has.
        unsafe { domain.map_at(Iova::new(IOVA), PhysAddr::new(page), PAGE, Prot::WRITE).unwrap() };
        assert_eq!(vmm.agent_writes(AGENT, None, IOVA, life), DONE);
        assert_eq!(vmm.bytes(page, 1), [life]);
        drop((domain, viommu));
        vmm.stop();
        // Not only the next driver ends what was mapped.
        assert_eq!(vmm.agent_writes(AGENT, None, IOVA, 0xee), BLOCKED, "after life {life}");
        assert_eq!(vmm.bytes(page, 1), [life]);
    }
    assert_eq!(running.backend.lock().trouble(), None);
}
