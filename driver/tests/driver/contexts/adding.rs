//! Contexts that come and go, and what accesses without a PASID meet.

use virtio_iommu::contexts::{Anonymous, ContextError, ContextSupport, ContextsOptions};
use virtio_iommu::{Iova, MapError, RequestError, Status};
use virtio_iommu_model::{Config, ContextProperties, Endpoint, Inject, Request, feature};

use super::{attached, live, options, pasid, reaches, table, write};
use crate::support::{ANYWHERE, EP, EP2, Machine, PAGE, RW, bytes_of};

#[test]
fn nothing_of_it_happens_unless_it_is_asked_for_and_offered() {
    // Offered, not asked for.
    let (machine, viommu) = Machine::live(Config::contexts());
    assert_eq!(machine.device().driver_features() & feature::ATTACH_TABLE, 0);
    let refused = viommu.create_contexts(ContextsOptions::default());
    assert_eq!(
        refused.err().map(|error| error.to_string()).unwrap(),
        "the draft with contexts was not negotiated"
    );
    assert!(viommu.context_support(EP).is_err());
    // Asked for, not offered.
    let machine = Machine::new(Config::default());
    let staged = machine.start_with(options()).unwrap();
    assert!(staged.create_contexts(ContextsOptions::default()).is_err());
}

#[test]
fn an_endpoint_says_what_it_can_do() {
    let (machine, viommu) = live();
    let expected = ContextSupport {
        pasid_bits: 20,
        output_bits: Some(48),
        arm: true,
        vtd: true,
        riscv: true,
        descriptors: true,
    };
    assert_eq!(viommu.context_support(EP), Ok(expected));
    let contexts = ContextProperties { pasid_bits: 8, output_bits: 40, formats: [5].into() };
    machine.device().add_endpoint(Endpoint { contexts, ..Endpoint::x86(9) });
    let support = viommu.context_support(EP2).unwrap();
    assert_eq!(
        (support.pasid_bits, support.output_bits, support.riscv, support.vtd),
        (8, Some(40), true, false)
    );
}

