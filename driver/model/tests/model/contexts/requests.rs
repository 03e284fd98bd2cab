//! Each request of the draft, and each way to get it wrong.

use virtio_iommu_model::Config;

use super::{
    FAULT, TABLES, attach_table, attached, detach_pasid, map_context, mapped, request, rig, unmap_context,
    vtd, x86_table,
};
use crate::rig::{BUFFERS, EP, EP2, INVAL, NOENT, OK, RANGE, RW, Rig, UNSUPP, attach, probe};

/// What a request with one field changed is answered.
fn with(rig: &mut Rig, bytes: &[u8], at: usize, field: &[u8]) -> u8 {
    let mut bytes = bytes.to_vec();
    bytes[at..at + field.len()].copy_from_slice(field);
    rig.status(&bytes)
}

#[test]
fn without_the_feature_they_are_unknown() {
    let mut rig = Rig::new(Config::default());
    assert_eq!(rig.attach(1, EP), OK);
    for bytes in [mapped(1), request(7, 60, &[]), request(8, 28, &[]), map_context(1, 0, 0xfff, 0, 3)] {
        assert_eq!(rig.send(&bytes, 4).0, 0);
    }
    assert_eq!(rig.status(&attach(2, EP2, 2, 0)), INVAL);
    // What would be a PASID is reserved bytes, and ignored: the endpoint leaves.
    assert_eq!(rig.status(&detach_pasid(3)), OK);
    assert_eq!(rig.device.domain_of(EP), None);
    // Nor does an offer alone do.
    let features = Config::default().features;
    let mut rig = Rig::with_features(Config::contexts(), features);
    assert_eq!(rig.send(&mapped(1), 4).0, 0);
    assert_eq!(rig.send(&mapped(1)[..10], 4).0, 0);
}

#[test]
fn attach_flags_say_what_anonymous_traffic_meets_and_are_the_domains() {
    for flags in [2, 4, 6] {
        let mut rig = attached(flags);
        assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, RW), INVAL);
        assert_eq!(rig.unmap(1, 0, 0xfff), INVAL);
        assert_eq!(rig.status(&attach(1, EP2, flags, 0)), OK);
        assert_eq!(rig.status(&attach(1, EP2, flags ^ 2, 0)), INVAL);
        assert_eq!(rig.status(&attach(3, EP2, flags | 1, 0)), INVAL);
        assert_eq!(rig.status(&attach(3, EP2, flags | 8, 0)), INVAL);
    }
}

#[test]
fn attach_table_checks_every_field() {
    let mut rig = attached(2);
    let root = x86_table(&mut rig);
    let good = vtd(5, root);
    assert_eq!(with(&mut rig, &good, 4, &[9]), NOENT, "domain");
    assert_eq!(with(&mut rig, &good, 8, &[77]), NOENT, "endpoint");
    assert_eq!(with(&mut rig, &good, 8, &[EP2 as u8]), INVAL, "an endpoint elsewhere");
    assert_eq!(with(&mut rig, &good, 12, &[0]), INVAL, "no PASID");
    assert_eq!(with(&mut rig, &good, 12, &[3]), INVAL, "flags");
    for format in [6, 7, 0xffff_u16] {
        assert_eq!(with(&mut rig, &good, 16, &format.to_le_bytes()), UNSUPP, "format");
    }
    for reserved in [18, 19, 44, 83] {
        assert_eq!(with(&mut rig, &good, reserved, &[1]), INVAL, "reserved byte {reserved}");
    }
    assert_eq!(with(&mut rig, &good, 20, &(1u32 << 20).to_le_bytes()), RANGE, "PASID");
    assert_eq!(with(&mut rig, &good, 24, &(root + 1).to_le_bytes()), INVAL, "a table that is not aligned");
    assert_eq!(with(&mut rig, &good, 24, &0x1000u64.to_le_bytes()), FAULT, "a table outside of memory");
    assert_eq!(with(&mut rig, &good, 32, &[1]), INVAL, "first-stage flags");
    assert_eq!(with(&mut rig, &good, 40, &[57]), INVAL, "width");
    assert_eq!(rig.status(&good), OK);
    assert_eq!(rig.status(&good), INVAL, "the PASID exists");
    assert_eq!(rig.status(&good[..83]), INVAL, "short");
    for at in 18..84 {
        if !(20..24).contains(&at) {
            assert_eq!(with(&mut rig, &mapped(6), at, &[1]), INVAL, "byte {at} of a mapped context");
        }
    }
    assert_eq!(rig.status(&mapped(6)), OK);
}

