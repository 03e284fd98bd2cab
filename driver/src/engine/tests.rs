//! What only the inside shows: states of records, from one answer to the next.

use super::*;
use crate::addr::{Iova, PhysAddr};
use crate::dma::HeldMemory;
use crate::error::{AttachError, RequestError, UnmapError};
use crate::options::DomainKind;
use crate::platform::DmaMemory;
use crate::prot::Prot;
use crate::queue::{Completion, Outcome};
use crate::test_memory::TestMemory;
use crate::wire::request::{Request, Status};
use alloc::sync::Arc;

const EP: EndpointId = EndpointId::new(8);
const EP2: EndpointId = EndpointId::new(9);
const LIST: ListId = ListId::new(0);
const TIMED_OUT: RequestError = RequestError::TimedOut;
const REFUSED: RequestError = RequestError::Refused(Status::NoMem);

fn range(page: u64, pages: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(page * 0x1000), pages * 0x1000).unwrap()
}

fn engine() -> Engine {
    let usable = IovaRange::new(Iova::new(0), Iova::new(0xffff_ffff)).unwrap();
    let geometry = Geometry { granule: 0x1000, usable, domain_ids: (5, 8), mmio_flag: true };
    let mut engine = Engine::new(geometry, Limits { endpoints: 4, domains: 3 }, None);
    for endpoint in [EP, EP2] {
        engine.introduce(endpoint, &mut Arc::from([]));
    }
    engine.close_bypass();
    engine
}

/// Fails when the IOMMU's own endpoint gets a record, by which the quick way would attach it.
#[test]
fn i10_the_iommus_own_endpoint_has_no_record() {
    let Engine { geometry, limits, .. } = engine();
    let mut engine = Engine::new(geometry, limits, Some(EP));
    engine.introduce(EP, &mut Arc::from([]));
    let key = domain(&mut engine);
    assert!(engine.endpoint(EP).is_none());
    assert!(engine.begin_attach_one(EP, key).is_none());
    assert!(engine.begin_attach(EP, key).is_err());
}

fn domain(engine: &mut Engine) -> DomainKey {
    let (geometry, kind) = (engine.geometry, DomainKind::Translated);
    engine.create_domain(&mut Some(Engine::prepare_domain(&geometry, engine.limits, 8, kind, None))).unwrap()
}

impl Engine {
    fn answer(&mut self, op: Op, outcome: Outcome) {
        self.settle(&Completion { op, outcome, abandoned: false });
    }

    fn answer_late(&mut self, op: Op, outcome: Outcome) {
        self.settle(&Completion { op, outcome, abandoned: true });
    }

    fn sent_attach(&mut self, id: EndpointId, key: DomainKey) -> Op {
        match self.begin_attach(id, key).unwrap() {
            AttachPlan::Send(_, op) => op,
            AttachPlan::Nothing => panic!("nothing was sent"),
        }
    }

    fn attach(&mut self, id: EndpointId, key: DomainKey) {
        let op = self.sent_attach(id, key);
        self.answer(op, Ok(()));
    }

    /// Takes a range and begins to map it.
    fn sent_map(&mut self, key: DomainKey, range: IovaRange, held: Option<HeldMemory>) -> Op {
        self.take(key, range).unwrap();
        let mut held = held;
        let purpose = Purpose { prot: Prot::READ, tag: Tag::NONE };
        let (record, _) = self.begin_map(key, (LIST, range), PhysAddr::new(0), purpose, &mut held).unwrap();
        Op::Map { domain: key, range, record }
    }

    fn map(&mut self, key: DomainKey, range: IovaRange, held: Option<HeldMemory>) {
        let op = self.sent_map(key, range, held);
        self.answer(op, Ok(()));
    }

    fn sent_unmap(&mut self, key: DomainKey, range: IovaRange) -> Op {
        match self.begin_unmap(key, range).unwrap() {
            UnmapPlan::Send(_, op) => op,
            UnmapPlan::Nothing => panic!("nothing was sent"),
        }
    }

