//! What only the inside shows: slots, batches, the free list, answers that name nobody.

use super::*;
use crate::addr::{Iova, IovaRange};
use crate::id::{DomainId, EndpointId};
use crate::test_memory::TestMemory;
use crate::wire::request::Status;
use alloc::vec::Vec;

const SIZE: u16 = 8;
const SLOTS: u16 = SIZE / 2;
const PROBE_SIZE: usize = 16;

/// The queue, and the device's side of its ring.
struct Bench {
    queue: RequestQueue,
    used_idx: u16,
}

fn bench() -> Bench {
    let memory = TestMemory::leak(RequestQueue::memory_len(SIZE, PROBE_SIZE));
    // SAFETY: leaked, so valid for ever, and no one else uses it.
    let memory = unsafe { SharedMemory::new(memory) };
    Bench { queue: RequestQueue::new(memory, SIZE, Suppression::Flags, PROBE_SIZE), used_idx: 0 }
}

fn unmap(number: u64) -> Request {
    let range = IovaRange::from_len(Iova::new(number * 0x1000), 0x1000).unwrap();
    Request::Unmap { domain: DomainId::new(1), range }
}

const PROBE: Request = Request::Probe { endpoint: EndpointId::new(8) };

impl Bench {
    /// Submits requests and publishes them.
    fn submit(&mut self, requests: &[Request]) -> Batch {
        let mut batch = Batch::default();
        for request in requests {
            assert!(self.queue.submit(request, Op::None, &mut batch));
        }
        let _ = self.queue.publish();
        batch
    }

    /// What came of the batch's first request.
    fn take(&mut self, batch: &mut Batch) -> Option<Outcome> {
        self.queue.take(batch).map(|answer| answer.map_err(|(_, error)| error))
    }

    fn used_offset(&self) -> usize {
        let addresses = self.queue.ring.addresses();
        (addresses.device_area.get() - addresses.descriptors.get()) as usize
    }

    /// Returns a chain as the device does, without writing an answer.
    fn give_back(&mut self, id: u32, len: u32) {
        let at = self.used_offset() + 4 + 8 * usize::from(self.used_idx % SIZE);
        let index_at = self.used_offset() + 2;
        self.used_idx = self.used_idx.wrapping_add(1);
        let memory = self.queue.ring.memory_mut();
        memory.write_bytes(at, &id.to_le_bytes());
        memory.write_bytes(at + 4, &len.to_le_bytes());
        memory.store_release_u16(index_at, self.used_idx.to_le());
    }

    /// Where descriptor `index` leads, from the start of the memory, and its length.
    fn descriptor(&self, index: u16) -> (usize, u32) {
        let mut bytes = [0; 12];
        self.queue.ring.memory().read_bytes(16 * usize::from(index), &mut bytes);
        let (address, len) = bytes.split_at(8);
        let address = u64::from_le_bytes(address.try_into().unwrap());
        let offset = address - self.queue.ring.addresses().descriptors.get();
        (offset as usize, u32::from_le_bytes(len.try_into().unwrap()))
    }

    /// Answers the request of a slot with a status.
    fn answer(&mut self, slot: u16, status: u8) {
        let (at, len) = self.descriptor(2 * slot + 1);
        self.queue.ring.memory_mut().write_bytes(at + len as usize - 4, &[status, 0, 0, 0]);
        self.give_back(u32::from(2 * slot), len);
    }

    /// Takes in what the device gave back, and counts it.
    fn drain(&mut self) -> usize {
        core::iter::from_fn(|| self.queue.complete()).count()
    }

    fn free_slots(&self) -> Vec<u16> {
        let mut free = Vec::new();
        let mut next = self.queue.free as u16;
        while next != NO_SLOT {
            let index = next;
            assert!(!free.contains(&index), "the free list loops");
            assert_eq!(self.queue.slots[usize::from(index)].state, SlotState::Free);
            free.push(index);
            next = self.queue.slots[usize::from(index)].next;
        }
        let counted = (self.queue.stray() == self.queue.stray_before).then_some(free.len());
        assert_eq!(self.queue.free_slots(), counted);
        free
    }
}

#[test]
fn a_slot_is_in_one_list_at_a_time() {
    let mut bench = bench();
    assert_eq!(bench.free_slots(), [0, 1, 2, 3]);
    let mut batch = bench.submit(&[unmap(1), unmap(2), unmap(3), unmap(4)]);
    assert!(!bench.queue.can_submit(false));
    assert!(!bench.queue.submit(&unmap(5), Op::None, &mut batch), "nothing is done when there is no slot");
    assert_eq!((batch.len(), bench.free_slots().len()), (SLOTS, 0));
    for slot in 0..SLOTS {
        bench.answer(slot, 0);
    }
    assert_eq!(bench.drain(), 4);
    assert_eq!(bench.free_slots().len(), 0, "outcomes wait to be taken");
    while bench.queue.take(&mut batch).is_some() {}
    assert!(batch.is_empty());
    let mut free = bench.free_slots();
    free.sort_unstable();
    assert_eq!(free, [0, 1, 2, 3]);
}

