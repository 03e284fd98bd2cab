//! Page requests, their groups, and PAGE_RESP.

use virtio_iommu_model::{Access, AccessKind, Config, PageAnswer, PageError, PageRequest};

use super::{attached, detach_pasid, map_context, mapped, request};
use crate::rig::{BUFFERS, EP, INVAL, NOENT, OK, RW, Rig};

fn page(address: u64, group: u16, last: bool) -> PageRequest {
    PageRequest { endpoint: EP, pasid: Some(1), address, kind: AccessKind::Write, group, last }
}

fn response(pasid: u32, group: u16, code: u16) -> Vec<u8> {
    let (pasid, group, code) = (pasid.to_le_bytes(), group.to_le_bytes(), code.to_le_bytes());
    request(8, 28, &[(4, &[EP as u8]), (8, &[1]), (12, &pasid), (16, &group), (18, &code)])
}

fn rig() -> Rig {
    let mut rig = attached(2);
    assert_eq!(rig.status(&mapped(1)), OK);
    rig
}

fn answer(group: u16, code: u16) -> PageAnswer {
    PageAnswer { endpoint: EP, pasid: Some(1), group, code }
}

#[test]
fn an_access_waits_for_its_page() {
    let mut rig = rig();
    rig.post_events(1, 48);
    let access = |rig: &mut Rig| {
        rig.device.access_or_request(&mut rig.mem, (EP, Some(1)), 0x5010, Access::Write(&[9]), 3)
    };
    assert_eq!(access(&mut rig), Err(PageError::Waiting));
    let at = rig.event_buffer(0);
    assert_eq!(rig.take_event().unwrap().0, 48);
    let mut expected = [0; 48];
    // WRITE, LAST, PAGE_REQ, ADDRESS, PASID, GROUP_ID.
    expected[..26].copy_from_slice(&[
        2, 0, 0, 0, 0x32, 7, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0x10, 0x50, 0, 0, 0, 0, 0, 0, 3, 0,
    ]);
    assert_eq!(rig.peek::<48>(at), expected);
    assert_eq!(rig.status(&map_context(1, 0x5000, 0x5fff, BUFFERS, RW)), OK);
    assert_eq!(rig.status(&response(1, 3, 0)), OK);
    assert_eq!(rig.device.take_page_answers(), [answer(3, 0)]);
    assert_eq!(access(&mut rig), Ok(()));
    assert_eq!(rig.peek::<1>(BUFFERS + 0x10), [9]);
}

#[test]
fn a_group_is_answered_once_and_after_its_last() {
    let mut rig = rig();
    for last in [false, false] {
        assert_eq!(rig.device.request_page(&mut rig.mem, page(0x1000, 7, last)), Ok(()));
    }
    assert_eq!(rig.device.waiting_groups(), 1);
    assert_eq!(rig.status(&response(1, 7, 0)), INVAL, "its last one has not come");
    assert_eq!(rig.device.request_page(&mut rig.mem, page(0x2000, 7, true)), Ok(()));
    assert_eq!(rig.status(&response(1, 7, 2)), OK);
    assert_eq!(rig.status(&response(1, 7, 2)), NOENT);
    assert_eq!(rig.device.take_page_answers(), [answer(7, 2)]);
}

#[test]
fn every_field_of_a_response_is_checked() {
    let mut rig = rig();
    assert_eq!(rig.device.request_page(&mut rig.mem, page(0x1000, 7, true)), Ok(()));
    let good = response(1, 7, 0);
    let cases: [(usize, u8, u8); 9] = [
        (4, 77, NOENT),
        (4, 9, NOENT),
        (8, 0, NOENT),
        (8, 3, INVAL),
        (12, 2, NOENT),
        (16, 8, NOENT),
        (18, 3, INVAL),
        (20, 1, INVAL),
        (27, 1, INVAL),
    ];
    for (at, value, expected) in cases {
        let mut bytes = good.clone();
        bytes[at] = value;
        assert_eq!(rig.status(&bytes), expected, "byte {at}");
    }
    assert_eq!(rig.status(&good[..27]), INVAL);
    assert_eq!(rig.status(&good), OK);
}

#[test]
fn groups_end_with_their_context() {
    let mut rig = rig();
    assert_eq!(rig.device.request_page(&mut rig.mem, page(0x1000, 7, true)), Ok(()));
    assert_eq!(rig.status(&detach_pasid(1)), OK);
    assert_eq!(rig.device.take_page_answers(), [answer(7, 1)]);
    assert_eq!(rig.status(&response(1, 7, 0)), NOENT);
}

#[test]
fn a_flood_is_dropped_and_counted() {
    let mut rig = Rig::new(Config { page_groups: 4, bypass: false, ..Config::contexts() });
    let sent = |rig: &mut Rig, group| rig.device.request_page(&mut rig.mem, page(0, group, true)).is_ok();
    let sent = (0..100).filter(|group| sent(&mut rig, *group)).count();
    assert_eq!((sent, rig.device.waiting_groups()), (4, 4));
    assert_eq!(rig.device.counters().page_requests_dropped, 96);
    let mut standard = Rig::new(Config::default());
    let dropped = standard.device.request_page(&mut standard.mem, page(0, 1, true));
    assert_eq!(dropped, Err(PageError::NoRoom));
}
