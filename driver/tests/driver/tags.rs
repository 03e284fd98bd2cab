//! Views of one endpoint under several names, and their common end.

use virtio_iommu::{
    DetachError, Direction, DmaDevice, DmaError, DomainOptions, EndpointOptions, Iova, PhysAddr,
    RequestError, Status, Unmapped,
};
use virtio_iommu_model::{Config, Inject};

use crate::support::{EP, Opened, PAGE, apart};

fn opened() -> Opened {
    let bounce = EndpointOptions { bounce_bytes: 0x2000, ..EndpointOptions::default() };
    Opened::new(Config::default(), DomainOptions::default(), bounce)
}

/// Fails when any way to map forgets the tag, or a clone does.
#[test]
fn mappings_carry_the_tag_of_the_view_that_made_them() {
    let opened = opened();
    let tag = |at: Iova| opened.domain.translate(at).unwrap().tag;
    let rx = opened.endpoint.tagged("rx ring");
    let tx = rx.tagged("tx ring").clone();
    let memory = opened.machine.memory(16 * PAGE);
    let mut iovas = [Iova::new(0); 2];
    // SAFETY: nobody but the test uses the memory.
    unsafe {
        let single = rx.map(memory.phys, 1, Direction::Both).unwrap();
        let resource = tx.map_resource(memory.phys, 1, Direction::Both).unwrap();
        let _list = tx.map_scatter(&apart(memory.phys, 2), Direction::Both, &mut iovas).unwrap();
        assert_eq!((tag(single.iova()), tag(resource.iova())), ("rx ring", "tx ring"));
        assert_eq!(iovas.map(tag), ["tx ring"; 2]);
        // Any view of the endpoint ends a mapping.
        assert_eq!(tx.unmap(single), Ok(Unmapped::Now));
    }
    let coherent = rx.alloc_coherent(1).unwrap();
    let (held, _) = opened.machine.lend(PAGE);
    let adopted = tx.adopt(held, Direction::Both).unwrap();
    assert_eq!((tag(coherent.iova()), tag(adopted.iova())), ("rx ring", "tx ring"));
    let plain = opened.endpoint.alloc_coherent(1).unwrap();
    assert_eq!(tag(plain.iova()), "");
    let mut buffer = [0; 4];
    let shared = virtio_iommu::Bounced::<virtio_iommu::FromDevice>::new(&rx, &mut buffer).unwrap();
    assert_eq!(tag(shared.iova()), "bounce pages");
    // A leak is found by its name.
    let leaked = opened.domain.translate(coherent.iova()).map(|found| (found.tag, found.range.start()));
    assert_eq!(leaked, Some(("rx ring", coherent.iova())));
}

/// Fails when a view of a closed endpoint maps, or cannot unmap.
#[test]
fn after_the_end_no_view_maps_and_each_unmaps() {
    let opened = opened();
    let view = opened.endpoint.tagged("other");
    let memory = opened.machine.memory(16 * PAGE);
    let coherent = view.alloc_coherent(1).unwrap();
    opened.endpoint.close().unwrap();
    let mut iovas = [Iova::new(0); 1];
    let mut buffer = [0; 4];
    let (held, phys) = opened.machine.lend(PAGE);
    let before = opened.machine.outstanding();
    // SAFETY: refused before anything is sent.
    let errors = unsafe {
        [
            view.alloc_coherent(1).err(),
            view.map(memory.phys, 1, Direction::Both).err(),
            view.map_resource(memory.phys, 1, Direction::Both).err(),
            view.map_scatter(&apart(memory.phys, 1), Direction::Both, &mut iovas).err(),
            view.map_msi(memory.phys).err(),
            virtio_iommu::Bounced::<virtio_iommu::FromDevice>::new(&view, &mut buffer).err(),
            virtio_iommu::DmaPool::new(&view, 1, 1, Direction::Both).err(),
        ]
    };
    assert_eq!(errors, [Some(DmaError::Closed); 7]);
    let (error, back) = view.adopt(held, Direction::Both).unwrap_err();
    assert_eq!((error, back.unwrap().memory().phys), (DmaError::Closed, phys));
    assert_eq!(opened.machine.outstanding(), before, "nothing was taken from the platform");
    let (freed, requests, _) = opened.machine.traffic(|| view.free_coherent(coherent));
    assert_eq!((freed, requests), (Ok(Unmapped::Now), 0));
    // Ending it again does nothing, and gives no address back twice.
    assert_eq!(view.close(), Ok(()));
    assert_eq!(opened.domain.mapping_count(), 0);
    let again = opened.viommu.open(EP, &opened.domain, EndpointOptions::default()).unwrap();
    assert!(again.alloc_coherent(1).is_ok(), "another view of it is another");
    assert_eq!(view.alloc_coherent(1).unwrap_err(), DmaError::Closed);
}

/// Fails when the second attempt does nothing, or frees the bounce pages once more.
#[test]
fn an_end_that_failed_can_be_tried_again() {
    let opened = opened();
    opened.machine.inject([Inject::Refuse(2)]);
    let refused = RequestError::Refused(Status::Unsupp);
    assert_eq!(opened.endpoint.close(), Err(DetachError::Request { endpoint: EP, error: refused }));
    assert_eq!(opened.endpoint.alloc_coherent(1).unwrap_err(), DmaError::Closed);
    // It is attached still, and there is nothing against a whole page but that its view ended.
    // SAFETY: refused before anything is sent.
    let mapped = unsafe { opened.endpoint.map(PhysAddr::new(0x10_0000), PAGE as usize, Direction::Both) };
    assert_eq!(mapped.unwrap_err(), DmaError::Closed);
    assert_eq!(opened.endpoint.close(), Ok(()));
    assert_eq!(opened.machine.device().domain_of(EP.get()), None);
    assert_eq!((opened.machine.outstanding(), opened.domain.mapping_count()), (2, 0));
}
