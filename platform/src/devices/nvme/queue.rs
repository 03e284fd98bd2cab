//! Pairs of a submission and a completion queue, of equal size, in shared memory.
//!
//! A completion is new when its phase bit differs from the last round's. Nothing in it is believed: what names no
//! command in flight, or another queue, is counted and passed over.

use virtio_iommu::Iova;

use super::command::{COMMAND_BYTES, COMPLETION_BYTES, Command, Completion, STATUS_OFFSET};
use super::controller::{Controller, Doorbells};
use crate::devices::dma::{Coherent, Dma};
use crate::devices::storage::{self, InFlight, Limits, Operation, Piece, Request, StorageError, Strays};

/// The page that the controller is told to use.
pub(super) const PAGE_BYTES: usize = 4096;

/// The two rings.
#[derive(Debug)]
pub(super) struct Pair {
    id: u16,
    entries: u16,
    submissions: Coherent,
    completions: Coherent,
    tail: u16,
    head: u16,
    /// The phase bit of a completion that is new.
    phase: u16,
}

impl Pair {
    /// Empty rings of `entries`, at least 2, in zeroed memory.
    pub(super) fn new(id: u16, entries: u16, submissions: Coherent, completions: Coherent) -> Self {
        Self { id, entries, submissions, completions, tail: 0, head: 0, phase: 1 }
    }

    /// Allocates the rings.
    pub(super) fn allocate(dma: Dma<'_>, id: u16, entries: u16) -> Result<Self, virtio_iommu::DmaError> {
        let submissions = dma.alloc(usize::from(entries) * COMMAND_BYTES)?;
        let completions = dma.alloc(usize::from(entries) * COMPLETION_BYTES)?;
        Ok(Self::new(id, entries, submissions, completions))
    }

    /// Where the rings are.
    pub(super) fn places(&self) -> (Iova, Iova) {
        (self.submissions.iova(), self.completions.iova())
    }

    pub(super) fn id(&self) -> u16 {
        self.id
    }

    pub(super) fn entries(&self) -> u16 {
        self.entries
    }

    pub(super) fn tail(&self) -> u16 {
        self.tail
    }

    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Puts a command at the tail. Fewer than `entries` are in flight, which the caller sees to.
    pub(super) fn put(&mut self, command: Command) {
        self.submissions.write(usize::from(self.tail) * COMMAND_BYTES, command);
        self.tail = if self.tail + 1 == self.entries { 0 } else { self.tail + 1 };
    }

    /// The next completion, if there is a new one.
    pub(super) fn take(&mut self) -> Option<Completion> {
        let offset = usize::from(self.head) * COMPLETION_BYTES;
        if self.completions.load_acquire(offset + STATUS_OFFSET) & 1 != self.phase {
            return None;
        }
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase ^= 1;
        }
        Some(self.completions.read(offset))
    }

    /// Gives the memory back. The controller must be off.
    pub(super) fn free(self, dma: Dma<'_>) -> Result<(), virtio_iommu::UnmapError> {
        dma.free(self.submissions).and(dma.free(self.completions))
    }
}

/// A pair for I/O, with room for what its commands need.
#[derive(Debug)]
pub(super) struct IoQueue {
    pair: Pair,
    doorbells: Doorbells,
    namespace: u32,
    sector_bytes: usize,
    /// A list of pages for each slot, none of which crosses a page.
    lists: Coherent,
    list_bytes: usize,
    in_flight: InFlight,
    strays: Strays,
}

impl IoQueue {
    /// The bytes of the list of one command's pages.
    pub(super) fn list_bytes(limits: Limits) -> usize {
        // Data that does not begin with a page takes one more; the first page is not in the list.
        (limits.max_bytes.div_ceil(PAGE_BYTES) * size_of::<u64>()).next_power_of_two()
    }