/// I4: fails when `take` goes by the order of answers.
#[test]
fn outcomes_come_in_the_batchs_order_whatever_the_devices() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let mut bench = bench();
        let mut batch = bench.submit(&[unmap(1), unmap(2), unmap(3), unmap(4)]);
        for slot in order {
            bench.answer(slot, slot as u8);
        }
        bench.drain();
        let outcomes: Vec<_> = core::iter::from_fn(|| bench.take(&mut batch)).collect();
        let refused = |status| Err(RequestError::Refused(status));
        let expected = [Ok(()), refused(Status::IoErr), refused(Status::Unsupp), refused(Status::DevErr)];
        assert_eq!(outcomes, expected);
    }
}

#[test]
fn a_batch_waits_for_its_first_and_others_are_not_held_up() {
    let mut bench = bench();
    let mut first = bench.submit(&[unmap(1), unmap(2)]);
    let mut second = bench.submit(&[unmap(3)]);
    bench.answer(2, 0);
    bench.answer(1, 0);
    bench.drain();
    assert!(bench.queue.take(&mut first).is_none());
    assert!(bench.queue.take(&mut second).is_some() && second.is_empty());
    bench.answer(0, 0);
    bench.drain();
    assert!(bench.queue.take(&mut first).is_some() && bench.queue.take(&mut first).is_some());
}

/// I3: fails when `abandon` frees the slot, or `finish` does not.
#[test]
fn an_abandoned_slot_is_free_only_after_its_answer() {
    let mut bench = bench();
    let mut batch = bench.submit(&[unmap(1), unmap(2), unmap(3)]);
    bench.answer(1, 0);
    bench.drain();
    assert!(bench.queue.take(&mut batch).is_none() && bench.queue.abandon(&mut batch).is_some());
    assert_eq!(bench.take(&mut batch), Some(Ok(())));
    assert!(bench.queue.take(&mut batch).is_none() && bench.queue.abandon(&mut batch).is_some());
    assert_eq!(bench.queue.abandon(&mut batch), None);
    assert_eq!((bench.queue.abandoned(), batch.is_empty()), (2, true));
    for _ in 0..10 {
        let mut again = bench.submit(&[unmap(4), unmap(5)]);
        assert!(!bench.queue.can_submit(false));
        for slot in [1, 3] {
            bench.answer(slot, 0);
        }
        bench.drain();
        while bench.queue.take(&mut again).is_some() {}
    }
    bench.answer(2, 6);
    let late = bench.queue.complete().unwrap();
    assert!(late.abandoned);
    assert_eq!(late.outcome, Err(RequestError::Refused(Status::NoEnt)));
    assert_eq!(bench.queue.abandoned(), 1);
    assert!(bench.free_slots().contains(&2) && !bench.free_slots().contains(&0));
}

#[test]
fn a_broken_ring_says_where_the_index_went() {
    let mut bench = bench();
    let mut abandoned = bench.submit(&[unmap(1)]);
    assert!(bench.queue.abandon(&mut abandoned).is_some());
    let mut batch = bench.submit(&[unmap(1)]);
    assert_eq!(bench.queue.broken(), None);
    bench.used_idx = 9;
    bench.give_back(2, 4);
    assert_eq!(bench.drain(), 0);
    assert!(bench.queue.broken().is_some() && !bench.queue.can_submit(false));
    let broken = RequestError::RingBroken { used_index: 10, expected_at_most: 2 };
    assert_eq!(bench.queue.broken(), Some(broken));
    assert!(bench.queue.abandon(&mut batch).is_some());
}

#[test]
fn answers_that_name_nobody_are_counted_and_passed_over() {
    let mut bench = bench();
    let mut batch = bench.submit(&[unmap(1), unmap(2), unmap(3), unmap(4)]);
    bench.give_back(1, 4);
    bench.give_back(u32::MAX, 4);
    bench.give_back(u32::from(SIZE), 4);
    bench.answer(0, 0);
    let completion = bench.queue.complete().unwrap();
    assert_eq!((completion.outcome, bench.queue.stray()), (Ok(()), 3));
    // They left the ring as if they had been somebody's.
    bench.free_slots();
    assert!(bench.queue.take(&mut batch).is_some());
    assert!(bench.queue.take(&mut batch).is_none());
    assert_eq!(bench.free_slots(), [0]);
}

