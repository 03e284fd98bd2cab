//! MAP and UNMAP.

use virtio_iommu_model::{Config, Endpoint, ReservedRegion, feature};

use crate::rig::{BUFFERS, EP, EP2, INVAL, MMIO, NOENT, OK, RANGE, READ, RW, Rig, map, unmap};

fn attached(config: Config) -> Rig {
    let mut rig = Rig::new(config);
    assert_eq!(rig.attach(1, EP), OK);
    rig
}

fn strict() -> Rig {
    attached(Config::default())
}

fn whole_space() -> Config {
    Config { input_range: 0..=u64::MAX, ..Config::default() }
}

#[test]
fn r26_misaligned_maps_are_range() {
    let mut rig = strict();
    assert_eq!(rig.map(1, 0x1001, 0x1fff, BUFFERS, READ), RANGE);
    assert_eq!(rig.map(1, 0x1000, 0x1ffe, BUFFERS, READ), RANGE);
    assert_eq!(rig.map(1, 0x1000, 0x2000, BUFFERS, READ), RANGE);
    assert_eq!(rig.map(1, 0x1000, 0x1fff, BUFFERS + 1, READ), RANGE);
    assert_eq!(rig.ranges(1), []);
}

#[test]
fn r26_granule_is_the_lowest_bit_of_the_mask() {
    let mut rig = attached(Config { page_size_mask: 0x4020_0000, ..Config::default() });
    assert_eq!(rig.map(1, 0, 0xfff, 0, READ), RANGE);
    assert_eq!(rig.map(1, 0, 0x5f_ffff, 0, READ), OK);
    let mut rig =
        attached(Config { page_size_mask: 1 << 63, input_range: 0..=u64::MAX, ..Config::default() });
    assert_eq!(rig.map(1, 1 << 63, u64::MAX, 0, READ), OK);
}

#[test]
fn r27_overlapping_maps_are_invalid_and_touching_ones_fine() {
    let mut rig = strict();
    assert_eq!(rig.map(1, 0x2000, 0x4fff, BUFFERS, READ), OK);
    for (first, last) in
        [(0x2000, 0x4fff), (0x3000, 0x3fff), (0x1000, 0x5fff), (0x1000, 0x2fff), (0x4000, 0x5fff)]
    {
        assert_eq!(rig.map(1, first, last, BUFFERS, READ), INVAL);
    }
    assert_eq!(rig.map(1, 0x1000, 0x1fff, BUFFERS, READ), OK);
    assert_eq!(rig.map(1, 0x5000, 0x5fff, BUFFERS + 0x3000, READ), OK);
    assert_eq!(rig.ranges(1), [(0x1000, 0x1fff), (0x2000, 0x4fff), (0x5000, 0x5fff)]);
}

#[test]
fn r28_unknown_flags_are_invalid() {
    let mut rig = strict();
    for bit in 3..32 {
        assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ | 1 << bit), INVAL);
    }
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, RW | MMIO), OK);
    assert!(rig.rules_broken().contains(&"D-17"));
}

#[test]
fn r28_mmio_needs_its_feature_negotiated() {
    let config = Config::default();
    let mut rig = Rig::with_features(config.clone(), config.features & !feature::MMIO);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, RW | MMIO), INVAL);
    assert!(rig.rules_broken().contains(&"D-22"));
}

#[test]
fn r29_map_in_an_unknown_domain_is_noent() {
    assert_eq!(strict().map(2, 0, 0xfff, BUFFERS, READ), NOENT);
}

#[test]
fn r30_map_in_a_bypass_domain_is_invalid() {
    let mut rig = strict();
    assert_eq!(rig.attach_bypass(2, EP2), OK);
    assert_eq!(rig.map(2, 0, 0xfff, BUFFERS, READ), INVAL);
    assert!(rig.rules_broken().contains(&"D-18"));
}

#[test]
fn r32_map_outside_the_input_range_is_range() {
    let mut rig = attached(Config { input_range: 0x10_0000..=0x1f_ffff, ..Config::default() });
    assert_eq!(rig.map(1, 0xf_f000, 0xf_ffff, BUFFERS, READ), RANGE);
    assert_eq!(rig.map(1, 0xf_f000, 0x10_0fff, BUFFERS, READ), RANGE);
    assert_eq!(rig.map(1, 0x1f_f000, 0x20_0fff, BUFFERS, READ), RANGE);
    assert_eq!(rig.map(1, 0x10_0000, 0x1f_ffff, BUFFERS, READ), OK);
    assert!(rig.rules_broken().contains(&"D-10"));
}

#[test]
fn r33_map_over_a_reserved_region_is_invalid() {
    for subtype in [0, 1, 9] {
        let mut rig = Rig::new(Config::default());
        let region = ReservedRegion { subtype, first: 0x8800, last: 0x88ff };
        rig.device.add_endpoint(Endpoint { reserved: vec![region], ..Endpoint::new(EP) });
        assert_eq!(rig.attach(1, EP), OK);
        assert_eq!(rig.map(1, 0x8000, 0x8fff, BUFFERS, READ), INVAL);
        assert_eq!(rig.map(1, 0x7000, 0x9fff, BUFFERS, READ), INVAL);
        assert_eq!(rig.map(1, 0x7000, 0x7fff, BUFFERS, READ), OK);
        assert_eq!(rig.map(1, 0x9000, 0x9fff, BUFFERS, READ), OK);
        assert!(rig.rules_broken().contains(&"D-33"));
    }
}

