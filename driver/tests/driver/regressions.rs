//! Sequences that once went wrong, most of them between two CPUs, or between a CPU and its interrupt handler.

use std::sync::{Arc, Mutex};

use virtio_iommu::{
    AttachError, Direction, DmaDevice, DomainOptions, EndpointOptions, Introduction, Iova, MapError,
    PhysSegment, Prot, RequestError, Status, UnmapError,
};
use virtio_iommu_model::{Config, Execute, Inject, Release};

use crate::support::{
    ANYWHERE, Broken, EP, EP2, Machine, PAGE, RW, When, heap_uses, interposed, take_broken,
};

/// Fails when mappings do not carry their domain: the other endpoint's bounce pages, at the same address, are freed.
#[test]
fn an_endpoint_cannot_free_what_another_has_at_the_same_address() {
    let (machine, viommu) = Machine::live(Config::default());
    let domain = || viommu.create_domain(DomainOptions::default()).unwrap();
    let mine = viommu.open(EP, &domain(), EndpointOptions::default()).unwrap();
    let bounce = EndpointOptions { bounce_bytes: 0x4000, ..EndpointOptions::default() };
    let other = viommu.open(EP2, &domain(), bounce).unwrap();
    let memory = mine.alloc_coherent(0x4000).unwrap();
    let (iova, before) = (memory.iova(), machine.outstanding());
    assert_eq!(other.free_coherent(memory), Err(UnmapError::NotMapped(iova)));
    assert_eq!(machine.outstanding(), before);
    assert!(machine.reaches(EP2, iova.get()), "the other's bounce pages are as they were");
}

/// Fails when the error of the first failed MAP hides that the roll-back failed too.
#[test]
fn a_list_that_cannot_be_rolled_back_says_so() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    let list = [(); 2].map(|()| PhysSegment { phys: machine.memory(PAGE).phys, len: PAGE as usize });
    let map = || {
        let mut iovas = [Iova::new(0); 2];
        // SAFETY: the test's own memory, which is never reused.
        unsafe { endpoint.map_scatter(&list, Direction::Both, &mut iovas) }.map(|_| ()).unwrap_err()
    };

    machine.inject([Inject::Pass, Inject::Refuse(8), Inject::Refuse(3)]);
    let error = map();
    assert!(error.to_string().contains("may be mapped"), "{error}");
    assert_eq!(viommu.stats().quarantined_mappings, 1);
    assert_eq!(viommu.reclaim(), 1);

    // The first is refused, and the second is never answered: that it timed out must not be lost.
    machine.inject([Inject::Refuse(8), Inject::Hold(Execute::Now)]);
    let error = map();
    assert!(error.to_string().contains("may be mapped"), "{error}");
    assert_eq!(viommu.stats().quarantined_mappings, 1);
    machine.release(Release::All);
    viommu.poll();
    assert_eq!((viommu.reclaim(), viommu.stats().quarantined_mappings), (1, 0));
}

/// Fails when memory of a refused MAP is anybody's: another CPU's poll gives it back, and the retry maps it.
#[test]
fn memory_lent_for_a_refused_map_goes_to_its_lender() {
    let (machine, viommu, work) = interposed(When::After);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    machine.inject([Inject::Refuse(4)]);
    let other_cpu = viommu.clone();
    work.run_next(move || {
        other_cpu.poll();
    });
    let (held, phys) = machine.lend(PAGE);
    let mapping = endpoint.adopt(held, Direction::Both).unwrap();
    assert!(!machine.is_lent_back(phys), "mapped, so not back");
    assert!(machine.reaches(EP, mapping.iova().get()));
    endpoint.unmap(mapping).unwrap();
    assert!(machine.is_lent_back(phys));
}

