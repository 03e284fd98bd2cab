//! Forms that no request of the draft has: too short, for a domain or in a format that is none, one bit off.

use virtio_iommu_model::{AccessKind, Config, ContextProperties, Endpoint, PageRequest};

use super::{
    FAULT, TABLES, attach_table, attached, detach_pasid, invalidate, map_context, mapped, request,
    unmap_context, vtd, write, x86_table,
};
use crate::rig::{BUFFERS, EP, INVAL, NOENT, NOMEM, OK, RANGE, RW, Rig, UNSUPP, attach};

/// A device with each thing that a request can be about: context 1 mapped, with 0x1000, context 2 a table, and group 7 waiting.
fn furnished() -> Rig {
    let mut rig = attached(2);
    let root = x86_table(&mut rig);
    assert_eq!(rig.status(&mapped(1)), OK);
    assert_eq!(rig.status(&map_context(1, 0x1000, 0x1fff, BUFFERS, RW)), OK);
    assert_eq!(rig.status(&vtd(2, root)), OK);
    let (endpoint, kind) = (EP, AccessKind::Read);
    let page = PageRequest { endpoint, pasid: Some(1), address: 0x9000, kind, group: 7, last: true };
    rig.device.request_page(&mut rig.mem, page).unwrap();
    rig
}

/// One good request of each kind and format for [`furnished`].
fn good() -> Vec<(&'static str, Vec<u8>)> {
    let root = TABLES.to_le_bytes();
    // T0SZ 25, EPD1, IPS 5.
    let tcr = (25u64 | 1 << 23 | 5 << 32).to_le_bytes();
    let pasid = request(7, 60, &[(4, &[2]), (6, &[1]), (8, &[1]), (12, &[1]), (16, &[2])]);
    vec![
        ("ATTACH_TABLE, mapped", mapped(3)),
        ("ATTACH_TABLE, Arm", attach_table(1, 3, &[(18, &[7]), (24, &tcr), (32, &root), (48, &[0xff])])),
        ("ATTACH_TABLE, x86-64", attach_table(3, 3, &[(24, &root)])),
        ("ATTACH_TABLE, VT-d", vtd(3, TABLES)),
        ("ATTACH_TABLE, RISC-V", attach_table(5, 3, &[(18, &[8]), (24, &(TABLES >> 12).to_le_bytes())])),
        ("DETACH", detach_pasid(1)),
        ("MAP_CONTEXT", map_context(1, 0x4000, 0x4fff, BUFFERS, RW)),
        ("UNMAP_CONTEXT", unmap_context(1, 0x1000, 0x1fff)),
        ("INVALIDATE, pages", invalidate(2, 0x1000, 1, 4)),
        ("INVALIDATE, a context", pasid),
        ("INVALIDATE, a domain", request(7, 60, &[(4, &[1]), (6, &[7]), (12, &[1])])),
        ("PAGE_RESP", request(8, 28, &[(4, &[EP as u8]), (8, &[1]), (12, &[1]), (16, &[7])])),
    ]
}

/// What is there, as accesses and answers show it.
fn state(rig: &mut Rig) -> (Vec<bool>, usize, Option<u32>) {
    let places = [(1, 0x1000), (1, 0x4000), (2, 0x1000), (2, 0x2000), (3, 0x1000)];
    let reached = places.map(|(pasid, iova)| write(rig, Some(pasid), iova, &[1]).is_ok());
    (reached.into(), rig.device.waiting_groups(), rig.device.domain_of(EP))
}

#[test]
fn a_request_is_whole_or_does_nothing() {
    for (name, bytes) in good() {
        let mut rig = furnished();
        let before = state(&mut rig);
        for len in 4..bytes.len() {
            assert_eq!(rig.status(&bytes[..len]), INVAL, "{name}, {len} bytes");
        }
        for (readable, writable) in [(&bytes[..3], 4), (&bytes[..], 0), (&bytes[..], 3)] {
            assert_eq!(rig.try_send(readable, writable).map_or(0, |(len, _)| len), 0, "{name}");
        }
        assert_eq!(state(&mut rig), before, "{name}");
        // What follows is not looked at.
        let longer = [&bytes[..], &[0xff; 9]].concat();
        assert_eq!(rig.status(&longer), OK, "{name}");
    }
}

