//! Faults: decoded, counted, kept up to a limit, their buffers posted again.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use virtio_iommu::{
    EndpointOptions, FaultAccess, FaultLimit, FaultReason, Interrupt, Iova, Leave, Options, Platform, Prot,
    Viommu,
};
use virtio_iommu_model::{Config, Quirks, feature};

use crate::support::{EP, EP2, Machine, PAGE, Rng, TestPlatform};

const AT: Iova = Iova::new(0x10_0000);

fn with(machine: &Machine, options: Options) -> Viommu<TestPlatform> {
    machine.start_with(options).unwrap().go_live().unwrap()
}

#[test]
fn faults_say_who_what_where_and_why() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let memory = machine.memory(PAGE);
    // SAFETY: nobody but the test uses the memory.
    unsafe { domain.map_at(AT, memory.phys, PAGE, Prot::READ) }.unwrap();
    assert!(machine.dma_write(EP, AT.get() + 5, &[1]).is_err());
    assert!(machine.dma_read(EP, 0x5000, 1).is_err());
    assert!(machine.dma_read(EP2, 0x6000, 1).is_err());
    assert_eq!(viommu.poll(), 3);
    let faults: Vec<_> = std::iter::from_fn(|| viommu.next_fault()).collect();
    let found: Vec<_> = faults.iter().map(|f| (f.endpoint, f.access, f.address, f.reason)).collect();
    let expected = [
        (EP, FaultAccess::WRITE, Some(Iova::new(AT.get() + 5)), FaultReason::Mapping),
        (EP, FaultAccess::READ, Some(Iova::new(0x5000)), FaultReason::Mapping),
        (EP2, FaultAccess::READ, Some(Iova::new(0x6000)), FaultReason::Domain),
    ];
    assert_eq!(found, expected);
    assert_eq!((viommu.fault_count(EP), viommu.fault_count(EP2)), (2, 1));
    assert_eq!((viommu.stats().faults.delivered, viommu.stats().faults.dropped), (3, 0));
}

#[test]
fn the_backlog_is_bounded_and_what_is_lost_is_counted() {
    let machine = Machine::new(Config::default());
    let viommu = with(&machine, Options { fault_backlog: 2, ..Machine::options() });
    for page in 0..5 {
        assert!(!machine.reaches(EP, page * PAGE));
    }
    assert_eq!(viommu.poll(), 5);
    assert_eq!((viommu.stats().faults.delivered, viommu.stats().faults.dropped), (5, 3));
    let first = viommu.next_fault().unwrap();
    assert_eq!(first.address, Some(Iova::new(0)), "the oldest are kept");
    assert!(viommu.next_fault().is_some() && viommu.next_fault().is_none());
    assert_eq!(viommu.fault_count(EP), 0, "an endpoint without record");
}

/// Fails when `EventQueue::next` does not push the buffer again, with either kind of suppression.
#[test]
fn d40_buffers_are_posted_again() {
    for dropped in [0, feature::RING_EVENT_IDX] {
        let features = Config::default().features & !dropped;
        let machine = Machine::new(Config { features, ..Config::default() });
        let viommu = with(&machine, Options { queue_size: 8, ..Machine::options() });
        for round in 0..40 {
            for page in 0..5 {
                assert!(!machine.reaches(EP, page * PAGE));
            }
            assert_eq!(viommu.poll(), 5, "round {round}");
            while viommu.next_fault().is_some() {}
        }
        assert_eq!(machine.device().counters().events_dropped, 0);
    }
}

#[test]
fn more_faults_than_buffers_are_dropped_by_the_device_or_wait_there() {
    let machine = Machine::new(Config { held_events: 3, ..Config::default() });
    let viommu = with(&machine, Options { queue_size: 4, ..Machine::options() });
    for page in 0..10 {
        assert!(!machine.reaches(EP, page * PAGE));
    }
    // Four buffers, then the doorbell brings the three that waited.
    assert_eq!((viommu.poll(), viommu.poll(), viommu.poll()), (4, 3, 0));
    assert_eq!(machine.device().counters().events_dropped, 3);
}

#[test]
fn a_fault_raises_an_interrupt_that_is_acknowledged() {
    let machine = Machine::new(Config::default());
    let viommu = with(&machine, Machine::options());
    assert_eq!(viommu.on_interrupt(), Interrupt::NotOurs);
    for _ in 0..3 {
        assert!(!machine.reaches(EP, 0));
        assert_eq!(viommu.on_interrupt(), Interrupt::Wake);
        assert_eq!(viommu.on_interrupt(), Interrupt::NotOurs);
        assert_eq!(viommu.poll(), 1);
    }
    machine.device().change_config(|_| {});
    assert_eq!(viommu.on_interrupt(), Interrupt::Wake);
}