/// Fails when `reclaim` may take a mapping that a waiter is still unmapping, and the waiter overlooks it.
#[test]
fn unmap_is_not_done_while_another_cpu_has_a_part_of_it() {
    let (machine, viommu, work) = interposed(When::After);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    let start = Iova::new(0x1_0000);
    for page in 0..2 {
        let iova = Iova::new(start.get() + page * PAGE);
        // SAFETY: the test's own memory, which is never reused.
        unsafe { domain.map_at(iova, machine.memory(PAGE).phys, PAGE, RW) }.unwrap();
    }
    machine.inject([Inject::Refuse(5), Inject::Pass, Inject::Hold(Execute::AtRelease)]);
    let (again, other_cpu) = (work.clone(), viommu.clone());
    // At the second doorbell, after the first page was unmapped by itself.
    work.run_next(move || {
        again.run_next(move || {
            other_cpu.reclaim();
        });
    });
    // SAFETY: mapped just above.
    let result = unsafe { domain.unmap(start, 2 * PAGE) };
    assert!(matches!(result, Err(UnmapError::Request { error: RequestError::TimedOut, .. })), "{result:?}");
    assert!(machine.reaches(EP, start.get() + PAGE), "the device did not do it yet");
    machine.release(Release::All);
    viommu.poll();
    assert!(!machine.reaches(EP, start.get() + PAGE));
    assert_eq!(viommu.stats().quarantined_mappings, 0);
}

/// Fails when only the submitter whose publication crossed the device's index rings: the handler waits in vain.
#[test]
fn a_handler_that_interrupts_a_submitter_before_its_doorbell_is_served() {
    let (machine, viommu, work) = interposed(When::Before);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    let (outer, inner) = (machine.memory(PAGE).phys, machine.memory(PAGE).phys);
    let result = Arc::new(Mutex::new(None));
    let (handlers_domain, handlers_result) = (domain.clone(), Arc::clone(&result));
    work.run_next(move || {
        // SAFETY: the test's own memory, which is never reused.
        let mapped = unsafe { handlers_domain.map(inner, PAGE, RW, ANYWHERE) };
        *handlers_result.lock().unwrap() = Some(mapped);
    });
    // SAFETY: as above.
    let mapped = unsafe { domain.map(outer, PAGE, RW, ANYWHERE) };
    assert!(mapped.is_ok(), "{mapped:?}");
    let handlers = result.lock().unwrap().take();
    assert!(matches!(handlers, Some(Ok(_))), "{handlers:?}");
    drop(machine);
}

/// Fails when dropping the view gives the address back that must always fault.
#[test]
fn the_faulting_address_outlives_a_view_that_was_dropped() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    let faulting = endpoint.faulting_iova();
    drop(endpoint);
    // SAFETY: the test's own memory, which is never reused.
    let mapped = unsafe { domain.map(machine.memory(PAGE).phys, PAGE, RW, ANYWHERE) }.unwrap();
    assert_ne!(mapped, faulting);
    assert!(!machine.reaches(EP, faulting.get()));
}

/// Fails when a failed `open` detaches whatever was attached.
#[test]
fn a_second_view_that_cannot_be_had_leaves_the_first_alone() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let first = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    machine.limit_allocations(0);
    let bounce = EndpointOptions { bounce_bytes: 4096, ..EndpointOptions::default() };
    assert!(viommu.open(EP, &domain, bounce).is_err());
    assert_eq!(machine.device().domain_of(EP.get()), Some(domain.id().get()));
    drop(first);
}

/// Fails when an emptied domain takes endpoints although its records tell of mappings that are gone.
#[test]
fn a_domain_that_lost_its_mappings_takes_no_endpoint() {
    let machine = Machine::new(Config::default());
    let staged = machine.start().unwrap();
    staged.introduce(EP).unwrap();
    let domain = staged.create_domain(DomainOptions::default()).unwrap();
    staged.attach(EP, &domain).unwrap();
    // SAFETY: the test's own memory, which is never reused.
    unsafe { domain.map(machine.memory(PAGE).phys, PAGE, RW, ANYWHERE) }.unwrap();
    staged.detach(EP).unwrap();
    assert_eq!(staged.attach(EP, &domain), Err(AttachError::DeadDomain));
}

