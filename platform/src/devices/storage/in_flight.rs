//! Requests between submission and completion, and the memory that the device reaches for them.
//!
//! ```text
//! free --begin--> with the device --answer--> answered --last of its batch, unmapped--> ready --next--> the caller's
//! ```
//!
//! A slot's number is what the device knows a request by. Slots of a batch form a list, whose head has the mapping.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use virtio_iommu::{Direction, Iova, PhysSegment};

use super::super::dma::{Dma, Mapped};
use super::{Completion, Limits, Operation, Request, StorageError};

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

#[derive(Debug)]
pub(in super::super) struct InFlight {
    limits: Limits,
    slots: Vec<Slot>,
    free: Vec<u16>,
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
            slots: (0..limits.depth).map(slot).collect(),
            // The lowest number is taken first.
            free: (0..limits.depth as u16).rev().collect(),
            ready: VecDeque::with_capacity(limits.depth),
            segments: Vec::with_capacity(room),
            iovas: vec![Iova::new(0); room],
            pieces: Vec::with_capacity(limits.max_pieces),
        }
    }

    /// Requests that the caller does not have back.
    pub(in super::super) fn count(&self) -> usize {
        self.slots.len() - self.free.len() + self.ready.len()
    }

    /// How many requests can be taken at once.
    pub(in super::super) fn room(&self) -> usize {
        // What is ready has a place too, so that the list of it never grows.
        self.free.len().saturating_sub(self.ready.len()).min(self.limits.batch)
    }

    /// Requests that the device has not answered.
    #[cfg(test)]
    pub(in super::super) fn unanswered(&self) -> usize {
        self.slots.iter().filter(|slot| slot.request.is_some() && slot.result.is_none()).count()
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

    /// The device answered a request. With the last one of a batch its memory is unmapped, and all of it is ready.
    pub(in super::super) fn answer(
        &mut self,
        dma: Dma<'_>,
        started: Started,
        result: Result<(), StorageError>,
    ) {
        let slot = &mut self.slots[usize::from(started.slot)];
        slot.result = Some(result);
        let head = slot.head;
        let Some(batch) = &mut self.slots[usize::from(head)].batch else { return };
        batch.unanswered -= 1;
        if batch.unanswered > 0 {
            return;
        }
        let mapped = self.slots[usize::from(head)].batch.take().and_then(|batch| batch.mapped);
        let unmapped = mapped.map_or(Ok(()), |mapped| dma.unmap(mapped));
        let mut index = head;
        loop {
            let slot = &mut self.slots[usize::from(index)];
            let (request, result) = (slot.request.take(), slot.result.take());
            if let (Some(request), Some(result)) = (request, result) {
                let Request { tag, buffer, .. } = request;
                let in_place = buffer.fixed().is_none();
                self.ready.push_back(match unmapped {
                    Err(error) if in_place => {
                        // The device may still reach the frames: nobody gets them any more.
                        core::mem::forget(buffer);
                        Completion { tag, buffer: None, result: Err(StorageError::Unmap(error)) }
                    }
                    _ => Completion { tag, buffer: Some(buffer), result },
                });
            }
            self.free.push(index);
            if slot.next == index {
                return;
            }
            index = slot.next;
        }
    }

    /// A request that is done and unmapped.
    pub(in super::super) fn next(&mut self) -> Option<Completion> {
        self.ready.pop_front()
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
    }
}

#[cfg(test)]
mod tests {
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
        assert!(in_flight.next().is_none());
        assert_eq!(in_flight.started(u32::from(batch[1].slot)), None, "answered is answered");
        in_flight.answer(Dma::Direct, batch[0], Ok(()));
        let done: Vec<_> = core::iter::from_fn(|| in_flight.next()).collect();
        let results: Vec<_> = done.iter().map(|done| (done.tag, done.result)).collect();
        assert_eq!(results, [(10, Ok(())), (11, Err(refused)), (12, Ok(()))]);
        assert_eq!((in_flight.count(), in_flight.room()), (0, 3));
    }

    #[test]
    fn single_requests_come_back_in_the_devices_order() {
        let mut in_flight = InFlight::new(LIMITS);
        let (first, second) = (begin(&mut in_flight, &[1]), begin(&mut in_flight, &[2]));
        in_flight.answer(Dma::Direct, second[0], Ok(()));
        assert_eq!(in_flight.next().map(|done| done.tag), Some(2));
        // Its slot is taken again while the first is still out.
        let third = begin(&mut in_flight, &[3]);
        assert_eq!(third[0].slot, second[0].slot);
        in_flight.answer(Dma::Direct, first[0], Ok(()));
        assert_eq!(in_flight.next().map(|done| done.tag), Some(1));
        assert_eq!(in_flight.count(), 1);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_stays_the_callers() {
        let mut in_flight = InFlight::new(LIMITS);
        for (len_bytes, count) in [(0, 1), (100, 1), (8192, 1), (512, 4)] {
            let mut requests: Vec<_> = (0..count).map(|tag| request(tag, len_bytes)).collect();
            let refused =
                in_flight.begin(Dma::Direct, Operation::Write, &mut requests, |_, _| panic!("started"));
            let full = matches!(refused, Err(StorageError::Full { requests: 4, room: 3 }));
            let bad = matches!(refused, Err(StorageError::Request { .. }));
            assert!(if count == 4 { full } else { bad }, "{refused:?}");
            assert_eq!((requests.len() as u64, in_flight.count()), (count, 0));
        }
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
        assert_eq!(in_flight.next().map(|done| done.result), Some(Err(StorageError::Cancelled)));
        assert_eq!(in_flight.started(0), None);
    }
}
