//! Requests between submission and completion, and the memory that the device reaches for them.
//!
//! ```text
//! free --begin--> with the device --answer--> answered --last of its batch, unmapped--> ready --next--> the caller's
//!                                                              |                          ^
//!                                                              `--deferred--> held --flush'
//! ```
//!
//! A slot's number is what the device knows a request by. Slots of a batch form a list, whose head has the mapping.
//!
//! Where unmapping is deferred the device reaches the memory until a flush, so it is held here until then. One flush
//! serves all that is held: it comes when the device has nothing more to answer, when what is held takes a quarter of the
//! slots, or after a millisecond.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use virtio_iommu::{Direction, Iova, PhysSegment, UnmapError, Unmapped};

use super::super::dma::{Dma, Mapped};
use super::{Completion, Limits, Operation, Request, StorageError};
use crate::time::Deadline;

/// How long a request that is done may wait for the flush that gives it back.
const HELD_NS: u64 = 1_000_000;

/// A piece of a request's data, by the device's own address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Piece {
    pub iova: Iova,
    pub len: usize,
}

/// A request that the device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Started {
    pub slot: u16,
    pub operation: Operation,
    pub sector: u64,
    pub len_bytes: usize,
}

#[derive(Debug)]
struct Slot {
    request: Option<Request>,
    operation: Operation,
    /// What the device said, once it did.
    result: Option<Result<(), StorageError>>,
    /// The first slot of the batch, and the next one: itself for the last.
    head: u16,
    next: u16,
    /// In the head only.
    batch: Option<Batch>,
}

#[derive(Debug)]
struct Batch {
    mapped: Option<Mapped>,
    unanswered: usize,
}

/// When memory is unmapped whose request is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Unmapping {
    /// Before the request comes back.
    Now,
    /// When the domain's policy says so, which may be later.
    ByPolicy,
}

#[derive(Debug)]
pub(in super::super) struct InFlight {
    limits: Limits,
    pub unmapping: Unmapping,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Requests that the device has not answered.
    unanswered: usize,
    /// What is done, and in the device's reach until a flush.
    held: Vec<Completion>,
    /// When the flush comes at the latest. Means something while anything is held.
    flush_at: Deadline,
    ready: VecDeque<Completion>,
    /// Room for the lists of one submission, so that none is allocated.
    segments: Vec<PhysSegment>,
    iovas: Vec<Iova>,
    pieces: Vec<Piece>,
}

impl InFlight {
    /// As many slots as `limits.depth` says, all free.
    pub(in super::super) fn new(limits: Limits) -> Self {
        let slot = |_| Slot {
            request: None,
            operation: Operation::Read,
            result: None,
            head: 0,
            next: 0,
            batch: None,
        };
        let room = limits.batch * limits.max_pieces;
        Self {
            limits,
            unmapping: Unmapping::Now,
            slots: (0..limits.depth).map(slot).collect(),
            // The lowest number is taken first.
            free: (0..limits.depth as u16).rev().collect(),
            unanswered: 0,
            held: Vec::with_capacity(limits.depth),
            flush_at: Deadline::after_ns(0),
            ready: VecDeque::with_capacity(limits.depth),
            segments: Vec::with_capacity(room),
            iovas: vec![Iova::new(0); room],
            pieces: Vec::with_capacity(limits.max_pieces),
        }
    }

    /// Requests that the caller does not have back.
    pub(in super::super) fn count(&self) -> usize {
        self.slots.len() - self.free.len() + self.held.len() + self.ready.len()
    }

    /// How many requests can be taken at once.
    pub(in super::super) fn room(&self) -> usize {
        // What is held or ready has a place too, so that the lists of it never grow.
        self.free.len().saturating_sub(self.held.len() + self.ready.len()).min(self.limits.batch)
    }

    /// Requests that the device has not answered.
    #[cfg(test)]
    pub(in super::super) fn unanswered(&self) -> usize {
        self.unanswered
    }

    /// Takes the requests, maps their data, and has each `put` before the device. All, or on an error none.
    pub(in super::super) fn begin(
        &mut self,
        dma: Dma<'_>,
        operation: Operation,
        requests: &mut Vec<Request>,
        mut put: impl FnMut(Started, &[Piece]),
    ) -> Result<(), StorageError> {
        if requests.is_empty() {
            return Ok(());
        }
        if requests.len() > self.room() {
            return Err(StorageError::Full { requests: requests.len(), room: self.room() });
        }
        self.segments.clear();
        for request in &*requests {
            let before = self.segments.len();
            self.segments.extend(request.buffer.segments(request.len_bytes).take(self.limits.max_pieces + 1));
            self.check(request, self.segments.len() - before)?;
        }
        let count = self.segments.len();
        let mapped = if count == 0 {
            None
        } else {
            let direction = match operation {
                Operation::Read => Direction::FromDevice,
                Operation::Write => Direction::ToDevice,
            };
            // SAFETY: the frames are owned by the requests, which stay in their slots until they are unmapped.
            Some(unsafe { dma.map(&self.segments, direction, &mut self.iovas[..count]) }?)
        };
        self.place(operation, mapped, requests, &mut put);
        Ok(())
    }

    fn check(&self, request: &Request, pieces: usize) -> Result<(), StorageError> {
        let (len_bytes, buffer_bytes) = (request.len_bytes, request.buffer.len_bytes());
        let fits = len_bytes > 0
            && len_bytes.is_multiple_of(self.limits.sector_bytes)
            && len_bytes <= buffer_bytes.min(self.limits.max_bytes)
            && pieces <= self.limits.max_pieces;
        if fits { Ok(()) } else { Err(StorageError::Request { len_bytes, buffer_bytes, pieces }) }
    }

