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
        let mut filling = self.filling();
        let Some((slot, memory)) = filling.next() else { return false };
        (slot.state, slot.op) = (SlotState::InFlight, op);
        memory.fill_cell::<_, TAIL_AT>(&mut slot.cell, (&request.words, request.len as u32), TAIL_SENTINEL);
        filling.end(batch);
        true
    }
}
