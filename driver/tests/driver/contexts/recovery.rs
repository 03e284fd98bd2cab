//! Contexts after the device lost them: by a reset, or with the domain's last endpoint.

use virtio_iommu::contexts::table::{ArmGranule, ContextDescriptors, ContextTable, TableFormat};
use virtio_iommu::contexts::{Anonymous, ContextMapError, Contexts, ContextsOptions};
use virtio_iommu::{AttachError, Iova, Recovered, RequestError, Status, Viommu};
use virtio_iommu_model::{Access, Config, Execute, Inject, Quirks, Request};

use super::{FORMATS, attached, options, pasid, range, reaches, table};
use crate::support::{EP, EP2, Machine, PAGE, RW, TestPlatform, bytes_of};

const ARM: TableFormat = TableFormat::Arm { granule: ArmGranule::K4, input_bits: 48 };

fn recover(machine: &Machine, viommu: &Viommu<TestPlatform>) -> Recovered {
    machine.device().fail();
    // SAFETY: the model ends what was in flight with its reset.
    unsafe { viommu.recover() }.unwrap()
}

/// What each context lets through, by page.
fn reach(machine: &Machine) -> Vec<(Option<u32>, u64)> {
    let places =
        (0..12).map(Some).chain([None]).flat_map(|pasid| (0..16).map(move |page| (pasid, page * PAGE)));
    places.filter(|(pasid, iova)| reaches(machine, *pasid, *iova)).collect()
}

/// Fails when `replay_contexts` is not called, tells of a mapping before its context, or leaves the mappings out.
#[test]
fn after_a_reset_contexts_are_as_they_were() {
    for format in FORMATS {
        let (machine, viommu, contexts) = attached(Some(Anonymous::Pasid0));
        let memory = machine.memory(16 * PAGE);
        let mut mapped = [0, 8].map(|number| contexts.add_mapped(pasid(number)).unwrap());
        let empty = contexts.add_mapped(pasid(9)).unwrap();
        let mut owned = contexts.add_owned(pasid(7), table(&viommu, format), 3).unwrap();
        let granule = owned.table().granule();
        // SAFETY: the test's own memory.
        unsafe {
            for (at, len) in [(1, 1), (2, 3), (9, 1)] {
                mapped[1].map(Iova::new(at * PAGE), memory.phys, len * PAGE, RW).unwrap();
            }
            mapped[0].map(Iova::new(5 * PAGE), memory.phys, PAGE, RW).unwrap();
            owned.map(Iova::new(granule), memory.phys, granule, RW).unwrap();
        }
        mapped[1].unmap(range(9 * PAGE, PAGE)).unwrap();
        let (number, before) = (contexts.domain().id(), reach(&machine));
        machine.device().clear_log();
        assert_eq!(recover(&machine, &viommu).endpoints, 1);
        assert_ne!(contexts.domain().id(), number);
        assert_eq!(reach(&machine), before, "{format:?}");
        assert!(before.contains(&(None, 5 * PAGE)) && before.contains(&(Some(8), 4 * PAGE)));
        // A context before what is mapped in it, with one doorbell for that.
        let told = machine.requests().into_iter().filter_map(|request| match request {
            Request::AttachTable { .. } => Some('a'),
            Request::MapContext { .. } => Some('m'),
            _ => None,
        });
        assert_eq!(told.collect::<String>(), "amammaa");
        // And all of it works as before.
        assert_eq!(owned.unmap(range(granule, granule)), Ok(granule));
        assert!(!reaches(&machine, Some(7), granule));
        mapped[1].unmap(range(2 * PAGE, 3 * PAGE)).unwrap();
        assert!(!reaches(&machine, Some(8), 3 * PAGE) && reaches(&machine, Some(8), PAGE));
        for context in mapped.into_iter().chain([empty]) {
            context.remove().map_err(|(_, error)| error).unwrap();
        }
        owned.remove().map_err(|(_, error)| error).unwrap();
        assert_eq!(reach(&machine), []);
    }
}