#[test]
fn requests_raise_no_interrupt() {
    for dropped in [0, feature::RING_EVENT_IDX] {
        let features = Config::default().features & !dropped;
        let (machine, viommu, _domain) = Machine::attached(Config { features, ..Config::default() });
        viommu.detach(EP).unwrap();
        assert_eq!(machine.device().counters().interrupts[0], 0);
    }
}

/// D-36 to D-39, and what QEMU sends. Fails when `EventQueue::next` does not look at the length.
#[test]
fn records_that_say_less_or_more_than_they_should() {
    let machine = Machine::new(Config::default());
    let viommu = with(&machine, Machine::options());
    let mut record = [0; 24];
    record[8] = EP.get() as u8;
    let send = |at: usize, bytes: &[u8]| {
        let mut sent = record;
        sent[at..at + bytes.len()].copy_from_slice(bytes);
        machine.push_event(&sent);
        viommu.poll();
        viommu.next_fault()
    };
    assert_eq!(send(1, &[0, 0, 1]), None, "D-36");
    assert_eq!(send(12, &[0xff; 4]).unwrap().address, None, "D-37");
    let all_flags = send(4, &[0xff; 4]).unwrap();
    assert_eq!((all_flags.access, all_flags.address), (FaultAccess::all(), Some(Iova::new(0))), "D-38");
    assert_eq!(send(0, &[77]).unwrap().reason, FaultReason::Unknown, "D-39");
    assert_eq!(viommu.stats().faults.malformed, 1);
    // Too short, in a buffer that holds a whole record of before.
    for len in [0, 20, 23] {
        machine.push_event(&record[..len]);
        viommu.poll();
        assert_eq!(viommu.next_fault(), None, "{len} bytes");
    }
    assert_eq!(viommu.stats().faults.malformed, 4);

    let quirks = Quirks { omit_fault_address: true, ..Quirks::qemu_10() };
    let machine = Machine::new(Config { quirks, ..Config::default() });
    let viommu = with(&machine, Machine::options());
    assert!(!machine.reaches(EP, 0x1000));
    viommu.poll();
    let fault = viommu.next_fault().unwrap();
    assert_eq!(
        (fault.reason, fault.access, fault.address),
        (FaultReason::Unknown, FaultAccess::empty(), None)
    );
}

/// Fails when `take_fault` does not look up the endpoint, or `open` forgets the tag.
#[test]
fn faults_say_whose_they_are() {
    let (machine, viommu, domain) = Machine::attached(Config::default());
    let options = EndpointOptions { tag: Some(77), ..EndpointOptions::default() };
    let _view = viommu.open(EP, &domain, options).unwrap();
    for endpoint in [EP, EP2] {
        assert!(!machine.reaches(endpoint, PAGE));
    }
    viommu.poll();
    let owners: Vec<_> = std::iter::from_fn(|| viommu.next_fault()).map(|f| (f.domain, f.tag)).collect();
    assert_eq!(owners, [(Some(domain.id()), Some(77)), (None, None)]);
    machine.device().add_endpoint(virtio_iommu_model::Endpoint::x86(0x77));
    assert!(!machine.reaches(virtio_iommu::EndpointId::new(0x77), PAGE));
    viommu.poll();
    assert_eq!(viommu.next_fault().map(|f| (f.domain, f.tag)), Some((None, None)), "nobody knows it");
}

/// Fails when `take_fault` keeps every record, or a window does not end.
#[test]
fn one_endpoint_in_a_storm_does_not_hide_the_others() {
    for machine in [Machine::new(Config::default()), Machine::clockless(Config::default())] {
        let limit = FaultLimit { records: 10, window_ns: 50_000 };
        let options = Options { fault_limit: limit, fault_backlog: 16, ..Machine::options() };
        let viommu = machine.start_with(options).unwrap();
        viommu.introduce(EP).unwrap();
        viommu.introduce(EP2).unwrap();
        let viommu = viommu.go_live().unwrap();
        for _ in 0..100 {
            assert!(!machine.reaches(EP, PAGE));
        }
        assert!(!machine.reaches(EP2, 2 * PAGE));
        assert_eq!(viommu.poll(), 101);
        let counts = viommu.stats().faults;
        assert_eq!((counts.delivered, counts.limited, counts.dropped), (101, 90, 0));
        assert_eq!((viommu.fault_count(EP), viommu.fault_count(EP2)), (100, 1));
        let fetched: Vec<_> = std::iter::from_fn(|| viommu.next_fault()).map(|f| f.endpoint).collect();
        assert_eq!((fetched.len(), fetched.last()), (11, Some(&EP2)));
        // A new window, by the clock or since all were fetched.
        for _ in 0..50 {
            machine.platform().relax();
        }
        assert!(!machine.reaches(EP, PAGE));
        viommu.poll();
        assert!(viommu.next_fault().is_some_and(|fault| fault.endpoint == EP));
    }
}