#[test]
fn inverted_and_single_byte_maps_are_invalid() {
    let mut rig = Rig::byte_granule();
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 9, 5, BUFFERS, READ), INVAL);
    assert_eq!(rig.map(1, 9, 9, BUFFERS, READ), INVAL);
    assert_eq!(rig.map(1, 9, 10, BUFFERS, READ), OK);
    assert!(rig.rules_broken().contains(&"D-19"));
}

#[test]
fn physical_overflow_is_range() {
    let mut rig = strict();
    assert_eq!(rig.map(1, 0, 0x1fff, !0xfff, READ), RANGE);
    assert_eq!(rig.map(1, 0, 0xfff, !0xfff, READ), OK);
}

#[test]
fn the_last_page_and_the_whole_space_can_be_mapped() {
    let mut rig = attached(whole_space());
    assert_eq!(rig.map(1, !0xfff, u64::MAX, BUFFERS, READ), OK);
    assert_eq!(rig.unmap(1, 0, u64::MAX), OK);
    assert_eq!(rig.map(1, 0, u64::MAX, 0, READ), OK);
    assert_eq!(rig.map(1, 0, 0xfff, 0, READ), INVAL);
    assert_eq!(rig.unmap(1, 1, u64::MAX), RANGE);
    assert_eq!(rig.unmap(1, 0, u64::MAX - 1), RANGE);
    assert_eq!(rig.unmap(1, 0, u64::MAX), OK);
    assert_eq!(rig.ranges(1), []);
}

#[test]
fn r34_unmap_reserved_is_invalid_and_removes_nothing() {
    let mut rig = strict();
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, READ), OK);
    assert_eq!(rig.status(&unmap(1, 0, 0xfff, 1)), INVAL);
    assert_eq!(rig.ranges(1), [(0, 0xfff)]);
    assert!(rig.rules_broken().contains(&"D-23"));
}

#[test]
fn r35_unmap_in_an_unknown_domain_is_noent() {
    assert_eq!(strict().unmap(2, 0, 0xfff), NOENT);
}

#[test]
fn r36_unmap_in_a_bypass_domain_is_invalid() {
    let mut rig = strict();
    assert_eq!(rig.attach_bypass(2, EP2), OK);
    assert_eq!(rig.unmap(2, 0, 0xfff), INVAL);
    assert!(rig.rules_broken().contains(&"D-26"));
}

fn three_mappings() -> Rig {
    let mut rig = strict();
    for page in [1, 2, 4] {
        assert_eq!(rig.map(1, page * 0x2000, page * 0x2000 + 0x1fff, BUFFERS, READ), OK);
    }
    rig
}

#[test]
fn r37_split_unmap_removes_nothing() {
    let all = [(0x2000, 0x3fff), (0x4000, 0x5fff), (0x8000, 0x9fff)];
    let splits = [
        (0x2000, 0x2fff), // high side of the first
        (0x3000, 0x3fff), // low side of the first
        (0x2800, 0x3000), // both
        (0x3fff, 0x3fff), // its last byte
        (0x2000, 0x2000), // its first byte
        (0x2000, 0x4fff), // covers the first, splits the second
        (0x3000, 0x9fff), // splits the first, covers the rest
        (0x2000, 0x8000), // covers two, takes one byte of the third
        (0, 0x9ffe),
    ];
    for (first, last) in splits {
        let mut rig = three_mappings();
        assert_eq!(rig.unmap(1, first, last), RANGE, "{first:#x}..={last:#x}");
        assert_eq!(rig.ranges(1), all);
        assert_eq!(rig.rules_broken().iter().filter(|rule| **rule == "D-25").count(), 1);
    }
}

#[test]
fn r38_unmap_over_holes_removes_what_is_covered() {
    let mut rig = three_mappings();
    assert_eq!(rig.unmap(1, 0x4000, 0x7fff), OK);
    assert_eq!(rig.ranges(1), [(0x2000, 0x3fff), (0x8000, 0x9fff)]);
    assert_eq!(rig.unmap(1, 0x4000, 0x7fff), OK);
    assert_eq!(rig.unmap(1, 0, 0xf_ffff), OK);
    assert_eq!(rig.ranges(1), []);
    assert_eq!(rig.rules_broken().iter().filter(|rule| **rule == "D-25").count(), 0);
}

#[test]
fn unmap_inverted_or_outside_the_input_range_fails() {
    let mut rig = three_mappings();
    assert_eq!(rig.unmap(1, 0x5fff, 0x4000), INVAL);
    assert_eq!(rig.unmap(1, 0, 1 << 39), RANGE);
    assert_eq!(rig.unmap(1, 1 << 40, 1 << 41), RANGE);
    assert_eq!(rig.ranges(1).len(), 3);
}

#[test]
fn what_drivers_must_not_send_is_reported_whatever_the_answer() {
    let whole = Config { input_range: 0..=u64::MAX, ..Config::qemu_10() };
    let mut rig = attached(whole);
    rig.device.clear_violations();
    assert_eq!(rig.map(1, 0x10, 0x1fff, BUFFERS, READ), OK);
    assert_eq!(rig.rules_broken(), ["I5"]);
    assert_eq!(rig.map(1, 0x1000, 0x1fff, BUFFERS, READ), INVAL);
    assert_eq!(rig.rules_broken(), ["I5"; 2]);
    assert_eq!(rig.unmap(1, 0, u64::MAX), OK);
    assert_eq!(rig.rules_broken(), ["I5"; 3]);
}

#[test]
fn flags_0_makes_a_mapping() {
    let mut rig = strict();
    assert_eq!(rig.status(&map(1, 0, 0xfff, BUFFERS, 0)), OK);
    assert_eq!(rig.ranges(1), [(0, 0xfff)]);
}
