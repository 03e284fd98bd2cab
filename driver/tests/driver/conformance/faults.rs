//! Fault records: D-36 to D-39, and D-40, which is about the end of the properties too.

use virtio_iommu::{Fault, FaultAccess, FaultReason, Iova, Options, ReservedKind, Viommu};
use virtio_iommu_model::{Config, feature};

use super::probe::{FOUND, found, introduced, property, region, regions_in};
use super::without;
use crate::support::{EP, Machine, PAGE, TestPlatform};

/// A write by [`EP`] to 0x1234, not mapped.
const RECORD: [u8; 24] = [2, 0, 0, 0, 0x02, 0x01, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0x34, 0x12, 0, 0, 0, 0, 0, 0];

const FAULT: Fault = Fault {
    reason: FaultReason::Mapping,
    access: FaultAccess::WRITE,
    endpoint: EP,
    address: Some(Iova::new(0x1234)),
    domain: None,
    tag: None,
    #[cfg(feature = "contexts")]
    pasid: None,
    #[cfg(feature = "contexts")]
    page_request: None,
};

/// Sends the record with some bytes changed, and returns what the driver makes of it.
fn received(machine: &Machine, viommu: &Viommu<TestPlatform>, at: usize, bytes: &[u8]) -> Option<Fault> {
    let mut record = RECORD;
    record[at..at + bytes.len()].copy_from_slice(bytes);
    machine.push_event(&record);
    assert_eq!(viommu.poll(), 1);
    let fault = viommu.next_fault();
    assert_eq!(viommu.next_fault(), None);
    fault
}

// Seen to fail with a `Fault::decode` that looks at the first of the three bytes only.
#[test]
fn d36_a_record_whose_reserved_bytes_are_not_zero_is_ignored() {
    let (machine, viommu) = Machine::live(Config::default());
    let mut ignored = 0;
    for at in 1..4 {
        for bit in 0..8 {
            assert_eq!(received(&machine, &viommu, at, &[1 << bit]), None);
            ignored += 1;
        }
    }
    let counts = viommu.stats().faults;
    assert_eq!((counts.malformed, counts.delivered, viommu.fault_count(EP)), (ignored, 0, 0));
    assert_eq!(received(&machine, &viommu, 0, &[]), Some(FAULT), "and the next one is not");
    assert_eq!(viommu.fault_count(EP), 1);
}

// Seen to fail with a `Fault::decode` that wants `reserved1` to be 0.
#[test]
fn d37_reserved1_of_a_record_is_ignored() {
    let (machine, viommu) = Machine::live(Config::default());
    for garbage in [[1, 0, 0, 0], [0, 0, 0, 0x80], [0xff; 4]] {
        assert_eq!(received(&machine, &viommu, 12, &garbage), Some(FAULT));
    }
    assert_eq!(viommu.stats().faults.malformed, 0);
}

// Seen to fail with a `Fault::decode` that takes a record with other flags for none.
#[test]
fn d38_undefined_flags_of_a_record_are_ignored() {
    let (machine, viommu) = Machine::live(Config::default());
    for bit in (0..32).filter(|bit| ![0, 1, 8].contains(bit)) {
        let flags = 0x102 | 1u32 << bit;
        assert_eq!(received(&machine, &viommu, 4, &flags.to_le_bytes()), Some(FAULT), "bit {bit}");
    }
    let all = Fault { access: FaultAccess::READ | FaultAccess::WRITE, ..FAULT };
    assert_eq!(received(&machine, &viommu, 4, &[0xff; 4]), Some(all));
    let none = Fault { access: FaultAccess::empty(), address: None, ..FAULT };
    assert_eq!(received(&machine, &viommu, 4, &(!0x103u32).to_le_bytes()), Some(none));
}

// Seen to fail with a `Fault::decode` that ignores records of unknown reason.
#[test]
fn d39_an_unknown_reason_reads_as_unknown() {
    let (machine, viommu) = Machine::live(Config::default());
    for reason in 0..=u8::MAX {
        let expected = match reason {
            1 => FaultReason::Domain,
            2 => FaultReason::Mapping,
            _ => FaultReason::Unknown,
        };
        let expected = Fault { reason: expected, ..FAULT };
        assert_eq!(received(&machine, &viommu, 0, &[reason]), Some(expected));
    }
    assert_eq!(viommu.fault_count(EP), 256);
}

/// What the driver finds in an area that is exactly as long as these bytes.
fn regions_in_all_of(area: Vec<u8>) -> usize {
    let (_machine, viommu) = introduced(area.len(), area);
    let regions = viommu.reserved_regions(EP).unwrap();
    assert!(regions.iter().all(|region| region.kind == ReservedKind::Msi));
    regions.len()
}

// Seen to fail with a `Properties::next` that passes over type 0, with one that wants a type 0, and with an
// `EventQueue::next` that does not push its buffer again, or only that of a record that is long enough.
#[test]
fn d40_properties_end_at_type_zero_or_with_the_area_and_event_buffers_go_back() {
    let behind = region(0, 0x20_0000, 0x20_ffff);
    for length in [0, 4, 20] {
        let end = [0, 0, length, 0, 0, 0, 0, 0];
        assert_eq!(
            regions_in([&found(), &end[..], &behind].concat()),
            [FOUND],
            "nothing counts behind type 0"
        );
        assert_eq!(regions_in([&end[..], &behind].concat()), []);
    }
    assert_eq!(regions_in_all_of(found()), 1, "without type 0");
    assert_eq!(regions_in_all_of([found(), found()].concat()), 2);
    for header in 1..4 {
        let cut = &found()[..header];
        assert_eq!(regions_in_all_of([&found(), cut].concat()), 1, "{header} bytes of a header");
        assert_eq!(regions_in_all_of(cut.to_vec()), 0);
    }
    for value in 0..20 {
        let cut = &found()[..4 + value];
        assert_eq!(regions_in_all_of([&found(), cut].concat()), 1, "{value} bytes of a value");
    }
    assert_eq!(regions_in_all_of([found(), property(0x7ff, &[1; 9])[..9].to_vec()].concat()), 1);

    for config in [Config::default(), without(feature::RING_EVENT_IDX)] {
        let machine = Machine::new(config);
        let options = Options { queue_size: 4, fault_backlog: 2, ..Machine::options() };
        let viommu = machine.start_with(options).unwrap().go_live().unwrap();
        // Good records, ignored ones, short ones, and more than the driver keeps.
        for round in 0..100 {
            for record in [&RECORD[..], &[0xff; 24], &[1; 20], &RECORD] {
                machine.push_event(record);
            }
            assert_eq!(viommu.poll(), 4, "round {round}");
        }
        let counters = machine.device().counters();
        assert_eq!((counters.events, counters.events_dropped), (400, 0), "a buffer was missing");
        assert!(!machine.reaches(EP, PAGE));
        assert_eq!(viommu.poll(), 1);
    }
}
