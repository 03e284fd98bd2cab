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

/// Fails when `settle_map` lets go of a refused MAP's address: another CPU maps there, and the roll-back unmaps that.
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
