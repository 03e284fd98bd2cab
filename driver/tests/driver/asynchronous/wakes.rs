//! Who is woken, when, and by whom; and when the device is asked to interrupt.

use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use virtio_iommu::{DmaDevice, Interrupt, Iova, Options};
use virtio_iommu_model::{Config, Execute, Inject, Release, feature};

use super::{AT, Bench};
use crate::support::{ANYWHERE, Bell, EP, EP2, Machine, PAGE, RW, Task, When, interposed};

fn page(number: u64) -> Iova {
    Iova::new(AT.get() + number * PAGE)
}

/// With either way to suppress interrupts.
fn benches(options: Options) -> [Bench; 2] {
    [0, feature::RING_EVENT_IDX].map(|dropped| {
        let features = Config::default().features & !dropped;
        Bench::on(Machine::new(Config { features, ..Config::default() }), options)
    })
}

fn with_slots(slots: u16) -> Options {
    Options { queue_size: 2 * slots, max_polls: u64::MAX, ..Machine::options() }
}

/// Fails when `InFlight::look` does not wake.
#[test]
fn an_answer_that_a_blocking_call_drained_wakes_its_sleeper() {
    let bench = Bench::new();
    let mut task = bench.map_at(AT);
    bench.hold_all();
    task.sleep();
    bench.hold_none();
    bench.machine.release(Release::All);
    bench.viommu.attach(EP2, &bench.domain).unwrap();
    assert_eq!(task.wakes(), 1);
    task.finish().unwrap();
    assert!(bench.reaches(AT));
}

/// Fails when neither `look` nor `sleep`, which the other future's poll runs, wakes, or dropping it does not.
#[test]
fn an_answer_that_another_future_drained_wakes_its_sleeper() {
    let bench = Bench::new();
    let (mut first, mut second) = (bench.map_at(AT), bench.map_at(page(1)));
    bench.hold_all();
    first.sleep();
    second.sleep();
    bench.machine.release(Release::Oldest);
    second.sleep();
    assert_eq!((first.wakes(), second.wakes()), (1, 0));
    first.finish().unwrap();
    bench.machine.release(Release::All);
    bench.hold_none();
    // Dropping one drains too.
    let mut third = bench.map_at(page(2));
    bench.hold_all();
    third.sleep();
    drop(third);
    assert_eq!(second.wakes(), 1);
    second.finish().unwrap();
    bench.recover();
    bench.assert_no_doubt();
}

/// Fails when `take_waker` takes any waker, or `wake` stops after the first.
#[test]
fn each_of_many_sleepers_is_woken_by_its_own_answer() {
    for bench in benches(Machine::options()) {
        let mut tasks: Vec<_> = (0..40).map(|number| bench.map_at(page(number))).collect();
        bench.hold_all();
        tasks.iter_mut().for_each(Task::sleep);
        let mut left: Vec<usize> = (0..tasks.len()).collect();
        while !left.is_empty() {
            // Answers out of order: the middle one, then two at once.
            let mut answered = vec![left.remove(left.len() / 2)];
            bench.machine.release(Release::Nth(left.len().div_ceil(2)));
            if let Some(last) = left.pop() {
                bench.machine.release(Release::Newest);
                answered.push(last);
            }
            assert_eq!(bench.viommu.on_interrupt(), Interrupt::Wake);
            bench.viommu.poll();
            let woken: Vec<usize> = (0..tasks.len()).filter(|index| tasks[*index].wakes() > 0).collect();
            let mut expected: Vec<usize> = (0..tasks.len()).filter(|index| !left.contains(index)).collect();
            expected.sort_unstable();
            assert_eq!(woken, expected);
            for index in answered {
                assert_eq!(tasks[index].wakes(), 1);
                tasks[index].finish().unwrap();
            }
        }
    }
}

