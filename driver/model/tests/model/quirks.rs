//! The deviations of QEMU, cloud-hypervisor and crosvm (PROTOCOL 4.2, 4.3; DEVICES 2).

use virtio_iommu_model::{
    Access, AccessKind, Config, Crash, Endpoint, FaultReason, Quirks, ReservedRegion, device_status,
};

use crate::rig::{
    BUFFERS, DEVERR, EP, EP2, INVAL, NOENT, OK, RANGE, READ, RW, Rig, UNSUPP, attach, map, probe, unmap,
};

fn qemu() -> Rig {
    Rig::new(Config::qemu_10())
}

fn attached(config: Config) -> Rig {
    let mut rig = Rig::new(config);
    assert_eq!(rig.attach(1, EP), OK);
    rig
}

#[test]
fn qemu_takes_maps_that_the_standard_refuses() {
    let mut rig = qemu();
    rig.device
        .add_endpoint(Endpoint { reserved: vec![ReservedRegion::msi(0x8000, 0x8fff)], ..Endpoint::new(EP) });
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0x10, 0x20, 0x31, READ), OK); // misaligned
    assert_eq!(rig.map(1, 0x30, 0x30, 0, READ), OK); // single byte
    assert_eq!(rig.map(1, 0x1000, 0x1fff, u64::MAX, READ), OK); // physical overflow
    assert_eq!(rig.map(1, 0x8000, 0x8fff, 0, READ), OK); // reserved
    assert_eq!(rig.map(1, 1 << 50, (1 << 50) + 0xfff, 0, READ), OK); // outside the input range
    assert_eq!(rig.map(1, 0x20, 0x2f, 0, READ), INVAL);
}

#[test]
fn qemu_ignores_reserved_bytes_and_answers_unknown_types() {
    let mut rig = qemu();
    assert_eq!(rig.status(&attach(1, EP, 0, 1)), OK);
    assert_eq!(rig.status(&attach(1, EP, 2, 0)), INVAL);
    assert_eq!(rig.status(&unmap(1, 0, 0xfff, 7)), OK);
    assert_eq!(rig.status(&[0x42, 0, 0, 0]), UNSUPP);
    assert_eq!(rig.send(&attach(1, EP, 0, 0), 8), (4, vec![0, 0, 0, 0, 0xaa, 0xaa, 0xaa, 0xaa]));
}

#[test]
fn qemu_detaches_before_it_checks() {
    let mut rig = attached(Config::qemu_10());
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ), OK);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.ranges(1), []); // mappings lost
    assert_eq!(rig.attach_bypass(1, EP), OK); // alone: re-created with the new flag
    assert!(rig.device.is_bypass_domain(1));
    assert_eq!(rig.attach(2, EP2), OK);
    assert_eq!(rig.attach(1, EP2), INVAL); // and is now in no domain
    assert_eq!(rig.device.domain_of(EP2), None);
    assert_eq!(rig.device.domains().collect::<Vec<_>>(), [1]);
}

#[test]
fn qemu_detach_differs_between_versions() {
    for (config, twice) in
        [(Config::qemu_7_2(), INVAL), (Config::qemu_10(), NOENT), (Config::qemu_11_1(), NOENT)]
    {
        let mut rig = Rig::new(config);
        assert_eq!(rig.detach(1, EP), NOENT);
        assert_eq!(rig.attach(1, EP), OK);
        assert_eq!(rig.detach(2, EP), INVAL);
        assert_eq!(rig.detach(1, EP), OK);
        assert_eq!(rig.detach(1, EP), twice);
    }
}

#[test]
fn qemu_unmap_that_splits_has_removed_what_it_met_before() {
    let mut rig = attached(Config::qemu_10());
    for page in [0x1000, 0x2000, 0x3000] {
        assert_eq!(rig.map(1, page, page + 0xfff, BUFFERS, READ), OK);
    }
    // 0x2000 is the root and is met first; 0x3000 takes its place and would be split; 0x1000 is never met.
    assert_eq!(rig.unmap(1, 0x1000, 0x37ff), RANGE);
    assert_eq!(rig.ranges(1), [(0x1000, 0x1fff), (0x3000, 0x3fff)]);
}