/// Fails when a refused DETACH counts as proof that the endpoint was attached.
#[test]
fn an_endpoint_of_unknown_state_is_not_attached_by_a_refusal() {
    let machine = Machine::new(Config::default());
    let viommu = machine.bring_up();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    machine.inject([Inject::UsedLen(0)]);
    assert!(viommu.attach(EP, &domain).is_err());
    // NOMEM: not INVAL, which says that it is not there.
    machine.inject([Inject::Refuse(8)]);
    assert!(viommu.detach(EP).is_err());
    assert_eq!(viommu.attach(EP, &domain), Err(AttachError::Busy(EP)));
}

/// Fails when an endpoint that the device cannot detach stays in the driver's scratch domain.
#[test]
fn a_device_that_cannot_detach_can_still_be_used() {
    let machine = Machine::new(Config::crosvm());
    let staged = machine.start().unwrap();
    assert_eq!(staged.introduce(EP), Ok(Introduction::CannotDetach));
    let viommu = staged.go_live().unwrap();
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    assert_eq!(machine.device().domain_of(EP.get()), Some(domain.id().get()));
    let memory = machine.memory(PAGE);
    // SAFETY: the test's own memory, which is never reused.
    let iova = unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) }.unwrap();
    assert!(machine.reaches(EP, iova.get()));
    let another = viommu.create_domain(DomainOptions::default()).unwrap();
    assert_eq!(viommu.attach(EP, &another), Err(AttachError::Busy(EP)));
    assert_ne!(another.id(), domain.id());
}

/// Fails when one refused ATTACH of the sweep ends the bring-up.
#[test]
fn an_endpoint_that_is_refused_is_reported_and_the_next_number_is_tried() {
    let machine = Machine::new(Config::default());
    let staged = machine.start().unwrap();
    machine.inject([Inject::Pass, Inject::Refuse(4)]);
    assert_eq!(staged.introduce(EP), Ok(Introduction::Known));
    machine.inject([Inject::Pass, Inject::Refuse(2), Inject::Refuse(2)]);
    assert_eq!(staged.introduce(EP2), Ok(Introduction::Refused(Status::Unsupp)));
}

/// Fails when taking another number uses the heap.
#[test]
fn mapping_uses_no_heap_even_when_the_domain_gets_another_number() {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    let before = domain.id();
    machine.inject([Inject::Refuse(4)]);
    // SAFETY: the test's own memory, which is never reused.
    let (mapped, uses) = heap_uses(|| unsafe { domain.map(memory.phys, PAGE, RW, ANYWHERE) });
    assert!(mapped.is_ok());
    assert_ne!(domain.id(), before);
    assert_eq!(uses, 0);
}

/// Fails when ranges that leave without a record are not counted.
#[test]
fn many_views_do_not_make_the_free_list_grow_under_the_lock() {
    let (_machine, viommu, domain) = Machine::attached(Config::default());
    let mut views: Vec<_> =
        (0..200).map(|_| viommu.open(EP, &domain, EndpointOptions::default()).ok()).collect();
    for view in views.iter_mut().step_by(2) {
        drop(view.take());
    }
    assert_eq!(take_broken(), Broken::NONE);
}

/// Fails when a broken ring is waited for.
#[test]
fn a_broken_ring_is_an_error_at_once() {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let phys = machine.memory(PAGE).phys;
    machine.inject([Inject::UsedJump(300)]);
    // SAFETY: the test's own memory, which is never reused.
    let map = || unsafe { domain.map(phys, PAGE, RW, ANYWHERE) };
    assert!(matches!(map(), Err(MapError::Quarantined { error: RequestError::RingBroken { .. }, .. })));
    let polls = machine.relaxed();
    assert!(matches!(map(), Err(MapError::NotSent(RequestError::RingBroken { .. }))));
    assert_eq!(machine.relaxed(), polls);
}

