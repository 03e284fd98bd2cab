//! Batches: requests that are submitted together, and waited for together.

use super::slot::{Slot, SlotState, head_of};
use crate::engine::Op;
use crate::ring::{Ring, Used};
use crate::shared_memory::{Places, SharedMemory};
use crate::wire::request::Request;

/// Requests that are submitted together and waited for together: a list through their slots, so that it takes
/// no memory of its own.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// The first slot, unless it is empty.
    head: u16,
    len: u16,
}

impl Batch {
    /// So many requests, the first of which is in this slot.
    pub(crate) fn of(slot: usize, len: u16) -> Self {
        Self { head: slot as u16, len }
    }

    /// The slot of the first request that nobody took yet, if there is one.
    pub(crate) fn slot(&self) -> usize {
        self.head.into()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn head(&self) -> Option<u16> {
        (self.len > 0).then_some(self.head)
    }

    /// How many requests are in it that nobody took yet.
    pub(crate) fn len(&self) -> u16 {
        self.len
    }

    /// Leaves its first request out.
    #[inline]
    pub(super) fn advance(&mut self, slots: &[Slot]) {
        if self.len > 0 {
            self.head = slots[usize::from(self.head)].next;
            self.len -= 1;
        }
    }

    /// Takes the first requests, as far as they succeeded, their answers are the next in the ring, and `take` has no more to
    /// say about what they did. That of which it has, which is taken too: then there may be more. Frees their slots, before
    /// the `free` one. Bounded by the batch.
    #[inline(always)]
    pub(super) fn take_successes(
        &mut self,
        (ring, slots, free): (&mut Ring, &mut [Slot], &mut usize),
        mut take: impl FnMut(&Op) -> bool,
    ) -> Option<Op> {
        let first = usize::from(self.head);
        let (at, places) = (ring.next_used(), ring.memory().places());
        let end = at + usize::from(ring.ready().min(self.len));
        let (mut next, mut index, mut last, mut all) = (at, first, first, true);
        while next < end {
            let (id, len) = ring.memory().used_entry_at(places, next);
            let used = Used { id, len };
            let Some(slot) = slots.get_mut(index) else { break };
            if !slot.succeeded(used, index, ring.memory()) {
                break;
            }
            slot.state = SlotState::Free;
            (last, index) = (index, usize::from(slot.next));
            next += 1;
            all = take(&slot.op);
            if !all {
                break;
            }
        }
        let (count, mut rest) = ((next - at) as u16, None);
        if count > 0 {
            rest = (!all).then(|| slots[last].op);
            // They are linked already.
            slots[last].next = *free as u16;
            *free = first;
            ring.pass(count);
            (self.head, self.len) = (index as u16, self.len - count);
        }
        rest
    }
}

/// Requests on their way into free slots. The queue is not in order before the [end](Self::end).
///
/// The lock is held from the first of a batch to the last: slots come off the free list one after the other, so that they
/// are linked already.
#[must_use = "the queue is not in order before the end"]
pub(crate) struct Filling<'a> {
    ring: &'a mut Ring,
    slots: &'a mut [Slot],
    /// The queue's first free slot, before this and after it.
    free: &'a mut usize,
    /// The one that is free now.
    unused: usize,
    /// Where the first entry goes, and the next one.
    first: usize,
    next: usize,
    places: Places,
}

impl<'a> Filling<'a> {
    #[inline(always)]
    pub(super) fn new(ring: &'a mut Ring, slots: &'a mut [Slot], free: &'a mut usize) -> Self {
        let (unused, first) = (*free, ring.next_avail());
        let places = ring.memory().places();
        Self { ring, slots, free, unused, first, next: first, places }
    }

    /// Whether there is a slot for one more.
    #[inline(always)]
    pub(crate) fn has_room(&self) -> bool {
        // The end of the list is beyond the slots.
        self.unused < self.slots.len()
    }

    /// How many there are.
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        self.next - self.first
    }

    /// Puts a request that is no PROBE, or that was written, into a slot. False, and nothing done, where there is none.
    #[inline(always)]
    pub(crate) fn put(&mut self, request: &Request, op: Op) -> bool {
        let Some((slot, memory)) = self.next() else { return false };
        slot.fill(request, op, memory);
        true
    }

    /// A slot whose request is to be written, and the memory that its cell is a part of.
    #[inline(always)]
    pub(super) fn next(&mut self) -> Option<(&mut Slot, &mut SharedMemory)> {
        let slot = self.slots.get_mut(self.unused)?;
        let memory = self.ring.memory_mut();
        memory.set_avail_entry_at(self.places, self.next, head_of(self.unused));
        self.unused = usize::from(slot.next);
        self.next += 1;
        Some((slot, memory))
    }

    /// Puts the queue in order, and the requests behind those of a batch. The device sees them after
    /// [`publish`](super::RequestQueue::publish).
    #[inline(always)]
    pub(crate) fn end(self, batch: &mut Batch) {
        // There are fewer slots than that.
        let count = self.len() as u16;
        let Self { ring, free, unused, .. } = self;
        ring.pushed(count);
        if batch.len == 0 {
            batch.head = *free as u16;
        }
        batch.len += count;
        *free = unused;
    }
}