#[test]
fn an_answer_for_a_slot_that_is_done_or_free_names_nobody() {
    let mut bench = bench();
    let mut batch = bench.submit(&[unmap(1), unmap(2), unmap(3)]);
    bench.answer(0, 0);
    bench.drain();
    bench.give_back(0, 4);
    assert_eq!((bench.drain(), bench.queue.stray()), (0, 1), "done");
    assert!(bench.queue.take(&mut batch).is_some());
    bench.give_back(0, 4);
    assert_eq!((bench.drain(), bench.queue.stray()), (0, 2), "free");
}

/// D-09: fails when the sentinel is not written again, so that the slot's last OK stands there.
#[test]
fn a_slots_last_status_is_not_taken_for_the_next_answer() {
    let mut bench = bench();
    let mut batch = bench.submit(&[unmap(1)]);
    bench.answer(0, 0);
    bench.drain();
    assert_eq!(bench.take(&mut batch), Some(Ok(())));
    for (len, error) in
        [(0, RequestError::NotHandled), (4, RequestError::ShortAnswer { used_len: 4, expected: 4 })]
    {
        let mut batch = bench.submit(&[unmap(2)]);
        bench.give_back(0, len);
        bench.drain();
        assert_eq!(bench.take(&mut batch), Some(Err(error)));
    }
}

/// D-27: one area for PROBE, exactly as long as `probe_size` says, and zeroed each time.
#[test]
fn probe_borrows_a_slot_and_gives_it_back() {
    let mut bench = bench();
    let (readable, writable) = (bench.descriptor(0), bench.descriptor(1));
    for round in 0..3 {
        let mut batch = bench.submit(&[PROBE]);
        assert!(bench.queue.can_submit(false) && !bench.queue.can_submit(true));
        assert_eq!(bench.descriptor(0).1, 72);
        let (at, len) = bench.descriptor(1);
        assert_eq!(len as usize, PROBE_SIZE + 4);
        let mut area = [0xaa; PROBE_SIZE];
        bench.queue.copy_properties(&mut area);
        assert_eq!(area, [0; PROBE_SIZE], "round {round}");
        bench.queue.ring.memory_mut().write_bytes(at, &[0x55; PROBE_SIZE]);
        bench.answer(0, 0);
        bench.drain();
        assert_eq!(bench.take(&mut batch), Some(Ok(())));
        bench.queue.copy_properties(&mut area);
        assert_eq!(area, [0x55; PROBE_SIZE]);
        assert_eq!((bench.descriptor(0).0, bench.descriptor(1)), (readable.0, writable));
        assert!(bench.queue.can_submit(true));
    }
}

#[test]
fn a_probe_that_was_given_up_keeps_its_area() {
    let mut bench = bench();
    let mut batch = bench.submit(&[PROBE]);
    bench.queue.abandon(&mut batch);
    assert!(!bench.queue.submit(&PROBE, Op::Probe, &mut batch));
    bench.answer(0, 0);
    bench.drain();
    assert!(bench.queue.submit(&PROBE, Op::Probe, &mut batch));
}

#[test]
fn requests_lie_in_their_slots() {
    let mut bench = bench();
    let _ = bench.submit(&[unmap(1), unmap(2)]);
    for (slot, number) in [(0u16, 1u8), (1, 2)] {
        let (at, len) = bench.descriptor(2 * slot);
        let mut bytes = [0; 28];
        bench.queue.ring.memory().read_bytes(at, &mut bytes);
        assert_eq!((len, bytes[0], bytes[9]), (28, 4, number << 4));
        let (tail_at, tail_len) = bench.descriptor(2 * slot + 1);
        let mut tail = [0; 4];
        bench.queue.ring.memory().read_bytes(tail_at, &mut tail);
        assert_eq!((tail_len, tail), (4, TAIL_SENTINEL));
    }
}

/// Against a plain model of who owns each slot, in any order.
#[test]
fn slots_are_neither_lost_nor_doubled() {
    let mut seed = 0x2545_f491_4f6c_dd1du64;
    std::println!("seed {seed:#x}");
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let mut bench = bench();
    let mut in_flight: Vec<u16> = Vec::new();
    let mut batches: Vec<Batch> = Vec::new();
    for _ in 0..20_000 {
        match random(4) {
            0 if bench.queue.can_submit(false) => {
                let slot = bench.queue.free_slot().unwrap().index() as u16;
                assert!(!in_flight.contains(&slot), "slot {slot} still belongs to the device");
                batches.push(bench.submit(&[unmap(1)]));
                in_flight.push(slot);
            }
            1 if !in_flight.is_empty() => {
                let slot = in_flight.swap_remove(random(in_flight.len() as u64) as usize);
                bench.answer(slot, 0);
            }
            2 => {
                bench.drain();
                for batch in &mut batches {
                    bench.queue.take(batch);
                }
            }
            _ if !batches.is_empty() => {
                bench.drain();
                let mut batch = batches.swap_remove(random(batches.len() as u64) as usize);
                if bench.queue.take(&mut batch).is_none() {
                    bench.queue.abandon(&mut batch);
                }
            }
            _ => {}
        }
        batches.retain(|batch| !batch.is_empty());
        assert_eq!(bench.queue.stray(), 0);
        let waiting = batches.len() + usize::from(bench.queue.abandoned());
        assert_eq!(bench.free_slots().len() + waiting, usize::from(SLOTS));
    }
}

