//! A device that answers badly, and a ring that is short.

use virtio_iommu::contexts::table::TableFormat;
use virtio_iommu::contexts::{Anonymous, ContextsOptions};
use virtio_iommu::{Iova, Options, RequestError};
use virtio_iommu_model::{Config, Execute, Inject};

use super::{attached, options, pasid, range, reaches, table};
use crate::support::{EP, Machine, PAGE, RW};

#[test]
fn every_bad_answer_to_an_invalidation_leaves_it_stale() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let mut context = contexts.add_owned(pasid(7), table(&viommu, TableFormat::X86_64), 0).unwrap();
    let memory = machine.memory(PAGE);
    let bad = [
        Inject::Unwritten,
        Inject::Status(77),
        Inject::UsedLen(0),
        Inject::UsedLen(3),
        Inject::Drop(Execute::AtRelease),
        Inject::Refuse(6),
    ];
    for inject in bad {
        // SAFETY: the test's own memory.
        unsafe { context.map(Iova::new(PAGE), memory.phys, PAGE, RW) }.unwrap();
        assert!(reaches(&machine, Some(7), PAGE));
        machine.inject([inject]);
        assert!(context.unmap(range(PAGE, PAGE)).is_err(), "{inject:?}");
        assert!(!context.table().stale().is_empty(), "{inject:?}");
        context.invalidate().unwrap();
        assert!(!reaches(&machine, Some(7), PAGE));
    }
}

#[test]
fn one_failure_of_a_batch_fails_it_all() {
    let (machine, viommu, contexts) = attached(Some(Anonymous::Blocked));
    let mut context = contexts.add_owned(pasid(7), table(&viommu, TableFormat::X86_64), 0).unwrap();
    let memory = machine.memory(PAGE);
    for page in 1..6 {
        // SAFETY: the test's own memory.
        unsafe { context.map(Iova::new(2 * PAGE * page), memory.phys, PAGE, RW) }.unwrap();
    }
    for page in 1..5 {
        context.unmap_later(range(2 * PAGE * page, PAGE)).unwrap();
    }
    machine.inject([Inject::Pass, Inject::Pass, Inject::Refuse(4)]);
    assert!(matches!(context.invalidate(), Err(RequestError::Refused(_))));
    assert_eq!(context.table().stale().len(), 4);
    context.invalidate().unwrap();
}

#[test]
fn a_short_ring_takes_a_batch_in_parts() {
    let machine = Machine::new(Config::contexts());
    let staged = machine.start_with(Options { queue_size: 4, ..options() }).unwrap();
    staged.introduce(EP).unwrap();
    let viommu = staged.go_live().unwrap();
    let contexts = viommu.create_contexts(ContextsOptions::default()).unwrap();
    viommu.attach(EP, contexts.domain()).unwrap();
    let mut context = contexts.add_owned(pasid(7), table(&viommu, TableFormat::X86_64), 0).unwrap();
    let memory = machine.memory(PAGE);
    for page in 1..10 {
        // SAFETY: the test's own memory.
        unsafe { context.map(Iova::new(2 * PAGE * page), memory.phys, PAGE, RW) }.unwrap();
        assert!(reaches(&machine, Some(7), 2 * PAGE * page));
    }
    for page in 1..9 {
        context.unmap_later(range(2 * PAGE * page, PAGE)).unwrap();
    }
    let (result, requests, kicks) = machine.traffic(|| context.invalidate());
    assert_eq!((result, requests, kicks), (Ok(()), 8, 4), "two slots");
    assert!(!(1..9).any(|page| reaches(&machine, Some(7), 2 * PAGE * page)));
}
