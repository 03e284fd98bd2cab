//! What each request has apart from its data: a header, a status byte, and descriptors that lead to all of it.
//!
//! ```text
//! each slot:  table of descriptors | header (16) | status (16, one used)
//!             [0] header -> [2..] data -> [1] status
//! ```
//!
//! With INDIRECT_DESC the ring has one descriptor for each slot, which leads to the slot's table; without, the slot's
//! part of the ring's own table is laid out the same way.

use virtio_iommu::Iova;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::ring::{DESCRIPTOR_BYTES, Descriptor, INDIRECT, NEXT, Ring, WRITE};
use crate::devices::dma::Coherent;
use crate::devices::storage::{Limits, Operation, Piece, Started};

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
pub(super) const STATUS_OK: u8 = 0;
/// What no device answers.
pub(super) const STATUS_NONE: u8 = 0xff;

/// Descriptors of a request where the ring's own are used.
pub(super) const CHAIN: u16 = 8;
const HEADER_BYTES: usize = 16;

/// What a request begins with.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

/// How requests use the ring's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chains {
    /// One, which leads to the slot's table.
    Indirect,
    /// [`CHAIN`] of them.
    Direct,
}

impl Chains {
    /// Descriptors of the ring for each slot.
    pub(super) const fn stride(self) -> u16 {
        match self {
            Self::Indirect => 1,
            Self::Direct => CHAIN,
        }
    }
}

/// What each request has apart from its data.
#[derive(Debug)]
pub(super) struct Slots {
    memory: Coherent,
    chains: Chains,
    /// Descriptors of a slot's table.
    table: usize,
}

impl Slots {
    /// Slots in zeroed memory of [`len_bytes`](Self::len_bytes), for all that the ring can have in flight.
    pub(super) fn new(memory: Coherent, chains: Chains, limits: Limits, ring: &mut Ring) -> Self {
        let mut slots = Self { memory, chains, table: Self::table(chains, limits) };
        for slot in 0..limits.depth as u16 {
            slots.lay_out(ring, slot);
        }
        slots
    }

    /// Descriptors of a slot's table.
    const fn table(chains: Chains, limits: Limits) -> usize {
        match chains {
            Chains::Indirect => 2 + limits.max_pieces,
            Chains::Direct => 0,
        }
    }

    /// The bytes that they take.
    pub(super) const fn len_bytes(chains: Chains, limits: Limits) -> usize {
        limits.depth * Self::stride(Self::table(chains, limits))
    }

    const fn stride(table: usize) -> usize {
        table * DESCRIPTOR_BYTES + 2 * HEADER_BYTES
    }

    fn table_at(&self, slot: u16) -> usize {
        usize::from(slot) * Self::stride(self.table)
    }

    fn header_at(&self, slot: u16) -> usize {
        self.table_at(slot) + self.table * DESCRIPTOR_BYTES
    }

    fn status_at(&self, slot: u16) -> usize {
        self.header_at(slot) + HEADER_BYTES
    }

    /// What the device says of a request.
    pub(super) fn status(&self, slot: u16) -> u8 {
        self.memory.read(self.status_at(slot))
    }

    pub(super) fn into_memory(self) -> Coherent {
        self.memory
    }

    /// The slot whose chain begins with a descriptor.
    pub(super) fn of_head(&self, head: u32) -> Option<u32> {
        let stride = u32::from(self.chains.stride());
        head.is_multiple_of(stride).then_some(head / stride)
    }

    /// Writes a descriptor of a slot's chain, numbered from 0.
    fn set(&mut self, ring: &mut Ring, slot: u16, index: u16, to: (Iova, usize), flags: u16, next: u16) {
        let (address, len) = to;
        match self.chains {
            Chains::Indirect => {
                let offset = self.table_at(slot) + DESCRIPTOR_BYTES * usize::from(index);
                self.memory.write(offset, Descriptor::new(address, len, flags, next));
            }
            Chains::Direct => {
                let first = slot * CHAIN;
                ring.set(first + index, Descriptor::new(address, len, flags, first + next));
            }
        }
    }

    /// Writes what stays the same for all requests of a slot: that the header comes first and the status last.
    fn lay_out(&mut self, ring: &mut Ring, slot: u16) {
        let header = self.memory.iova_at(self.header_at(slot));
        let status = self.memory.iova_at(self.status_at(slot));
        self.set(ring, slot, 0, (header, HEADER_BYTES), NEXT, 2);
        self.set(ring, slot, 1, (status, 1), WRITE, 0);
    }

    /// Fills a slot and adds it to the ring.
    pub(super) fn put(&mut self, ring: &mut Ring, started: Started, pieces: &[Piece]) {
        let Started { slot, operation, sector, .. } = started;
        let (kind, write) = match operation {
            Operation::Read => (TYPE_IN, WRITE),
            Operation::Write => (TYPE_OUT, 0),
        };
        let header = Header { kind: kind.into(), reserved: U32::ZERO, sector: sector.into() };
        self.memory.write(self.header_at(slot), header);
        self.memory.write(self.status_at(slot), STATUS_NONE);
        let last = pieces.len() as u16 + 1;
        for (index, piece) in (2..).zip(pieces) {
            let next = if index == last { 1 } else { index + 1 };
            self.set(ring, slot, index, (piece.iova, piece.len), write | NEXT, next);
        }
        if self.chains == Chains::Indirect {
            let table = self.memory.iova_at(self.table_at(slot));
            let len = (2 + pieces.len()) * DESCRIPTOR_BYTES;
            ring.set(slot, Descriptor::new(table, len, INDIRECT, 0));
        }
        ring.push(slot * self.chains.stride());
    }
}