/// Fails when bits that do not exist are sent (D-17).
#[test]
fn permission_bits_that_do_not_exist_are_refused() {
    let (machine, _viommu, domain) = Machine::attached(Config::default());
    let phys = machine.memory(PAGE).phys;
    let odd = Prot::from_bits_retain(0x81);
    // SAFETY: nothing is mapped.
    let (result, requests, _) = machine.traffic(|| unsafe { domain.map(phys, PAGE, odd, ANYWHERE) });
    assert_eq!((result, requests), (Err(MapError::UnknownFlags(0x81)), 0));
}

/// Fails when bytes of a MAP of unknown outcome are subtracted without having been added.
#[test]
fn mapped_bytes_are_those_of_confirmed_mappings() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let [first, second] = [(); 2].map(|()| machine.memory(PAGE).phys);
    // SAFETY: the test's own memory, which is never reused.
    unsafe { domain.map(first, PAGE, RW, ANYWHERE) }.unwrap();
    machine.inject([Inject::UsedLen(0)]);
    // SAFETY: as above.
    assert!(unsafe { domain.map(second, PAGE, RW, ANYWHERE) }.is_err());
    assert_eq!(viommu.reclaim(), 1);
    assert_eq!(domain.stats().mapped_bytes, PAGE);
}

/// Fails when the endpoint is detached before its pages are unmapped while the bypass is open.
#[test]
fn closing_before_the_bypass_is_closed_leaves_nothing() {
    let machine = Machine::new(Config::default());
    let staged = machine.start().unwrap();
    staged.introduce(EP).unwrap();
    let domain = staged.create_domain(DomainOptions::default()).unwrap();
    let bounce = EndpointOptions { bounce_bytes: 4096, ..EndpointOptions::default() };
    let before = machine.outstanding();
    staged.open(EP, &domain, bounce).unwrap().close().unwrap();
    assert_eq!((staged.stats().quarantined_mappings, machine.outstanding()), (0, before));
}

/// Fails when an endpoint that was unplugged stays attached for good: its domain never dies.
#[test]
fn an_endpoint_that_was_unplugged_is_detached() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
    let (held, phys) = machine.lend(PAGE);
    let mapping = endpoint.adopt(held, Direction::Both).unwrap();
    machine.device().remove_endpoint(EP.get());
    viommu.detach(EP).unwrap();
    endpoint.unmap(mapping).unwrap();
    assert!(machine.is_lent_back(phys));
    assert!(matches!(viommu.attach(EP, &domain), Err(AttachError::Request { .. })));
}

/// Fails when the first mapping that cannot be reclaimed keeps the others in quarantine.
#[test]
fn reclaiming_goes_on_after_one_that_fails() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    for _ in 0..3 {
        // SAFETY: the test's own memory, which is never reused.
        let iova = unsafe { domain.map(machine.memory(PAGE).phys, PAGE, RW, ANYWHERE) }.unwrap();
        machine.inject([Inject::Refuse(8)]);
        // SAFETY: mapped just above.
        assert!(unsafe { domain.unmap(iova, PAGE) }.is_err());
    }
    machine.inject([Inject::Refuse(8)]);
    assert_eq!((viommu.reclaim(), viommu.stats().quarantined_mappings), (2, 1));
}

/// Fails when a request that was sent, and given up on after a shutdown, is said not to have been sent.
#[test]
fn a_request_that_a_shutdown_overtakes_has_an_unknown_outcome() {
    let (machine, viommu, work) = interposed(When::After);
    let domain = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    let other_cpu = viommu.clone();
    work.run_next(move || {
        // SAFETY: the endpoint does what the test says.
        let _ = unsafe { other_cpu.shutdown(virtio_iommu::Leave::Blocked) };
    });
    // SAFETY: the test's own memory, which is never reused.
    let mapped = unsafe { domain.map(machine.memory(PAGE).phys, PAGE, RW, ANYWHERE) };
    assert!(matches!(mapped, Err(MapError::Quarantined { .. })), "{mapped:?}");
    assert_eq!(viommu.stats().quarantined_mappings, 1);
}

