//! The split ring: any split of a chain, indirect tables, wrap, suppression, and malformed rings.

use virtio_iommu_model::{Config, RingError, device_status, feature, isr};

use crate::rig::{BASE, BUFFERS, EP, INDIRECT, OK, Piece, Rig, WRITE, attach, map, probe};

const REQ: u16 = 0;

fn strict() -> Rig {
    Rig::new(Config::default())
}

/// A queue with other features than those of the ring itself.
fn without(features: u64) -> Rig {
    let config = Config::default();
    let offered = config.features;
    Rig::with_features(config, offered & !features)
}

#[test]
fn head_and_tail_split_into_single_bytes() {
    let mut rig = strict();
    let at = rig.slot(0);
    rig.poke(at, &attach(1, EP, 0, 0));
    rig.poke(at + 0x400, &[0xaa; 4]);
    let mut pieces: Vec<Piece> = (0..20).map(|index| (at + index, 1, 0)).collect();
    pieces.extend((0..4).map(|index| (at + 0x400 + index, 1, WRITE)));
    rig.write_chain(REQ, 100, &pieces);
    rig.make_available(REQ, 100);
    rig.kick(REQ);
    assert_eq!(rig.take_used(REQ), Some((100, 4)));
    assert_eq!(rig.peek::<4>(at + 0x400), [0; 4]);
    assert_eq!(rig.device.domain_of(EP), Some(1));
}

/// Puts `pieces` into an indirect table and makes descriptor 0 point at it.
fn indirect(rig: &mut Rig, pieces: &[Piece], table_len: u32, head_flags: u16) {
    let table = BASE + 0x3_8000;
    for (index, (addr, len, flags)) in pieces.iter().enumerate() {
        let next = if index + 1 < pieces.len() { crate::rig::NEXT } else { 0 };
        rig.write_desc(table, index as u16, (*addr, *len, flags | next), index as u16 + 1);
    }
    let desc = rig.requests.desc;
    rig.write_desc(desc, 0, (table, table_len, INDIRECT | head_flags), 1);
    rig.make_available(REQ, 0);
    rig.kick(REQ);
}

#[test]
fn indirect_tables_hold_whole_chains() {
    let mut rig = strict();
    let at = rig.slot(0);
    rig.poke(at, &attach(1, EP, 0, 0));
    let pieces = [(at, 4, 0), (at + 4, 16, 0), (at + 0x400, 4, WRITE)];
    indirect(&mut rig, &pieces, 48, WRITE);
    assert_eq!(rig.take_used(REQ), Some((0, 4)));
    assert_eq!(rig.device.domain_of(EP), Some(1));
}

#[test]
fn an_indirect_table_may_end_a_direct_chain() {
    let mut rig = strict();
    let (at, desc, table) = (rig.slot(0), rig.requests.desc, BASE + 0x3_8000);
    rig.poke(at, &attach(1, EP, 0, 0));
    rig.write_desc(table, 0, (at + 0x400, 4, WRITE), 0);
    rig.write_desc(desc, 0, (at, 20, crate::rig::NEXT), 7);
    rig.write_desc(desc, 7, (table, 16, INDIRECT), 0);
    rig.make_available(REQ, 0);
    rig.kick(REQ);
    assert_eq!(rig.take_used(REQ), Some((0, 4)));
}

#[test]
fn several_requests_in_one_kick_are_handled_in_order() {
    let mut rig = strict();
    rig.submit(0, &probe(EP), 516);
    rig.submit(3, &attach(1, EP, 0, 0), 4);
    rig.submit(1, &map(1, 0, 0xfff, BUFFERS, 1), 4);
    rig.kick(REQ);
    let used: Vec<_> = core::iter::from_fn(|| rig.take_used(REQ)).collect();
    assert_eq!(used, [(0, 516), (6, 4), (2, 4)]);
    assert_eq!(rig.device.counters().interrupts[0], 1);
}

