//! What one CPU leaves behind is not taken for another's. A CPU that has not looked at its answer yet is a future that was not
//! polled again, or one that is at its doorbell.

use std::sync::{Arc, Mutex};

use virtio_iommu::{Direction, Iova, MapError, Options};
use virtio_iommu_model::{Config, Execute, Inject, Release};

use super::{AT, Bench};
use crate::support::{EP, Machine, PAGE, RW, Task, When, interposed};

const ELSEWHERE: Iova = Iova::new(0x20_0000);

/// Maps a page, and says whether it did.
fn maps(bench: &Bench, iova: Iova) -> bool {
    bench.map_at(iova).finish().is_ok()
}

/// What was mapped is whole: reached, not in quarantine, and its owner can unmap it.
fn assert_owned(bench: &Bench, iova: Iova) {
    assert!(bench.reaches(iova), "another's mapping was unmapped");
    // SAFETY: mapped by the test.
    assert_eq!(unsafe { bench.domain.unmap(iova, PAGE) }, Ok(()), "another's mapping is in quarantine");
}

/// Fails when `settle_map` lets go of a refused MAP's address and the roll-back does not tell lists apart: another CPU maps
/// there, and the roll-back unmaps that.
#[test]
fn the_roll_back_of_a_refused_map_spares_who_maps_there_next() {
    let one = Config { max_mappings: 1, ..Config::default() };
    for look_by_dropping in [false, true] {
        let bench = Bench::on(Machine::new(one.clone()), Machine::options());
        assert!(maps(&bench, ELSEWHERE));
        let mut refused = bench.map_at(AT);
        bench.hold_all();
        refused.sleep();
        bench.hold_none();
        bench.machine.release(Release::All);
        // Another CPU drains the refusal, and maps there if it can.
        // SAFETY: mapped above.
        unsafe { bench.domain.unmap(ELSEWHERE, PAGE) }.unwrap();
        let mapped = maps(&bench, AT);
        if look_by_dropping {
            drop(refused);
        } else {
            assert!(matches!(refused.finish(), Err(MapError::Request { .. })));
        }
        assert!(mapped || maps(&bench, AT), "the address is kept");
        assert_owned(&bench, AT);
        bench.assert_nothing_left();
    }
}

/// The same for a part of a list, whose memory waits for it too.
#[test]
fn the_roll_back_of_a_list_spares_who_maps_meanwhile() {
    let bench = Bench::new();
    let segments = bench.segments(3);
    let mut iovas = [Iova::new(0); 3];
    // SAFETY: the test's own memory, which is never reused.
    let list = unsafe { bench.endpoint.map_scatter_async(&segments, Direction::Both, &mut iovas) };
    let mut list = Task::new(list);
    let (pass, refuse, hold) = (Inject::Pass, Inject::Refuse(8), Inject::Hold(Execute::Now));
    bench.machine.inject([hold, refuse, pass]);
    list.sleep();
    bench.machine.release(Release::All);
    bench.viommu.poll();
    let others: Vec<_> = (0..4).map(|_| bench.map().finish().unwrap()).collect();
    assert!(list.finish().is_err());
    others.into_iter().for_each(|iova| assert_owned(&bench, iova));
    drop(list);
    bench.assert_nothing_left();
}

/// Fails when a dropped UNMAP that was answered puts into quarantine whatever is at its address by now.
#[test]
fn an_unmap_that_is_dropped_after_its_answer_spares_who_maps_there_next() {
    let bench = Bench::new();
    assert!(maps(&bench, AT));
    // SAFETY: mapped above.
    let mut unmapping = Task::new(unsafe { bench.domain.unmap_async(AT, PAGE) });
    bench.hold_all();
    unmapping.sleep();
    bench.hold_none();
    bench.serve();
    assert!(maps(&bench, AT), "the answer freed the address");
    drop(unmapping);
    assert_owned(&bench, AT);
    bench.assert_nothing_left();
}

/// Fails when the roll-back takes all records in the list's addresses for the list's: what became of one whose outcome was
/// unknown another CPU can settle, and use the addresses, before whoever sent it looks.
#[test]
fn the_roll_back_of_a_map_of_unknown_outcome_spares_who_maps_there_next() {
    let (machine, viommu, work) = interposed(When::After);
    let domain = viommu.create_domain(Default::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    let phys = machine.memory(PAGE).phys;
    machine.inject([Inject::UsedLen(0)]);
    let (other_cpu, others_domain) = (viommu.clone(), domain.clone());
    let reclaimed = Arc::new(Mutex::new(0));
    let result = Arc::clone(&reclaimed);
    work.run_next(move || {
        other_cpu.poll();
        *result.lock().unwrap() = other_cpu.reclaim();
        // SAFETY: the test's own memory, which is never reused.
        unsafe { others_domain.map_at(AT, phys, PAGE, RW) }.unwrap();
    });
    // SAFETY: as above.
    let mapped = unsafe { domain.map_at(AT, phys, PAGE, RW) };
    assert!(matches!(mapped, Err(MapError::Quarantined { .. })), "{mapped:?}");
    assert_eq!(*reclaimed.lock().unwrap(), 1);
    assert!(machine.reaches(EP, AT.get()), "the other's mapping was unmapped");
    // SAFETY: mapped above.
    assert_eq!(unsafe { domain.unmap(AT, PAGE) }, Ok(()));
    assert_eq!((viommu.stats().quarantined_mappings, domain.mapping_count()), (0, 0));
}

/// A dropped MAP is refused, and its address mapped by another CPU, between the drop of its request and of its list. Fails
/// when the list takes all records in its addresses for its own.
#[test]
fn a_map_that_is_dropped_in_flight_spares_who_maps_there_next() {
    let one = Config { max_mappings: 1, ..Config::default() };
    let bench = Bench::on(Machine::new(one), Options { queue_size: 16, ..Machine::options() });
    let (mut dropped, mut sleeper) = (bench.map_at(AT), bench.map_at(ELSEWHERE));
    bench.hold_all();
    sleeper.sleep();
    dropped.sleep();
    bench.hold_none();
    // Dropping drains this answer, and wakes the sleeper in the middle.
    bench.machine.release(Release::Oldest);
    let (device, other_cpu) = (bench.machine.handle(), bench.viommu.clone());
    let (domain, phys) = (bench.domain.clone(), bench.phys(1));
    sleeper.bell.on_wake(move || {
        assert_eq!(device.release(Release::All), 1, "refused: the sleeper has the only mapping");
        other_cpu.poll();
        // SAFETY: the sleeper's mapping, which nobody uses.
        unsafe { domain.unmap(ELSEWHERE, PAGE) }.unwrap();
        // SAFETY: the test's own memory, which is never reused.
        unsafe { domain.map_at(AT, phys, PAGE, RW) }.unwrap();
    });
    drop(dropped);
    assert_eq!(sleeper.wakes(), 1);
    assert_owned(&bench, AT);
    let _ = sleeper.finish();
    bench.assert_nothing_left();
}
