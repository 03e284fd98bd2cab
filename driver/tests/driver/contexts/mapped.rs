//! Contexts that are driven by MAP and UNMAP.

use virtio_iommu::contexts::{Anonymous, ContextMapError, ContextUnmapError};
use virtio_iommu::{AttachError, Iova, PhysAddr, Prot, RequestError, Status};
use virtio_iommu_model::{Endpoint, Execute, Inject, Release, ReservedRegion};

use super::{attached, pasid, range, reaches, write};
use crate::support::{EP2, PAGE, RW, bytes_of};

#[test]
fn memory_is_reached_between_map_and_unmap_and_by_its_pasid_alone() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(2 * PAGE);
    let mut context = contexts.add_mapped(pasid(5)).unwrap();
    let _other = contexts.add_mapped(pasid(6)).unwrap();
    assert!(!reaches(&machine, Some(5), 0x8000));
    // SAFETY: the test's own memory.
    unsafe { context.map(Iova::new(0x8000), memory.phys, 2 * PAGE, Prot::READ) }.unwrap();
    assert!(reaches(&machine, Some(5), 0x8000) && reaches(&machine, Some(5), 0x9fff));
    assert!(!reaches(&machine, Some(6), 0x8000) && !reaches(&machine, None, 0x8000));
    assert!(write(&machine, Some(5), 0x8000, &[1]).is_err());
    context.unmap(range(0x8000, 2 * PAGE)).unwrap();
    assert!(!reaches(&machine, Some(5), 0x8000));
    // SAFETY: as above.
    unsafe { context.map(Iova::new(0x8000), memory.phys, PAGE, RW) }.unwrap();
    write(&machine, Some(5), 0x8010, &[7]).unwrap();
    assert_eq!(bytes_of(&memory)[0x10], 7);
    assert_eq!(viommu.stats().kicks, viommu.stats().requests, "one at a time");
}