/// Fails when the record of a table of descriptors is not told again.
#[test]
fn after_a_reset_tables_of_descriptors_are_as_they_were() {
    for arrangement in
        [ContextDescriptors::Linear, ContextDescriptors::TwoLevel4K, ContextDescriptors::TwoLevel64K]
    {
        let (machine, viommu, contexts) = attached(Some(Anonymous::Pasid0));
        let descriptors = ContextTable::new(arrangement, 8, viommu.clone()).unwrap();
        let mut contexts = contexts.attach_descriptors(descriptors).map_err(|refused| refused.error).unwrap();
        let memory = machine.memory(4 * PAGE);
        let mut added = [0, 3, 11].map(|number| {
            let mut context = contexts.add(pasid(number), table(&viommu, ARM), number as u16 + 1).unwrap();
            // SAFETY: the test's own memory.
            unsafe { context.map(Iova::new(PAGE * u64::from(number + 1)), memory.phys, PAGE, RW) }.unwrap();
            Some(context)
        });
        let before = reach(&machine);
        assert_eq!(before, [(Some(0), PAGE), (Some(3), 4 * PAGE), (Some(11), 12 * PAGE), (None, PAGE)]);
        recover(&machine, &viommu);
        assert_eq!(reach(&machine), before, "{arrangement:?}");
        let pages = machine.outstanding();
        contexts.remove(added[1].take().unwrap()).map_err(|(_, error)| error).unwrap();
        assert!(machine.outstanding() < pages);
        assert_eq!(contexts.unmap(added[2].as_mut().unwrap(), range(12 * PAGE, PAGE)), Ok(PAGE));
        assert_eq!(reach(&machine), [(Some(0), PAGE), (None, PAGE)]);
        // What changes while no endpoint is there takes no request, and holds when one is.
        viommu.detach(EP).unwrap();
        let ((), requests, _) = machine.traffic(|| {
            contexts.remove(added[2].take().unwrap()).map_err(|(_, error)| error).unwrap();
            added[1] = Some(contexts.add(pasid(5), table(&viommu, ARM), 9).unwrap());
        });
        assert_eq!(requests, 0);
        // SAFETY: the test's own memory.
        unsafe { added[1].as_mut().unwrap().map(Iova::new(0), memory.phys, PAGE, RW) }.unwrap();
        viommu.attach(EP, &domain_of(&contexts)).unwrap();
        assert_eq!(reach(&machine), [(Some(0), PAGE), (Some(5), 0), (None, PAGE)]);
        // The table itself goes when no endpoint is there.
        let contexts = contexts.free().unwrap_err();
        viommu.detach(EP).unwrap();
        let (domain, pages) = (domain_of(&contexts), machine.outstanding());
        contexts.free().unwrap();
        assert!(machine.outstanding() < pages);
        viommu.attach(EP, &domain).unwrap();
        assert_eq!(reach(&machine), []);
    }
}

fn domain_of(
    contexts: &virtio_iommu::contexts::DescriptorContexts<TestPlatform, Viommu<TestPlatform>>,
) -> virtio_iommu::Domain<TestPlatform> {
    contexts.contexts().domain().clone()
}

/// Fails when `lose` keeps what nobody counts on, or what was in doubt is told again.
#[test]
fn what_was_in_doubt_is_not_told_again() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(PAGE);
    let mut context = contexts.add_mapped(pasid(8)).unwrap();
    let dropped = contexts.add_mapped(pasid(9)).unwrap();
    // SAFETY: the test's own memory, which it keeps.
    unsafe {
        context.map(Iova::new(PAGE), memory.phys, PAGE, RW).unwrap();
        context.map(Iova::new(3 * PAGE), memory.phys, PAGE, RW).unwrap();
        machine.inject([Inject::Drop(Execute::Now)]);
        let unknown = context.map(Iova::new(5 * PAGE), memory.phys, PAGE, RW);
        assert_eq!(unknown, Err(ContextMapError::Unknown(RequestError::TimedOut)));
    }
    machine.inject([Inject::Drop(Execute::AtRelease)]);
    context.unmap(range(3 * PAGE, PAGE)).unwrap_err();
    drop(dropped);
    assert_eq!(reach(&machine), [(Some(8), PAGE), (Some(8), 3 * PAGE), (Some(8), 5 * PAGE)]);
    assert_eq!(viommu.stats().quarantined_mappings, 2);
    recover(&machine, &viommu);
    assert_eq!(reach(&machine), [(Some(8), PAGE)]);
    assert_eq!(context.mappings().collect::<Vec<_>>(), [range(PAGE, PAGE)]);
    assert_eq!(viommu.stats().quarantined_mappings, 0);
    // Nobody's, and not told again: its PASID is free.
    let (_added, requests, _) = machine.traffic(|| contexts.add_mapped(pasid(9)).unwrap());
    assert_eq!(requests, 1);
}