#[test]
fn indices_wrap_at_65536() {
    for (mut rig, interrupts) in [(strict(), None), (without(feature::RING_EVENT_IDX), Some(66_000))] {
        rig.device.change_config(|config| config.log_limit = 10);
        for round in 0..66_000_u32 {
            let status = if round % 2 == 0 { rig.attach(1, EP) } else { rig.detach(1, EP) };
            assert_eq!(status, OK);
        }
        assert_eq!(rig.requests.next_avail, (66_000 % 65_536) as u16);
        assert_eq!(rig.peek_u16(rig.requests.used + 2), (66_000 % 65_536) as u16);
        if let Some(count) = interrupts {
            assert_eq!(rig.device.counters().interrupts[0], count);
        }
    }
}

#[test]
fn a_queue_of_one_descriptor_works_with_indirect_tables() {
    let mut rig = strict();
    rig.requests.size = 1;
    let queue = &rig.requests;
    rig.device.set_queue(REQ, 1, queue.desc, queue.avail, queue.used).unwrap();
    let at = rig.slot(0);
    rig.poke(at, &attach(1, EP, 0, 0));
    indirect(&mut rig, &[(at, 20, 0)], 16, 0);
    assert_eq!(rig.take_used(REQ), Some((0, 0)));
    // Two descriptors are more than the queue has, wherever they stand.
    indirect(&mut rig, &[(at, 20, 0), (at + 0x400, 4, WRITE)], 32, 0);
    assert_eq!(rig.device.ring_error(), Some(RingError::ChainTooLong));
}

#[test]
fn no_interrupt_flag_suppresses_without_event_idx() {
    let mut rig = without(feature::RING_EVENT_IDX);
    let avail = rig.requests.avail;
    rig.poke(avail, &[1, 0]);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.device.take_isr(), 0);
    assert_eq!(rig.device.counters().suppressed[0], 1);
    rig.poke(avail, &[0, 0]);
    assert_eq!(rig.detach(1, EP), OK);
    assert_eq!(rig.device.take_isr(), isr::QUEUE);
    assert_eq!(rig.device.take_isr(), 0);
}

#[test]
fn used_event_says_when_an_interrupt_is_due() {
    let mut rig = strict();
    let used_event = rig.requests.avail + 4 + 2 * 256;
    rig.poke(used_event, &2_u16.to_le_bytes()); // after the third
    for expected in [false, false, true, false] {
        rig.attach(1, EP);
        assert_eq!(rig.device.take_queue_interrupt(REQ), expected);
    }
    // The flag has no meaning with EVENT_IDX.
    let avail = rig.requests.avail;
    rig.poke(avail, &[1, 0]);
    rig.poke(used_event, &4_u16.to_le_bytes());
    rig.attach(1, EP);
    assert!(rig.device.take_queue_interrupt(REQ));
}

#[test]
fn avail_event_follows_what_was_taken() {
    let mut rig = strict();
    let avail_event = rig.requests.used + 4 + 8 * 256;
    for expected in 1..4 {
        rig.attach(1, EP);
        assert_eq!(rig.peek_u16(avail_event), expected);
    }
    let mut rig = without(feature::RING_EVENT_IDX);
    rig.attach(1, EP);
    assert_eq!(rig.peek_u16(avail_event), 0);
}

/// Kicks, and wants a device that asks for a reset, says so, and then does nothing until it is reset.
fn expect_broken(rig: &mut Rig, error: RingError) {
    rig.kick(REQ);
    assert_eq!(rig.device.ring_error(), Some(error));
    assert_ne!(rig.device.status() & device_status::NEEDS_RESET, 0);
    assert_eq!(rig.device.take_isr() & isr::CONFIG, isr::CONFIG);
    let executed = rig.device.counters().ok;
    rig.submit(0, &attach(1, EP, 0, 0), 4);
    rig.kick(REQ);
    assert_eq!(rig.device.counters().ok, executed);
    rig.device.set_status(0);
    assert_eq!(rig.device.status(), 0);
    rig.bring_up(Config::default().features);
    assert_eq!(rig.attach(1, EP), OK);
}

