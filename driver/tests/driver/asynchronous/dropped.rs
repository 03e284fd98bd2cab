//! Futures that are dropped half-way: what is in flight stays the device's, what nobody owns is in quarantine, and nothing
//! is lost for good.
//!
//! Lent memory that came back twice would have failed the test; see [`Machine`](crate::support::Machine).

use virtio_iommu::{CoherentMemory, Direction, DmaDevice, Iova};
use virtio_iommu_model::{Execute, Inject, Release};

use super::kinds::{Kind, Way, kinds};
use super::{AT, Bench};
use crate::support::{EP, PAGE, RW, Task};

/// Mappings that are made while a dropped request is in flight, and have to be whole at the end: that nothing of the dropped
/// one is used for them.
struct Neighbours(Vec<CoherentMemory>);

impl Neighbours {
    fn new(bench: &Bench) -> Self {
        let memory = || bench.endpoint.alloc_coherent(2 * PAGE as usize).unwrap();
        Self((0..4).map(|_| memory()).collect())
    }

    fn check(self, bench: &Bench) {
        for (number, memory) in self.0.into_iter().enumerate() {
            let (iova, byte) = (memory.iova().get(), 0x50 + number as u8);
            // SAFETY: memory of this length that only the test uses.
            unsafe { memory.ptr().as_ptr().write_bytes(byte, memory.len_bytes()) };
            assert_eq!(bench.machine.dma_read(EP, iova + PAGE, 2).unwrap(), [byte; 2]);
            bench.endpoint.free_coherent(memory).unwrap();
        }
    }
}

/// Lets a task sleep `times` times, each but the last time served. False if it was done before.
fn sleeps<T>(bench: &Bench, task: &mut Task<'_, T>, times: usize) -> bool {
    for time in 0..times {
        if time > 0 {
            bench.serve();
        }
        if task.poll().is_ready() {
            return false;
        }
    }
    true
}