#[test]
fn qemu_inverted_ranges_differ_between_versions() {
    let mut rig = attached(Config::qemu_10());
    assert_eq!(rig.unmap(1, 0x1500, 0x1400), OK);
    assert_eq!(rig.map(1, 0x1000, 0x1fff, BUFFERS, READ), OK);
    assert_eq!(rig.unmap(1, 0x1500, 0x1400), RANGE);
    assert_eq!(rig.map(1, 0x9000, 0x8000, BUFFERS, READ), OK);
    assert_eq!(rig.try_send(&unmap(1, 0, 0xffff, 0), 4), None);
    assert_eq!(rig.device.crash(), Some(Crash::EndlessLoop));
    assert!(!rig.device.is_running());
    let mut rig = attached(Config::qemu_11_1());
    assert_eq!(rig.map(1, 0x9000, 0x8000, BUFFERS, READ), INVAL);
    assert_eq!(rig.unmap(1, 0x1500, 0x1400), INVAL);
}

#[test]
fn an_inverted_map_is_taken_by_that_quirk_alone() {
    let quirks = Quirks { inverted_accepted: true, ..Quirks::default() };
    let mut rig = attached(Config { quirks, ..Config::default() });
    assert_eq!(rig.map(1, 0x9000, 0x8000, BUFFERS, READ), OK);
    assert_eq!(rig.ranges(1), []);
}

#[test]
fn qemu_probe_with_too_little_room() {
    assert_eq!(qemu().send(&probe(EP), 100).1[..4], [DEVERR, 0, 0, 0]);
    let (len, bytes) = qemu().send(&probe(EP), 1000);
    assert_eq!((len, bytes[512], bytes[516]), (516, OK, 0xaa));
    assert_eq!(qemu().send(&probe(EP)[..8], 516).1[512], INVAL);
    let mut old = Rig::new(Config::qemu_7_2());
    assert_eq!(old.try_send(&probe(EP), 4), None);
    assert_eq!(old.device.crash(), Some(Crash::Abort));
}

#[test]
fn qemu_stops_on_malformed_requests_event_buffers_and_bypass_writes() {
    let stopped = |rig: &Rig| assert_eq!(rig.device.status(), 0x4f);
    for (readable, writable) in [(3, 4), (20, 3), (20, 0)] {
        let mut rig = qemu();
        assert_eq!(rig.try_send(&attach(1, EP, 0, 0)[..readable], writable), None);
        stopped(&rig);
    }
    let mut rig = qemu();
    rig.device.write_config(36, &[0]);
    rig.post_events(1, 23);
    assert!(rig.device.access(&mut rig.mem, EP, 0, Access::Write(&[1])).is_err());
    stopped(&rig);
    let mut rig = qemu();
    rig.device.write_config(36, &[2]);
    stopped(&rig);
    assert!(rig.device.bypasses(EP));
}

#[test]
fn qemu_behaves_as_if_everything_were_negotiated() {
    let config = Config::qemu_10();
    let mut rig = Rig::with_features(config, virtio_iommu_model::feature::VERSION_1);
    assert_eq!(rig.attach_bypass(2, EP2), OK);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ | 4), OK);
    assert_eq!(rig.send(&probe(EP), 516).0, 516);
}

#[test]
fn qemu_domains_survive_a_device_reset_but_not_a_system_reset() {
    for (config, survives) in
        [(Config::qemu_7_2(), false), (Config::qemu_10(), true), (Config::qemu_11_1(), true)]
    {
        let mut rig = attached(config);
        rig.device.set_status(0);
        assert_eq!(rig.device.domain_of(EP).is_some(), survives);
        rig.device.system_reset();
        assert_eq!(rig.device.domain_of(EP), None);
    }
}

#[test]
fn qemu_fault_records() {
    let mut rig = qemu();
    rig.device.write_config(36, &[0]);
    rig.post_events(8, 24);
    let fault = |rig: &mut Rig, iova| {
        rig.device.access(&mut rig.mem, EP, iova, Access::Write(&[1])).unwrap_err();
        let record = rig.take_event().unwrap().1;
        (record[0], u16::from_le_bytes([record[4], record[5]]))
    };
    assert_eq!(fault(&mut rig, 0), (0, 0x100)); // never attached
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0x1000, 0x1fff, BUFFERS, READ), OK);
    assert_eq!(fault(&mut rig, 0), (2, 0x100)); // not mapped
    assert_eq!(fault(&mut rig, 0x1000), (2, 0x102)); // permission
    assert_eq!(rig.detach(1, EP), OK);
    assert_eq!(fault(&mut rig, 0), (0, 0x100)); // forgotten
    assert_eq!(rig.attach_bypass(2, EP2), OK);
    assert_eq!(rig.attach(2, EP), INVAL);
    assert_eq!(fault(&mut rig, 0), (1, 0x100)); // failed ATTACH
}