    fn state(&self, key: DomainKey, range: IovaRange) -> Option<MappingState> {
        self.domain(key)?.space.get(range.start()).map(|record| record.state)
    }

    /// Whether the addresses could be handed out now. Leaves them as they are.
    fn is_free(&mut self, key: DomainKey, range: IovaRange) -> bool {
        let free = self.take(key, range).is_ok();
        if free {
            self.give_back(key, range, 1);
        }
        free
    }
}

fn held() -> Option<HeldMemory> {
    let memory = DmaMemory { phys: PhysAddr::new(0), len: 0x1000, ..TestMemory::leak(8) };
    Some(HeldMemory::from_platform(memory, 0x1000))
}

#[test]
fn a_mapping_from_its_beginning_to_its_end() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    let at = range(1, 2);
    let op = engine.sent_map(key, at, None);
    assert_eq!(engine.state(key, at), Some(MappingState::Mapping));
    assert_eq!(engine.begin_unmap(key, at), Err(UnmapError::NotMapped(at.start())), "not yet");
    engine.answer(op, Ok(()));
    assert_eq!(engine.state(key, at), Some(MappingState::Live));
    let op = engine.sent_unmap(key, at);
    assert_eq!(engine.state(key, at), Some(MappingState::Unmapping));
    assert_eq!(engine.begin_unmap(key, at), Err(UnmapError::NotMapped(at.start())), "under way");
    assert!(!engine.is_free(key, at));
    engine.answer(op, Ok(()));
    assert!(engine.state(key, at).is_none() && engine.is_free(key, at));
}

/// Fails when the tag is lost on the way, or another record's is told.
#[test]
fn a_mapping_that_leaks_is_found_by_its_tag() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    for (page, tag) in [(1, "disk"), (2, "net ring"), (3, "disk")] {
        engine.take(key, range(page, 1)).unwrap();
        let purpose = Purpose { prot: Prot::READ, tag: engine.tag(tag) };
        let place = (LIST, range(page, 1));
        let (record, _) = engine.begin_map(key, place, PhysAddr::new(0), purpose, &mut None).unwrap();
        engine.answer(Op::Map { domain: key, range: place.1, record }, Ok(()));
    }
    for page in [1, 3] {
        let op = engine.sent_unmap(key, range(page, 1));
        engine.answer(op, Ok(()));
    }
    let left = engine.domain(key).unwrap().space.iter_from(Iova::new(0));
    let left: Vec<_> = left.map(|record| (engine.tag_of(record), record.range)).collect();
    assert_eq!(left, [("net ring", range(2, 1))]);
}

/// Fails when a handle is believed without its address.
#[test]
fn an_answer_reaches_no_later_mapping_in_the_same_place() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    engine.map(key, range(2, 1), None);
    let op = engine.sent_unmap(key, range(2, 1));
    engine.answer(op, Ok(()));
    engine.take(key, range(1, 3)).unwrap();
    engine.give_back(key, range(1, 3), 1);
    let other = engine.sent_map(key, range(1, 1), None);
    let (Op::Unmap { record: old, .. }, Op::Map { record: new, .. }) = (op, other) else { panic!() };
    assert_eq!(old, new, "else this shows nothing");
    engine.settle(&Completion { op, outcome: Ok(()), abandoned: true });
    assert_eq!(engine.state(key, range(1, 1)), Some(MappingState::Mapping));
}

