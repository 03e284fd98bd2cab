//! Translation, faults, and the event queue.

use virtio_iommu_model::{
    Access, AccessError, AccessKind, Config, Endpoint, Fault, FaultReason, Quirks, ReservedRegion,
    device_status,
};

use crate::rig::{BASE, BUFFERS, EP, OK, READ, RW, Rig};

const WRITE_ONLY: u32 = 2;

fn closed() -> Config {
    Config { bypass: false, ..Config::default() }
}

/// Attached to domain 1, with IOVA 0x1_0000..=0x1_1fff at BUFFERS.
fn mapped(flags: u32) -> Rig {
    let mut rig = Rig::new(closed());
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, 0x1_0000, 0x1_1fff, BUFFERS, flags), OK);
    rig
}

fn write(rig: &mut Rig, iova: u64, data: &[u8]) -> Result<(), AccessError> {
    rig.device.access(&mut rig.mem, EP, iova, Access::Write(data))
}

fn read(rig: &mut Rig, iova: u64, len: usize) -> Result<Vec<u8>, AccessError> {
    let mut buf = vec![0xee; len];
    rig.device.access(&mut rig.mem, EP, iova, Access::Read(&mut buf))?;
    Ok(buf)
}

fn fault(reason: FaultReason, kind: AccessKind, address: u64) -> AccessError {
    AccessError::Fault(Fault { reason, kind: Some(kind), endpoint: EP, address: Some(address), pasid: None })
}

#[test]
fn r11_unattached_endpoints_fault_with_reason_domain() {
    let mut rig = Rig::new(closed());
    assert_eq!(write(&mut rig, BUFFERS, &[1]), Err(fault(FaultReason::Domain, AccessKind::Write, BUFFERS)));
    assert_eq!(rig.peek::<1>(BUFFERS), [0]);
    assert_eq!(rig.device.translate(444, BUFFERS, AccessKind::Read), Err(FaultReason::Unknown));
}

#[test]
fn r24_mappings_end_with_detach() {
    let mut rig = mapped(RW);
    assert_eq!(write(&mut rig, 0x1_0000, &[7]), Ok(()));
    assert_eq!(rig.detach(1, EP), OK);
    let refused = fault(FaultReason::Domain, AccessKind::Write, 0x1_0000);
    assert_eq!(write(&mut rig, 0x1_0000, &[8]), Err(refused));
    assert_eq!(rig.peek::<1>(BUFFERS), [7]);
}

#[test]
fn first_and_last_bytes_translate_and_their_neighbours_do_not() {
    let rig = mapped(RW);
    let at = |iova| rig.device.translate(EP, iova, AccessKind::Read);
    assert_eq!(at(0x1_0000), Ok(BUFFERS));
    assert_eq!(at(0x1_1fff), Ok(BUFFERS + 0x1fff));
    assert_eq!(at(0xffff), Err(FaultReason::Mapping));
    assert_eq!(at(0x1_2000), Err(FaultReason::Mapping));
}

#[test]
fn r31_permissions_are_enforced_in_both_directions() {
    let mut rig = mapped(READ);
    assert_eq!(read(&mut rig, 0x1_0000, 4), Ok(vec![0; 4]));
    let refused = fault(FaultReason::Mapping, AccessKind::Write, 0x1_0002);
    assert_eq!(write(&mut rig, 0x1_0002, &[1]), Err(refused));

    let mut rig = mapped(WRITE_ONLY);
    assert_eq!(write(&mut rig, 0x1_0000, &[1]), Ok(()));
    let refused = fault(FaultReason::Mapping, AccessKind::Read, 0x1_0000);
    assert_eq!(read(&mut rig, 0x1_0000, 1), Err(refused));
    rig.device.change_config(|config| config.quirks.write_implies_read = true);
    assert_eq!(read(&mut rig, 0x1_0000, 1), Ok(vec![1]));

    let mut rig = mapped(0);
    assert!(read(&mut rig, 0x1_0000, 1).is_err());
    assert!(write(&mut rig, 0x1_0000, &[1]).is_err());
}