/// Fails when a failure to tell again is passed over, or what failed is forgotten.
#[test]
fn what_cannot_be_told_again_is_reported_and_the_endpoint_is_out() {
    // PROBE of the other, PROBE, ATTACH, ATTACH_TABLE, MAP_CONTEXT.
    for (passed, told) in [(3, "a context"), (4, "a mapping")] {
        let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
        let memory = machine.memory(PAGE);
        let mut context = contexts.add_mapped(pasid(8)).unwrap();
        // SAFETY: the test's own memory.
        unsafe { context.map(Iova::new(PAGE), memory.phys, PAGE, RW) }.unwrap();
        let script: Vec<_> = (0..passed).map(|_| Inject::Pass).chain([Inject::Refuse(8)]).collect();
        machine.inject(script.clone());
        let recovered = recover(&machine, &viommu);
        let error = RequestError::Refused(Status::NoMem);
        assert_eq!(recovered.lost, [(EP, AttachError::Contexts { endpoint: EP, error })], "{told}");
        assert_eq!((recovered.endpoints, recovered.detached), (0, 1), "{told}");
        assert_eq!({ machine.device().domain_of(EP.get()) }, None);
        // SAFETY: refused.
        let absent = unsafe { context.map(Iova::new(2 * PAGE), memory.phys, PAGE, RW) };
        assert_eq!(absent, Err(ContextMapError::NoEndpoint));
        assert_eq!(context.mappings().count(), 1);
        // The same by an endpoint that comes later, without PROBE; and then it goes well.
        machine.inject(script[2..].to_vec());
        let refused = viommu.attach(EP, contexts.domain());
        assert_eq!(refused.map(drop), Err(AttachError::Contexts { endpoint: EP, error }), "{told}");
        viommu.attach(EP, contexts.domain()).unwrap();
        assert_eq!(reach(&machine), [(Some(8), PAGE)]);
    }
}

/// Fails when `revoke` does not reach contexts, or what ends while the domain is dead is sent, or is told again.
#[test]
fn contexts_are_there_again_with_the_next_endpoint() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(PAGE);
    let mut mapped = contexts.add_mapped(pasid(8)).unwrap();
    let mut owned = contexts.add_owned(pasid(7), table(&viommu, TableFormat::Sv39), 0).unwrap();
    let gone = contexts.add_mapped(pasid(9)).unwrap();
    // SAFETY: the test's own memory.
    unsafe {
        mapped.map(Iova::new(PAGE), memory.phys, PAGE, RW).unwrap();
        mapped.map(Iova::new(2 * PAGE), memory.phys, PAGE, RW).unwrap();
        owned.map(Iova::new(PAGE), memory.phys, PAGE, RW).unwrap();
        owned.map(Iova::new(2 * PAGE), memory.phys, PAGE, RW).unwrap();
    }
    viommu.detach(EP).unwrap();
    let ((), requests, _) = machine.traffic(|| {
        mapped.unmap(range(2 * PAGE, PAGE)).unwrap();
        assert_eq!(owned.unmap(range(2 * PAGE, PAGE)), Ok(PAGE));
        gone.remove().map_err(|(_, error)| error).unwrap();
        contexts.invalidate_all().unwrap();
    });
    assert_eq!(requests, 0);
    assert!(owned.table().stale().is_empty());
    viommu.attach(EP2, contexts.domain()).unwrap();
    let reaches = |pasid, page: u64| {
        let access = Access::Write(&[1]);
        let from = (EP2.get(), Some(pasid));
        machine
            .with_device(|device, ram| device.access_context(ram, from.0, from.1, page * PAGE, access))
            .is_ok()
    };
    for pasid in [7, 8] {
        assert!(reaches(pasid, 1) && !reaches(pasid, 2), "PASID {pasid}");
    }
    assert_eq!(bytes_of(&memory)[0], 1);
}

