//! Sleepers whose answer does not come: deadlines, a device that asks for a reset, a broken ring, a shutdown.

use virtio_iommu::{Interrupt, Iova, Leave, MapError, Options, RequestError};
use virtio_iommu_model::{Config, Inject, Release};

use super::{AT, Bench};
use crate::support::{Machine, PAGE, POLLS, RW, Task, When, interposed};

type Mapping<'a> = Task<'a, Result<(), MapError>>;

fn page(number: u64) -> Iova {
    Iova::new(AT.get() + number * PAGE)
}

fn quarantined(result: Result<(), MapError>) -> RequestError {
    match result {
        Err(MapError::Quarantined { error, .. }) => error,
        other => panic!("{other:?}"),
    }
}

fn refused(result: Result<(), MapError>) -> RequestError {
    match result {
        Err(MapError::NotSent(error) | MapError::Request { error, .. }) => error,
        other => panic!("{other:?}"),
    }
}

/// Two requests in flight, and one future that waits for a slot.
fn three_sleepers(bench: &Bench) -> [Mapping<'_>; 3] {
    let mut tasks = [0, 1, 2].map(|number| bench.map_at(page(number)));
    bench.hold_all();
    tasks.iter_mut().for_each(Task::sleep);
    bench.hold_none();
    assert_eq!(bench.machine.device().held(), 2);
    tasks
}

/// Fails when `sleep` or `sleep_for_slot` sets no alarm, or `wake_due_at` ignores it.
#[test]
fn a_sleeper_is_woken_by_a_poll_after_its_deadline() {
    let bench = Bench::with_slots(2);
    let mut tasks = three_sleepers(&bench);
    let timeout = Machine::options().timeout_ns;
    bench.machine.pass_time(timeout - 1);
    bench.viommu.poll();
    assert_eq!(tasks.each_ref().map(Task::wakes), [0; 3], "before the deadline");
    bench.machine.pass_time(1);
    assert_eq!(tasks.each_ref().map(Task::wakes), [0; 3], "without a poll");
    bench.viommu.poll();
    assert_eq!(tasks.each_ref().map(Task::wakes), [1; 3]);

    let [first, second, third] = tasks.each_mut().map(Task::finish);
    assert_eq!((quarantined(first), quarantined(second)), (RequestError::TimedOut, RequestError::TimedOut));
    assert_eq!(refused(third), RequestError::NoSlot);
    let stats = bench.viommu.stats();
    assert_eq!((stats.quarantined_mappings, stats.abandoned_requests), (2, 2));
    drop(tasks);
    bench.recover();
    bench.assert_nothing_left();
}

/// Fails when a deadline that passed for one is taken for everybody's, or nobody sets the alarm again.
#[test]
fn each_sleeper_has_a_deadline_of_its_own() {
    let bench = Bench::new();
    let half = Machine::options().timeout_ns / 2;
    let (mut early, mut late) = (bench.map_at(AT), bench.map_at(page(1)));
    bench.hold_all();
    early.sleep();
    bench.machine.pass_time(half);
    late.sleep();
    bench.machine.pass_time(half);
    bench.viommu.poll();
    assert_eq!(early.wakes(), 1);
    // Woken for nothing, at worst.
    if late.wakes() > 0 {
        late.sleep();
    }
    assert_eq!(quarantined(early.finish()), RequestError::TimedOut);
    let before = late.wakes();
    bench.machine.pass_time(half);
    bench.viommu.poll();
    assert_eq!(late.wakes(), before + 1);
    assert_eq!(quarantined(late.finish()), RequestError::TimedOut);
    drop((early, late));
    bench.recover();
    bench.assert_nothing_left();
}

/// Fails when `wake_due_at` wakes nobody where there is no clock.
#[test]
fn without_a_clock_polls_count() {
    let options = Options { queue_size: 4, ..Machine::options() };
    let bench = Bench::on(Machine::clockless(Config::default()), options);
    let mut tasks = three_sleepers(&bench);
    let mut polls = 0;
    let mut results = [const { None }; 3];
    while results.iter().any(Option::is_none) {
        bench.viommu.poll();
        polls += 1;
        for (task, result) in tasks.iter_mut().zip(&mut results).filter(|(_, result)| result.is_none()) {
            assert_eq!(u64::from(task.wakes()), polls, "each poll wakes");
            if let std::task::Poll::Ready(ended) = task.poll() {
                *result = Some(ended);
            }
        }
        assert!(polls <= POLLS);
    }
    assert!(polls >= POLLS - 1, "{polls}");
    let [first, second, third] = results.map(Option::unwrap);
    assert_eq!((quarantined(first), quarantined(second)), (RequestError::TimedOut, RequestError::TimedOut));
    assert_eq!(refused(third), RequestError::NoSlot);
    drop(tasks);
    bench.recover();
    bench.assert_nothing_left();
}

