//! Misbehaviour on demand, as a driver's test uses it.

use virtio_iommu_model::{Answer, Config, Execute, Inject, Random, Release, device_status};

use crate::rig::{BUFFERS, EP, EP2, OK, READ, Rig, attach, detach, map};

const REQ: u16 = 0;

fn with(script: &[Inject]) -> Rig {
    let mut rig = Rig::new(Config::default());
    rig.device.inject.script.extend(script);
    rig
}

fn all_used(rig: &mut Rig) -> Vec<(u32, u32)> {
    core::iter::from_fn(|| rig.take_used(REQ)).collect()
}

fn tail(rig: &Rig, slot: u16) -> [u8; 4] {
    rig.peek(rig.slot(slot) + 0x400)
}

#[test]
fn held_requests_are_executed_now_or_at_release() {
    for (execute, early) in [(Execute::Now, Some(1)), (Execute::AtRelease, None)] {
        let mut rig = with(&[Inject::Hold(execute)]);
        assert_eq!(rig.try_send(&attach(1, EP, 0, 0), 4), None);
        assert_eq!((rig.device.held(), rig.device.domain_of(EP)), (1, early));
        assert_eq!(tail(&rig, 0), [0xaa; 4]);
        rig.device.take_isr();
        assert_eq!(rig.device.release(Release::All, &mut rig.mem), 1);
        assert_eq!(rig.device.domain_of(EP), Some(1));
        assert_eq!((all_used(&mut rig), tail(&rig, 0)), (vec![(0, 4)], [0; 4]));
    }
}

#[test]
fn a_late_request_reads_memory_at_its_release() {
    let mut rig = with(&[Inject::Hold(Execute::AtRelease)]);
    rig.try_send(&attach(1, EP, 0, 0), 4);
    let at = rig.slot(0);
    rig.poke(at, &attach(2, EP2, 0, 0));
    rig.device.release(Release::Oldest, &mut rig.mem);
    assert_eq!((rig.device.domain_of(EP), rig.device.domain_of(EP2)), (None, Some(2)));
}

#[test]
fn releases_come_in_any_order() {
    let mut rig = with(&[Inject::Hold(Execute::Now); 5]);
    for slot in 0..5 {
        rig.submit(slot, &attach(1, EP, 0, 0), 4);
    }
    rig.kick(REQ);
    for which in [Release::Newest, Release::Nth(1), Release::Nth(9), Release::AllReversed, Release::Oldest] {
        rig.device.release(which, &mut rig.mem);
    }
    let ids: Vec<_> = all_used(&mut rig).iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [8, 2, 6, 4, 0]);
}

#[test]
fn deferred_requests_are_answered_after_the_rest_last_first() {
    let mut rig = with(&[Inject::Defer, Inject::Pass, Inject::Defer, Inject::Pass]);
    for slot in 0..4 {
        rig.submit(slot, &attach(u32::from(slot), EP, 0, 0), 4);
    }
    rig.kick(REQ);
    let ids: Vec<_> = all_used(&mut rig).iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [2, 6, 4, 0]);
    assert_eq!(rig.device.domain_of(EP), Some(3));
}

#[test]
fn dropped_requests_are_executed_or_not_and_never_answered() {
    for (execute, domain) in [(Execute::Now, Some(1)), (Execute::AtRelease, None)] {
        let mut rig = with(&[Inject::Drop(execute)]);
        assert_eq!(rig.try_send(&attach(1, EP, 0, 0), 4), None);
        assert_eq!(rig.device.domain_of(EP), domain);
        assert_eq!(rig.device.release(Release::All, &mut rig.mem), 0);
    }
}

#[test]
fn reuse_of_an_unanswered_requests_memory_or_descriptors_is_reported() {
    for inject in [Inject::Drop(Execute::Now), Inject::Hold(Execute::Now)] {
        let mut rig = with(&[inject]);
        rig.try_send(&attach(1, EP, 0, 0), 4);
        rig.submit(1, &detach(1, EP), 4);
        rig.kick(REQ);
        assert!(!rig.rules_broken().contains(&"core"));
        rig.submit(0, &attach(1, EP, 0, 0), 4);
        rig.kick(REQ);
        assert!(rig.rules_broken().contains(&"core"));
    }
}