/// Polls tasks when they are woken, and answers one request when that leads to nothing. Every `drop_every`th that is woken
/// is dropped instead. Returns how many were done.
fn run_woken<T>(bench: &Bench, tasks: Vec<Task<'_, T>>, drop_every: usize) -> usize {
    let mut tasks: Vec<_> = tasks.into_iter().map(Some).collect();
    let mut seen = vec![0; tasks.len()];
    let (mut done, mut woken) = (0, 0);
    let mut ready: Vec<usize> = (0..tasks.len()).collect();
    // More than it takes: each answer ends one task, or lets one that waited send its request.
    for _ in 0..8 * tasks.len() {
        let mut ended = 0;
        for index in ready.drain(..) {
            let Some(task) = &mut tasks[index] else { continue };
            let was_woken = task.wakes() > seen[index];
            seen[index] = task.wakes();
            woken += usize::from(was_woken);
            let dropped = was_woken && drop_every > 0 && woken % drop_every == 0;
            if dropped || task.poll().is_ready() {
                tasks[index] = None;
                ended += 1;
                done += usize::from(!dropped);
            }
        }
        if tasks.iter().all(Option::is_none) {
            return done;
        }
        let mut answered = 0;
        if ended == 0 {
            answered = bench.machine.release(Release::Oldest);
            assert_eq!(bench.viommu.on_interrupt() == Interrupt::Wake, answered > 0);
            // Only for its reason: a poll would make up for a wake-up that was lost.
            if answered > 0 {
                bench.viommu.poll();
            }
        }
        let wakes = tasks.iter().map(|task| task.as_ref().map_or(0, Task::wakes));
        ready
            .extend(wakes.enumerate().filter(|(index, wakes)| *wakes > seen[*index]).map(|(index, _)| index));
        assert!(!ready.is_empty() || ended + answered > 0, "all sleep, and nothing is under way");
    }
    panic!("{} are not done", tasks.iter().flatten().count());
}

/// Fails when `wake` does not wake those who wait for a slot, or `push` lets the 65th sleep without a waker.
#[test]
fn more_futures_than_slots_are_all_served() {
    for count in [3, 20, 100] {
        for bench in benches(with_slots(2)) {
            let tasks: Vec<_> = (0..count).map(|number| bench.map_at(page(number))).collect();
            bench.hold_all();
            assert_eq!(run_woken(&bench, tasks, 0), count as usize);
            bench.hold_none();
            // SAFETY: mapped by the tasks.
            unsafe { bench.domain.unmap(AT, count * PAGE) }.unwrap();
            bench.assert_nothing_left();
        }
    }
}

/// Fails when only as many of those who wait are woken as there are slots: one that is dropped then took the wake-up along.
#[test]
fn a_woken_future_that_is_dropped_takes_no_wake_up_along() {
    for (slots, count, drop_every) in [(1, 20, 2), (1, 100, 3), (2, 20, 3), (2, 100, 5)] {
        for bench in benches(with_slots(slots)) {
            let tasks: Vec<_> = (0..count).map(|number| bench.map_at(page(number))).collect();
            bench.hold_all();
            let done = run_woken(&bench, tasks, drop_every);
            assert!((1..count as usize).contains(&done));
            bench.recover();
            assert_eq!(bench.domain.mapping_count(), done);
        }
    }
}

/// Fails when `register` keeps the waker that was there, and `look` does not take it back.
#[test]
fn the_last_waker_counts() {
    let bench = Bench::new();
    let mut task = std::pin::pin!(async {
        // SAFETY: the test's own memory, which is never reused.
        unsafe { bench.domain.map_async(bench.phys(0), PAGE, RW, ANYWHERE) }.await
    });
    let (old, new) = (Bell::new(), Bell::new());
    bench.hold_all();
    for bell in [&old, &new] {
        assert!(task.as_mut().poll(&mut Context::from_waker(&bell.waker())).is_pending());
    }
    assert_eq!((old.wakers(), new.wakers()), (0, 1));
    bench.serve();
    assert_eq!((old.wakes(), new.wakes(), new.wakers()), (0, 1, 0));
    assert!(matches!(task.as_mut().poll(&mut Context::from_waker(&new.waker())), Poll::Ready(Ok(_))));
}