/// I3: every way to lose an answer, and every late answer.
#[test]
fn what_is_in_doubt_is_quarantined_until_the_answer() {
    let quarantined = |in_flight| {
        Some(if in_flight { MappingState::QuarantinedInFlight } else { MappingState::Quarantined })
    };
    for (late, after) in
        [(Ok(()), quarantined(false)), (Err(REFUSED), None), (Err(TIMED_OUT), quarantined(false))]
    {
        let mut engine = engine();
        let key = domain(&mut engine);
        engine.attach(EP, key);
        let at = range(1, 1);
        let op = engine.sent_map(key, at, None);
        engine.lose(op);
        assert_eq!(engine.state(key, at), quarantined(true));
        assert!(engine.reclaimable(None).is_none() && !engine.is_free(key, at));
        assert_eq!(engine.quarantined(), (1, 0x1000));
        engine.answer_late(op, late);
        assert_eq!((engine.state(key, at), engine.is_free(key, at)), (after, after.is_none()));
    }
    for (late, after) in [(Ok(()), None), (Err(REFUSED), quarantined(false))] {
        let mut engine = engine();
        let key = domain(&mut engine);
        engine.attach(EP, key);
        let at = range(1, 1);
        engine.map(key, at, None);
        let op = engine.sent_unmap(key, at);
        engine.lose(op);
        engine.answer_late(op, late);
        assert_eq!((engine.state(key, at), engine.is_free(key, at)), (after, after.is_none()));
        assert_eq!(engine.reclaimable(None).is_some(), after.is_some());
    }
}

/// I1: fails when `let_go` drops a record that holds memory, or hands out its addresses before it is taken.
#[test]
fn held_memory_is_taken_once_and_its_addresses_with_it() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    let at = range(1, 1);
    engine.map(key, at, held());
    assert!(engine.take_any_released().is_none());
    let op = engine.sent_unmap(key, at);
    engine.answer(op, Ok(()));
    assert_eq!(engine.state(key, at), Some(MappingState::Released));
    assert!(!engine.is_free(key, at));
    assert!(engine.take_any_released().is_some() && engine.is_free(key, at));
    assert!(engine.take_any_released().is_none() && engine.take_released(key, at).is_none());
}

/// Fails when whoever polls gets the memory that goes back to the caller of a refused MAP.
#[test]
fn memory_of_a_refused_map_goes_to_its_lender_only() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    let at = range(1, 1);
    let op = engine.sent_map(key, at, held());
    engine.answer(op, Err(REFUSED));
    assert_eq!(engine.state(key, at), Some(MappingState::Returned));
    assert!(engine.take_any_released().is_none());
    assert!(!engine.is_free(key, at), "others must not get the address while the list is rolled back");
    let Some(Unmade::Refused { memory: Some(_), .. }) = engine.next_unmade(key, (LIST, range(1, 2))) else {
        panic!("the memory is not there");
    };
    assert!(engine.is_free(key, at));
    // Nobody waits for a late refusal: it goes the other way.
    let op = engine.sent_map(key, at, held());
    engine.lose(op);
    engine.answer_late(op, Err(REFUSED));
    assert!(engine.next_unmade(key, (LIST, at)).is_none() && engine.take_any_released().is_some());
}

/// I1: fails when `revoke_if_empty` takes what is in flight for gone, or does not look at the bypass.
#[test]
fn the_last_detach_revokes_what_is_not_in_flight() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    let (live, stuck, in_flight) = (range(1, 1), range(2, 1), range(3, 1));
    engine.map(key, live, None);
    engine.map(key, stuck, held());
    engine.disown(key, stuck);
    let lost = engine.sent_map(key, in_flight, held());
    engine.lose(lost);
    let (_, op) = engine.begin_detach(EP).unwrap();
    engine.answer(op, Ok(()));
    assert_eq!(engine.state(key, live), Some(MappingState::Live));
    assert_eq!(engine.state(key, stuck), Some(MappingState::Released));
    assert_eq!(engine.state(key, in_flight), Some(MappingState::QuarantinedInFlight));
    assert!(engine.is_gone(key, live));
    assert_eq!(engine.begin_unmap(key, live), Ok(UnmapPlan::Nothing));
    assert!(engine.take_released(key, stuck).is_some());
    engine.answer_late(lost, Err(REFUSED));
    assert!(engine.take_any_released().is_some());
    // Empty again, it can begin anew.
    engine.attach(EP2, key);
    assert!(!engine.begin_replay(key));
}

#[test]
fn a_domain_in_doubt_is_not_revoked() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    let lost = engine.sent_attach(EP2, key);
    engine.lose(lost);
    engine.map(key, range(1, 1), None);
    let (_, op) = engine.begin_detach(EP).unwrap();
    engine.answer(op, Ok(()));
    assert!(!engine.is_gone(key, range(1, 1)), "the other endpoint may be in it");
    engine.answer_late(lost, Err(REFUSED));
    assert!(engine.is_gone(key, range(1, 1)));
}