/// Fails when a slot that the device forgot is not free, counts on, or when its answer of before is taken for a new
/// one.
#[test]
fn a_queue_that_the_device_forgot_begins_anew() {
    let mut bench = bench();
    let mut given_up = bench.submit(&[unmap(1)]);
    assert_eq!(bench.queue.abandon(&mut given_up), Some(Op::None));
    let mut waiting = bench.submit(&[unmap(2), PROBE]);
    let mut answered = bench.submit(&[unmap(3)]);
    bench.answer(3, 0);
    assert_eq!(bench.drain(), 1);
    // Written by the device after the driver looked for the last time.
    bench.answer(1, 0);

    let forgotten: Vec<_> = core::iter::from_fn(|| bench.queue.forget_one()).collect();
    assert_eq!(forgotten, [(Op::None, true), (Op::None, false), (Op::None, false)]);
    bench.queue.restart();
    bench.used_idx = 0;
    assert_eq!((bench.drain(), bench.queue.abandoned(), bench.queue.stray()), (0, 0, 0));
    assert_eq!(bench.queue.take(&mut answered), Some(Ok(())), "that came before");

    // One slot is free, and PROBE's area; the others wait for whoever sent their requests.
    let mut probe = bench.submit(&[PROBE]);
    bench.answer(3, 0);
    assert_eq!(bench.drain(), 1);
    assert_eq!(bench.queue.take(&mut probe), Some(Ok(())));
    let reset = Some(Err((Op::None, RequestError::Reset)));
    for _ in 0..2 {
        assert_eq!(bench.queue.take(&mut waiting), reset);
    }
    assert!(waiting.is_empty());
    let all: Vec<_> = (0..u64::from(SLOTS)).map(unmap).collect();
    let _ = bench.submit(&all);
    assert!(!bench.queue.can_submit(false));
}

/// Fails when what a device wrote over the descriptors outlives its reset.
#[test]
fn descriptors_are_mended() {
    let mut bench = bench();
    let before: Vec<_> = (0..SIZE).map(|index| bench.descriptor(index)).collect();
    bench.queue.ring.memory_mut().write_bytes(0, &[0xee; 16 * SIZE as usize]);
    bench.queue.restart();
    let after: Vec<_> = (0..SIZE).map(|index| bench.descriptor(index)).collect();
    assert_eq!(before, after);
}

/// Fails when one answer of several is taken the quick way: the second copy would answer the slot's next request.
#[test]
fn an_answer_that_comes_twice_is_nobodys_the_second_time() {
    let mut bench = bench();
    let _other = bench.submit(&[unmap(1)]);
    let slot = bench.queue.free_slot().unwrap();
    let index = slot.index();
    let _ = slot.send(&unmap(2), Op::None);
    bench.answer(index as u16, 0);
    bench.answer(index as u16, 0);
    assert!(!bench.queue.take_one(index), "there are two");
    assert_eq!(bench.drain(), 1);
    let mut batch = Batch::of(index, 1);
    assert_eq!((bench.take(&mut batch), bench.queue.stray()), (Some(Ok(())), 1));
    // Its next request has no answer yet.
    let slot = bench.queue.free_slot().unwrap();
    assert_eq!(slot.index(), index);
    let _ = slot.send(&unmap(3), Op::None);
    assert!(!bench.queue.take_one(index) && bench.drain() == 0);
}

/// Fails when a batch leaves answers behind that were seen, and does not say so.
#[test]
fn a_batch_says_what_it_left_behind() {
    let mut bench = bench();
    let _other = bench.submit(&[unmap(1)]);
    let mut batch = bench.submit(&[unmap(2)]);
    bench.answer(1, 0);
    let take = |bench: &mut Bench, batch: &mut Batch| {
        let mut count = 0;
        let rest = bench.queue.take_successes(batch, |_| {
            count += 1;
            true
        });
        (count, rest, bench.queue.has_left_any())
    };
    assert_eq!(take(&mut bench, &mut batch), (1, None, false));
    let mut batch = bench.submit(&[unmap(3)]);
    bench.answer(1, 0);
    bench.answer(1, 0);
    assert_eq!(take(&mut bench, &mut batch), (1, None, true));
    assert_eq!((bench.drain(), bench.queue.stray(), bench.queue.has_left_any()), (0, 1, false));
}
