//! Requests that were given up on belong to the device: it may carry them out at any time, until it answers (I3).

use virtio_iommu::contexts::{Anonymous, ContextError, ContextMapError, ContextUnmapError, ContextsOptions};
use virtio_iommu::{DomainError, DomainOptions, Iova};
use virtio_iommu_model::{Config, Execute, Inject, Release};

use super::{attached, options, pasid, range, reaches};
use crate::support::{EP, Machine, PAGE, RW};

/// Fails when a range is unmapped, or taken for free, while its MAP is in flight: the late MAP would come after the UNMAP
/// that was confirmed.
#[test]
fn i03_a_late_map_keeps_its_range() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(2 * PAGE);
    let mut context = contexts.add_mapped(pasid(5)).unwrap();
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    // SAFETY: the test's own memory, which it keeps; what is mapped twice is refused.
    let again = unsafe {
        let unknown = context.map(Iova::new(PAGE), memory.phys, PAGE, RW);
        assert!(matches!(unknown, Err(ContextMapError::Unknown(_))));
        context.map(Iova::new(3 * PAGE), memory.phys, PAGE, RW).unwrap();
        context.map(Iova::new(0), memory.phys, 2 * PAGE, RW)
    };
    assert_eq!(again, Err(ContextMapError::InUse { range: range(PAGE, PAGE) }));
    let in_flight = Err(ContextUnmapError::InFlight { mapping: range(PAGE, PAGE) });
    let (unmapped, requests, _) = machine.traffic(|| context.unmap(range(0, 8 * PAGE)));
    assert_eq!((unmapped, requests), (in_flight, 0));
    // What is not in flight goes.
    context.unmap(range(2 * PAGE, 8 * PAGE)).unwrap();
    machine.release(Release::All);
    viommu.poll();
    assert!(reaches(&machine, Some(5), PAGE));
    context.unmap(range(0, 8 * PAGE)).unwrap();
    assert!(!reaches(&machine, Some(5), PAGE));
    assert_eq!(viommu.stats().abandoned_requests, 0);
}

/// Fails when a late answer is not settled: the range would be kept for ever.
#[test]
fn i03_a_late_refusal_gives_the_range_back() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(PAGE);
    let mut context = contexts.add_mapped(pasid(5)).unwrap();
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    // SAFETY: the test's own memory, which it keeps.
    unsafe { context.map(Iova::new(PAGE), memory.phys, PAGE, RW) }.unwrap_err();
    assert_eq!(viommu.stats().quarantined_mappings, 1);
    machine.refuse_held(8);
    viommu.poll();
    assert_eq!((context.mappings().count(), viommu.stats().quarantined_mappings), (0, 0));
}

/// Fails when the range of a late UNMAP is used again: the late UNMAP would take the new mapping away.
#[test]
fn i03_a_late_unmap_keeps_its_range() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(PAGE);
    let mut context = contexts.add_mapped(pasid(5)).unwrap();
    let map = |context: &mut virtio_iommu::contexts::MappedContext<_>, at| {
        // SAFETY: the test's own memory, which it keeps.
        unsafe { context.map(Iova::new(at), memory.phys, PAGE, RW) }
    };
    map(&mut context, PAGE).unwrap();
    map(&mut context, 3 * PAGE).unwrap();
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    context.unmap(range(0, 8 * PAGE)).unwrap_err();
    assert_eq!(map(&mut context, PAGE), Err(ContextMapError::InUse { range: range(PAGE, PAGE) }));
    let in_flight = ContextUnmapError::InFlight { mapping: range(3 * PAGE, PAGE) };
    assert_eq!(context.unmap(range(2 * PAGE, 4 * PAGE)), Err(in_flight));
    machine.release(Release::All);
    viommu.poll();
    assert_eq!(context.mappings().count(), 0);
    map(&mut context, PAGE).unwrap();
    assert!(reaches(&machine, Some(5), PAGE) && !reaches(&machine, Some(5), 3 * PAGE));
}

/// Fails when a PASID is given to another context while a request of the one before is in flight: a late MAP, or a late
/// DETACH, would be the new one's.
#[test]
fn i03_a_late_request_keeps_the_pasid() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(PAGE);
    let mut context = contexts.add_mapped(pasid(5)).unwrap();
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    // SAFETY: the test's own memory, which it keeps.
    unsafe { context.map(Iova::new(PAGE), memory.phys, PAGE, RW) }.unwrap_err();
    // It is gone, and what it was to map cannot come any more.
    context.remove().map_err(|(_, error)| error).unwrap();
    let taken = Some(ContextError::Taken { pasid: pasid(5) });
    assert_eq!(contexts.add_mapped(pasid(5)).err(), taken);
    machine.release(Release::All);
    viommu.poll();
    let context = contexts.add_mapped(pasid(5)).unwrap();
    assert!(!reaches(&machine, Some(5), PAGE));

    machine.inject([Inject::Hold(Execute::AtRelease)]);
    let (context, _error) = context.remove().unwrap_err();
    context.remove().map_err(|(_, error)| error).unwrap();
    assert_eq!(contexts.add_mapped(pasid(5)).err(), taken);
    machine.release(Release::All);
    viommu.poll();
    let mut context = contexts.add_mapped(pasid(5)).unwrap();
    // SAFETY: as above.
    unsafe { context.map(Iova::new(PAGE), memory.phys, PAGE, RW) }.unwrap();
    assert!(reaches(&machine, Some(5), PAGE));
}

/// Fails when the number of a domain is used again while a request about one of its contexts is in flight.
#[test]
fn i02_a_late_request_keeps_the_domains_number() {
    let machine = Machine::new(Config { domain_range: 5..=6, ..Config::contexts() });
    let staged = machine.start_with(options()).unwrap();
    staged.introduce(EP).unwrap();
    let viommu = staged.go_live().unwrap();
    let contexts = viommu.create_contexts(ContextsOptions::default()).unwrap();
    viommu.attach(EP, contexts.domain()).unwrap();
    let memory = machine.memory(PAGE);
    let mut context = contexts.add_mapped(pasid(5)).unwrap();
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    // SAFETY: the test's own memory, which it keeps.
    unsafe { context.map(Iova::new(PAGE), memory.phys, PAGE, RW) }.unwrap_err();
    viommu.detach(EP).unwrap();
    drop(context);
    drop(contexts);
    let other = viommu.create_domain(DomainOptions::default()).unwrap();
    let exhausted = || viommu.create_domain(DomainOptions::default()).err();
    assert_eq!(exhausted(), Some(DomainError::IdsExhausted { ids: 2 }));
    machine.release(Release::All);
    viommu.poll();
    assert_eq!(exhausted(), None);
    drop(other);
}

/// Fails when a late ATTACH_TABLE is taken for one of the domain that died since: the PASID could never be used again.
#[test]
fn i03_a_late_context_of_a_domain_that_died_is_there_and_goes() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    contexts.add_mapped(pasid(5)).unwrap_err();
    viommu.detach(EP).unwrap();
    viommu.attach(EP, contexts.domain()).unwrap();
    assert_eq!(contexts.add_mapped(pasid(5)).err(), Some(ContextError::Taken { pasid: pasid(5) }));
    machine.release(Release::All);
    viommu.poll();
    let (_context, requests, _) = machine.traffic(|| contexts.add_mapped(pasid(5)).unwrap());
    assert_eq!(requests, 2, "DETACH with the PASID, and ATTACH_TABLE");
}