/// Fails when a refused DETACH makes an endpoint of unknown state an attached one.
#[test]
fn attachments_in_doubt_stay_in_doubt() {
    let mut engine = engine();
    let key = domain(&mut engine);
    let op = engine.sent_attach(EP, key);
    engine.answer(op, Err(RequestError::Refused(Status::Other(0x80))));
    let unknown = Attachment::Unknown { domain: key, in_flight: false };
    assert_eq!(engine.endpoint(EP).unwrap().attachment, unknown);
    assert_eq!(engine.begin_attach(EP, key), Err(AttachError::Busy(EP)));
    let (_, op) = engine.begin_detach(EP).unwrap();
    engine.answer(op, Err(REFUSED));
    assert_eq!(engine.endpoint(EP).unwrap().attachment, unknown);
    assert_eq!(engine.domain(key).unwrap().possible, 1);
    let (_, op) = engine.begin_detach(EP).unwrap();
    engine.answer(op, Ok(()));
    assert_eq!(engine.endpoint(EP).unwrap().attachment, Attachment::Detached);
    let record = engine.domain(key).unwrap();
    assert_eq!((record.attached(), record.possible), (0, 0));
}

#[test]
fn counts_of_endpoints_return_to_zero_by_every_way() {
    let outcomes: [Outcome; 3] = [Ok(()), Err(REFUSED), Err(TIMED_OUT)];
    for attach in outcomes {
        for detach in outcomes {
            for late in [false, true] {
                let mut engine = engine();
                let key = domain(&mut engine);
                let op = engine.sent_attach(EP, key);
                if late {
                    engine.lose(op);
                    engine.answer_late(op, attach);
                } else {
                    engine.answer(op, attach);
                }
                // Until it works.
                for outcome in [detach, Ok(()), Ok(())] {
                    let Ok((_, op)) = engine.begin_detach(EP) else { break };
                    engine.answer(op, outcome);
                }
                let record = engine.domain(key).unwrap();
                assert_eq!((record.attached(), record.possible), (0, 0), "{attach:?} {detach:?} {late}");
                assert_eq!(engine.endpoint(EP).unwrap().attachment, Attachment::Detached);
            }
        }
    }
}

/// I2, and I12's numbers that are never used again.
#[test]
fn numbers_are_in_use_as_long_as_their_record_is() {
    let mut engine = engine();
    let keys = [(); 3].map(|()| domain(&mut engine));
    let ids = keys.map(|key| engine.domain(key).unwrap().id.get());
    assert_eq!(ids, [5, 6, 7]);
    engine.attach(EP, keys[0]);
    assert!(engine.release_domain(keys[0]).is_none(), "an endpoint is in it");
    assert!(engine.release_domain(keys[1]).is_some());
    let next = domain(&mut engine);
    assert_eq!(engine.domain(next).unwrap().id.get(), 8);
    engine.renumber(next).unwrap();
    assert_eq!(engine.domain(next).unwrap().id.get(), 6);
    assert_eq!(engine.renumber(next), Err(DomainError::IdsExhausted { ids: 4 }), "5 and 7 in use, 8 retired");
    assert_eq!(engine.domain(next).unwrap().id.get(), 6, "nothing changed");
    let (_, op) = engine.begin_detach(EP).unwrap();
    engine.answer(op, Ok(()));
    assert!(engine.take_orphan().is_some() && engine.take_orphan().is_none());
    engine.renumber(next).unwrap();
    assert_eq!(engine.domain(next).unwrap().id.get(), 5);
}

