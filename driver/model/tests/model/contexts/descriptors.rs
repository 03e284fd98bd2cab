//! A table of context descriptors in place of single contexts.

use virtio_iommu_model::FaultReason;

use super::{FAULT, TABLES, attached, detach_pasid, mapped, refused, request, write};
use crate::rig::{BUFFERS, EP, INVAL, OK, RANGE, Rig};

const DESCRIPTORS: u64 = TABLES + 0x1_0000;

fn attach(s1fmt: u8, s1dss: u8, s1cdmax: u8, pointer: u64) -> Vec<u8> {
    let fields: [(usize, &[u8]); 6] = [
        (4, &[1]),
        (8, &[EP as u8]),
        (16, &[2]),
        (18, &[s1fmt, s1dss]),
        (20, &[s1cdmax]),
        (24, &pointer.to_le_bytes()),
    ];
    request(6, 84, &fields)
}

/// Writes a descriptor for a table that maps 0x1000.
fn describe(rig: &mut Rig, pasid: u64) {
    let entry = |rig: &mut Rig, at: u64, value: u64| rig.poke(at, &value.to_le_bytes());
    entry(rig, TABLES, TABLES + 0x1003);
    entry(rig, TABLES + 0x1000, TABLES + 0x2003);
    entry(rig, TABLES + 0x2008, BUFFERS + 0x443);
    let at = DESCRIPTORS + 64 * pasid;
    entry(rig, at + 8, TABLES);
    entry(rig, at + 24, 0xff);
    // T0SZ 25, EPD1, V, IPS 5, AA64, R, A.
    entry(rig, at, 25 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 3 << 45);
}

fn invalidate(granularity: u8, caches: u8, pasid: u8) -> Vec<u8> {
    request(7, 60, &[(4, &[granularity]), (6, &[caches]), (8, &[1]), (12, &[1]), (16, &[pasid])])
}

#[test]
fn descriptors_are_cached_also_that_there_is_none() {
    let mut rig = attached(2);
    assert_eq!(rig.status(&attach(0, 0, 4, DESCRIPTORS)), OK);
    assert_eq!(refused(&mut rig, Some(3), 0x1000), FaultReason::Domain);
    describe(&mut rig, 3);
    assert_eq!(refused(&mut rig, Some(3), 0x1000), FaultReason::Domain);
    assert_eq!(rig.status(&invalidate(2, 4, 3)), OK);
    assert_eq!(write(&mut rig, Some(3), 0x1000, &[1]), Ok(()));
    // Gone: the descriptor, and what was found through it, are forgotten each for itself.
    rig.poke(DESCRIPTORS + 64 * 3, &[0; 8]);
    assert_eq!(write(&mut rig, Some(3), 0x1000, &[1]), Ok(()));
    assert_eq!(rig.status(&invalidate(2, 4, 3)), OK);
    assert_eq!(refused(&mut rig, Some(3), 0x1000), FaultReason::Domain);
    rig.poke(TABLES + 0x2008, &[0; 8]);
    describe(&mut rig, 3);
    rig.poke(TABLES + 0x2008, &[0; 8]);
    assert_eq!(rig.status(&invalidate(2, 4, 3)), OK);
    assert_eq!(write(&mut rig, Some(3), 0x1000, &[1]), Ok(()), "the translation is cached still");
    assert_eq!(rig.status(&invalidate(2, 1, 3)), OK);
    assert_eq!(refused(&mut rig, Some(3), 0x1000), FaultReason::Mapping);
}

#[test]
fn anonymous_accesses_do_as_the_table_says() {
    for (flags, s1dss) in [(2, 0), (4, 1), (6, 2)] {
        let mut rig = attached(flags);
        for wrong in (0..4).filter(|other| *other != s1dss) {
            assert_eq!(rig.status(&attach(0, wrong, 4, DESCRIPTORS)), INVAL);
        }
        describe(&mut rig, 0);
        assert_eq!(rig.status(&attach(0, s1dss, 4, DESCRIPTORS)), OK);
        match flags {
            2 => assert_eq!(refused(&mut rig, None, 0x1000), FaultReason::Domain),
            4 => assert_eq!(write(&mut rig, None, BUFFERS + 0x10, &[1]), Ok(())),
            _ => assert_eq!(write(&mut rig, None, 0x1000, &[1]), Ok(())),
        }
    }
    assert_eq!(attached(0).status(&attach(0, 0, 4, DESCRIPTORS)), INVAL);
}

#[test]
fn every_field_is_checked() {
    let mut rig = attached(2);
    assert_eq!(rig.status(&attach(3, 0, 4, DESCRIPTORS)), INVAL);
    assert_eq!(rig.status(&attach(0, 0, 21, DESCRIPTORS)), RANGE);
    assert_eq!(rig.status(&attach(0, 0, 4, DESCRIPTORS + 64)), INVAL);
    assert_eq!(rig.status(&attach(0, 0, 4, 0x1000)), FAULT);
    assert_eq!(rig.status(&attach(1, 0, 8, 0x1000)), FAULT);
    for at in [12, 32, 83] {
        let mut bytes = attach(0, 0, 4, DESCRIPTORS);
        bytes[at] = 1;
        assert_eq!(rig.status(&bytes), INVAL, "byte {at}");
    }
    assert_eq!(rig.status(&mapped(1)), OK);
    assert_eq!(rig.status(&attach(0, 0, 4, DESCRIPTORS)), INVAL, "the domain has contexts");
    assert_eq!(rig.status(&detach_pasid(1)), OK);
    assert_eq!(rig.status(&attach(0, 0, 4, DESCRIPTORS)), OK);
    assert_eq!(rig.status(&attach(0, 0, 4, DESCRIPTORS)), INVAL, "it has a table");
    assert_eq!(rig.status(&mapped(1)), INVAL);
    assert_eq!(rig.status(&detach_pasid(1)), INVAL);
    assert_eq!(rig.status(&invalidate(2, 4, 16)), RANGE);
}
