//! Traces as QEMU wrote them, and traces that make no sense.

use super::*;

/// Recorded by sending, one kick each unless said otherwise: two event buffers; ATTACH of 0x18 to 1, of an endpoint that is
/// not there (refused), of 0x20 to 2; three MAPs in one kick; a MAP over another (refused); UNMAPs of one mapping, of
/// nothing, in an unknown domain (refused); ATTACH of 0x18 to 3, which moves it, and again; DETACH from the wrong domain
/// (refused), from the right one, again (refused); ATTACH with a bypass flag that does not fit (refused).
const QEMU_10: &str = include_str!("qemu-10.0.2.log");
/// The same on an older version.
const QEMU_7: &str = include_str!("qemu-7.2.22.log");

const RECORDED: Counts = Counts { attach: 4, detach: 1, map: 3, unmap: 3, kicks: 14, pops: 16 };

#[test]
fn recorded_traces_count_accepted_requests() {
    assert_eq!(Counts::parse(QEMU_10, 1).unwrap(), RECORDED);
    assert_eq!(Counts::parse(QEMU_7, 1).unwrap(), RECORDED);
}

#[test]
fn other_devices_and_the_event_queue_do_not_count() {
    // A disk with its own queue 0, before, between and after.
    let disk =
        "virtio_queue_notify vdev 0xd n 0 vq 0xdd\nvirtqueue_pop vq 0xdd elem 0x1 in_num 2 out_num 1\n";
    let event = "virtqueue_pop vq 0xee elem 0x1 in_num 1 out_num 0\n";
    let notify = "virtio_queue_notify";
    let mixed = QEMU_10.replace(notify, &format!("{disk}{event}{notify}"));
    assert_eq!(Counts::parse(&format!("{mixed}{disk}"), 1).unwrap(), RECORDED);
}

#[test]
fn a_switch_of_another_endpoint_accepts_nothing() {
    // A write to `bypass` right after a refused ATTACH switches every function, beginning with the first.
    let text = "\
virtqueue_pop vq 0xa elem 0x2 in_num 1 out_num 1
virtio_iommu_attach domain=1 endpoint=24
virtio_iommu_switch_address_space Device 00:00.0 switching address space (iommu enabled=1)
virtio_iommu_switch_address_space Device 00:03.0 switching address space (iommu enabled=1)
";
    assert_eq!(Counts::parse(text, 1).unwrap(), Counts { pops: 1, ..Counts::default() });
}

#[test]
fn functions_are_endpoints() {
    assert_eq!(device_in("Device 00:1f.2 switching address space (iommu enabled=0)"), Some(0xfa));
    assert_eq!(device_in("Device 11:00.0 switching"), Some(0x1100));
    assert_eq!(device_in("Device x"), None);
}

#[test]
fn stamps_before_the_events_change_nothing() {
    let stamped: String = QEMU_10.lines().map(|line| format!("4711@1790000000.123456:{line}\n")).collect();
    assert_eq!(Counts::parse(&stamped, 1).unwrap(), RECORDED);
}

#[test]
fn other_lines_and_an_empty_log_are_nothing() {
    assert_eq!(Counts::parse("", 1).unwrap(), Counts::default());
    assert_eq!(Counts::parse("qemu: warning\n\nvirtio_iommu_mapping x\n", 1).unwrap(), Counts::default());
}

#[test]
fn an_event_from_nowhere_or_from_two_queues_is_an_error() {
    let nowhere = Counts::parse("virtio_iommu_attach domain=1 endpoint=16", 1).unwrap_err();
    assert!(format!("{nowhere:#}").contains("line 1: virtio_iommu_attach without"), "{nowhere:#}");
    let more = "virtqueue_pop vq 0x9 elem 0x1 in_num 1 out_num 1\nvirtio_iommu_unmap domain=1\n";
    let two = Counts::parse(&format!("{QEMU_10}{more}"), 1).unwrap_err();
    assert!(format!("{two:#}").contains("queue 0x9"), "{two:#}");
}

#[test]
fn several_iommus_count_together() {
    let second = QEMU_10.replace(" vq 0x", " vq 0x7");
    let both = Counts::parse(&format!("{QEMU_10}{second}"), 2).unwrap();
    assert_eq!((both.map, both.kicks, both.pops), (2 * RECORDED.map, 2 * RECORDED.kicks, 2 * RECORDED.pops));
    assert_eq!(Counts::parse(QEMU_10, 2).unwrap(), RECORDED, "one may be idle");
    let third = QEMU_10.replace(" vq 0x", " vq 0x8");
    assert!(Counts::parse(&format!("{QEMU_10}{second}{third}"), 2).is_err());
}

#[test]
fn lines_cut_short_are_errors() {
    for cut in ["virtqueue_pop", "virtqueue_pop vq", "virtio_queue_notify vdev 0x1 n 0"] {
        assert!(Counts::parse(cut, 1).is_err(), "{cut}");
    }
    assert!(Counts::parse("virtqueue_pop vq 0xa\nvirtio_iommu_attach domain=1", 1).is_err());
}

#[test]
fn a_missing_file_is_named() {
    let error = Counts::read(Path::new("/nonexistent/trace.log"), 1).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/trace.log"));
}
