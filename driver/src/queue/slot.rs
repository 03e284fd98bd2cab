//! A request slot: the place of one request in shared memory, and who waits for it.
//!
//! ```text
//!            submit             used entry              take
//!   Free ------------> InFlight ----------> Done(outcome) ---> Free
//!                         | abandon (deadline passed)
//!                         v                used entry
//!                     Abandoned --------------------------------> Free
//! ```
//! An abandoned slot still belongs to the device: it is not reused before its used entry came.

use crate::engine::Op;
use crate::error::RequestError;
use crate::ring::{CELL_LEN, Used};
use crate::shared_memory::{Cell, SharedMemory};
use crate::wire::request::{Encoded, Request, Status, TAIL_LEN, TAIL_SENTINEL, Tail, WORDS};
use core::mem::size_of;

/// What came of a request.
pub(crate) type Outcome = Result<(), RequestError>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotState {
    Free,
    InFlight,
    Done(Outcome),
    Abandoned,
}

/// The driver's private side of a slot: a cache line, or two as its cell is, which one shift finds.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Slot {
    pub state: SlotState,
    /// Where it lies in shared memory.
    pub cell: Cell,
    /// What the request does to the driver's records, while it is not free.
    pub op: Op,
    /// The next slot of the same batch, or of the free list, or [`NO_SLOT`].
    pub next: u16,
}

#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Slot>() == CELL_LEN);

/// No slot: there are at most 2^14.
pub(super) const NO_SLOT: u16 = u16::MAX;

/// Bytes from one slot to the next.
pub(super) const STRIDE: usize = CELL_LEN;
/// Where the answer's tail lies in a slot.
pub(super) const TAIL_AT: usize = if cfg!(feature = "contexts") { 96 } else { 40 };

const _: () = assert!(8 * WORDS <= TAIL_AT && TAIL_AT + size_of::<Tail>() <= STRIDE);

/// The first descriptor of a slot: there are at most 2^14 slots.
#[inline(always)]
pub(super) fn head_of(index: usize) -> u16 {
    2 * index as u16
}

impl Slot {
    /// Writes a request, unless it is a PROBE, which has an area of its own.
    #[inline(always)]
    pub(super) fn fill(&mut self, request: &Request, op: Op, memory: &mut SharedMemory) {
        (self.state, self.op) = (SlotState::InFlight, op);
        if !matches!(request, Request::Probe { .. }) {
            let Encoded { words, len } = request.encode();
            memory.fill_cell::<WORDS, TAIL_AT>(&mut self.cell, (&words, len as u32), TAIL_SENTINEL);
        }
    }

    /// Whether a used entry is the answer to this request, which is in the slot of this number, and success.
    #[inline(always)]
    pub(super) fn succeeded(&self, used: Used, index: usize, memory: &SharedMemory) -> bool {
        // There are at most 2^14 of them.
        let mine = used.id == 2 * index as u32 && self.state == SlotState::InFlight;
        // Before the answer is known to be there the device may be writing it.
        mine && used.len >= TAIL_LEN as u32 && memory.read_cell::<TAIL_AT>(&self.cell)[0] == Status::OK
    }
}

/// Judges an answer: success is all bytes written *and* status OK (D-09).
///
/// A length of 0 with a status in place is that status's failure, since some devices count no bytes when they
/// refuse; with the sentinel in place the device did not handle the request.
#[inline]
pub(super) fn judge(used_len: u32, expected: u32, status: u8) -> Outcome {
    let answered = status != TAIL_SENTINEL[0];
    match Status::from_wire(status) {
        Status::Ok if used_len >= expected => Ok(()),
        Status::Ok => Err(RequestError::ShortAnswer { used_len, expected }),
        refused if answered => Err(RequestError::Refused(refused)),
        _ if used_len == 0 => Err(RequestError::NotHandled),
        _ => Err(RequestError::ShortAnswer { used_len, expected }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn success_is_length_and_status() {
        assert_eq!(judge(4, 4, 0), Ok(()));
        // A stale OK in an answer that was never written.
        assert_eq!(judge(0, 4, 0), Err(RequestError::ShortAnswer { used_len: 0, expected: 4 }));
        assert_eq!(judge(4, 516, 0), Err(RequestError::ShortAnswer { used_len: 4, expected: 516 }));
        assert_eq!(judge(4, 4, 6), Err(RequestError::Refused(Status::NoEnt)));
        assert_eq!(judge(0, 4, 4), Err(RequestError::Refused(Status::Inval)));
        assert_eq!(judge(0, 4, 0xff), Err(RequestError::NotHandled));
        assert_eq!(judge(4, 4, 0xff), Err(RequestError::ShortAnswer { used_len: 4, expected: 4 }));
        assert_eq!(judge(4, 4, 0x80), Err(RequestError::Refused(Status::Other(0x80))));
    }
}
