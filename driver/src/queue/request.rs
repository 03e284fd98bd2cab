//! The request queue: slots in shared memory, batches, completion in any order.

use super::batch::{Batch, Filling};
use super::slot::{NO_SLOT, Outcome, STRIDE, Slot, SlotState, TAIL_AT, head_of, judge};
use crate::engine::Op;
use crate::error::RequestError;
use crate::ring::{DESC_NEXT, DESC_WRITE, Interrupts, Layout, Ring, Suppression, UsedIndexJumped};
use crate::shared_memory::SharedMemory;
use crate::wire::request::{Encoded, MAX_READABLE, PROBE_READABLE, Request, TAIL_LEN, TAIL_SENTINEL};
use alloc::vec::Vec;
use core::task::Waker;

/// What came of a request, for whoever waits for it. What did not succeed comes with what it would have done.
pub(crate) type Answer = Result<(), (Op, RequestError)>;

/// A request that the device is done with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    pub op: Op,
    pub outcome: Outcome,
    /// Whether whoever submitted it gave up waiting.
    pub abandoned: bool,
}

/// Offsets of what follows the ring in the queue's memory.
#[derive(Clone, Copy, Debug)]
struct Areas {
    slots: usize,
    probe_readable: usize,
    probe_writable: usize,
    len: usize,
}

impl Areas {
    fn new(size: u16, probe_size: usize) -> Self {
        let slots = Layout::new(size).len;
        let probe_readable = slots + STRIDE * usize::from(size / 2);
        let probe_writable = probe_readable + PROBE_READABLE.next_multiple_of(STRIDE);
        Self { slots, probe_readable, probe_writable, len: probe_writable + probe_size + TAIL_LEN }
    }
}

/// A slot that no request is in, in a queue that is not broken.
pub(crate) struct FreeSlot<'a> {
    index: usize,
    slot: &'a mut Slot,
    ring: &'a mut Ring,
    /// The queue's first free slot, which this is.
    free: &'a mut usize,
}

impl<'a> FreeSlot<'a> {
    /// Names it to [`RequestQueue::take_one`].
    #[inline(always)]
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Puts a request that is no PROBE here and shows it to the device, where all is [usual](RequestQueue::is_usual). Says
    /// whether the device wants the doorbell.
    #[inline(always)]
    pub(crate) fn send(self, request: &Request, op: Op) -> bool {
        let Self { index, slot, ring, free } = self;
        *free = usize::from(slot.next);
        slot.fill(request, op, ring.memory_mut());
        ring.publish_one(head_of(index))
    }
}

/// The request queue.
///
/// Slot `i` uses descriptors `2i` (readable) and `2i + 1` (writable), set once: a request is a copy into the
/// slot and an entry in the ring. PROBE, whose parts are larger, borrows a slot's descriptors for an area of
/// its own, one at a time.
pub(crate) struct RequestQueue {
    ring: Ring,
    areas: Areas,
    slots: Vec<Slot>,
    /// The first slot that is free, or one that there is not, [`NO_SLOT`].
    free: usize,
    abandoned: u16,
    /// Slots whose answers wait for whoever sent the requests.
    done: u16,
    /// The slot that PROBE's area belongs to.
    probing: Option<u16>,
    probe_size: usize,
    /// Set when the device broke the ring: nothing is sent or read any more.
    broken: Option<UsedIndexJumped>,
    /// Used entries whose id names no request in flight, and how many there were when the device forgot the queue.
    stray: u64,
    stray_before: u64,
    /// For each slot, whom to wake when the device is done with it.
    wakers: Vec<Option<Waker>>,
    /// How many of them there are, and how many of their slots are done.
    sleepers: u16,
    due: u16,
}

impl RequestQueue {
    /// Bytes of memory that a queue of `size` descriptors takes, with room for `probe_size` bytes of properties.
    pub(crate) fn memory_len(size: u16, probe_size: usize) -> usize {
        Areas::new(size, probe_size).len
    }