fn expect_bad_chain(pieces: &[Piece], error: RingError) {
    let mut rig = strict();
    rig.write_chain(REQ, 0, pieces);
    rig.make_available(REQ, 0);
    expect_broken(&mut rig, error);
}

#[test]
fn r51_malformed_chains_ask_for_a_reset() {
    expect_bad_chain(&[(BUFFERS, 4, WRITE), (BUFFERS, 20, 0)], RingError::ReadableAfterWritable);
    expect_bad_chain(&[(BUFFERS, 0, 0), (BUFFERS, 4, WRITE)], RingError::EmptyDescriptor);
    expect_bad_chain(&[(BUFFERS, 16, INDIRECT), (BUFFERS, 4, WRITE)], RingError::IndirectNotAllowed);
    expect_bad_chain(&[(BUFFERS, 0, INDIRECT)], RingError::IndirectLength(0));
    expect_bad_chain(&[(BUFFERS, 17, INDIRECT)], RingError::IndirectLength(17));
}

#[test]
fn r51_a_looping_chain_ends() {
    let mut rig = strict();
    let desc = rig.requests.desc;
    rig.write_desc(desc, 0, (BUFFERS, 1, crate::rig::NEXT), 1);
    rig.write_desc(desc, 1, (BUFFERS, 1, crate::rig::NEXT), 0);
    rig.make_available(REQ, 0);
    expect_broken(&mut rig, RingError::ChainTooLong);
}

#[test]
fn r51_indices_outside_their_table() {
    let mut rig = strict();
    rig.make_available(REQ, 256);
    expect_broken(&mut rig, RingError::DescriptorIndex(256));
    let desc = rig.requests.desc;
    rig.write_desc(desc, 0, (BUFFERS, 1, crate::rig::NEXT), 0xffff);
    rig.make_available(REQ, 0);
    expect_broken(&mut rig, RingError::DescriptorIndex(0xffff));
}

#[test]
fn r51_an_available_index_that_runs_ahead() {
    let mut rig = strict();
    let index = rig.requests.avail + 2;
    rig.poke(index, &257_u16.to_le_bytes());
    expect_broken(&mut rig, RingError::AvailableIndex(257));
}

#[test]
fn r51_nested_or_unnegotiated_indirect_tables() {
    let mut rig = strict();
    indirect(&mut rig, &[(BUFFERS, 16, INDIRECT)], 16, 0);
    expect_broken(&mut rig, RingError::IndirectNotAllowed);
    let mut rig = without(feature::RING_INDIRECT_DESC);
    indirect(&mut rig, &[(BUFFERS, 16, 0)], 16, 0);
    expect_broken(&mut rig, RingError::IndirectNotAllowed);
}

#[test]
fn r51_rings_and_buffers_outside_memory() {
    for addr in [0, BASE - 0x1000, u64::MAX, u64::MAX - 10] {
        for writable in [0, WRITE] {
            let mut rig = strict();
            let at = rig.slot(0);
            rig.poke(at, &attach(1, EP, 0, 0));
            let (readable, tail) = if writable == 0 { (addr, at) } else { (at, addr) };
            rig.write_chain(REQ, 0, &[(readable, 20, 0), (tail, 4, WRITE)]);
            rig.make_available(REQ, 0);
            rig.kick(REQ);
            assert!(matches!(rig.device.ring_error(), Some(RingError::Memory(_))), "{addr:#x}");
            assert_eq!(rig.take_used(REQ), None);
        }
        let mut rig = strict();
        rig.device.set_queue(REQ, 256, addr & !15, addr & !1, addr & !3).unwrap();
        rig.kick(REQ);
        assert!(matches!(rig.device.ring_error(), Some(RingError::Memory(_))));
    }
}
