//! Faults: decoded, counted, kept up to a limit, their buffers posted again.

use virtio_iommu::{FaultAccess, FaultReason, Interrupt, Iova, Options, Prot, Viommu};
use virtio_iommu_model::{Config, Quirks, feature};

use crate::support::{EP, EP2, Machine, PAGE, TestPlatform};

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