    /// A queue of `size` (a power of two, at least 2) descriptors in `memory` of [`memory_len`](Self::memory_len)
    /// zeroed bytes.
    pub(crate) fn new(memory: SharedMemory, size: u16, suppression: Suppression, probe_size: usize) -> Self {
        let areas = Areas::new(size, probe_size);
        let slot_count = size / 2;
        let slots = (0..slot_count)
            .map(|index| Slot {
                state: SlotState::Free,
                cell: memory.cell(areas.slots + STRIDE * usize::from(index), 2 * index),
                op: Op::None,
                next: if index + 1 < slot_count { index + 1 } else { NO_SLOT },
            })
            .collect();
        let ring = Ring::new(memory, size, suppression, Interrupts::Unwanted);
        let mut queue = Self {
            ring,
            areas,
            slots,
            free: 0,
            abandoned: 0,
            done: 0,
            probing: None,
            probe_size,
            broken: None,
            stray: 0,
            stray_before: 0,
            wakers: (0..slot_count).map(|_| None).collect(),
            sleepers: 0,
            due: 0,
        };
        for index in 0..slot_count {
            queue.point_at_slot(index);
        }
        queue
    }

    pub(crate) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Slots whose requests were given up on and still belong to the device.
    pub(crate) fn abandoned(&self) -> u16 {
        self.abandoned
    }

    /// Whether a request can be submitted now; PROBE also needs its one area.
    pub(crate) fn can_submit(&self, probe: bool) -> bool {
        self.broken.is_none() && self.has_free_slot() && !(probe && self.probing.is_some())
    }

    /// Used entries that named no request in flight.
    pub(crate) fn stray(&self) -> u64 {
        self.stray
    }

    /// Puts a request into a free slot and the slot into the batch. The device sees it after
    /// [`publish`](Self::publish). False, and nothing done, where [`can_submit`](Self::can_submit) says no.
    #[must_use]
    #[inline]
    pub(crate) fn submit(&mut self, request: &Request, op: Op, batch: &mut Batch) -> bool {
        let probe = matches!(request, Request::Probe { .. });
        if !self.can_submit(probe) {
            return false;
        }
        let index = self.free as u16;
        if probe {
            self.write_probe(index, request);
        }
        self.queue(request, op, batch)
    }

    /// The same for a request that is no PROBE, or that was written, in a queue that is not broken. False where no slot is
    /// free.
    #[must_use]
    #[inline]
    pub(crate) fn queue(&mut self, request: &Request, op: Op, batch: &mut Batch) -> bool {
        let mut filling = self.filling();
        let put = filling.put(request, op);
        filling.end(batch);
        put
    }