/// Fails when a waker is not added where one is that does not wake the same.
#[test]
fn the_last_waker_of_one_that_waits_for_a_slot_counts() {
    let bench = Bench::with_slots(1);
    let mut first = bench.map_at(AT);
    let mut second = std::pin::pin!(async {
        // SAFETY: the test's own memory, which is never reused.
        unsafe { bench.domain.map_async(bench.phys(0), PAGE, RW, ANYWHERE) }.await
    });
    let (old, new) = (Bell::new(), Bell::new());
    bench.hold_all();
    first.sleep();
    for bell in [&old, &new, &new] {
        assert!(second.as_mut().poll(&mut Context::from_waker(&bell.waker())).is_pending());
    }
    assert_eq!(new.wakers(), 1, "the same one is there once");
    bench.serve();
    assert_eq!((first.wakes(), new.wakes()), (1, 0), "the slot is not free before its request is taken");
    first.finish().unwrap();
    assert_eq!(new.wakes(), 1);
    bench.hold_none();
    assert!(matches!(second.as_mut().poll(&mut Context::from_waker(&new.waker())), Poll::Ready(Ok(_))));
}

/// Fails when `new` of the queue wants interrupts, or `rest_if_nobody_sleeps` or its call in `look` or `give_up` goes.
#[test]
fn the_device_interrupts_only_while_somebody_sleeps() {
    for bench in benches(Machine::options()) {
        let blocking = || {
            let before = bench.interrupts();
            for _ in 0..3 {
                let memory = bench.endpoint.alloc_coherent(100).unwrap();
                bench.endpoint.free_coherent(memory).unwrap();
                bench.map().finish().unwrap();
            }
            bench.interrupts() - before
        };
        assert_eq!((blocking(), bench.interrupts()), (0, 0));
        let mut task = bench.map_at(AT);
        bench.hold_all();
        task.sleep();
        bench.hold_none();
        bench.serve();
        assert_eq!(bench.interrupts(), 1);
        task.finish().unwrap();
        assert_eq!(blocking(), 0, "after a sleeper was served");

        let mut task = bench.map_at(page(1));
        bench.hold_all();
        task.sleep();
        bench.hold_none();
        drop(task);
        assert_eq!(blocking(), 0, "after a sleeper went away");
        bench.recover();

        let mut task = bench.map_at(page(2));
        bench.hold_all();
        task.sleep();
        bench.hold_none();
        bench.machine.pass_time(u64::MAX / 2);
        assert!(task.finish().is_err());
        assert_eq!(blocking(), 0, "after a sleeper gave up");
        bench.recover();
    }
}

/// A sleeper among blocking calls, which turn interrupts neither off for him nor on for themselves.
#[test]
fn interrupts_stay_asked_for_while_others_come_and_go() {
    for bench in benches(Machine::options()) {
        let (mut first, mut second) = (bench.map_at(AT), bench.map_at(page(1)));
        bench.hold_all();
        first.sleep();
        second.sleep();
        bench.hold_none();
        // Its own poll, and blocking calls, find nothing for the other.
        bench.map().finish().unwrap();
        bench.viommu.on_interrupt();
        bench.viommu.poll();
        bench.machine.release(Release::Oldest);
        assert_eq!(bench.viommu.on_interrupt(), Interrupt::Wake);
        bench.viommu.poll();
        first.finish().unwrap();
        bench.serve();
        assert_eq!((first.wakes(), second.wakes()), (1, 1));
        second.finish().unwrap();
    }
}

/// The device answers between the driver's look at the ring and its wish to be interrupted, which therefore comes too late
/// for the interrupt. Fails when `sleep` does not drain after `want_interrupts`.
#[test]
fn an_answer_just_before_falling_asleep_is_not_slept_over() {
    for bench in benches(Machine::options()) {
        let machine = bench.machine.handle();
        let mut task = bench.map_at(AT);
        bench.hold_all();
        task.bell.on_clone(move || {
            assert_eq!(machine.release(Release::All), 1);
        });
        let polled = task.poll();
        assert_eq!(bench.interrupts(), 0, "the test missed the window");
        assert!(polled.is_ready() || task.wakes() > 0, "asleep, and nobody will wake it");
        bench.hold_none();
    }
}

/// The same for one that waits for a slot. Fails when `sleep_for_slot` does not drain.
#[test]
fn a_slot_that_comes_free_just_before_falling_asleep_is_not_slept_over() {
    for bench in benches(with_slots(1)) {
        let machine = bench.machine.handle();
        let mut first = bench.map_at(AT);
        bench.hold_all();
        first.sleep();
        // Its slot is free as soon as the answer is drained.
        drop(first);
        let mut second = bench.map_at(page(1));
        second.bell.on_clone(move || {
            assert_eq!(machine.release(Release::All), 1);
        });
        bench.hold_none();
        let polled = second.poll();
        assert!(polled.is_ready() || second.wakes() > 0, "asleep, and nobody will wake it");
        bench.recover();
        bench.assert_no_doubt();
    }
}

