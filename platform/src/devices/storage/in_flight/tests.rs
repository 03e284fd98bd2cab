use super::super::super::dma::Coherent;
use super::super::Buffer;
use super::*;

const LIMITS: Limits =
    Limits { sector_bytes: 512, sectors: 64, max_bytes: 4096, max_pieces: 2, depth: 4, batch: 3 };

fn request(tag: u64, len_bytes: usize) -> Request {
    Request { tag, sector: tag, len_bytes, buffer: Buffer::Premapped(Coherent::leak(4096)) }
}

fn begin(in_flight: &mut InFlight, tags: &[u64]) -> Vec<Started> {
    let mut started = Vec::new();
    let mut requests = tags.iter().map(|tag| request(*tag, 512)).collect();
    in_flight
        .begin(Dma::Direct, Operation::Read, &mut requests, |one, pieces| {
            assert_eq!(pieces.len(), 1);
            started.push(one);
        })
        .expect("room");
    assert!(requests.is_empty());
    started
}

#[test]
fn a_batch_comes_back_with_its_last_answer_and_results_stay_apart() {
    let mut in_flight = InFlight::new(LIMITS);
    let batch = begin(&mut in_flight, &[10, 11, 12]);
    assert_eq!((in_flight.count(), in_flight.room(), in_flight.unanswered()), (3, 1, 3));
    let refused = StorageError::Refused { sector: 11, status: 2 };
    in_flight.answer(Dma::Direct, batch[2], Ok(()));
    in_flight.answer(Dma::Direct, batch[1], Err(refused));
    assert!(in_flight.next(Dma::Direct).is_none());
    assert_eq!(in_flight.started(u32::from(batch[1].slot)), None, "answered is answered");
    in_flight.answer(Dma::Direct, batch[0], Ok(()));
    let done: Vec<_> = core::iter::from_fn(|| in_flight.next(Dma::Direct)).collect();
    let results: Vec<_> = done.iter().map(|done| (done.tag, done.result)).collect();
    assert_eq!(results, [(10, Ok(())), (11, Err(refused)), (12, Ok(()))]);
    assert_eq!((in_flight.count(), in_flight.room()), (0, 3));
}

#[test]
fn single_requests_come_back_in_the_devices_order() {
    let mut in_flight = InFlight::new(LIMITS);
    let (first, second) = (begin(&mut in_flight, &[1]), begin(&mut in_flight, &[2]));
    in_flight.answer(Dma::Direct, second[0], Ok(()));
    assert_eq!(in_flight.next(Dma::Direct).map(|done| done.tag), Some(2));
    // Its slot is taken again while the first is still out.
    let third = begin(&mut in_flight, &[3]);
    assert_eq!(third[0].slot, second[0].slot);
    in_flight.answer(Dma::Direct, first[0], Ok(()));
    assert_eq!(in_flight.next(Dma::Direct).map(|done| done.tag), Some(1));
    assert_eq!(in_flight.count(), 1);
}

#[test]
fn what_does_not_fit_is_refused_and_stays_the_callers() {
    let mut in_flight = InFlight::new(LIMITS);
    for (len_bytes, count) in [(0, 1), (100, 1), (8192, 1), (512, 4)] {
        let mut requests: Vec<_> = (0..count).map(|tag| request(tag, len_bytes)).collect();
        let refused = in_flight.begin(Dma::Direct, Operation::Write, &mut requests, |_, _| panic!("started"));
        let full = matches!(refused, Err(StorageError::Full { requests: 4, room: 3 }));
        let bad = matches!(refused, Err(StorageError::Request { .. }));
        assert!(if count == 4 { full } else { bad }, "{refused:?}");
        assert_eq!((requests.len() as u64, in_flight.count()), (count, 0));
    }
}

/// Has a batch of its own answered, whose memory is unmapped with the next flush.
fn answer_deferred(in_flight: &mut InFlight, started: Started) {
    let slot = &mut in_flight.slots[usize::from(started.slot)];
    (slot.result, slot.batch) = (Some(Ok(())), None);
    in_flight.unanswered -= 1;
    in_flight.settle(started.slot, Ok(Unmapped::AtFlush));
    in_flight.flush_at = Deadline::after_ns(u64::MAX);
}

#[test]
fn what_is_unmapped_later_comes_back_with_the_last_answer() {
    let mut in_flight = InFlight::new(Limits { depth: 12, ..LIMITS });
    let started: Vec<_> = (1..=2).map(|tag| begin(&mut in_flight, &[tag])[0]).collect();
    answer_deferred(&mut in_flight, started[0]);
    assert!(in_flight.next(Dma::Direct).is_none(), "the device has more to do");
    assert_eq!((in_flight.count(), in_flight.free.len()), (2, 11), "it is not the caller's yet");
    answer_deferred(&mut in_flight, started[1]);
    let done: Vec<_> = core::iter::from_fn(|| in_flight.next(Dma::Direct)).map(|done| done.tag).collect();
    assert_eq!((done.as_slice(), in_flight.count()), ([1, 2].as_slice(), 0));
}

#[test]
fn what_is_unmapped_later_comes_back_with_others_or_after_a_while() {
    let mut in_flight = InFlight::new(Limits { depth: 8, ..LIMITS });
    let started: Vec<_> = (1..=8).map(|tag| begin(&mut in_flight, &[tag])[0]).collect();
    answer_deferred(&mut in_flight, started[0]);
    assert!(in_flight.next(Dma::Direct).is_none(), "an eighth");
    assert_eq!(in_flight.room(), 0, "what is held takes room");
    answer_deferred(&mut in_flight, started[1]);
    let done: Vec<_> = core::iter::from_fn(|| in_flight.next(Dma::Direct)).map(|done| done.tag).collect();
    assert_eq!(done, [1, 2], "a quarter");
    answer_deferred(&mut in_flight, started[2]);
    assert!(in_flight.next(Dma::Direct).is_none());
    in_flight.flush_at = Deadline::after_ns(0);
    assert_eq!(in_flight.next(Dma::Direct).map(|done| done.tag), Some(3), "its time is up");
}

#[test]
fn numbers_that_are_not_in_flight_are_nobodys() {
    let mut in_flight = InFlight::new(LIMITS);
    let started = begin(&mut in_flight, &[7]);
    for slot in [1, 3, 4, 0xffff, 0x1_0000, u32::MAX] {
        assert_eq!(in_flight.started(slot), None);
    }
    assert_eq!(in_flight.started(0), Some(started[0]));
    in_flight.cancel(Dma::Direct);
    assert_eq!(in_flight.next(Dma::Direct).map(|done| done.result), Some(Err(StorageError::Cancelled)));
    assert_eq!(in_flight.started(0), None);
}