    /// A queue over an empty pair with more than `limits.depth` entries. `lists` has [`list_bytes`](Self::list_bytes)
    /// for each request.
    pub(super) fn new(
        pair: Pair,
        doorbells: Doorbells,
        namespace: u32,
        lists: Coherent,
        limits: Limits,
    ) -> Self {
        Self {
            pair,
            doorbells,
            namespace,
            sector_bytes: limits.sector_bytes,
            lists,
            list_bytes: Self::list_bytes(limits),
            in_flight: InFlight::new(limits),
            strays: Strays::default(),
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.count()
    }

    pub(super) fn room(&self) -> usize {
        self.in_flight.room()
    }

    pub(super) fn strays(&self) -> Strays {
        self.strays
    }

    /// Starts requests by one doorbell, each with the pages that its buffer has, or those of `instead`.
    pub(super) fn submit(
        &mut self,
        controller: &Controller,
        dma: Dma<'_>,
        operation: Operation,
        requests: &mut alloc::vec::Vec<Request>,
        instead: Option<[u64; 2]>,
    ) -> Result<(), StorageError> {
        let Self { pair, lists, list_bytes, in_flight, namespace, sector_bytes, .. } = self;
        let before = pair.tail();
        in_flight.begin(dma, operation, requests, |started, pieces| {
            let list = usize::from(started.slot) * *list_bytes;
            let prp = instead.unwrap_or_else(|| pages(lists, list, pieces));
            let write = operation == Operation::Write;
            // At most `max_bytes`, which is less than 65,536 sectors.
            let blocks = (started.len_bytes / *sector_bytes) as u16;
            let mut command = Command::transfer(write, *namespace, started.sector, blocks, prp);
            command.id = started.slot.into();
            pair.put(command);
        })?;
        if pair.tail() != before {
            controller.ring_tail(self.doorbells, self.pair.tail());
        }
        Ok(())
    }

    /// Takes what the controller completed, at most a round of the ring, and a request that is done.
    pub(super) fn complete(&mut self, controller: &Controller, dma: Dma<'_>) -> Option<storage::Completion> {
        let mut taken = false;
        for _ in 0..self.pair.entries() {
            let Some(completion) = self.pair.take() else { break };
            taken = true;
            if completion.submission_queue.get() != self.pair.id() {
                self.strays.wrong_queue += 1;
                continue;
            }
            let Some(started) = self.in_flight.started(completion.command.get().into()) else {
                self.strays.unknown_id += 1;
                continue;
            };
            let result = match completion.status() {
                0 => Ok(()),
                status => Err(StorageError::Refused { sector: started.sector, status }),
            };
            self.in_flight.answer(dma, started, result);
        }
        if taken {
            controller.ring_head(self.doorbells, self.pair.head());
        }
        self.in_flight.next(dma)
    }

    /// Gives back requests and memory. The controller must be off.
    pub(super) fn free(
        mut self,
        dma: Dma<'_>,
        done: &mut alloc::vec::Vec<storage::Completion>,
    ) -> Result<(), virtio_iommu::UnmapError> {
        self.in_flight.cancel(dma);
        while let Some(completion) = self.in_flight.next(dma) {
            done.push(completion);
        }
        self.pair.free(dma).and(dma.free(self.lists))
    }
}

/// What a command says of where its data is: the first page, and the second, or a list of all others, which is written
/// at `list`.
fn pages(lists: &mut Coherent, list: usize, pieces: &[Piece]) -> [u64; 2] {
    let mut first = [0; 2];
    let mut count = 0;
    for piece in pieces {
        let (mut at, mut left) = (piece.iova.get(), piece.len as u64);
        while left > 0 {
            match count {
                0 | 1 => first[count] = at,
                _ => lists.write(list + (count - 1) * size_of::<u64>(), at.to_le()),
            }
            count += 1;
            let in_page = PAGE_BYTES as u64 - at % PAGE_BYTES as u64;
            at = at.wrapping_add(in_page);
            left -= in_page.min(left);
        }
    }
    if count > 2 {
        lists.write(list, first[1].to_le());
        first[1] = lists.iova_at(list).get();
    }
    first
}

#[cfg(test)]
mod tests;