#[test]
fn qemu_translates_granules_and_lets_the_byte_below_through() {
    let mut rig = attached(Config::qemu_10());
    assert_eq!(rig.map(1, 0x2_0000, 0x2_0010, 0x71_0000, RW), OK);
    let at = |rig: &Rig, iova| rig.device.translate(EP, iova, AccessKind::Write);
    assert_eq!(at(&rig, 0x1_ffff), Ok(0x70_ffff));
    assert_eq!(at(&rig, 0x1_fffe), Err(FaultReason::Mapping));
    assert_eq!(at(&rig, 0x2_0000), Ok(0x71_0000));
    assert_eq!(at(&rig, 0x2_0011), Err(FaultReason::Mapping));
    // A write that starts in the mapping goes on to the end of the page.
    assert_eq!(rig.map(1, 0x3_0000, 0x3_0000, BUFFERS, RW), OK);
    assert!(rig.device.access(&mut rig.mem, EP, 0x3_0000, Access::Write(&[9; 32])).is_ok());
    assert_eq!(rig.peek::<1>(BUFFERS + 31), [9]);
}

#[test]
fn cloud_hypervisor_reports_failures_with_used_length_0() {
    let mut rig = Rig::new(Config::cloud_hypervisor());
    assert_eq!(rig.send(&map(1, 0, 0xfff, BUFFERS, READ), 4), (0, vec![NOENT, 0, 0, 0]));
    assert_eq!(rig.attach(1, 444), OK);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ), OK);
    assert_eq!(rig.send(&map(1, !0xfff, u64::MAX, 0, READ), 4), (0, vec![RANGE, 0, 0, 0]));
    assert_eq!(rig.send(&unmap(1, 0, u64::MAX, 0), 4), (0, vec![RANGE, 0, 0, 0]));
    assert_eq!(rig.detach(77, 444), OK);
    assert_eq!(rig.device.domains().count(), 0);
}

#[test]
fn cloud_hypervisor_wants_one_descriptor_each() {
    let mut rig = Rig::new(Config::cloud_hypervisor());
    let at = rig.slot(0);
    rig.poke(at, &attach(1, EP, 0, 0));
    rig.write_chain(0, 0, &[(at, 4, 0), (at + 4, 16, 0), (at + 0x400, 4, crate::rig::WRITE)]);
    rig.make_available(0, 0);
    rig.kick(0);
    assert_eq!(rig.take_used(0), Some((0, 0)));
    assert_eq!(rig.device.domain_of(EP), None);
}

#[test]
fn cloud_hypervisor_bypasses_until_told_and_never_faults() {
    let mut rig = Rig::new(Config::cloud_hypervisor());
    let mut byte = [9];
    rig.device.read_config(36, &mut byte);
    assert_eq!((byte, rig.device.bypasses(EP)), ([0], true));
    rig.device.write_config(36, &[0]);
    assert!(!rig.device.bypasses(EP));
    rig.post_events(1, 24);
    assert!(rig.device.access(&mut rig.mem, EP, 0, Access::Write(&[1])).is_err());
    assert_eq!(rig.take_event(), None);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ), OK);
    assert!(rig.device.access(&mut rig.mem, EP, 0, Access::Write(&[1])).is_ok());
    rig.device.set_status(0);
    assert_eq!((rig.device.domain_of(EP), rig.ranges(1)), (Some(1), vec![(0, 0xfff)]));
}

#[test]
fn crosvm_moves_and_detaches_nothing() {
    let mut rig = attached(Config::crosvm());
    assert_eq!(rig.attach(1, EP), UNSUPP);
    assert_eq!(rig.attach(2, EP), UNSUPP);
    assert_eq!(rig.attach_bypass(2, EP2), INVAL);
    assert_eq!(rig.detach(1, EP), UNSUPP);
    assert_eq!(rig.device.domain_of(EP), Some(1));
    assert_eq!(rig.send(&unmap(1, 0, 0xfff, 0), 4), (0, vec![0xaa; 4]));
    assert_eq!(rig.try_send(&unmap(1, 0, u64::MAX, 0), 4), None);
    assert_eq!(rig.device.crash(), Some(Crash::Abort));
}

#[test]
fn crosvm_lives_once() {
    let mut rig = attached(Config::crosvm());
    let features = rig.device.device_features();
    assert_ne!(features & 1 << 42, 0);
    rig.device.set_status(0);
    rig.device.set_driver_features(features);
    rig.device.set_status(11);
    assert_eq!(rig.device.status() & device_status::FEATURES_OK, 0);
}
