//! The cases of QEMU's own qtest (QTEST.md), with granule 1 and again scaled to 4 KiB.

use virtio_iommu_model::{Config, Device, Endpoint};

use crate::rig::{EP, INVAL, NOENT, OK, RANGE, READ, Rig};

/// The endpoint that the test calls 444: not there.
const ABSENT: u32 = 444;

#[test]
fn config() {
    let device = Device::new(Config::default());
    let mut space = [0; 40];
    device.read_config(0, &mut space);
    assert_eq!(space[8..16], [0; 8]);
    assert!(u64::from_le_bytes(space[16..24].try_into().unwrap()) >= 0xffff_ffff);
    assert_eq!(space[24..28], [0; 4]);
    assert_eq!(space[28..32], [0xff; 4]);
    assert_eq!(space[36], 1);
}

fn attach_detach(mut rig: Rig) {
    assert_eq!(rig.attach(0, EP), OK);
    assert_eq!(rig.attach(0, ABSENT), NOENT);
    assert_eq!(rig.detach(0, 1), NOENT);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.device.domains().collect::<Vec<_>>(), [1]);
    assert_eq!(rig.detach(0, EP), INVAL);
    assert_eq!(rig.detach(1, EP), OK);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0, 0xfff, 0xa1000, READ), OK);
    assert_eq!(rig.map(1, 0x2000, 0x2fff, 0xb1000, READ), OK);
    assert_eq!(rig.detach(1, EP), OK);
    assert_eq!(rig.device.domains().count(), 0);
}

#[test]
fn attach_detach_strict() {
    attach_detach(Rig::new(Config::default()));
}

#[test]
fn attach_detach_like_qemu() {
    attach_detach(Rig::new(Config::qemu_10()));
}

/// Runs the sequence with its small numbers multiplied by `scale`.
fn map_unmap(mut rig: Rig, scale: u64) {
    let range = |first: u64, last: u64| (first * scale, (last + 1) * scale - 1);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(0, 0, 0xfff, 0xa1000, READ), NOENT);
    assert_eq!(rig.map(1, 0, 0xfff, 0xa1000, READ), OK);
    assert_eq!(rig.map(1, 0, 0xffff, 0xb1000, READ), INVAL);
    assert_eq!(rig.unmap(4, 0x10, 0xfff), NOENT);
    assert_eq!(rig.unmap(1, 0x10, 0xfff), RANGE);
    assert_eq!(rig.unmap(1, 0, 0x1000), OK);

    let map = |rig: &mut Rig, first, last, phys| {
        let (first, last) = range(first, last);
        rig.map(1, first, last, phys, READ)
    };
    let unmap = |rig: &mut Rig, first, last| {
        let (first, last) = range(first, last);
        rig.unmap(1, first, last)
    };
    assert_eq!(unmap(&mut rig, 0, 4), OK); // example 1
    assert_eq!(map(&mut rig, 0, 9, 0xa1000), OK); // example 2
    assert_eq!(unmap(&mut rig, 0, 9), OK);
    assert_eq!(map(&mut rig, 0, 4, 0xb1000), OK); // example 3
    assert_eq!(map(&mut rig, 5, 9, 0xb2000), OK);
    assert_eq!(unmap(&mut rig, 0, 9), OK);
    assert_eq!(map(&mut rig, 0, 9, 0xc1000), OK); // example 4
    assert_eq!(unmap(&mut rig, 0, 4), RANGE);
    assert_eq!(unmap(&mut rig, 0, 10), OK);
    assert_eq!(map(&mut rig, 0, 4, 0xd1000), OK); // example 5
    assert_eq!(map(&mut rig, 5, 9, 0xd2000), OK);
    assert_eq!(unmap(&mut rig, 0, 4), OK);
    assert_eq!(unmap(&mut rig, 5, 9), OK);
    assert_eq!(map(&mut rig, 0, 4, 0xe2000), OK); // example 6
    assert_eq!(unmap(&mut rig, 0, 9), OK);
    assert_eq!(map(&mut rig, 0, 4, 0xf2000), OK); // example 7
    assert_eq!(map(&mut rig, 10, 14, 0xf3000), OK);
    assert_eq!(unmap(&mut rig, 0, 14), OK);
    assert_eq!(map(&mut rig, 10, 14, 0xf3000), OK);
    assert_eq!(map(&mut rig, 0, 4, 0xf2000), OK);
    assert_eq!(unmap(&mut rig, 0, 4), OK);
    assert_eq!(map(&mut rig, 10, 14, 0xf3000), INVAL);
}

#[test]
fn map_unmap_with_byte_granule() {
    map_unmap(Rig::byte_granule(), 1);
}

#[test]
fn map_unmap_scaled_to_4_kib() {
    map_unmap(Rig::new(Config::default()), 0x1000);
}

#[test]
fn map_unmap_like_qemu_with_4_kib_granule() {
    for config in [Config::qemu_7_2(), Config::qemu_10(), Config::qemu_11_1()] {
        map_unmap(Rig::new(config), 1);
    }
}

#[test]
fn endpoints_are_what_a_test_registers() {
    let mut rig = Rig::new(Config::default());
    assert_eq!(rig.attach(1, ABSENT), NOENT);
    rig.device.add_endpoint(Endpoint::new(ABSENT));
    assert_eq!(rig.attach(1, ABSENT), OK);
    rig.device.remove_endpoint(ABSENT);
    assert_eq!(rig.detach(1, ABSENT), NOENT);
    assert_eq!(rig.device.domains().count(), 0);
}
