//! PROBE.

use virtio_iommu_model::{Answer, Config, Endpoint, Request, ReservedRegion, Status, feature};

use crate::rig::{EP, EP2, INVAL, NOENT, OK, Rig, attach, probe};

const PROBE_WR: u32 = 516;

fn with_endpoint(endpoint: Endpoint) -> Rig {
    let mut rig = Rig::new(Config::default());
    rig.device.add_endpoint(endpoint);
    rig
}

fn windows(count: u64) -> Vec<ReservedRegion> {
    (0..count).map(|index| ReservedRegion::reserved(index << 20, (index << 20) + 0xfff)).collect()
}

#[test]
fn r39_probe_ignores_reserved() {
    let mut rig = Rig::new(Config::default());
    let mut request = probe(EP);
    request[8..].fill(0xff);
    let (len, bytes) = rig.send(&request, PROBE_WR);
    assert_eq!((len, bytes[512]), (516, OK));
    assert!(rig.rules_broken().contains(&"D-28"));
}

#[test]
fn r40_probe_unknown_endpoint_is_noent() {
    let (len, bytes) = Rig::new(Config::default()).send(&probe(444), PROBE_WR);
    assert_eq!((len, bytes[512]), (516, NOENT));
    assert_eq!(bytes[..512], [0; 512]);
}

#[test]
fn r41_probe_without_the_feature_is_returned_unwritten() {
    let config = Config::default();
    let without = config.features & !feature::PROBE;
    let not_negotiated = Rig::with_features(config.clone(), without);
    let not_offered = Rig::new(Config { features: without, ..config });
    for mut rig in [not_negotiated, not_offered] {
        assert_eq!(rig.send(&probe(EP), PROBE_WR), (0, vec![0xaa; 516]));
        assert_eq!(rig.send(&probe(EP)[..8], PROBE_WR), (0, vec![0xaa; 516]));
    }
}

#[test]
fn r42_r45_properties_are_packed_with_their_own_lengths() {
    let region = ReservedRegion::msi(0xfee0_0000, 0xfeef_ffff);
    let second = ReservedRegion::reserved(0x1122_3344_5566_7788, u64::MAX);
    let mut rig = with_endpoint(Endpoint { reserved: vec![region, second], ..Endpoint::new(EP) });
    let (_, bytes) = rig.send(&probe(EP), PROBE_WR);
    let expected = [
        1, 0, 20, 0, 1, 0, 0, 0, 0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0xff, 0xff, 0xef, 0xfe, 0, 0, 0, 0, //
        1, 0, 20, 0, 0, 0, 0, 0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0xff,
    ];
    assert_eq!(bytes[..48], expected);
    assert_eq!(bytes[48..], [0; 468]);
}

#[test]
fn r43_too_small_an_area_gets_no_property() {
    let mut rig = with_endpoint(Endpoint::x86(EP));
    for writable in [4, 5, 100, 515] {
        let (len, bytes) = rig.send(&probe(EP), writable);
        let (area, tail) = bytes.split_at(writable as usize - 4);
        assert_eq!((len, tail), (writable, &[INVAL, 0, 0, 0][..]));
        assert!(area.iter().all(|byte| *byte == 0));
    }
    assert!(rig.rules_broken().contains(&"D-27"));
}

#[test]
fn r44_the_rest_of_a_larger_area_is_zero() {
    let mut rig = with_endpoint(Endpoint::x86(EP));
    let (len, bytes) = rig.send(&probe(EP), 600);
    assert_eq!(len, 600);
    assert_eq!(bytes[24..], [0; 576]);
}

#[test]
fn twenty_one_regions_fit_and_twenty_two_are_invalid() {
    let mut rig = with_endpoint(Endpoint { reserved: windows(21), ..Endpoint::new(EP) });
    assert_eq!(rig.send(&probe(EP), PROBE_WR).1[512], OK);
    let mut rig = with_endpoint(Endpoint { reserved: windows(22), ..Endpoint::new(EP) });
    let (_, bytes) = rig.send(&probe(EP), PROBE_WR);
    assert_eq!(bytes[..513], [&[0; 512][..], &[INVAL]].concat());
}

#[test]
fn raw_properties_go_before_after_or_instead() {
    let raw = Endpoint {
        raw_before: vec![0xff, 0x07, 1, 0, 9],
        raw_after: vec![1, 0x10, 0, 0],
        ..Endpoint::x86(EP)
    };
    let mut rig = with_endpoint(raw);
    rig.device.add_endpoint(Endpoint { raw_instead: Some(vec![7; 1000]), ..Endpoint::x86(EP2) });
    let (_, bytes) = rig.send(&probe(EP), PROBE_WR);
    assert_eq!(bytes[..9], [0xff, 0x07, 1, 0, 9, 1, 0, 20, 0]);
    assert_eq!(bytes[29..34], [1, 0x10, 0, 0, 0]);
    let (_, bytes) = rig.send(&probe(EP2), PROBE_WR);
    assert_eq!(bytes, [&[7; 512][..], &[0; 4]].concat());
}

#[test]
fn probe_size_0_has_only_a_tail() {
    let mut rig = Rig::new(Config { probe_size: 0, ..Config::default() });
    assert_eq!(rig.send(&probe(EP), 4), (4, vec![0; 4]));
}

#[test]
fn a_long_writable_part_is_not_filled_without_bound() {
    let mut rig = Rig::new(Config::default());
    rig.submit(0, &attach(1, EP, 0, 0), u32::MAX);
    rig.kick(0);
    assert_eq!(rig.take_used(0), Some((0, 0)));
}

#[test]
fn the_log_keeps_order_and_answers() {
    let mut rig = Rig::new(Config { log_limit: 2, ..Config::default() });
    rig.attach(1, 444);
    rig.send(&probe(EP), PROBE_WR);
    assert_eq!(rig.attach(1, EP), OK);
    let log: Vec<_> = rig.device.log().map(|entry| (entry.number, entry.request, entry.answer)).collect();
    let ok = Answer::Status(Status::Ok);
    assert_eq!(log[0], (1, Request::Probe { endpoint: EP, reserved_zero: true }, ok));
    assert_eq!(log[1], (2, Request::Attach { domain: 1, endpoint: EP, flags: 0, reserved: 0 }, ok));
    let counters = rig.device.counters();
    assert_eq!((counters.attach, counters.probe, counters.ok, counters.failed), (2, 1, 2, 1));
    assert_eq!(rig.rules_broken(), [] as [&str; 0]);
    assert_eq!(rig.attach(1, EP2), OK);
    assert_eq!(rig.rules_broken(), ["D-07"]);
}
