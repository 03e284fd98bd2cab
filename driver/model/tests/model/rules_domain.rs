//! the envelope of requests, ATTACH and DETACH.

use virtio_iommu_model::{Config, Device, Endpoint, ReservedRegion, feature};

use crate::rig::{
    BUFFERS, EP, EP2, INVAL, NOENT, NOMEM, OK, PAGE, RANGE, READ, RW, Rig, UNSUPP, attach, detach, map,
};

fn strict() -> Rig {
    Rig::new(Config::default())
}

#[test]
fn r01_map_unmap_is_offered_and_r02_bypass_is_not() {
    let features = Device::new(Config::default()).device_features();
    assert_ne!(features & feature::MAP_UNMAP, 0);
    assert_eq!(features & feature::BYPASS, 0);
    assert_ne!(features & feature::BYPASS_CONFIG, 0);
}

#[test]
fn r01_without_map_unmap_both_requests_are_unknown() {
    let config = Config { features: Config::default().features & !feature::MAP_UNMAP, ..Config::default() };
    let mut rig = Rig::new(config);
    assert_eq!(rig.attach(1, EP), OK);
    let (len, tail) = rig.send(&map(1, 0, 0xfff, BUFFERS, READ), 4);
    assert_eq!((len, tail), (0, vec![0xaa; 4]));
}

#[test]
fn r03_a_mask_of_zero_maps_nothing() {
    let mut rig = Rig::new(Config { page_size_mask: 0, ..Config::default() });
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ), RANGE);
}

#[test]
fn r06_device_reset_unattaches_and_drops_domains() {
    let mut rig = strict();
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ), OK);
    rig.device.set_status(0);
    assert_eq!(rig.device.domain_of(EP), None);
    assert_eq!(rig.device.domains().count(), 0);
    rig.bring_up(Config::default().features);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ), NOENT);
}

#[test]
fn r08_unknown_types_are_returned_unwritten() {
    let mut rig = strict();
    for kind in [0, 6, 0x42, 0xff] {
        let mut request = map(1, 0, 0xfff, 0, 0);
        request[0] = kind;
        assert_eq!(rig.send(&request, 4), (0, vec![0xaa; 4]));
    }
    assert_eq!(rig.device.counters().unwritten, 4);
}

#[test]
fn r08_unknown_type_without_a_writable_part_is_returned() {
    assert_eq!(strict().send(&[0x42, 0, 0, 0], 0).0, 0);
}

#[test]
fn r09_requests_without_room_for_head_or_tail_are_returned_unwritten() {
    let mut rig = strict();
    assert_eq!(rig.send(&[1, 0, 0], 4), (0, vec![0xaa; 4]));
    assert_eq!(rig.send(&attach(1, EP, 0, 0), 3), (0, vec![0xaa; 3]));
    assert_eq!(rig.send(&attach(1, EP, 0, 0), 0).0, 0);
    assert_eq!(rig.send(&[], 4), (0, vec![0xaa; 4]));
    assert_eq!(rig.device.domain_of(EP), None);
    assert!(rig.device.is_running());
}

#[test]
fn short_readable_parts_with_a_tail_are_invalid() {
    let mut rig = strict();
    let whole = [attach(1, EP, 0, 0), detach(1, EP), map(1, 0, 0xfff, BUFFERS, READ)];
    for request in whole {
        for len in 4..request.len() {
            assert_eq!(rig.status(&request[..len]), INVAL, "type {} of {len} bytes", request[0]);
        }
    }
    assert_eq!(rig.device.domain_of(EP), None);
}

#[test]
fn long_readable_parts_are_accepted_and_the_tail_is_last() {
    let mut rig = strict();
    let mut request = attach(1, EP, 0, 0);
    request.extend([0xff; 100]);
    let (len, bytes) = rig.send(&request, 16);
    assert_eq!((len, bytes), (16, vec![0; 16]));
    assert_eq!(rig.device.domain_of(EP), Some(1));
}

#[test]
fn r10_head_reserved_is_ignored_and_tail_reserved_is_zero() {
    let mut rig = strict();
    let mut request = attach(1, EP, 0, 0);
    request[1..4].fill(0xff);
    assert_eq!(rig.send(&request, 4), (4, vec![0; 4]));
    assert!(rig.rules_broken().contains(&"D-08"));
}

#[test]
fn r13_attach_reserved_is_invalid() {
    let mut rig = strict();
    for bit in [0, 8, 31] {
        assert_eq!(rig.status(&attach(1, EP, 0, 1 << bit)), INVAL);
    }
    assert_eq!(rig.device.domain_of(EP), None);
}

#[test]
fn r14_attach_unknown_flags_are_invalid() {
    let mut rig = strict();
    for bit in 1..32 {
        assert_eq!(rig.status(&attach(1, EP, 1 << bit, 0)), INVAL);
    }
    assert_eq!(rig.status(&attach(1, 444, 2, 0)), INVAL);
}

#[test]
fn r14_attach_bypass_needs_the_feature_negotiated() {
    let offered = Config::default();
    let without = offered.features & !feature::BYPASS_CONFIG;
    let mut rig = Rig::with_features(offered.clone(), without);
    assert_eq!(rig.attach_bypass(1, EP), INVAL);
    let mut rig = Rig::new(Config { features: without, ..offered });
    assert_eq!(rig.attach_bypass(1, EP), INVAL);
}

#[test]
fn r15_attach_unknown_endpoint_is_noent() {
    let mut rig = strict();
    assert_eq!(rig.attach(1, 444), NOENT);
    assert_eq!(rig.device.domains().count(), 0);
}