/// Fails when a domain of which no endpoint is known to be left takes another as if the device had its mappings
/// still: it was detached, so that the domain died, and the answer does not say so.
#[test]
fn a_domain_that_may_have_died_takes_no_endpoint() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    // SAFETY: the test's own memory, which is never reused.
    let iova = unsafe { domain.map(machine.memory(PAGE).phys, PAGE, RW, ANYWHERE) }.unwrap();
    machine.inject([Inject::Status(0x80)]);
    assert!(viommu.detach(EP).is_err());
    assert_eq!(viommu.attach(EP2, &domain), Err(AttachError::DeadDomain));
    assert!(!machine.reaches(EP2, iova.get()));
    // Without mappings there is nothing to be in doubt about.
    // SAFETY: mapped above.
    unsafe { domain.unmap(iova, PAGE) }.unwrap_err();
    let other = viommu.create_domain(DomainOptions::default()).unwrap();
    viommu.attach(EP2, &other).unwrap();
}

/// Fails when an ATTACH that was answered late leaves a domain that had died without its mappings, and attaching once
/// more says that all is well.
#[test]
fn attaching_once_more_maps_what_a_late_answer_left_unmapped() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    // SAFETY: the test's own memory, which is never reused.
    let iova = unsafe { domain.map(machine.memory(PAGE).phys, PAGE, RW, ANYWHERE) }.unwrap();
    for again in ["attach", "move"] {
        viommu.detach(EP).unwrap();
        machine.inject([Inject::Hold(Execute::Now)]);
        assert!(viommu.attach(EP, &domain).is_err());
        machine.release(Release::All);
        viommu.poll();
        match again {
            "attach" => viommu.attach(EP, &domain).unwrap(),
            _ => viommu.move_endpoint(EP, &domain).unwrap(),
        }
        assert!(machine.reaches(EP, iova.get()), "{again}");
    }
    let ((), requests, _) = machine.traffic(|| viommu.attach(EP, &domain).unwrap());
    assert_eq!(requests, 0, "all is there");
}

/// Fails when a mapping that may not have been mapped again counts as nobody's: its memory then goes back, with the
/// domain's end or by reclaiming, while its owner still writes to it.
#[test]
fn a_replay_of_unknown_outcome_leaves_the_memory_with_its_owner() {
    for inject in [Inject::UsedLen(0), Inject::Status(0x80), Inject::Hold(Execute::Now)] {
        let (machine, viommu, domain) = Machine::attached(Config::default());
        let endpoint = viommu.open(EP, &domain, EndpointOptions::default()).unwrap();
        let memory = endpoint.alloc_coherent(PAGE as usize).unwrap();
        let phys = domain.translate(memory.iova()).unwrap().phys;
        viommu.detach(EP).unwrap();
        machine.inject([Inject::Pass, inject]);
        assert!(matches!(viommu.attach(EP, &domain), Err(AttachError::Replay { .. })), "{inject:?}");
        machine.release(Release::All);
        viommu.poll();
        viommu.reclaim();
        assert!(machine.is_live(phys), "{inject:?}: its owner has it");
        // The domain is dead: where an answer came after its end, the device knows of nothing to unmap.
        let _ = endpoint.free_coherent(memory);
        assert!(!machine.is_live(phys), "{inject:?}");
    }
}

/// Fails when an ATTACH that was carried out late, after all others had left the domain, counts as if the domain had
/// lived on with its mappings.
#[test]
fn a_late_attach_does_not_bring_mappings_back() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    machine.inject([Inject::Hold(Execute::AtRelease)]);
    assert!(viommu.attach(EP2, &domain).is_err());
    // SAFETY: the test's own memory, which is never reused.
    let iova = unsafe { domain.map(machine.memory(PAGE).phys, PAGE, RW, ANYWHERE) }.unwrap();
    viommu.detach(EP).unwrap();
    machine.release(Release::All);
    viommu.poll();
    assert_eq!(viommu.attach(EP2, &domain), Err(AttachError::Busy(EP2)), "it has to leave first");
    viommu.detach(EP2).unwrap();
    viommu.attach(EP2, &domain).unwrap();
    assert!(machine.reaches(EP2, iova.get()));
}