#[test]
fn status_and_reserved_bytes_are_replaced() {
    let mut rig = with(&[Inject::Status(0xee), Inject::TailReserved([1, 2, 3]), Inject::Refuse(8)]);
    assert_eq!(rig.send(&attach(1, EP, 0, 0), 4).1, [0xee, 0, 0, 0]);
    assert_eq!(rig.send(&map(1, 0, 0xfff, BUFFERS, READ), 4).1, [OK, 1, 2, 3]);
    assert_eq!(rig.send(&detach(1, EP), 4), (4, vec![8, 0, 0, 0]));
    assert_eq!(rig.device.domain_of(EP), Some(1));
    let entry = rig.device.log().next_back().unwrap();
    assert_eq!((entry.inject, entry.answer), (Inject::Refuse(8), Answer::NotExecuted));
}

#[test]
fn an_unwritten_answer_leaves_an_old_ok() {
    let mut rig = with(&[Inject::Pass, Inject::Unwritten]);
    assert_eq!(rig.attach(1, EP), OK);
    rig.poke(rig.slot(0), &detach(1, EP));
    rig.make_available(REQ, 0);
    rig.kick(REQ);
    assert_eq!((rig.take_used(REQ), rig.device.domain_of(EP)), (Some((0, 0)), Some(1)));
    assert_eq!((rig.take_used(REQ), tail(&rig, 0)), (None, [0; 4]));
}

#[test]
fn used_elements_lie() {
    let mut rig =
        with(&[Inject::UsedLen(3), Inject::UsedId(0xdead_beef), Inject::Twice, Inject::UsedJump(300)]);
    for slot in 0..4 {
        rig.submit(slot, &attach(1, EP, 0, 0), 4);
    }
    rig.kick(REQ);
    let used: Vec<_> = (0..5).filter_map(|_| rig.take_used(REQ)).collect();
    assert_eq!(used, [(0, 3), (0xdead_beef, 4), (4, 4), (4, 4), (6, 4)]);
    assert_eq!(rig.peek_u16(rig.requests.used + 2), 305);
}

#[test]
fn needs_reset_at_the_nth_request() {
    let mut rig = Rig::new(Config::default());
    rig.device.inject.pass(2);
    rig.device.inject.push(Inject::NeedsReset);
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.detach(1, EP), OK);
    assert_eq!(rig.try_send(&attach(1, EP, 0, 0), 4), None);
    assert_ne!(rig.device.status() & device_status::NEEDS_RESET, 0);
    assert_eq!(rig.device.domain_of(EP), None);
}

#[test]
fn resets_forget_held_requests() {
    let mut rig = with(&[Inject::Hold(Execute::AtRelease), Inject::Hold(Execute::AtRelease)]);
    rig.try_send(&attach(1, EP, 0, 0), 4);
    rig.device.reset_queue(REQ);
    assert_eq!(rig.device.held(), 0);
    rig.device.set_status(0);
    rig.bring_up(Config::default().features);
    rig.try_send(&attach(1, EP, 0, 0), 4);
    rig.device.set_status(0);
    assert_eq!(rig.device.release(Release::All, &mut rig.mem), 0);
    assert_eq!(rig.device.domain_of(EP), None);
}

#[test]
fn lost_interrupts_and_slow_resets() {
    let mut rig = with(&[]);
    rig.device.inject.lose_interrupts = true;
    assert_eq!(rig.attach(1, EP), OK);
    assert_eq!(rig.device.take_isr(), 0);
    rig.device.inject.slow_reset = 2;
    rig.device.set_status(0);
    let seen: Vec<_> = (0..3).map(|_| rig.device.read_status() == 0).collect();
    assert_eq!(seen, [false, false, true]);
}

#[test]
fn random_injection_depends_on_nothing_but_its_seed() {
    let run = |seed| {
        let mut rig = with(&[]);
        rig.device.inject.random = Some(Random::new(seed, 3, vec![Inject::Status(9), Inject::UsedLen(0)]));
        (0..100).map(|_| rig.send(&attach(1, EP, 0, 0), 4)).collect::<Vec<_>>()
    };
    let first = run(1);
    assert_eq!(first, run(1));
    assert_ne!(first, run(2));
    let hit = first.iter().filter(|(len, tail)| *len != 4 || tail[0] != OK).count();
    assert!((15..60).contains(&hit), "{hit} of 100");
}