/// A waker that does what other code may do: poll the driver, map, and block. Fails when a waker is called or cloned under
/// the lock: this never ends.
#[test]
fn wakers_may_use_the_driver() {
    let bench = Bench::new();
    let mut task = bench.map_at(AT);
    let (viommu, domain, phys) = (bench.viommu.clone(), bench.domain.clone(), bench.phys(2));
    bench.hold_all();
    let other_cpu = viommu.clone();
    task.bell.on_clone(move || {
        other_cpu.poll();
    });
    task.bell.on_wake(move || {
        viommu.poll();
        // SAFETY: the test's own memory, which is never reused.
        unsafe { domain.map_at(page(1), phys, PAGE, RW) }.unwrap();
    });
    task.sleep();
    bench.hold_none();
    bench.serve();
    assert_eq!(task.wakes(), 1);
    task.finish().unwrap();
    assert!(bench.reaches(AT) && bench.reaches(page(1)) && bench.machine.reaches(EP, AT.get()));
}

/// Fails when one PROBE that waits for another's answer is woken by whatever slot is free: it never sleeps.
#[test]
fn a_probe_sleeps_until_the_area_is_free() {
    let bench = Bench::new();
    let third = virtio_iommu::EndpointId::new(11);
    bench.machine.device().add_endpoint(virtio_iommu_model::Endpoint::x86(third.get()));
    let mut first = Task::new(bench.viommu.attach_async(super::UNKNOWN, &bench.other));
    let mut second = Task::new(bench.viommu.attach_async(third, &bench.other));
    bench.hold_all();
    first.sleep();
    second.sleep();
    bench.viommu.poll();
    assert_eq!((first.wakes(), second.wakes()), (0, 0));
    bench.serve();
    assert_eq!(first.wakes(), 1);
    first.sleep();
    assert_eq!(second.wakes(), 1, "the area came free");
    bench.hold_none();
    bench.serve();
    first.finish().unwrap();
    second.finish().unwrap();
}

/// Fails when `look_once` wakes nobody, or `begin` does not look whether anybody waits: whoever began to wait for a slot
/// while one mapping took the last sleeps on.
#[test]
fn who_looks_once_wakes_who_waits_for_his_slot() {
    for anywhere in [true, false] {
        wakes_who_waits(anywhere);
    }
}

/// A mapping anywhere goes the quick way, one at an address does not.
fn wakes_who_waits(anywhere: bool) {
    let (machine, viommu, work) = interposed(When::Before);
    let domain = viommu.create_domain(Default::default()).unwrap();
    viommu.attach(EP, &domain).unwrap();
    let phys = machine.memory(PAGE).phys;
    let map_at = |at| {
        let domain = domain.clone();
        // SAFETY: the test's own memory, which is never reused.
        Task::new(async move { unsafe { domain.map_at_async(at, phys, PAGE, RW) }.await })
    };
    // All slots but one are the device's, and nobody waits for their answers.
    let lost = 127;
    machine.inject((0..lost).map(|_| Inject::Hold(Execute::AtRelease)));
    for index in 0..lost {
        map_at(page(index)).sleep();
    }
    assert_eq!(viommu.stats().abandoned_requests, lost);
    let sleeper = Arc::new(Mutex::new(map_at(page(lost))));
    let (bell, other) = (sleeper.lock().unwrap().bell.clone(), Arc::clone(&sleeper));
    // Before the answer is there, which he would drain himself.
    work.run_next(move || other.lock().unwrap().sleep());
    // SAFETY: as above, here and below.
    let mapped = || unsafe { domain.map(phys, PAGE, RW, ANYWHERE) };
    // SAFETY: as above.
    let mapped_at = || unsafe { domain.map_at(page(lost + 1), phys, PAGE, RW) };
    assert!(if anywhere { mapped().is_ok() } else { mapped_at().is_ok() });
    assert_eq!(bell.wakes(), 1);
    assert_eq!(sleeper.lock().unwrap().finish(), Ok(()));
}
