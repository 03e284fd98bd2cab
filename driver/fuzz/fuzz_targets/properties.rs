//! The properties that PROBE returns, against a second reading of the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_iommu::fuzzing::{Read, properties};
use virtio_iommu::{Iova, IovaRange, ReservedKind, ReservedRegion};

fuzz_target!(|area: &[u8]| {
    let found: Vec<Read> = properties(area).take(area.len() / 4 + 1).collect();
    assert!(found.len() <= area.len() / 4, "a step that did not move on");
    assert_eq!(found, expected(area));
});

fn le(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn expected(area: &[u8]) -> Vec<Read> {
    let mut list = Vec::new();
    let mut at = 0;
    while at + 4 <= area.len() {
        let (kind, len) = (le(&area[at..at + 2]), le(&area[at + 2..at + 4]) as usize);
        if kind == 0 {
            break;
        }
        let value = at + 4;
        at = value + len;
        if at > area.len() {
            list.push(Read::Malformed);
            break;
        }
        list.push(match kind {
            1 if len >= 20 => region(&area[value..value + 20]),
            1 => Read::Malformed,
            _ => Read::Ignored,
        });
    }
    list
}

fn region(value: &[u8]) -> Read {
    let (start, last) = (le(&value[4..12]), le(&value[12..20]));
    if last < start {
        return Read::Malformed;
    }
    let range = IovaRange::new(Iova::new(start), Iova::new(last)).expect("not inverted");
    let kind = if value[0] == 1 { ReservedKind::Msi } else { ReservedKind::Reserved };
    Read::Reserved(ReservedRegion { range, kind })
}
