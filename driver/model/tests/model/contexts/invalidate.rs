//! What is cached of tables until it is invalidated, and INVALIDATE's rules.

use virtio_iommu_model::FaultReason;

use super::{TABLES, attached, invalidate, mapped, refused, request, vtd, write, x86_table};
use crate::rig::{BUFFERS, INVAL, NOENT, OK, RANGE, Rig};

/// Context 2 with a table, of which both pages are cached, and then gone from the table.
fn stale() -> Rig {
    let mut rig = attached(2);
    let root = x86_table(&mut rig);
    assert_eq!(rig.status(&vtd(2, root)), OK);
    assert_eq!(rig.status(&mapped(1)), OK);
    for page in [0x1000, 0x2000] {
        assert_eq!(write(&mut rig, Some(2), page, &[1]), Ok(()));
    }
    rig.poke(TABLES + 0x3008, &[0; 16]);
    rig
}

fn is_stale(rig: &mut Rig, page: u64) -> bool {
    write(rig, Some(2), page, &[1]).is_ok()
}

#[test]
fn translations_stay_until_their_range_is_invalidated() {
    let mut rig = stale();
    assert!(is_stale(&mut rig, 0x1000) && is_stale(&mut rig, 0x2000));
    assert_eq!(rig.status(&invalidate(2, 0x2000, 1, 4)), OK);
    assert!(is_stale(&mut rig, 0x1000));
    assert_eq!(refused(&mut rig, Some(2), 0x2000), FaultReason::Mapping);
    assert_eq!(rig.status(&invalidate(2, 0, 2, 4)), OK);
    assert!(!is_stale(&mut rig, 0x1000));
}

#[test]
fn leaf_only_keeps_the_way() {
    let mut rig = stale();
    // Another table in place of the lowest, with one page.
    rig.poke(TABLES + 0x4008, &(BUFFERS + 0x1067).to_le_bytes());
    rig.poke(TABLES + 0x2000, &(TABLES + 0x4007).to_le_bytes());
    assert_eq!(rig.status(&invalidate(2, 0, 512, 4)), OK);
    assert!(!is_stale(&mut rig, 0x1000));
    assert_eq!(rig.status(&invalidate(2, 0, 512, 0)), OK);
    assert_eq!(write(&mut rig, Some(2), 0x1000, &[1]), Ok(()));
}

#[test]
fn a_context_or_a_domain_is_invalidated_at_once() {
    let pasid = request(7, 60, &[(4, &[2]), (6, &[1]), (8, &[1]), (12, &[1]), (16, &[2])]);
    let domain = request(7, 60, &[(4, &[1]), (6, &[7]), (12, &[1])]);
    for all in [pasid, domain] {
        let mut rig = stale();
        assert_eq!(rig.status(&all), OK);
        assert!(!is_stale(&mut rig, 0x1000) && !is_stale(&mut rig, 0x2000));
    }
}

#[test]
fn every_field_is_checked_and_nothing_is_forgotten_then() {
    let mut rig = stale();
    let good = invalidate(2, 0, 8, 4);
    let cases: [(usize, &[u8], u8); 22] = [
        (4, &[0], INVAL),
        (4, &[3], INVAL),
        (4, &[8], INVAL),
        (4, &[1], INVAL), // the domain, with a PASID
        (6, &[0], INVAL),
        (6, &[8], INVAL),
        (6, &[4], INVAL), // descriptors have no addresses
        (8, &[0], INVAL), // addresses of no context
        (8, &[3], INVAL), // a PASID and an ASID
        (8, &[8], INVAL),
        (10, &[1], INVAL),
        (12, &[9], NOENT),
        (16, &[3], NOENT),
        (16, &[1], INVAL), // a mapped context
        (20, &[1], INVAL),
        (32, &[1], INVAL),
        (39, &[0xff], OK), // beyond what is cached
        (40, &[0], INVAL),
        (47, &[0xff], RANGE),
        (48, &[11], INVAL),
        (48, &[53], INVAL),
        (59, &[1], INVAL),
    ];
    for (at, field, expected) in cases {
        let mut bytes = good.clone();
        bytes[at..at + field.len()].copy_from_slice(field);
        assert_eq!(rig.status(&bytes), expected, "byte {at} as {field:?}");
        assert!(is_stale(&mut rig, 0x1000), "byte {at} as {field:?}");
    }
    let last = invalidate(2, !0xfff, 2, 4);
    assert_eq!(rig.status(&last), RANGE);
    assert_eq!(rig.status(&invalidate(2, !0xfff, 1, 4)), OK);
    assert_eq!(rig.status(&good[..59]), INVAL);
    assert_eq!(rig.status(&good), OK);
    assert!(!is_stale(&mut rig, 0x1000));
}

#[test]
fn the_context_of_one_asid_alone() {
    let mut rig = attached(2);
    // 4 KiB pages, 39 bits, two contexts on one table.
    let entry = |rig: &mut Rig, at: u64, value: u64| rig.poke(at, &value.to_le_bytes());
    entry(&mut rig, TABLES, TABLES + 0x1003);
    entry(&mut rig, TABLES + 0x1000, TABLES + 0x2003);
    entry(&mut rig, TABLES + 0x2008, BUFFERS + 0x443);
    let tcr = (25u64 | 1 << 23 | 5 << 32).to_le_bytes();
    for (pasid, asid) in [(2, 7), (3, 8)] {
        let fields: [(usize, &[u8]); 4] =
            [(18, &[asid]), (24, &tcr), (32, &TABLES.to_le_bytes()), (48, &[0xff])];
        assert_eq!(rig.status(&super::attach_table(1, pasid, &fields)), OK);
        assert_eq!(write(&mut rig, Some(pasid), 0x1000, &[1]), Ok(()));
    }
    entry(&mut rig, TABLES + 0x2008, 0);
    let asid = request(7, 60, &[(4, &[2]), (6, &[1]), (8, &[2]), (12, &[1]), (24, &[8])]);
    assert_eq!(rig.status(&asid), OK);
    assert_eq!(write(&mut rig, Some(2), 0x1000, &[1]), Ok(()));
    assert!(write(&mut rig, Some(3), 0x1000, &[1]).is_err());
}
