//! Requests of the draft: longer than the standard's, in the same slots.

use super::{Batch, RequestQueue};
use crate::contexts::Encoded;
use crate::engine::Op;
use crate::queue::slot::{SlotState, TAIL_AT};
use crate::wire::request::TAIL_SENTINEL;

impl RequestQueue {
    /// [`submit`](Self::submit) for a request of the draft.
    #[must_use]
    pub(crate) fn submit_context(&mut self, request: &Encoded, op: Op, batch: &mut Batch) -> bool {
        if !self.can_submit(false) {
            return false;
        }
        let index = self.free as u16;
        let slot = &mut self.slots[usize::from(index)];
        self.free = usize::from(slot.next);
        (slot.state, slot.op) = (SlotState::InFlight, op);
        let memory = self.ring.memory_mut();
        memory.fill_cell::<_, TAIL_AT>(&mut slot.cell, (&request.words, request.len as u32), TAIL_SENTINEL);
        self.ring.push(2 * index);
        // Slots come off the free list one after the other: they are linked already.
        if batch.len == 0 {
            batch.head = index;
        }
        batch.len += 1;
        true
    }
}
