//! Futures do what their blocking twins do.

use std::task::Poll;

use virtio_iommu::Interrupt;
use virtio_iommu_model::Release;

use super::Bench;
use super::kinds::{Way, kinds};

/// What came of an operation, and what it cost.
fn run(bench: &Bench, way: Way, start: &super::kinds::Start) -> (String, String) {
    let mut task = start(bench, way);
    bench.machine.device().take_counters();
    let Poll::Ready(result) = task.poll() else { panic!("the device answered at once") };
    assert_eq!((task.wakes(), bench.interrupts()), (0, 0), "nobody slept");
    (result, cost(bench))
}

fn cost(bench: &Bench) -> String {
    let mut counters = bench.machine.device().take_counters();
    (counters.interrupts, counters.suppressed) = Default::default();
    let domains =
        [&bench.domain, &bench.other].map(|domain| (domain.id(), domain.mapping_count(), domain.stats()));
    format!("{counters:?} {:?} {domains:?}", bench.viommu.stats())
}

/// Fails when `InFlight::poll` does not look before it sleeps, or a future sends what its twin does not.
#[test]
fn futures_that_are_answered_at_once_do_what_blocking_calls_do() {
    for kind in kinds() {
        let blocking = run(&Bench::new(), Way::Blocking, &kind.start);
        let asynchronous = run(&Bench::new(), Way::Asynchronous, &kind.start);
        assert_eq!(asynchronous, blocking, "{}", kind.name);
        assert!(asynchronous.0.starts_with("Ok("), "{}: {}", kind.name, asynchronous.0);
    }
}

/// Fails when `sleep` asks for no interrupt, `Viommu::poll` wakes nobody, or the waker is called before the answer came.
#[test]
fn futures_that_are_answered_later_do_what_blocking_calls_do() {
    for kind in kinds() {
        let blocking = run(&Bench::new(), Way::Blocking, &kind.start);
        let bench = Bench::new();
        let mut task = (kind.start)(&bench, Way::Asynchronous);
        bench.machine.device().take_counters();
        bench.hold_all();
        let mut rounds = 0;
        let result = loop {
            match task.poll() {
                Poll::Ready(result) => break result,
                Poll::Pending => rounds += 1,
            }
            let name = kind.name;
            // The embedder may look whenever it likes.
            bench.viommu.poll();
            assert_eq!(task.wakes(), rounds - 1, "{name}: woken without an answer");
            assert_eq!(bench.viommu.on_interrupt(), Interrupt::NotOurs, "{name}");
            bench.machine.release(Release::All);
            assert_eq!(bench.viommu.on_interrupt(), Interrupt::Wake, "{name}: not interrupted");
            assert_eq!(task.wakes(), rounds - 1, "{name}: woken by the handler");
            bench.viommu.poll();
            assert_eq!(task.wakes(), rounds, "{name}: not woken");
            bench.viommu.poll();
            assert_eq!(task.wakes(), rounds, "{name}: woken again");
        };
        bench.hold_none();
        assert!(rounds > 0, "{} never slept", kind.name);
        assert_eq!((result, cost(&bench)), blocking, "{}", kind.name);
        assert_eq!(task.bell.wakers(), 0, "{}: a waker is kept", kind.name);
    }
}