#[test]
fn holes_are_no_matter_and_parts_of_mappings_are() {
    let (machine, _viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(2 * PAGE);
    let mut context = contexts.add_mapped(pasid(5)).unwrap();
    for at in [0x8000, 0x1_0000] {
        // SAFETY: the test's own memory.
        unsafe { context.map(Iova::new(at), memory.phys, 2 * PAGE, RW) }.unwrap();
    }
    let splits = |at| Err(ContextUnmapError::Splits { mapping: range(at, 2 * PAGE) });
    assert_eq!(context.unmap(range(0x8000, PAGE)), splits(0x8000));
    assert_eq!(context.unmap(range(0x8000, 0x9000)), splits(0x1_0000));
    let (result, requests, _) = machine.traffic(|| context.unmap(range(0, 0x10_0000)));
    assert_eq!((result, requests), (Ok(()), 1));
    let (result, requests, _) = machine.traffic(|| context.unmap(range(0, 0x10_0000)));
    assert_eq!((result, requests, context.mappings().count()), (Ok(()), 0, 0));
}

#[test]
fn what_cannot_be_mapped_is_never_sent() {
    let (machine, _viommu, contexts) = attached(Some(Anonymous::Blocked));
    let mut context = contexts.add_mapped(pasid(5)).unwrap();
    let mut map = |iova, phys, len, prot| {
        // SAFETY: every one is refused.
        unsafe { context.map(Iova::new(iova), PhysAddr::new(phys), len, prot) }.unwrap_err()
    };
    let granule = PAGE;
    let ((), requests, _) = machine.traffic(|| {
        assert_eq!(map(8, 0, PAGE, RW), ContextMapError::Misaligned { value: 8, granule });
        assert_eq!(map(0, 8, PAGE, RW), ContextMapError::Misaligned { value: 8, granule });
        assert_eq!(map(0, 0, 8, RW), ContextMapError::Misaligned { value: 8, granule });
        assert_eq!(map(0, 0, 0, RW), ContextMapError::Empty);
        let wraps = |phys, len| ContextMapError::Wraps { phys: PhysAddr::new(phys), len };
        assert_eq!(map(0, !0xfff, 2 * PAGE, RW), wraps(!0xfff, 2 * PAGE));
        assert_eq!(map(!0xfff, 0, 2 * PAGE, RW), wraps(0, 2 * PAGE));
        for prot in [Prot::empty(), Prot::MMIO, Prot::from_bits_retain(9)] {
            assert_eq!(map(0, 0, PAGE, prot), ContextMapError::Prot { prot });
        }
        // Beyond the input range, and in the window of interrupts.
        for at in [1 << 39, 0xfee0_0000] {
            assert_eq!(map(at, 0, PAGE, RW), ContextMapError::Unusable { range: range(at, PAGE) });
        }
    });
    assert_eq!(requests, 0);
    let memory = machine.memory(PAGE);
    // SAFETY: the test's own memory; the second is refused.
    let twice = unsafe {
        context.map(Iova::new(PAGE), memory.phys, PAGE, RW).unwrap();
        context.map(Iova::new(0), memory.phys, 2 * PAGE, RW)
    };
    assert_eq!(twice, Err(ContextMapError::InUse { range: range(PAGE, PAGE) }));
}

#[test]
fn an_unknown_outcome_counts_as_mapped_and_a_failed_unmap_too() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(PAGE);
    let mut context = contexts.add_mapped(pasid(5)).unwrap();
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    // SAFETY: the test's own memory, which it keeps.
    let mapped = unsafe { context.map(Iova::new(PAGE), memory.phys, PAGE, RW) };
    assert_eq!(mapped, Err(ContextMapError::Unknown(RequestError::TimedOut)));
    assert_eq!(context.mappings().next(), Some(range(PAGE, PAGE)));
    machine.release(Release::All);
    viommu.poll();
    assert!(reaches(&machine, Some(5), PAGE));
    machine.inject([Inject::Refuse(3)]);
    let refused = RequestError::Refused(Status::DevErr);
    assert_eq!(context.unmap(range(PAGE, PAGE)), Err(ContextUnmapError::Request(refused)));
    assert_eq!(context.mappings().count(), 1);
    context.unmap(range(PAGE, PAGE)).unwrap();
    assert!(!reaches(&machine, Some(5), PAGE));
    // A known refusal leaves nothing.
    machine.inject([Inject::Refuse(8)]);
    // SAFETY: refused.
    let mapped = unsafe { context.map(Iova::new(PAGE), memory.phys, PAGE, RW) };
    assert_eq!(mapped, Err(ContextMapError::Refused(RequestError::Refused(Status::NoMem))));
    assert_eq!(context.mappings().count(), 0);
    machine.inject([Inject::Refuse(3)]);
    let (context, _error) = context.remove().unwrap_err();
    context.remove().map_err(|(_, error)| error).unwrap();
}

/// Fails when only the default context's mappings are looked at.
#[test]
fn i05_an_endpoint_whose_reserved_region_is_mapped_in_a_context_stays_out() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let region = ReservedRegion::reserved(0x8000, 0x8fff);
    machine.device().add_endpoint(Endpoint { reserved: [region].into(), ..Endpoint::new(EP2.get()) });
    viommu.forget(EP2).unwrap();
    let memory = machine.memory(2 * PAGE);
    let mut context = contexts.add_mapped(pasid(5)).unwrap();
    // SAFETY: the test's own memory.
    unsafe { context.map(Iova::new(0x7000), memory.phys, 2 * PAGE, RW) }.unwrap();
    let refused = viommu.attach(EP2, contexts.domain()).map(drop);
    let expected = AttachError::ReservedInUse { endpoint: EP2, region: range(0x8000, PAGE) };
    assert_eq!(refused, Err(expected));
    context.unmap(range(0x7000, 2 * PAGE)).unwrap();
    viommu.attach(EP2, contexts.domain()).unwrap();
}