/// A storm of 100,000 records through 256 buffers: every one that the device delivered is counted once, for its
/// endpoint, and is fetched, limited or dropped. Fails when a buffer is not posted again, or a count saturates.
#[test]
fn a_storm_loses_no_count() {
    const STORM: u64 = 100_000;
    let machine = Machine::new(Config { held_events: 1000, ..Config::default() });
    let limit = FaultLimit { records: 1000, window_ns: 1_000_000 };
    let options = Options { fault_limit: limit, queue_size: 256, ..Machine::options() };
    let staged = machine.start_with(options).unwrap();
    for endpoint in [EP, EP2] {
        staged.introduce(endpoint).unwrap();
    }
    let viommu = staged.go_live().unwrap();
    let mut rng = Rng::new(0xfa17);
    let (mut fetched, mut polled) = (0, 0);
    for index in 0..STORM {
        assert!(!machine.reaches(if index % 3 == 0 { EP2 } else { EP }, index * PAGE));
        if rng.below(300) == 0 {
            polled += viommu.poll();
            fetched +=
                std::iter::from_fn(|| viommu.next_fault()).take(rng.below(200) as usize).count() as u64;
            machine.platform().relax();
        }
    }
    loop {
        let records = viommu.poll();
        polled += records;
        fetched += std::iter::from_fn(|| viommu.next_fault()).count() as u64;
        if records == 0 {
            break;
        }
    }
    let (counts, dropped_by_device) = (viommu.stats().faults, machine.device().counters().events_dropped);
    assert_eq!(counts.delivered, polled);
    assert_eq!(counts.delivered + dropped_by_device, STORM, "the device delivered or dropped each");
    assert_eq!(fetched + counts.limited + counts.dropped, counts.delivered);
    assert_eq!(viommu.fault_count(EP) + viommu.fault_count(EP2), counts.delivered);
    assert!(dropped_by_device > 0 && counts.limited > 0 && counts.dropped > 0 && counts.malformed == 0);
}

/// Counts how often it was woken.
#[derive(Default)]
struct Counted(AtomicUsize);

impl Wake for Counted {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Fails when `poll` wakes nobody, or everybody without a fault; when a second task makes the first sleep for ever; or when
/// a shutdown leaves them waiting.
#[test]
fn faults_can_be_awaited() {
    let (machine, viommu) = Machine::live(Config::default());
    let counts: [Arc<Counted>; 2] = Default::default();
    let wakers = counts.clone().map(Waker::from);
    let woken = || [0, 1].map(|task: usize| counts[task].0.load(Ordering::Relaxed));
    let mut first = pin!(viommu.next_fault_async());
    let mut context = Context::from_waker(&wakers[0]);
    assert!(first.as_mut().poll(&mut context).is_pending());
    assert_eq!((viommu.poll(), woken()), (0, [0, 0]));
    assert!(!machine.reaches(EP, PAGE));
    assert_eq!((viommu.poll(), woken()), (1, [1, 0]));
    let fault = first.as_mut().poll(&mut context);
    assert!(matches!(fault, Poll::Ready(Some(fault)) if fault.address == Some(Iova::new(PAGE))));

    // Whoever waited before is woken, and can wait again.
    let (mut first, mut second) = (pin!(viommu.next_fault_async()), pin!(viommu.next_fault_async()));
    assert!(first.as_mut().poll(&mut context).is_pending());
    assert!(second.as_mut().poll(&mut Context::from_waker(&wakers[1])).is_pending());
    assert_eq!(woken(), [2, 0]);
    // SAFETY: no endpoint does DMA any more.
    unsafe { viommu.shutdown(Leave::Blocked) }.unwrap();
    assert_eq!(woken(), [2, 1]);
    for future in [first, second] {
        assert!(matches!(future.poll(&mut context), Poll::Ready(None)));
    }
}