/// A domain whose second endpoint did not come back from a reset that domains survive.
fn stranded() -> (Machine, Viommu<TestPlatform>, Contexts<TestPlatform>) {
    let quirks = Quirks { domains_survive_reset: true, ..Quirks::default() };
    let machine = Machine::new(Config { quirks, ..Config::contexts() });
    let staged = machine.start_with(options()).unwrap();
    for endpoint in [EP, EP2] {
        staged.introduce(endpoint).unwrap();
    }
    let viommu = staged.go_live().unwrap();
    let contexts = viommu.create_contexts(ContextsOptions::default()).unwrap();
    for endpoint in [EP, EP2] {
        viommu.attach(endpoint, contexts.domain()).unwrap();
    }
    (machine, viommu, contexts)
}

/// Fails when `strand_contexts` does nothing: the table goes back to its owner while the endpoint walks it.
#[test]
fn what_an_endpoint_may_have_kept_stays_until_that_is_known() {
    let (machine, viommu, contexts) = stranded();
    let mut context = contexts.add_owned(pasid(7), table(&viommu, TableFormat::X86_64), 0).unwrap();
    let mut mapped = contexts.add_mapped(pasid(8)).unwrap();
    let memory = machine.memory(PAGE);
    // SAFETY: the test's own memory.
    unsafe {
        context.map(Iova::new(PAGE), memory.phys, PAGE, RW).unwrap();
        mapped.map(Iova::new(PAGE), memory.phys, PAGE, RW).unwrap();
    }
    let pages = machine.outstanding();
    // PROBE and ATTACH of the first, PROBE of the second, and it cannot be moved.
    machine.inject([Inject::Pass, Inject::Pass, Inject::Pass, Inject::Refuse(3)]);
    let recovered = recover(&machine, &viommu);
    assert_eq!(recovered.lost.len(), 1, "{recovered:?}");
    let old = |machine: &Machine, pasid| {
        let access = Access::Write(&[1]);
        machine
            .with_device(|device, ram| device.access_context(ram, EP2.get(), Some(pasid), PAGE, access))
            .is_ok()
    };
    assert!(old(&machine, 7) && old(&machine, 8), "the endpoint that was lost is where it was");
    assert!(!reaches(&machine, Some(7), PAGE), "and the other one is not");
    let ((context, mut mapped), requests, _) = machine.traffic(|| {
        let (context, _error) = context.remove().unwrap_err();
        mapped.unmap(range(PAGE, PAGE)).unwrap_err();
        (context, mapped)
    });
    assert_eq!((requests, machine.outstanding()), (0, pages));
    let recovered = recover(&machine, &viommu);
    assert_eq!(recovered.lost.len(), 0, "{recovered:?}");
    assert!(old(&machine, 7) && reaches(&machine, Some(7), PAGE), "both have it again");
    context.remove().map_err(|(_, error)| error).unwrap();
    mapped.unmap(range(PAGE, PAGE)).unwrap();
    assert!(!old(&machine, 7) && !old(&machine, 8) && machine.outstanding() < pages);
}

/// A reset of the queue alone leaves contexts where they are, and ends the wait for what was in flight.
#[test]
fn contexts_stay_when_only_the_queue_is_reset() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(PAGE);
    let mut context = contexts.add_mapped(pasid(8)).unwrap();
    machine.inject([Inject::Drop(Execute::Now)]);
    // SAFETY: the test's own memory, which it keeps.
    unsafe { context.map(Iova::new(PAGE), memory.phys, PAGE, RW) }.unwrap_err();
    context.unmap(range(PAGE, PAGE)).unwrap_err();
    viommu.reset_queues().unwrap();
    assert_eq!(reach(&machine), [(Some(8), PAGE)]);
    context.unmap(range(PAGE, PAGE)).unwrap();
    assert_eq!(reach(&machine), []);
}