#[test]
fn anonymous_accesses_are_blocked_bypass_or_use_pasid_0() {
    let (machine, _viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(PAGE);
    assert!(!reaches(&machine, None, memory.phys.get()));
    // SAFETY: nothing is mapped.
    let mapped = unsafe { contexts.domain().map(memory.phys, PAGE, RW, ANYWHERE) };
    assert_eq!(mapped, Err(MapError::NoDefaultContext));

    let (machine, _viommu, _contexts) = attached(Some(Anonymous::Bypasses));
    let memory = machine.memory(PAGE);
    assert!(reaches(&machine, None, memory.phys.get()));

    let (machine, _viommu, contexts) = attached(Some(Anonymous::Pasid0));
    let memory = machine.memory(PAGE);
    let mut zero = contexts.add_mapped(pasid(0)).unwrap();
    assert!(!reaches(&machine, None, PAGE));
    // SAFETY: the test's own memory.
    unsafe { zero.map(Iova::new(PAGE), memory.phys, PAGE, RW) }.unwrap();
    assert!(reaches(&machine, None, PAGE) && reaches(&machine, Some(0), PAGE));
    zero.remove().map_err(|(_, error)| error).unwrap();
    assert!(!reaches(&machine, None, PAGE));
}

#[test]
fn a_default_context_goes_with_others() {
    let (machine, _viommu, contexts) = attached(None);
    let (own, other) = (machine.memory(PAGE), machine.memory(PAGE));
    // SAFETY: the test's own memory.
    let iova = unsafe { contexts.domain().map(own.phys, PAGE, RW, ANYWHERE) }.unwrap();
    let mut one = contexts.add_mapped(pasid(1)).unwrap();
    // SAFETY: as above.
    unsafe { one.map(iova, other.phys, PAGE, RW) }.unwrap();
    write(&machine, None, iova.get(), &[1]).unwrap();
    write(&machine, Some(1), iova.get(), &[2]).unwrap();
    assert_eq!((bytes_of(&own)[0], bytes_of(&other)[0]), (1, 2));
}

#[test]
fn a_pasid_has_one_context_at_a_time() {
    let (_machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let one = contexts.add_mapped(pasid(1)).unwrap();
    let taken = ContextError::Taken { pasid: pasid(1) };
    assert_eq!(contexts.add_mapped(pasid(1)).err(), Some(taken));
    let x86 = table(&viommu, virtio_iommu::contexts::table::TableFormat::X86_64);
    let not_added = contexts.add_owned(pasid(1), x86, 0).unwrap_err();
    assert_eq!(not_added.error, taken);
    one.remove().map_err(|(_, error)| error).unwrap();
    let two = contexts.add_owned(pasid(1), not_added.table.unwrap(), 0).unwrap();
    two.remove().map_err(|(_, error)| error).unwrap();
    for number in 0..64 {
        contexts.add_mapped(pasid(number)).unwrap();
    }
    assert_eq!(contexts.add_mapped(pasid(64)).err(), Some(ContextError::TooMany { limit: 64 }));
}

#[test]
fn a_domain_without_endpoints_has_no_contexts_to_add() {
    let (_machine, viommu) = live();
    let contexts = viommu.create_contexts(ContextsOptions::default()).unwrap();
    assert_eq!(contexts.add_mapped(pasid(1)).err(), Some(ContextError::NoEndpoint));
    viommu.attach(EP, contexts.domain()).unwrap();
    let context = contexts.add_mapped(pasid(1)).unwrap();
    // With the last endpoint it is gone, which takes no request to know.
    viommu.detach(EP).unwrap();
    context.remove().map_err(|(_, error)| error).unwrap();
    viommu.attach(EP, contexts.domain()).unwrap();
    // Or it turns out then.
    let context = contexts.add_mapped(pasid(1)).unwrap();
    viommu.detach(EP).unwrap();
    viommu.attach(EP, contexts.domain()).unwrap();
    context.remove().map_err(|(_, error)| error).unwrap();
}

#[test]
fn what_the_device_refuses_is_said_and_free_again() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let properties = ContextProperties { pasid_bits: 4, output_bits: 48, formats: [5].into() };
    machine.device().add_endpoint(Endpoint { contexts: properties, ..Endpoint::x86(9) });
    viommu.forget(EP2).unwrap();
    viommu.attach(EP2, contexts.domain()).unwrap();
    // The other endpoint's PASIDs have four bits.
    let refused =
        |error| Some(ContextError::Request { pasid: pasid(16), error: RequestError::Refused(error) });
    assert_eq!(contexts.add_mapped(pasid(16)).err(), refused(Status::Range));
    machine.inject([Inject::Refuse(8)]);
    let refused = ContextError::Request { pasid: pasid(1), error: RequestError::Refused(Status::NoMem) };
    assert_eq!(contexts.add_mapped(pasid(1)).err(), Some(refused));
    contexts.add_mapped(pasid(1)).unwrap();
}

#[test]
fn an_attachment_of_unknown_outcome_keeps_table_and_pasid() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let before = machine.outstanding();
    machine.inject([Inject::Hold(virtio_iommu_model::Execute::Now)]);
    let format = virtio_iommu::contexts::table::TableFormat::X86_64;
    let not_added = contexts.add_owned(pasid(1), table(&viommu, format), 0).unwrap_err();
    assert!(not_added.table.is_none());
    assert_eq!(not_added.error, ContextError::Request { pasid: pasid(1), error: RequestError::TimedOut });
    assert_eq!(machine.outstanding(), before + 1, "the table's page stays with the device");
    assert_eq!(contexts.add_mapped(pasid(1)).err(), Some(ContextError::Taken { pasid: pasid(1) }));
    machine.release(virtio_iommu_model::Release::All);
    viommu.poll();
    // Now it is known to be there, and nobody's: it goes when the PASID is wanted.
    let ((), requests, _) = machine.traffic(|| drop(contexts.add_mapped(pasid(1)).unwrap()));
    assert_eq!(requests, 2, "DETACH with the PASID, and ATTACH_TABLE");
    assert_eq!(machine.outstanding(), before + 1);
}

#[test]
fn a_context_holds_for_all_endpoints_of_its_domain() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let memory = machine.memory(PAGE);
    let mut one = contexts.add_mapped(pasid(1)).unwrap();
    // SAFETY: the test's own memory.
    unsafe { one.map(Iova::new(PAGE), memory.phys, PAGE, RW) }.unwrap();
    viommu.attach(EP2, contexts.domain()).unwrap();
    viommu.detach(EP).unwrap();
    let access = |machine: &Machine| {
        let access = virtio_iommu_model::Access::Write(&[1]);
        machine.with_device(|device, ram| device.access_context(ram, EP2.get(), Some(1), PAGE, access))
    };
    assert_eq!(access(&machine), Ok(()));
    one.remove().map_err(|(_, error)| error).unwrap();
    assert!(access(&machine).is_err());
    let detach = machine.requests().into_iter().rfind(|request| matches!(request, Request::Detach { .. }));
    assert!(
        matches!(detach, Some(Request::Detach { endpoint: 9, reserved: 0x1_0000_0001, .. })),
        "{detach:?}"
    );
}