    /// Gives each request a slot. There are enough.
    fn place(
        &mut self,
        operation: Operation,
        mapped: Option<Mapped>,
        requests: &mut Vec<Request>,
        put: &mut impl FnMut(Started, &[Piece]),
    ) {
        self.unanswered += requests.len();
        let mut batch = Some(Batch { mapped, unanswered: requests.len() });
        let (mut head, mut last) = (None, None);
        let mut mapped_pieces = self.segments.iter().zip(&self.iovas);
        for request in requests.drain(..) {
            let Some(index) = self.free.pop() else { unreachable!("`begin` counted the free slots") };
            self.pieces.clear();
            match request.buffer.fixed() {
                Some(iova) => self.pieces.push(Piece { iova, len: request.len_bytes }),
                None => {
                    let mut left = request.len_bytes;
                    while left > 0 {
                        let Some((segment, iova)) = mapped_pieces.next() else { break };
                        self.pieces.push(Piece { iova: *iova, len: segment.len });
                        left -= segment.len.min(left);
                    }
                }
            }
            let (sector, len_bytes) = (request.sector, request.len_bytes);
            let head = *head.get_or_insert(index);
            if let Some(last) = last.replace(index) {
                self.slots[usize::from(last)].next = index;
            }
            self.slots[usize::from(index)] = Slot {
                request: Some(request),
                operation,
                result: None,
                head,
                next: index,
                batch: batch.take(),
            };
            put(Started { slot: index, operation, sector, len_bytes }, &self.pieces);
        }
    }

    /// The request in a slot, if the device has one there that it has not answered.
    pub(in super::super) fn started(&self, slot: u32) -> Option<Started> {
        let index = u16::try_from(slot).ok()?;
        let slot = self.slots.get(usize::from(index))?;
        let request = slot.request.as_ref().filter(|_| slot.result.is_none())?;
        let (sector, len_bytes) = (request.sector, request.len_bytes);
        Some(Started { slot: index, operation: slot.operation, sector, len_bytes })
    }

    /// The device answered a request. With the last one of a batch its memory is unmapped, and all of it is ready, or
    /// held.
    pub(in super::super) fn answer(
        &mut self,
        dma: Dma<'_>,
        started: Started,
        result: Result<(), StorageError>,
    ) {
        let slot = &mut self.slots[usize::from(started.slot)];
        slot.result = Some(result);
        self.unanswered -= 1;
        let head = slot.head;
        let Some(batch) = &mut self.slots[usize::from(head)].batch else { return };
        batch.unanswered -= 1;
        if batch.unanswered > 0 {
            return;
        }
        let mapped = self.slots[usize::from(head)].batch.take().and_then(|batch| batch.mapped);
        let unmapped = mapped.map_or(Ok(Unmapped::Now), |mapped| dma.unmap(mapped));
        self.settle(
            head,
            match self.unmapping {
                Unmapping::Now => unmapped,
                // Whoever submits sees to the flush.
                Unmapping::ByPolicy => unmapped.map(|_| Unmapped::Now),
            },
        );
    }

    /// A batch was answered, and its memory unmapped, or not.
    fn settle(&mut self, head: u16, unmapped: Result<Unmapped, UnmapError>) {
        if unmapped == Ok(Unmapped::AtFlush) && self.held.is_empty() {
            self.flush_at = Deadline::after_ns(HELD_NS);
        }
        let mut index = head;
        loop {
            let slot = &mut self.slots[usize::from(index)];
            let (request, result) = (slot.request.take(), slot.result.take());
            if let (Some(request), Some(result)) = (request, result) {
                let Request { tag, buffer, .. } = request;
                let done = Completion { tag, buffer: Some(buffer), result };
                match unmapped {
                    Ok(Unmapped::Now) => self.ready.push_back(done),
                    Ok(Unmapped::AtFlush) => self.held.push(done),
                    Err(error) => self.ready.push_back(lose(done, error)),
                }
            }
            self.free.push(index);
            if slot.next == index {
                return;
            }
            index = slot.next;
        }
    }

    /// A request that is done and out of the device's reach. Flushes when that is due.
    pub(in super::super) fn next(&mut self, dma: Dma<'_>) -> Option<Completion> {
        if self.is_flush_due() {
            let flushed = dma.flush();
            self.ready.extend(self.held.drain(..).map(|done| match flushed {
                Ok(()) => done,
                Err(error) => lose(done, error),
            }));
        }
        self.ready.pop_front()
    }

    fn is_flush_due(&mut self) -> bool {
        let many = self.held.len() >= self.slots.len().div_ceil(4);
        !self.held.is_empty() && (many || self.unanswered == 0 || self.flush_at.expired())
    }

    /// Answers everything in the device's place, which was reset.
    pub(in super::super) fn cancel(&mut self, dma: Dma<'_>) {
        for index in 0..self.slots.len() as u32 {
            if let Some(started) = self.started(index) {
                self.answer(dma, started, Err(StorageError::Cancelled));
            }
        }
    }
}

impl Drop for InFlight {
    /// What the device has stays out of everybody's hands.
    fn drop(&mut self) {
        for slot in &mut self.slots {
            core::mem::forget(slot.request.take());
        }
        self.held.drain(..).for_each(core::mem::forget);
    }
}

/// What becomes of a request whose memory the device may still reach: nobody gets the memory any more. Memory that was
/// not mapped for the request is the caller's all the time.
fn lose(done: Completion, error: UnmapError) -> Completion {
    match done.buffer {
        Some(buffer) if buffer.fixed().is_none() => {
            core::mem::forget(buffer);
            Completion { buffer: None, result: Err(StorageError::Unmap(error)), ..done }
        }
        buffer => Completion { buffer, ..done },
    }
}

#[cfg(test)]
mod tests;