#[test]
fn a_key_of_before_names_nothing() {
    let mut engine = engine();
    let old = domain(&mut engine);
    drop(engine.release_domain(old));
    let new = domain(&mut engine);
    assert_eq!(old.place(), new.place());
    assert!(engine.domain(old).is_none() && engine.domain(new).is_some());
    assert_eq!(engine.begin_attach(EP, old), Err(AttachError::DeadDomain));
    assert_eq!(engine.begin_unmap(old, range(1, 1)), Err(UnmapError::NotMapped(range(1, 1).start())));
    engine.settle(&Completion {
        op: Op::Map { domain: old, range: range(1, 1), record: MappingHandle(0) },
        outcome: Ok(()),
        abandoned: true,
    });
    assert_eq!(engine.quarantined(), (0, 0));
}

/// I7: fails when `begin_attach` sends for an endpoint that is there already.
#[test]
fn attaching_again_takes_nothing() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    assert_eq!(engine.begin_attach(EP, key), Ok(AttachPlan::Nothing));
    assert_eq!(engine.domain(key).unwrap().attached(), 1);
}

#[test]
fn requests_name_the_domain_by_its_number() {
    let mut engine = engine();
    let key = domain(&mut engine);
    let id = engine.domain(key).unwrap().id;
    let Ok(AttachPlan::Send(request, op)) = engine.begin_attach(EP, key) else { panic!() };
    assert_eq!(request, Request::Attach { domain: id, endpoint: EP, kind: DomainKind::Translated });
    engine.answer(op, Ok(()));
    let Ok((request, _)) = engine.begin_detach(EP) else { panic!() };
    assert_eq!(request, Request::Detach { domain: id, endpoint: EP });
    assert_eq!(engine.begin_detach(EP).map(|_| ()), Err(crate::error::DetachError::NotAttached(EP)));
}

/// I6: RANGE for several leaves each to be unmapped by itself; for one it is a refusal.
#[test]
fn range_for_several_sets_them_apart() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    let out_of_range = Err(RequestError::Refused(Status::Range));
    for page in [1, 2] {
        engine.map(key, range(page, 1), None);
    }
    let op = engine.sent_unmap(key, range(1, 2));
    engine.answer(op, out_of_range);
    assert_eq!(engine.next_apart(key, range(1, 2)), Some(range(1, 1)));
    for page in [1, 2] {
        let Ok(UnmapPlan::Send(_, op)) = engine.begin_unmap_apart(key, range(page, 1)) else { panic!() };
        engine.answer(op, if page == 1 { Ok(()) } else { out_of_range });
    }
    assert_eq!(engine.next_apart(key, range(1, 2)), None);
    assert_eq!(engine.state(key, range(1, 1)), None);
    assert_eq!(engine.state(key, range(2, 1)), Some(MappingState::Quarantined));
}

/// Loses an endpoint of the domain in a recovery.
fn strand(engine: &mut Engine, key: DomainKey) {
    engine.nothing_in_flight();
    let revival = engine.begin_revival(key).unwrap();
    let (_, op) = engine.begin_readmission(EP, key).unwrap();
    engine.answer(op, Err(REFUSED));
    assert!(!engine.end_revival(key, revival));
}

/// Brings it back.
fn bring_back(engine: &mut Engine, key: DomainKey) {
    let revival = engine.begin_revival(key).unwrap();
    let (_, op) = engine.begin_readmission(EP, key).unwrap();
    engine.answer(op, Ok(()));
    assert!(engine.end_revival(key, revival));
}

fn is_stranded(result: Result<UnmapPlan, UnmapError>) -> bool {
    matches!(result, Err(UnmapError::Request { error: RequestError::Reset, .. }))
}

/// I1: fails when mappings that are being unmapped one by one are not stranded: the UNMAP would go to a number that has
/// none.
#[test]
fn a_recovery_strands_what_is_being_unmapped_apart() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    engine.map(key, range(1, 1), None);
    engine.map(key, range(2, 1), held());
    let op = engine.sent_unmap(key, range(1, 2));
    engine.answer(op, Err(RequestError::Refused(Status::Range)));
    strand(&mut engine, key);
    // Whoever unmaps them finds out, for each.
    for page in [1, 2] {
        let rest = range(page, 3 - page);
        assert_eq!(engine.next_apart(key, rest), Some(range(page, 1)));
        assert!(is_stranded(engine.begin_unmap_apart(key, range(page, 1))));
    }
    bring_back(&mut engine, key);
    assert!(engine.is_free(key, range(1, 1)), "nobody's any more");
    assert_eq!(engine.state(key, range(2, 1)), Some(MappingState::Released));
}

