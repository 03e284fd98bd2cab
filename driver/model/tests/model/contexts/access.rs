//! Where accesses go: by PASID, and without one.

use virtio_iommu_model::FaultReason;

use super::{attached, map_context, mapped, refused, rig, vtd, write, x86_table};
use crate::rig::{BUFFERS, EP, EP2, OK, RW, attach};

#[test]
fn contexts_are_apart_from_each_other_and_from_the_default_one() {
    let mut rig = attached(0);
    assert_eq!(rig.map(1, 0x1000, 0x1fff, BUFFERS + 0x8000, RW), OK);
    assert_eq!(rig.status(&mapped(1)), OK);
    assert_eq!(rig.status(&map_context(1, 0x1000, 0x1fff, BUFFERS + 0x9000, RW)), OK);
    let root = x86_table(&mut rig);
    assert_eq!(rig.status(&vtd(2, root)), OK);
    for (pasid, value) in [(None, 7), (Some(1), 8), (Some(2), 9)] {
        assert_eq!(write(&mut rig, pasid, 0x1000, &[value]), Ok(()));
    }
    assert_eq!(rig.peek::<1>(BUFFERS + 0x8000), [7]);
    assert_eq!(rig.peek::<1>(BUFFERS + 0x9000), [8]);
    assert_eq!(rig.peek::<1>(BUFFERS), [9]);
    assert_eq!(refused(&mut rig, Some(3), 0x1000), FaultReason::Domain);
    assert_eq!(refused(&mut rig, Some(1), 0x2000), FaultReason::Mapping);
    assert_eq!(refused(&mut rig, Some(2), 0x5000), FaultReason::Mapping);
}

#[test]
fn anonymous_accesses_are_blocked_bypass_or_use_context_0() {
    let mut rig = attached(2);
    assert_eq!(refused(&mut rig, None, BUFFERS), FaultReason::Domain);
    let mut rig = attached(4);
    assert_eq!(write(&mut rig, None, BUFFERS, &[5]), Ok(()));
    assert_eq!(rig.peek::<1>(BUFFERS), [5]);
    assert_eq!(refused(&mut rig, Some(1), BUFFERS), FaultReason::Domain);
    let mut rig = attached(6);
    assert_eq!(refused(&mut rig, None, 0x1000), FaultReason::Domain);
    assert_eq!(rig.status(&mapped(0)), OK);
    assert_eq!(refused(&mut rig, None, 0x1000), FaultReason::Mapping);
    assert_eq!(rig.status(&map_context(0, 0x1000, 0x1fff, BUFFERS, RW)), OK);
    assert_eq!(write(&mut rig, None, 0x1000, &[6]), Ok(()));
    assert_eq!(rig.peek::<1>(BUFFERS), [6]);
}

#[test]
fn a_context_is_the_domains_and_holds_for_all_its_endpoints() {
    let mut rig = attached(2);
    assert_eq!(rig.status(&mapped(1)), OK);
    assert_eq!(rig.status(&map_context(1, 0x1000, 0x1fff, BUFFERS, RW)), OK);
    let access = |rig: &mut crate::rig::Rig| {
        let write = virtio_iommu_model::Access::Write(&[1]);
        rig.device.access_context(&mut rig.mem, EP2, Some(1), 0x1000, write)
    };
    assert!(access(&mut rig).is_err());
    assert_eq!(rig.status(&attach(1, EP2, 2, 0)), OK);
    assert_eq!(access(&mut rig), Ok(()));
    // And outlives the endpoint that it was added by.
    assert_eq!(rig.detach(1, EP), OK);
    assert_eq!(access(&mut rig), Ok(()));
}

#[test]
fn what_is_not_attached_has_no_contexts() {
    let mut rig = rig();
    assert_eq!(refused(&mut rig, Some(1), BUFFERS), FaultReason::Domain);
    assert_eq!(rig.attach_bypass(1, EP), OK);
    assert_eq!(write(&mut rig, Some(1), BUFFERS, &[3]), Ok(()));
}

#[test]
fn records_are_48_bytes_where_they_fit_and_24_where_not() {
    let mut rig = attached(2);
    rig.post_events(1, 48);
    assert_eq!(refused(&mut rig, Some(0x12345), 0x1008), FaultReason::Domain);
    let at = rig.event_buffer(0);
    let (len, _) = rig.take_event().unwrap();
    let mut expected = [0; 48];
    expected[..24]
        .copy_from_slice(&[1, 0, 0, 0, 2, 3, 0, 0, 8, 0, 0, 0, 0x45, 0x23, 1, 0, 8, 0x10, 0, 0, 0, 0, 0, 0]);
    assert_eq!((len, rig.peek::<48>(at)), (48, expected));
    rig.post_events(1, 47);
    assert_eq!(refused(&mut rig, Some(1), 0x1008), FaultReason::Domain);
    let (len, record) = rig.take_event().unwrap();
    assert_eq!((len, &record[..16]), (24, &[1, 0, 0, 0, 2, 1, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0][..]));
}