    /// Begins to put requests into free slots, of a queue that is not broken.
    #[inline(always)]
    pub(crate) fn filling(&mut self) -> Filling<'_> {
        let Self { ring, slots, free, .. } = self;
        Filling::new(ring, slots, free)
    }

    #[cold]
    fn write_probe(&mut self, index: u16, request: &Request) {
        self.probing = Some(index);
        let Areas { probe_readable, probe_writable, .. } = self.areas;
        let writable_len = self.probe_size + TAIL_LEN;
        let (readable_at, writable_at) =
            (self.ring.memory().phys(probe_readable), self.ring.memory().phys(probe_writable));
        let memory = self.ring.memory_mut();
        // What is behind the words was zeroed once, and stays so.
        let Encoded { words, len } = request.encode();
        for (number, word) in words.iter().enumerate() {
            memory.write_bytes(probe_readable + 8 * number, &word.to_ne_bytes());
        }
        // No properties of an earlier endpoint may be read as this one's.
        for at in probe_writable..probe_writable + self.probe_size {
            memory.write_bytes(at, &[0]);
        }
        memory.write_bytes(probe_writable + self.probe_size, &TAIL_SENTINEL);
        self.ring.set_descriptor(2 * index, readable_at, len as u32, DESC_NEXT, 2 * index + 1);
        self.ring.set_descriptor(2 * index + 1, writable_at, writable_len as u32, DESC_WRITE, 0);
    }

    fn point_at_slot(&mut self, index: u16) {
        let at = self.slot_at(index);
        let (readable, tail) = (self.ring.memory().phys(at), self.ring.memory().phys(at + TAIL_AT));
        self.ring.set_descriptor(2 * index, readable, MAX_READABLE as u32, DESC_NEXT, 2 * index + 1);
        self.ring.set_descriptor(2 * index + 1, tail, TAIL_LEN as u32, DESC_WRITE, 0);
    }

    fn slot_at(&self, index: u16) -> usize {
        self.areas.slots + STRIDE * usize::from(index)
    }

    /// Shows the device what was submitted, and says whether it wants the doorbell.
    #[must_use = "without the doorbell the device may never look"]
    pub(crate) fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    /// The next request that the device is done with. A slot that was abandoned is free after this; of the
    /// others the outcome waits for [`take`](Self::take).
    ///
    /// Entries that name no request in flight are counted and passed over, at most one ring of them a call.
    #[inline]
    pub(crate) fn complete(&mut self) -> Option<Completion> {
        for _ in 0..self.ring.size() {
            if self.broken.is_some() {
                return None;
            }
            let used = match self.ring.pop() {
                Ok(used) => used?,
                Err(jumped) => {
                    self.broken = Some(jumped);
                    return None;
                }
            };
            match self.slot_of(used.id) {
                Some(index) => return Some(self.finish(index, used.len)),
                None => self.stray += 1,
            }
        }
        None
    }

    /// Whether nothing is out of the ordinary: the device keeps to the ring, nobody sleeps, and no PROBE is under way.
    pub(crate) fn is_usual(&self) -> bool {
        let quiet = self.sleepers == 0 && self.ring.interrupts() == Interrupts::Unwanted;
        self.broken.is_none() && quiet && self.probing.is_none()
    }

    /// A slot to put a request into.
    #[inline(always)]
    pub(crate) fn free_slot(&mut self) -> Option<FreeSlot<'_>> {
        let Self { ring, slots, free, .. } = self;
        // The end of the list is beyond the slots.
        let index = *free;
        Some(FreeSlot { index, slot: slots.get_mut(index)?, ring, free })
    }

    /// The slot that is used next, if there is one.
    pub(crate) fn first_free(&self) -> usize {
        self.free
    }

    pub(crate) fn has_free_slot(&self) -> bool {
        self.free < self.slots.len()
    }

    /// How many slots are free, of a queue that is not broken, without a look at them: all that are not with the device, and
    /// have no answer that waits. `None` where the device answered what it was not asked, since that counts too much.
    #[inline(always)]
    pub(crate) fn free_slots(&self) -> Option<usize> {
        let taken = usize::from(self.ring.in_flight()) + usize::from(self.done);
        if self.stray == self.stray_before { self.slots.len().checked_sub(taken) } else { None }
    }

    /// Takes the success of a request that was [sent](FreeSlot::send), where all is [usual](Self::is_usual), if it is the
    /// only answer that is there. Whether it was: behind it there may be another that names the same slot, which would be
    /// taken for the answer of the slot's next request.
    #[inline(always)]
    pub(crate) fn take_one(&mut self, index: usize) -> bool {
        debug_assert!(self.is_usual());
        let Some(used) = self.ring.sole() else { return false };
        let Some(slot) = self.slots.get_mut(index) else { return false };
        if !slot.succeeded(used, index, self.ring.memory()) {
            return false;
        }
        (slot.state, slot.next) = (SlotState::Free, self.free as u16);
        self.free = index;
        self.ring.pass_sole();
        true
    }

    /// Whether there are answers that were seen and not taken: they have to be taken in before the lock is given back after
    /// [`take_successes`](Self::take_successes), for the same reason.
    #[inline(always)]
    pub(crate) fn has_left_any(&self) -> bool {
        self.ring.has_left_any()
    }

    /// Takes the first requests of a batch, where all is [usual](Self::is_usual), as far as they succeeded and their answers
    /// are the next in the ring: what most find when they look, without the way over [`complete`](Self::complete) and
    /// [`take`](Self::take). What each did goes to `take`, which says whether that is all; the first of which it is not is
    /// returned, to be settled, and there may be more behind it.
    #[inline(always)]
    pub(crate) fn take_successes(&mut self, batch: &mut Batch, take: impl FnMut(&Op) -> bool) -> Option<Op> {
        debug_assert!(self.is_usual());
        batch.take_successes((&mut self.ring, &mut self.slots, &mut self.free), take)
    }

    /// The slot that a used entry's id names, if a request is in flight there.
    #[inline]
    fn slot_of(&self, id: u32) -> Option<u16> {
        let index = u16::try_from(id / 2).ok()?;
        let slot = self.slots.get(usize::from(index))?;
        let in_flight = matches!(slot.state, SlotState::InFlight | SlotState::Abandoned);
        (id.is_multiple_of(2) && in_flight).then_some(index)
    }

    #[inline]
    fn finish(&mut self, index: u16, used_len: u32) -> Completion {
        let (expected, status) = if self.probing == Some(index) {
            let mut tail = [0; TAIL_LEN];
            self.ring.memory().read_bytes(self.areas.probe_writable + self.probe_size, &mut tail);
            (self.probe_size + TAIL_LEN, tail[0])
        } else {
            (TAIL_LEN, self.ring.memory().read_cell::<TAIL_AT>(&self.slots[usize::from(index)].cell)[0])
        };
        let slot = &mut self.slots[usize::from(index)];
        let outcome = judge(used_len, expected as u32, status);
        let completion = Completion { op: slot.op, outcome, abandoned: slot.state == SlotState::Abandoned };
        slot.state = SlotState::Done(outcome);
        self.done += 1;
        if self.sleepers > 0 {
            self.due += u16::from(self.wakers[usize::from(index)].is_some());
        }
        if completion.abandoned {
            self.abandoned -= 1;
            self.release(index);
        }
        completion
    }

    /// Takes the outcome of the batch's first request, if the device is done with it, and frees its slot.
    #[inline]
    pub(crate) fn take(&mut self, batch: &mut Batch) -> Option<Answer> {
        let head = batch.head()?;
        let slot = &self.slots[usize::from(head)];
        let SlotState::Done(outcome) = slot.state else { return None };
        let outcome = outcome.map_err(|error| (slot.op, error));
        self.advance(batch);
        self.release(head);
        Some(outcome)
    }

    /// Gives up on the batch's first request, which is in flight: its slot stays with the device. Returns what it
    /// would have done.
    pub(crate) fn abandon(&mut self, batch: &mut Batch) -> Option<Op> {
        let head = batch.head()?;
        self.advance(batch);
        let slot = &mut self.slots[usize::from(head)];
        debug_assert_eq!(slot.state, SlotState::InFlight);
        slot.state = SlotState::Abandoned;
        slot.next = NO_SLOT;
        self.abandoned += 1;
        Some(slot.op)
    }

    /// A request that the device still had when it forgot the queue, and whether nobody waits for it any more. It will
    /// not be answered, which whoever waits finds out now.
    pub(crate) fn forget_one(&mut self) -> Option<(Op, bool)> {
        let in_flight = |slot: &Slot| matches!(slot.state, SlotState::InFlight | SlotState::Abandoned);
        let index = self.slots.iter().position(in_flight)?;
        let slot = &mut self.slots[index];
        let (op, abandoned) = (slot.op, slot.state == SlotState::Abandoned);
        slot.state = SlotState::Done(Err(RequestError::Reset));
        self.done += 1;
        self.due += u16::from(self.wakers[index].is_some());
        if abandoned {
            self.abandoned -= 1;
            self.release(index as u16);
        }
        Some((op, abandoned))
    }

    /// Begins anew after [`forget_one`](Self::forget_one) found nothing more: the device forgot the queue, of which it
    /// may have broken all that it can write.
    pub(crate) fn restart(&mut self) {
        self.ring.restart();
        self.stray_before = self.stray;
        self.broken = None;
        // Also where whoever sent a PROBE did not look at what came of it yet.
        self.probing = None;
        for index in 0..self.slots.len() as u16 {
            self.point_at_slot(index);
        }
    }

    /// Whether the device is done with the batch's first request.
    pub(crate) fn is_done(&self, batch: &Batch) -> bool {
        let done = |head| matches!(self.slots[usize::from(head)].state, SlotState::Done(_));
        batch.head().is_none_or(done)
    }

    /// Leaves a waker with the batch's first request. Returns the one that was there, to be dropped without the lock,
    /// or this one where the batch is empty.
    #[must_use = "a waker is not to be dropped under the lock"]
    pub(crate) fn register(&mut self, batch: &Batch, waker: Waker) -> Option<Waker> {
        let Some(head) = batch.head() else { return Some(waker) };
        let old = self.unregister(batch);
        self.wakers[usize::from(head)] = Some(waker);
        self.sleepers += 1;
        self.due += u16::from(self.is_done(batch));
        old
    }

    /// Takes the waker back from the batch's first request.
    #[must_use = "a waker is not to be dropped under the lock"]
    #[inline]
    pub(crate) fn unregister(&mut self, batch: &Batch) -> Option<Waker> {
        if self.sleepers == 0 {
            return None;
        }
        let head = batch.head()?;
        self.unregister_at(head)
    }

    fn unregister_at(&mut self, index: u16) -> Option<Waker> {
        let waker = self.wakers[usize::from(index)].take()?;
        self.sleepers -= 1;
        self.due -= u16::from(matches!(self.slots[usize::from(index)].state, SlotState::Done(_)));
        Some(waker)
    }

    /// Wakers that are registered.
    pub(crate) fn sleepers(&self) -> u16 {
        self.sleepers
    }

    /// Whether some of them are to be called.
    pub(crate) fn has_due(&self) -> bool {
        self.due > 0
    }

    /// A waker that is to be called, or any if `all`, and its slot, which is `from` or a later one.
    pub(crate) fn take_waker(&mut self, from: u16, all: bool) -> Option<(u16, Waker)> {
        if self.sleepers == 0 {
            return None;
        }
        let called = |index: &u16| {
            let index = usize::from(*index);
            let done = matches!(self.slots[index].state, SlotState::Done(_));
            self.wakers[index].is_some() && (all || done)
        };
        let index = (from..self.slots.len() as u16).find(called)?;
        Some((index, self.unregister_at(index)?))
    }

    /// Says whether the device is to interrupt when it is done with a request. After `Wanted` the ring has to be looked
    /// at once more.
    #[inline]
    pub(crate) fn want_interrupts(&mut self, interrupts: Interrupts) {
        self.ring.set_interrupts(interrupts);
    }

    /// Why nothing is answered any more, if the device broke the ring.
    pub(crate) fn broken(&self) -> Option<RequestError> {
        let UsedIndexJumped { seen, expected_at_most } = self.broken?;
        Some(RequestError::RingBroken { used_index: seen, expected_at_most })
    }

    #[inline]
    fn advance(&mut self, batch: &mut Batch) {
        batch.advance(&self.slots);
    }

    /// Frees a slot that is done.
    #[inline]
    fn release(&mut self, index: u16) {
        if self.probing == Some(index) {
            self.probing = None;
            self.point_at_slot(index);
        }
        let free = core::mem::replace(&mut self.free, usize::from(index)) as u16;
        self.done -= 1;
        let slot = &mut self.slots[usize::from(index)];
        (slot.state, slot.next) = (SlotState::Free, free);
    }

    /// Copies the properties that the last PROBE returned. Valid until the next one is submitted.
    pub(crate) fn copy_properties(&self, into: &mut [u8]) {
        let len = into.len().min(self.probe_size);
        self.ring.memory().read_bytes(self.areas.probe_writable, &mut into[..len]);
    }
}

#[cfg(feature = "contexts")]
mod context;
#[cfg(test)]
mod tests;
