//! Front ends and drivers that do what cannot be: an error that says so, and a server that ends.

use std::io::Write as _;
use std::os::unix::net::UnixStream;

use virtio_iommu_vhost::{CONFIG_LEN, End};

use crate::front_end::{OUTSIDE, Ring, Running, Vmm, until};
use crate::raw::{ANSWER, ATTACH, Descriptor, RINGS, VERSION_1};

/// A device with the raw driver's rings.
fn started() -> (Running, Vmm) {
    let running = Running::start();
    let vmm = Vmm::connect(&running);
    vmm.start(VERSION_1, RINGS).unwrap();
    (running, vmm)
}

fn trouble(running: &Running) -> String {
    running.backend.lock().trouble().unwrap_or("none").to_owned()
}

#[test]
fn a_request_in_order_is_answered_and_interrupts() {
    let (running, vmm) = started();
    vmm.submit(&ATTACH, 0, 1);
    until("the answer", || vmm.is_answered());
    until("the interrupt", || vmm.calls[0].read().is_ok());
    assert_eq!(vmm.bytes(ANSWER, 4), [0; 4]);
    assert_eq!(running.backend.lock().device().domain_of(8), Some(1));
    assert_eq!(trouble(&running), "none");
}

#[test]
fn rings_that_cannot_be_stop_the_device_with_a_word() {
    let out = Descriptor { address: OUTSIDE - 8, ..ATTACH[0] };
    let (far, head) = ([ATTACH[0], Descriptor { next: 99, ..ATTACH[0] }], ATTACH[0]);
    let cases: [(&str, &[Descriptor], u16, u16); 6] = [
        ("Memory", &[out, ATTACH[1]], 0, 1),
        ("Memory", &[head, Descriptor { address: u64::MAX - 1, ..ATTACH[1] }], 0, 1),
        ("DescriptorIndex(99)", &far, 0, 1),
        ("DescriptorIndex(65535)", &ATTACH, 0xffff, 1),
        ("AvailableIndex(32767)", &ATTACH, 0, 0x7fff),
        ("ChainTooLong", &[head, Descriptor { next: 0, ..head }], 0, 1),
    ];
    for (named, descriptors, head, index) in cases {
        let (running, vmm) = started();
        vmm.submit(descriptors, head, index);
        until(named, || running.backend.lock().trouble().is_some());
        let trouble = trouble(&running);
        assert!(trouble.contains(named) && trouble.contains("needs a reset"), "{named}: {trouble}");
        assert!(!vmm.is_answered(), "{named}");
        // The front end is served on, and a driver that resets the device can use it.
        vmm.stop();
        vmm.put(RINGS[0].available, &[0; 6]);
        vmm.start(VERSION_1, RINGS).unwrap();
        vmm.submit(&ATTACH, 0, 1);
        until("the answer after a reset", || vmm.is_answered());
        drop(vmm);
        assert_eq!(running.end().unwrap(), End::Closed);
    }
}

#[test]
fn rings_that_cannot_be_set_up_are_refused() {
    let [requests, events] = RINGS;
    let outside = Ring { available: OUTSIDE, ..requests };
    // This can only be seen at work.
    let running = Running::start();
    let vmm = Vmm::connect(&running);
    vmm.start(VERSION_1, [Ring { used: OUTSIDE - 4, ..requests }, events]).unwrap();
    vmm.submit(&ATTACH, 0, 1);
    until("the trouble", || trouble(&running).contains("Memory"));
    for ring in [outside, Ring { size: 0, ..requests }, Ring { size: 512, ..requests }] {
        let running = Running::start();
        let vmm = Vmm::connect(&running);
        assert!(vmm.start(VERSION_1, [ring, events]).is_err(), "{ring:?}");
        drop(vmm);
        assert!(matches!(running.end().unwrap(), End::Refused(_)), "{ring:?}");
    }
}

#[test]
fn features_that_do_not_do_are_refused() {
    let running = Running::start();
    let vmm = Vmm::connect(&running);
    assert!(vmm.start(VERSION_1 | 1 << 60, RINGS).is_err());
    assert!(matches!(running.end().unwrap(), End::Refused(_)));

    let running = Running::start();
    let vmm = Vmm::connect(&running);
    vmm.start(0, RINGS).unwrap();
    vmm.submit(&ATTACH, 0, 1);
    until("the trouble", || trouble(&running).contains("does not work with the features 0x0"));
    assert!(!vmm.is_answered());
}

#[test]
fn configuration_has_an_end() {
    let running = Running::start();
    let vmm = Vmm::connect(&running);
    assert_eq!(vmm.read_config(0, CONFIG_LEN).unwrap().len(), CONFIG_LEN);
    assert!(vmm.write_config(CONFIG_LEN - 1, &[0; 2]).is_err());
    drop(vmm);
    assert!(matches!(running.end().unwrap(), End::Refused(_)));
}

#[test]
fn front_ends_go_at_any_time() {
    // Before a word.
    let running = Running::start();
    drop(UnixStream::connect(&running.path).unwrap());
    assert_eq!(running.end().unwrap(), End::Closed);
    // In one.
    let running = Running::start();
    let mut stream = UnixStream::connect(&running.path).unwrap();
    stream.write_all(&[1, 0, 0, 0, 1]).unwrap();
    drop(stream);
    assert_eq!(running.end().unwrap(), End::Closed);
    // With rings that work.
    let (running, vmm) = started();
    vmm.submit(&ATTACH, 0, 1);
    drop(vmm);
    assert_eq!(running.end().unwrap(), End::Closed);
}

#[test]
fn what_is_no_front_end_is_refused() {
    for bytes in [[0xff; 64], [0; 64]] {
        let running = Running::start();
        let mut stream = UnixStream::connect(&running.path).unwrap();
        stream.write_all(&bytes).unwrap();
        let end = running.end().unwrap();
        assert!(matches!(end, End::Refused(_)), "{end:?}");
    }
}