#[test]
fn an_access_over_two_mappings_goes_to_both_places() {
    let mut rig = mapped(RW);
    assert_eq!(rig.map(1, 0x1_2000, 0x1_2fff, BUFFERS + 0x8000, RW), OK);
    assert_eq!(write(&mut rig, 0x1_1ffe, &[1, 2, 3, 4]), Ok(()));
    assert_eq!(rig.peek::<2>(BUFFERS + 0x1ffe), [1, 2]);
    assert_eq!(rig.peek::<2>(BUFFERS + 0x8000), [3, 4]);
    assert_eq!(read(&mut rig, 0x1_1ffe, 4), Ok(vec![1, 2, 3, 4]));
}

#[test]
fn an_access_stops_where_the_permission_ends() {
    let mut rig = mapped(RW);
    assert_eq!(rig.map(1, 0x1_2000, 0x1_2fff, BUFFERS + 0x8000, READ), OK);
    let refused = fault(FaultReason::Mapping, AccessKind::Write, 0x1_2000);
    assert_eq!(write(&mut rig, 0x1_1ffe, &[1, 2, 3, 4]), Err(refused));
    assert_eq!(rig.peek::<2>(BUFFERS + 0x1ffe), [1, 2]);
    assert_eq!(rig.peek::<2>(BUFFERS + 0x8000), [0, 0]);
    assert_eq!(rig.device.counters().faults, 1);
}

#[test]
fn accesses_at_the_end_of_the_space_and_of_memory_do_not_wrap() {
    let mut rig = Rig::new(Config { input_range: 0..=u64::MAX, ..closed() });
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.map(1, !0xfff, u64::MAX, BUFFERS, RW), OK);
    assert_eq!(write(&mut rig, u64::MAX, &[5]), Ok(()));
    assert_eq!(rig.peek::<1>(BUFFERS + 0xfff), [5]);
    assert!(matches!(write(&mut rig, u64::MAX, &[6, 7]), Err(AccessError::Fault(_))));
    assert_eq!(rig.map(1, 0, 0xfff, 0, RW), OK);
    assert!(matches!(write(&mut rig, 0, &[1]), Err(AccessError::NotMemory(_))));
}

#[test]
fn r46_reserved_regions_fault_and_msi_writes_stay_in_the_device() {
    let mut rig = Rig::new(closed());
    let reserved =
        vec![ReservedRegion::reserved(0x5000, 0x5fff), ReservedRegion::msi(0xfee0_0000, 0xfeef_ffff)];
    rig.device.add_endpoint(Endpoint { reserved, ..Endpoint::new(EP) });
    assert!(write(&mut rig, 0xfee0_0000, &[1; 4]).is_err());
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(write(&mut rig, 0xfee0_1004, &[0x41, 0, 0, 0]), Ok(()));
    let rung = rig.device.take_doorbells();
    assert_eq!((rung.len(), rung[0].address, rung[0].data), (1, 0xfee0_1004, 0x41));
    let refused = fault(FaultReason::Mapping, AccessKind::Read, 0xfee0_0000);
    assert_eq!(read(&mut rig, 0xfee0_0000, 4), Err(refused));
    assert!(write(&mut rig, 0x5000, &[1]).is_err());
}

#[test]
fn an_access_that_runs_into_the_msi_window_is_parted_at_its_edge() {
    let mut rig = Rig::new(Config::default());
    let window = ReservedRegion::msi(BUFFERS + 4, BUFFERS + 7);
    rig.device.add_endpoint(Endpoint { reserved: vec![window], ..Endpoint::new(EP) });
    assert!(rig.device.bypasses(EP));
    assert_eq!(write(&mut rig, BUFFERS, &[1, 2, 3, 4, 5, 6, 7, 8, 9]), Ok(()));
    assert_eq!(rig.peek::<9>(BUFFERS), [1, 2, 3, 4, 0, 0, 0, 0, 9]);
    assert_eq!(rig.device.take_doorbells()[0].data, 0x0807_0605);
}