/// I1: fails when a list that is rolled back does not see that a part of it is stranded: it would say that nothing is
/// mapped.
#[test]
fn a_list_that_is_rolled_back_gives_up_what_is_stranded() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    engine.map(key, range(1, 1), None);
    strand(&mut engine, key);
    let Some(Unmade::Live(part)) = engine.next_unmade(key, (LIST, range(1, 2))) else { panic!("not seen") };
    assert!(is_stranded(engine.begin_unmap(key, part)));
    assert!(engine.next_unmade(key, (LIST, range(1, 2))).is_none());
    bring_back(&mut engine, key);
    assert!(engine.is_free(key, range(1, 1)));
}

/// Fails when a range of which some is stranded is refused as it is: its owner has only one handle for all of it.
#[test]
fn what_is_stranded_in_part_is_given_up_as_a_whole() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    engine.attach(EP2, key);
    engine.map(key, range(1, 1), None);
    let revival = engine.begin_revival(key).unwrap();
    let (_, op) = engine.begin_readmission(EP, key).unwrap();
    engine.answer(op, Ok(()));
    assert!(!engine.end_revival(key, revival), "the other one did not come back");
    engine.map(key, range(2, 1), None);
    assert!(is_stranded(engine.begin_unmap(key, range(1, 2))));
    assert_eq!(engine.state(key, range(1, 1)), Some(MappingState::Stranded));
    let quarantined = Some(MappingState::Quarantined);
    assert_eq!(engine.state(key, range(2, 1)), quarantined);
    // What is nobody's stays so.
    assert_eq!(engine.begin_unmap(key, range(1, 1)), Err(UnmapError::NotMapped(range(1, 1).start())));
}

/// I1: fails when an UNMAP that nobody but `reclaim` wanted takes a mapping from its owner.
#[test]
fn reclaiming_a_replay_in_doubt_leaves_it_to_its_owner() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    let at = range(1, 1);
    engine.map(key, at, held());
    let (_, detach) = engine.begin_detach(EP).unwrap();
    engine.answer(detach, Ok(()));
    engine.attach(EP, key);
    let (_, op, _) = engine.next_replay(key, None).unwrap();
    engine.answer(op, Err(TIMED_OUT));
    assert_eq!(engine.reclaimable(None), Some((key, at)));
    let UnmapPlan::Send(_, op) = engine.begin_reclaim(key, at).unwrap() else { panic!("it may be mapped") };
    engine.answer(op, Ok(()));
    assert_eq!(engine.state(key, at), Some(MappingState::Live));
    assert_eq!(engine.begin_unmap(key, at), Ok(UnmapPlan::Nothing));
    assert_eq!(engine.state(key, at), Some(MappingState::Released));
}

/// Fails when it stays noted that an endpoint has to join its domain that turned out, late, to be unplugged.
#[test]
fn an_endpoint_that_is_gone_joins_no_renumbered_domain() {
    let mut engine = engine();
    let key = domain(&mut engine);
    engine.attach(EP, key);
    engine.attach(EP2, key);
    let revival = engine.begin_revival(key).unwrap();
    let (_, op) = engine.begin_readmission(EP, key).unwrap();
    engine.answer(op, Ok(()));
    let (_, op) = engine.begin_readmission(EP2, key).unwrap();
    engine.lose(op);
    assert!(!engine.end_revival(key, revival));
    engine.answer_late(op, Err(RequestError::Refused(Status::NoEnt)));
    assert!(engine.begin_renumber(key));
    let (_, op) = engine.begin_detach(EP).unwrap();
    engine.answer(op, Ok(()));
    engine.renumber(key).unwrap();
    assert_eq!((engine.next_to_rejoin(key), engine.next_to_rejoin(key)), (Some(EP), None));
}