/// Each is refused and changes nothing, or is another good one.
#[test]
fn a_request_with_one_bit_off_is_refused_whole() {
    for (name, bytes) in good() {
        let (mut refused, mut taken) = (0, 0);
        let mut rig = furnished();
        let before = state(&mut rig);
        // But for its kind, and the bytes that are reserved in each head.
        for bit in 32..8 * bytes.len() {
            let mut other = bytes.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            let status = rig.status(&other);
            assert!(
                [OK, UNSUPP, INVAL, RANGE, NOENT, FAULT].contains(&status),
                "{name}, bit {bit}: {status}"
            );
            if status == OK {
                taken += 1;
                rig = furnished();
            } else {
                refused += 1;
            }
            assert_eq!(state(&mut rig), before, "{name}, bit {bit}");
        }
        println!("{name}: {refused} refused, {taken} are good ones");
        assert!(refused > 0, "{name}");
        assert_eq!(rig.status(&bytes), OK, "{name}");
    }
}

#[test]
fn domains_that_cannot_be_and_that_are_not() {
    let config = Config { domain_range: 1..=5, bypass: false, ..Config::contexts() };
    let mut rig = Rig::new(config);
    assert_eq!(rig.status(&attach(1, EP, 2, 0)), OK);
    assert_eq!(rig.status(&mapped(1)), OK);
    for (name, bytes) in good() {
        let at = match bytes[0] {
            8 => continue,
            7 => 12,
            _ => 4,
        };
        for (domain, expected) in [(0, RANGE), (6, RANGE), (5, NOENT)] {
            let mut other = bytes.clone();
            other[at] = domain;
            assert_eq!(rig.status(&other), expected, "{name}, domain {domain}");
        }
    }
}

#[test]
fn formats_that_the_endpoint_does_not_offer() {
    let mut rig = attached(2);
    let contexts = ContextProperties { pasid_bits: 20, output_bits: 48, formats: [5].into() };
    rig.device.add_endpoint(Endpoint { contexts, ..Endpoint::new(10) });
    assert_eq!(rig.status(&attach(2, 10, 2, 0)), OK);
    let descriptors = request(6, 84, &[(4, &[2]), (8, &[10]), (16, &[2]), (24, &TABLES.to_le_bytes())]);
    assert_eq!(rig.status(&descriptors), UNSUPP);
    for (name, mut bytes) in good().into_iter().take(5) {
        (bytes[4], bytes[8]) = (2, 10);
        let expected = if [0, 5].contains(&bytes[16]) { OK } else { UNSUPP };
        bytes[20] = bytes[16];
        x86_table(&mut rig);
        assert_eq!(rig.status(&bytes), expected, "{name}");
    }
}

#[test]
fn more_than_the_device_has_room_for() {
    let mut rig = Rig::new(Config { max_mappings: 2, bypass: false, ..Config::contexts() });
    assert_eq!(rig.status(&attach(1, EP, 2, 0)), OK);
    for pasid in 0..1024 {
        assert_eq!(rig.status(&mapped(pasid)), OK);
    }
    assert_eq!(rig.status(&mapped(1024)), NOMEM);
    assert_eq!(rig.status(&detach_pasid(3)), OK);
    assert_eq!(rig.status(&mapped(1024)), OK);
    for page in 1..3 {
        assert_eq!(rig.status(&map_context(1, page << 12, (page << 12) + 0xfff, BUFFERS, RW)), OK);
    }
    assert_eq!(rig.status(&map_context(1, 0x9000, 0x9fff, BUFFERS, RW)), NOMEM);
    // Each context has room of its own.
    assert_eq!(rig.status(&map_context(2, 0x9000, 0x9fff, BUFFERS, RW)), OK);
}

#[test]
fn ranges_of_unmap_context_and_names_of_invalidate() {
    let mut rig = furnished();
    assert_eq!(rig.status(&unmap_context(9, 0, 0xfff)), NOENT);
    assert_eq!(rig.status(&unmap_context(1, 0, u64::MAX)), RANGE, "beyond the input range");
    assert_eq!(rig.status(&map_context(1, 0x4000, 0x4000, BUFFERS, RW)), INVAL, "one byte");
    assert_eq!(rig.status(&map_context(1, 0x4000, 0x4fff, !0xfff, RW)), OK, "the last page of memory");
    assert_eq!(rig.status(&map_context(1, 0x5000, 0x6fff, !0xfff, RW)), RANGE, "memory that wraps");
    let asid = |archid: u32| {
        request(7, 60, &[(4, &[2]), (6, &[1]), (8, &[2]), (12, &[1]), (24, &archid.to_le_bytes())])
    };
    assert_eq!(rig.status(&asid(0xffff)), OK, "none has it");
    assert_eq!(rig.status(&asid(0x1_0000)), RANGE);
    let mut domain = asid(1);
    domain[4] = 1;
    assert_eq!(rig.status(&domain), INVAL, "a domain, by an ASID");
    let mut nobody = asid(1);
    nobody[8] = 0;
    assert_eq!(rig.status(&nobody), INVAL, "a context, and none named");
}