#[test]
fn r47_records_are_24_bytes_with_reserved_fields_zero() {
    let mut rig = mapped(READ);
    rig.post_events(2, 24);
    assert!(write(&mut rig, 0x1_0008, &[1]).is_err());
    let (len, record) = rig.take_event().unwrap();
    assert_eq!(len, 24);
    assert_eq!(record, [2, 0, 0, 0, 2, 1, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 8, 0, 1, 0, 0, 0, 0, 0]);
    assert!(rig.device.take_queue_interrupt(1));
    assert_eq!(rig.take_event(), None);
    assert!(read(&mut rig, 0, 1).is_err());
    assert_eq!(rig.take_event().unwrap().1[..8], [2, 0, 0, 0, 1, 1, 0, 0]);
}

#[test]
fn r48_the_address_may_be_left_out() {
    let quirks = Quirks { omit_fault_address: true, ..Quirks::default() };
    let mut rig = Rig::new(Config { quirks, ..closed() });
    rig.post_events(1, 24);
    assert!(write(&mut rig, 0x1234, &[1]).is_err());
    let record = rig.take_event().unwrap().1;
    assert_eq!(record, [1, 0, 0, 0, 2, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn r49_a_record_is_never_spread_over_buffers() {
    let mut rig = Rig::new(closed());
    rig.post_events(2, 23);
    let before = rig.peek::<24>(rig.event_buffer(0));
    assert!(write(&mut rig, 0, &[1]).is_err());
    assert_eq!(rig.take_event(), Some((0, before)));
    assert_eq!(rig.take_event(), None);
    assert_eq!(rig.device.counters().event_buffers_short, 1);
    assert!(rig.device.is_running());
}

#[test]
fn r50_without_a_buffer_records_are_dropped_and_counted() {
    let mut rig = Rig::new(closed());
    for _ in 0..3 {
        assert!(write(&mut rig, 0, &[1]).is_err());
    }
    rig.post_events(1, 24);
    assert_eq!(rig.take_event(), None);
    let counters = rig.device.counters();
    assert_eq!((counters.faults, counters.events, counters.events_dropped), (3, 0, 3));
}

#[test]
fn r50_or_they_wait_for_buffers() {
    let mut rig = Rig::new(Config { held_events: 2, ..closed() });
    for iova in 0..3 {
        assert!(write(&mut rig, iova, &[1]).is_err());
    }
    rig.post_events(4, 24);
    assert_eq!(rig.take_event().unwrap().1[16], 0);
    assert_eq!(rig.take_event().unwrap().1[16], 1);
    assert_eq!(rig.take_event(), None);
    assert_eq!(rig.device.counters().events_dropped, 1);
}

#[test]
fn r50_waiting_records_keep_their_order_when_buffers_come_one_by_one() {
    let mut rig = Rig::new(Config { held_events: 3, ..closed() });
    for iova in 0..3 {
        assert!(write(&mut rig, iova, &[1]).is_err());
    }
    for iova in 0..3 {
        rig.post_events(1, 24);
        assert_eq!(rig.take_event().unwrap().1[16], iova);
        assert_eq!(rig.take_event(), None);
    }
}

#[test]
fn faults_before_driver_ok_are_dropped() {
    let mut rig = Rig::new(closed());
    rig.device.set_status(0);
    assert!(write(&mut rig, 0, &[1]).is_err());
    assert_eq!(rig.device.counters().events_dropped, 1);
}

#[test]
fn raw_records_of_any_length_can_be_sent() {
    let mut rig = Rig::new(closed());
    rig.post_events(3, 48);
    rig.device.push_event(&mut rig.mem, &[9; 20]);
    rig.device.push_event(&mut rig.mem, &[8; 48]);
    rig.device.push_event(&mut rig.mem, &[]);
    let lens: Vec<_> =
        core::iter::from_fn(|| rig.take_event()).map(|(len, record)| (len, record[0])).collect();
    assert_eq!(lens[..2], [(20, 9), (48, 8)]);
    assert_eq!(lens[2].0, 0);
}

#[test]
fn a_bad_event_buffer_asks_for_a_reset() {
    let mut rig = Rig::new(closed());
    rig.write_chain(1, 0, &[(BASE - 0x1000, 24, crate::rig::WRITE)]);
    rig.make_available(1, 0);
    assert!(write(&mut rig, 0, &[1]).is_err());
    assert_ne!(rig.device.status() & device_status::NEEDS_RESET, 0);
    assert!(rig.device.take_config_interrupt());
}