/// Runs `test` for each operation, to be dropped in its first, second ... sleep.
fn for_each_sleep(new: impl Fn() -> Bench, test: impl Fn(&Kind, &Bench, Task<'_, String>)) {
    for kind in kinds() {
        for times in 1.. {
            let bench = new();
            let mut task = (kind.start)(&bench, Way::Asynchronous);
            bench.hold_all();
            if !sleeps(&bench, &mut task, times) {
                assert!(times > 1, "{} never slept", kind.name);
                break;
            }
            println!("{} dropped in sleep {times}", kind.name);
            test(&kind, &bench, task);
        }
    }
}

/// Fails when `unmap` owns its mappings only from its first poll on, or `adopt_async` its memory.
#[test]
fn before_the_first_poll() {
    for kind in kinds() {
        println!("{}", kind.name);
        let bench = Bench::new();
        let task = (kind.start)(&bench, Way::Asynchronous);
        let ((), requests, _) = bench.machine.traffic(|| drop(task));
        assert_eq!((requests, bench.viommu.stats().abandoned_requests), (0, 0));
        // What was to be unmapped is still mapped, and nobody's.
        let quarantined = bench.viommu.stats().quarantined_mappings;
        assert_eq!(quarantined, bench.domain.mapping_count());
        assert_eq!(bench.viommu.reclaim(), quarantined);
        bench.assert_nothing_left();
    }
}

/// Fails when `List` or `Owned` do not see to what was not sent, or a waker that stays behind takes a wake-up along.
#[test]
fn while_waiting_for_a_slot() {
    for kind in kinds() {
        println!("{}", kind.name);
        let bench = Bench::with_slots(2);
        let mut task = (kind.start)(&bench, Way::Asynchronous);
        let mut fillers = [0, 1].map(|number| bench.map_at(Iova::new(2 * AT.get() + number * PAGE)));
        let mut last = bench.map_at(Iova::new(3 * AT.get()));
        bench.hold_all();
        fillers.iter_mut().for_each(Task::sleep);
        task.sleep();
        last.sleep();
        let ((), requests, _) = bench.machine.traffic(|| drop(task));
        assert_eq!((requests, bench.viommu.stats().abandoned_requests), (0, 0));
        bench.hold_none();
        bench.serve();
        for filler in &mut fillers {
            assert_eq!(filler.wakes(), 1);
            filler.finish().unwrap();
        }
        assert!(last.wakes() > 0, "it waited behind the one that was dropped");
        last.finish().unwrap();
        bench.recover();
        // SAFETY: mapped by the tasks.
        unsafe { bench.domain.unmap(Iova::new(2 * AT.get()), 2 * PAGE) }.unwrap();
        // SAFETY: as above.
        unsafe { bench.domain.unmap(Iova::new(3 * AT.get()), PAGE) }.unwrap();
        bench.assert_nothing_left();
    }
}

/// Fails when dropping `InFlight` or `List` does nothing, or memory goes back with the future.
#[test]
fn in_flight() {
    for_each_sleep(Bench::new, |kind, bench, task| {
        bench.hold_none();
        let in_flight = bench.machine.device().held();
        let blocks = bench.machine.outstanding();
        drop(task);
        assert_eq!(bench.viommu.stats().abandoned_requests, in_flight as u64);
        let neighbours = Neighbours::new(bench);
        // Trying does not help as long as the device owes answers.
        bench.viommu.poll();
        bench.viommu.reclaim();
        assert!(bench.none_back(), "{}: memory of a request in flight went back", kind.name);
        assert_eq!(bench.machine.outstanding(), blocks + 4, "{}", kind.name);
        assert_eq!(bench.machine.release(Release::AllReversed), in_flight);
        bench.viommu.poll();
        bench.viommu.reclaim();
        neighbours.check(bench);
        bench.assert_nothing_left();
    });
}

/// The same with room for few requests, so that lists are sent in several parts.
#[test]
fn in_flight_with_few_slots() {
    for_each_sleep(
        || Bench::with_slots(2),
        |_, bench, task| {
            drop(task);
            bench.recover();
            bench.assert_nothing_left();
        },
    );
}

/// Fails when `List` does not disown, or `disown_op` disowns what is not there to be unmapped apart.
#[test]
fn after_somebody_else_drained_the_answer() {
    for_each_sleep(Bench::new, |_, bench, task| {
        bench.hold_none();
        bench.serve();
        assert!(task.wakes() > 0);
        let neighbours = Neighbours::new(bench);
        drop(task);
        assert_eq!(bench.viommu.stats().abandoned_requests, 0);
        bench.recover();
        neighbours.check(bench);
        bench.assert_nothing_left();
    });
}

/// Refusals do to what was dropped as little as answers.
#[test]
fn in_flight_and_refused_later() {
    for status in [4, 8] {
        for_each_sleep(Bench::new, |_, bench, task| {
            bench.hold_none();
            drop(task);
            assert!(bench.machine.refuse_held(status) > 0);
            bench.recover();
            bench.assert_nothing_left_but_attachments();
        });
    }
}

/// What happens to the requests of a list, the `held`th of which is held back, and to what is left when it is dropped there.
/// False if it did not get there.
fn drop_list_at(bench: &Bench, script: &[Inject], held: usize, drained: bool) -> bool {
    let segments = bench.segments(6);
    let mut iovas = [Iova::new(0); 6];
    // SAFETY: the test's own memory, which is never reused.
    let list = unsafe { bench.endpoint.map_scatter_async(&segments, Direction::Both, &mut iovas) };
    let mut list = Task::new(list);
    let mut script = script.to_vec();
    script.resize(script.len().max(held), Inject::Pass);
    script.insert(held, Inject::Hold(Execute::AtRelease));
    bench.machine.inject(script);
    if list.poll().is_ready() {
        return false;
    }
    if drained {
        bench.serve();
    }
    drop(list);
    bench.machine.device().inject.script.clear();
    bench.recover();
    true
}

/// Fails when `roll_back` forgets what it did not get to, or `List` does.
#[test]
fn in_the_middle_of_a_list_that_is_rolled_back() {
    let (pass, refuse) = (Inject::Pass, Inject::Refuse(8));
    let scripts: [&[Inject]; 4] = [&[], &[refuse], &[pass, refuse], &[pass, refuse, pass, pass, refuse]];
    for slots in [1, 2, 3, 64] {
        for script in scripts {
            for drained in [false, true] {
                let mut reached = 0;
                for held in 0..12 {
                    let bench = Bench::with_slots(slots);
                    if drop_list_at(&bench, script, held, drained) {
                        reached += 1;
                        bench.assert_nothing_left();
                    }
                }
                assert!(reached >= 1, "{slots} slots, {script:?}");
            }
        }
    }
}

/// Fails when `unmap_apart` forgets what it did not get to, or `disown_op` what it was asked to do.
#[test]
fn in_the_middle_of_unmapping_apart() {
    for drained in [false, true] {
        for held in 0..=4 {
            let bench = Bench::new();
            let held_memory: Vec<_> = (0..4).map(|_| bench.lend()).collect();
            let mappings: Vec<_> = held_memory
                .into_iter()
                .map(|memory| {
                    bench.endpoint.adopt(memory, Direction::Both).map_err(|(error, _)| error).unwrap()
                })
                .collect();
            // From the top down, so that they touch.
            let start = mappings.iter().map(|mapping| mapping.iova()).min().unwrap();
            // SAFETY: mapped above.
            let mut task = Task::new(unsafe { bench.domain.unmap_async(start, 4 * PAGE) });
            let mut script = vec![Inject::Refuse(5), Inject::Pass, Inject::Pass, Inject::Pass, Inject::Pass];
            if held > 0 {
                script[held] = Inject::Hold(Execute::AtRelease);
            } else {
                // The answer RANGE itself comes late.
                bench.machine.device().inject.script.clear();
                script = vec![Inject::Hold(Execute::AtRelease)];
            }
            bench.machine.inject(script);
            task.sleep();
            if held == 0 {
                bench.machine.refuse_held(5);
            } else if drained {
                bench.machine.release(Release::All);
            }
            if drained {
                bench.viommu.poll();
                assert_eq!(task.wakes(), 1);
            }
            drop(task);
            bench.machine.device().inject.script.clear();
            let unmapped = held.saturating_sub(1);
            let back = || {
                bench.lent.lock().unwrap().iter().filter(|phys| bench.machine.is_lent_back(**phys)).count()
            };
            if !drained {
                assert_eq!(back(), unmapped, "what was confirmed, and nothing else");
            }
            bench.recover();
            assert_eq!(back(), 4);
            bench.assert_nothing_left();
        }
    }
}

/// What is left in quarantine is not used: it keeps its addresses, and the device its reach, until it was unmapped.
#[test]
fn a_dropped_map_is_not_forgotten() {
    let bench = Bench::new();
    let mut task = bench.map_at(AT);
    bench.hold_all();
    task.sleep();
    bench.hold_none();
    drop(task);
    let stats = bench.viommu.stats();
    assert_eq!((stats.quarantined_mappings, stats.quarantined_bytes, stats.abandoned_requests), (1, PAGE, 1));
    bench.machine.release(Release::All);
    bench.viommu.poll();
    assert!(bench.reaches(AT), "the late answer was yes");
    // SAFETY: refused before anything is sent.
    assert!(unsafe { bench.domain.map_at(AT, bench.phys(1), PAGE, RW) }.is_err());
    assert_eq!(bench.viommu.reclaim(), 1);
    assert!(!bench.reaches(AT));
    bench.assert_nothing_left();
}