#[test]
fn r16_a_domain_takes_several_endpoints_or_says_unsupp() {
    let mut rig = strict();
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.attach(1, EP2), OK);
    let mut rig = Rig::new(Config { shared_domains: false, ..Config::default() });
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.attach(1, EP2), UNSUPP);
    assert_eq!(rig.device.domain_of(EP2), None);
    assert_eq!(rig.attach(1, EP), OK);
}

#[test]
fn r17_bypass_flag_must_be_the_domains() {
    let mut rig = strict();
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.attach_bypass(1, EP2), INVAL);
    assert_eq!(rig.attach_bypass(1, EP), INVAL);
    assert_eq!(rig.attach_bypass(2, EP2), OK);
    assert_eq!(rig.attach(2, EP), INVAL);
    assert_eq!(rig.device.domain_of(EP), Some(1));
    assert_eq!(rig.device.domain_of(EP2), Some(2));
    assert!(rig.rules_broken().contains(&"D-14"));
}

#[test]
fn r18_attach_moves_and_the_old_domain_dies_with_its_last_endpoint() {
    let mut rig = strict();
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.attach(1, EP2), OK);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ), OK);
    assert_eq!(rig.attach(2, EP), OK);
    assert_eq!(rig.ranges(1), [(0, 0xfff)]);
    assert_eq!(rig.attach(2, EP2), OK);
    assert_eq!(rig.device.domains().collect::<Vec<_>>(), [2]);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ), NOENT);
}

#[test]
fn r19_incompatible_endpoints_are_unsupp() {
    let mut rig = strict();
    rig.device.add_endpoint(Endpoint { class: 1, ..Endpoint::new(EP2) });
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.attach(1, EP2), UNSUPP);
    assert_eq!(rig.device.domain_of(EP2), None);
}

#[test]
fn r19_mappings_over_a_newcomers_reserved_region_are_unsupp() {
    let mut rig = strict();
    let reserved = vec![ReservedRegion::reserved(0x1800, 0x18ff)];
    rig.device.add_endpoint(Endpoint { reserved, ..Endpoint::new(EP2) });
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0x1000, 0x1fff, BUFFERS, READ), OK);
    assert_eq!(rig.attach(1, EP2), UNSUPP);
}

#[test]
fn r20_attach_creates_the_domain_and_the_same_one_again_keeps_mappings() {
    let mut rig = strict();
    assert_eq!(rig.attach(7, EP), OK);
    assert_eq!(rig.device.domains().collect::<Vec<_>>(), [7]);
    assert_eq!(rig.map(7, 0, 0xfff, BUFFERS, READ), OK);
    assert_eq!(rig.attach(7, EP), OK);
    assert_eq!(rig.ranges(7), [(0, 0xfff)]);
    assert_eq!(rig.detach(7, EP), OK);
    assert_eq!(rig.device.domains().count(), 0);
}

#[test]
fn domains_outside_the_range_are_range() {
    let mut rig = Rig::new(Config { domain_range: 5..=7, ..Config::default() });
    for domain in [0, 4, 8, u32::MAX] {
        assert_eq!(rig.attach(domain, EP), RANGE);
        assert_eq!(rig.map(domain, 0, 0xfff, BUFFERS, READ), RANGE);
        assert_eq!(rig.unmap(domain, 0, 0xfff), RANGE);
    }
    assert_eq!(rig.attach(5, EP), OK);
    assert_eq!(rig.attach(7, EP), OK);
    assert!(rig.rules_broken().contains(&"D-11"));
}

#[test]
fn domains_are_free_when_the_range_is_not_offered() {
    let features = Config::default().features & !feature::DOMAIN_RANGE;
    let mut rig = Rig::new(Config { domain_range: 5..=7, features, ..Config::default() });
    assert_eq!(rig.attach(0, EP), OK);
    assert_eq!(rig.attach(u32::MAX, EP), OK);
}

#[test]
fn too_many_domains_and_mappings_are_nomem() {
    let mut rig = Rig::new(Config { max_domains: 1, max_mappings: 2, ..Config::default() });
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.attach(2, EP2), NOMEM);
    assert_eq!(rig.attach(2, EP), OK); // its own domain makes room
    for page in 0..2 {
        assert_eq!(rig.map(2, page * PAGE, page * PAGE + 0xfff, BUFFERS, RW), OK);
    }
    assert_eq!(rig.map(2, 0x8000, 0x8fff, BUFFERS, RW), NOMEM);
}

#[test]
fn r21_detach_ignores_reserved() {
    let mut rig = strict();
    assert_eq!(rig.attach(1, EP), OK);
    let mut request = detach(1, EP);
    request[12..].fill(0xff);
    assert_eq!(rig.status(&request), OK);
    assert!(rig.rules_broken().contains(&"D-16"));
}

#[test]
fn r22_detach_unknown_endpoint_is_noent() {
    let mut rig = strict();
    assert_eq!(rig.detach(1, 444), NOENT);
}

#[test]
fn r23_detach_from_another_domain_is_invalid() {
    let mut rig = strict();
    assert_eq!(rig.detach(1, EP), INVAL);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.detach(2, EP), INVAL);
    assert_eq!(rig.device.domain_of(EP), Some(1));
    assert_eq!(rig.detach(1, EP), OK);
    assert_eq!(rig.detach(1, EP), INVAL);
}

#[test]
fn r25_only_the_last_detach_ends_a_domain() {
    let mut rig = strict();
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.attach(1, EP2), OK);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ), OK);
    assert_eq!(rig.detach(1, EP), OK);
    assert_eq!(rig.ranges(1), [(0, 0xfff)]);
    assert_eq!(rig.detach(1, EP2), OK);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.ranges(1), []);
}