/// Fails when `poll` does not look at the status after a configuration interrupt, or `end` wakes nobody.
#[test]
fn a_device_that_asks_for_a_reset_wakes_all_sleepers() {
    let bench = Bench::with_slots(2);
    let mut tasks = three_sleepers(&bench);
    bench.machine.device().fail();
    assert_eq!(bench.viommu.on_interrupt(), Interrupt::Wake);
    assert_eq!(tasks.each_ref().map(Task::wakes), [0; 3], "by the handler");
    bench.viommu.poll();
    assert_eq!(tasks.each_ref().map(Task::wakes), [1; 3]);
    let [first, second, third] = tasks.each_mut().map(Task::finish);
    let reset = RequestError::NeedsReset;
    assert_eq!((quarantined(first), quarantined(second), refused(third)), (reset, reset, reset));
    assert_eq!(bench.viommu.stats().quarantined_mappings, 2);
    // Nothing sleeps from now on.
    assert_eq!(refused(bench.map_at(page(3)).finish()), reset);
}

/// Fails when an interrupt for the configuration that comes with one for a queue is overlooked.
#[test]
fn a_configuration_interrupt_is_not_lost_behind_another() {
    let bench = Bench::with_slots(2);
    let mut tasks = three_sleepers(&bench);
    assert!(!bench.machine.reaches(crate::support::EP2, 0));
    assert_eq!(bench.viommu.on_interrupt(), Interrupt::Wake);
    bench.machine.device().fail();
    assert_eq!(bench.viommu.on_interrupt(), Interrupt::Handled);
    bench.viommu.poll();
    assert_eq!(tasks.each_ref().map(Task::wakes), [1; 3]);
    assert_eq!(quarantined(tasks[0].finish()), RequestError::NeedsReset);
}

/// Fails when `wake_due` does not look whether the ring broke: only whoever blocks finds out.
#[test]
fn a_broken_ring_wakes_all_sleepers() {
    let (machine, viommu, work) = interposed(When::After);
    let domain = viommu.create_domain(Default::default()).unwrap();
    viommu.attach(crate::support::EP, &domain).unwrap();
    let phys = machine.memory(PAGE).phys;
    // SAFETY: the test's own memory, which is never reused.
    let map = |at| Task::new(unsafe { domain.map_at_async(at, phys, PAGE, RW) });
    let (mut sleeper, mut other) = (map(AT), map(page(1)));
    machine.inject([Inject::Hold(virtio_iommu_model::Execute::AtRelease), Inject::UsedJump(300)]);
    sleeper.sleep();
    let (bell, other_cpu) = (sleeper.bell.clone(), viommu.clone());
    work.run_next(move || {
        other_cpu.poll();
        assert_eq!(bell.wakes(), 1, "the poll drained what broke the ring");
    });
    let broken = |error| matches!(error, RequestError::RingBroken { .. });
    assert!(broken(quarantined(other.finish())));
    assert_eq!(sleeper.wakes(), 1);
    assert!(broken(quarantined(sleeper.finish())));
    assert!(broken(refused(map(page(2)).finish())));
    machine.take_violations();
}

/// Fails when `end` wakes nobody.
#[test]
fn a_shutdown_wakes_all_sleepers() {
    let bench = Bench::with_slots(2);
    let mut tasks = three_sleepers(&bench);
    // SAFETY: the endpoint does what the test says. The DETACH finds no slot.
    assert!(unsafe { bench.viommu.shutdown(Leave::Blocked) }.is_err());
    assert!(tasks.iter().all(|task| task.wakes() > 0));
    let [first, second, third] = tasks.each_mut().map(Task::finish);
    // They were sent, so that their outcome is not known.
    assert_eq!((quarantined(first), quarantined(second)), (RequestError::TimedOut, RequestError::TimedOut));
    assert_eq!(refused(third), RequestError::ShutDown);
    assert_eq!(refused(bench.map_at(page(3)).finish()), RequestError::ShutDown);
    assert_eq!(bench.machine.release(Release::All), 0);
}

/// All are woken between the driver's look and the sleep of one more. Fails when `sleep` or `sleep_for_slot` sleeps although
/// nothing is answered any more.
#[test]
fn nobody_falls_asleep_after_all_were_woken() {
    for slots in [2, 1] {
        let bench = Bench::with_slots(slots);
        let (mut first, mut second) = (bench.map_at(AT), bench.map_at(page(1)));
        bench.hold_all();
        first.sleep();
        let (device, other_cpu) = (bench.machine.handle(), bench.viommu.clone());
        second.bell.on_clone(move || {
            device.fail();
            other_cpu.on_interrupt();
            other_cpu.poll();
        });
        let result = second.finish();
        let error = if slots == 2 { quarantined(result) } else { refused(result) };
        assert_eq!((error, first.wakes()), (RequestError::NeedsReset, 1));
    }
}