#[test]
fn attach_table_checks_what_each_format_says() {
    let mut rig = attached(2);
    let root = TABLES.to_le_bytes();
    let riscv = attach_table(5, 1, &[(18, &[8]), (24, &(TABLES >> 12).to_le_bytes())]);
    for (at, field) in [(18, 7), (18, 11), (19, 1), (32, 1), (83, 1), (31, 1)] {
        assert_eq!(with(&mut rig, &riscv, at, &[field]), INVAL, "byte {at}");
    }
    assert_eq!(with(&mut rig, &riscv, 24, &[0, 0, 0]), FAULT);
    assert_eq!(rig.status(&riscv), OK);
    // T0SZ 25, EPD1, IPS 5.
    let tcr = (25u64 | 1 << 23 | 5 << 32).to_le_bytes();
    let mair = 0x04ffu64.to_le_bytes();
    let arm = attach_table(1, 2, &[(18, &[7]), (24, &tcr), (32, &root), (48, &mair)]);
    // T0SZ, EPD1, a table that is not aligned, TTBR1, reserved.
    for (at, field) in [(24, 1), (26, 0), (32, 8), (40, 1), (56, 1), (83, 1)] {
        assert_eq!(with(&mut rig, &arm, at, &[field]), INVAL, "byte {at}");
    }
    assert_eq!(with(&mut rig, &arm, 35, &[0x70]), FAULT);
    assert_eq!(rig.status(&arm), OK);
    let x86 = attach_table(3, 3, &[(24, &root)]);
    assert_eq!(with(&mut rig, &x86, 32, &[1]), INVAL);
    assert_eq!(rig.status(&x86), OK);
}

#[test]
fn contexts_are_for_domains_that_translate() {
    let mut rig = rig();
    assert_eq!(rig.attach_bypass(1, EP), OK);
    assert_eq!(rig.status(&mapped(1)), INVAL);
    assert_eq!(rig.detach(1, EP), OK);
    assert_eq!(rig.status(&mapped(1)), NOENT);
    // With a default context they can be added too.
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.status(&mapped(1)), OK);
    assert_eq!(rig.map(1, 0, 0xfff, BUFFERS, RW), OK);
}

#[test]
fn map_and_unmap_in_a_context_keep_the_rules_of_map_and_unmap() {
    let mut rig = attached(2);
    assert_eq!(rig.status(&map_context(1, 0, 0xfff, BUFFERS, RW)), NOENT, "no context");
    assert_eq!(rig.status(&mapped(1)), OK);
    let root = x86_table(&mut rig);
    assert_eq!(rig.status(&vtd(2, root)), OK);
    assert_eq!(rig.status(&map_context(2, 0, 0xfff, BUFFERS, RW)), INVAL, "an owned context");
    assert_eq!(rig.status(&unmap_context(2, 0, 0xfff)), INVAL, "an owned context");
    let good = map_context(1, 0x1000, 0x2fff, BUFFERS, RW);
    assert_eq!(with(&mut rig, &good, 4, &[9]), NOENT, "domain");
    assert_eq!(with(&mut rig, &good, 12, &[8]), INVAL, "flags");
    assert_eq!(with(&mut rig, &good, 16, &[1]), RANGE, "first address");
    assert_eq!(with(&mut rig, &good, 24, &[0]), RANGE, "last address");
    assert_eq!(with(&mut rig, &good, 25, &[0]), INVAL, "inverted");
    assert_eq!(with(&mut rig, &good, 32, &[1]), RANGE, "memory");
    assert_eq!(with(&mut rig, &good, 31, &[0x7f]), RANGE, "input range");
    assert_eq!(rig.status(&good[..39]), INVAL, "short");
    assert_eq!(rig.status(&good), OK);
    assert_eq!(rig.status(&good), INVAL, "overlap");
    let all = unmap_context(1, 0x1000, 0x2fff);
    assert_eq!(with(&mut rig, &all, 12, &[1]), INVAL, "reserved");
    assert_eq!(with(&mut rig, &all, 25, &[0x1f]), RANGE, "a part");
    assert_eq!(with(&mut rig, &all, 25, &[0x0]), INVAL, "inverted");
    assert_eq!(rig.status(&all[..31]), INVAL, "short");
    assert_eq!(rig.status(&all), OK);
    assert_eq!(rig.status(&all), OK);
    assert_eq!(rig.status(&good), OK);
}

#[test]
fn detach_with_a_pasid_takes_one_context() {
    let mut rig = attached(2);
    assert_eq!(rig.status(&mapped(1)), OK);
    assert_eq!(rig.status(&detach_pasid(2)), NOENT);
    let good = detach_pasid(1);
    assert_eq!(with(&mut rig, &good, 12, &[3]), INVAL, "flags");
    assert_eq!(with(&mut rig, &good, 12, &[0]), INVAL, "a PASID without its flag");
    assert_eq!(with(&mut rig, &good, 8, &[EP2 as u8]), INVAL, "an endpoint elsewhere");
    assert_eq!(with(&mut rig, &good, 8, &[77]), NOENT, "endpoint");
    assert_eq!(rig.status(&good), OK);
    assert_eq!(rig.status(&good), NOENT);
    assert_eq!(rig.device.domain_of(EP), Some(1));
    // All of them go with the last endpoint.
    assert_eq!(rig.status(&mapped(1)), OK);
    assert_eq!(rig.detach(1, EP), OK);
    assert_eq!(rig.status(&attach(1, EP, 2, 0)), OK);
    assert_eq!(rig.status(&mapped(1)), OK);
}

#[test]
fn probe_says_what_an_endpoint_can_do_with_contexts() {
    let (_, bytes) = rig().send(&probe(EP), 516);
    let expected =
        [[4, 0, 4, 0, 48, 0, 0, 0].as_slice(), &[5, 0, 4, 0, 20, 0, 0, 0], &[6, 0, 20, 0, 4, 0, 0, 0]]
            .concat();
    assert_eq!(bytes[..24], expected);
    let mut standard = Rig::new(Config::default());
    assert_eq!(standard.send(&probe(EP), 516).1[..4], [0; 4]);
}
