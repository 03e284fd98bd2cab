//! A virtio disk, with as little to map for a request as there can be: its data.
//!
//! Ring, headers, status bytes and tables of descriptors are mapped once. What `virtio-drivers` does for each request,
//! sharing header, status and data one by one, would take three mappings.
//!
//! ```text
//! each slot:  table of descriptors | header (16) | status (16, one used)
//!             [0] header -> [2..] data -> [1] status
//! ```
//!
//! With INDIRECT_DESC the ring has one descriptor for each slot, which leads to the slot's table; without, the slot's
//! part of the ring's own table is laid out the same way.
//!
//! Leaves out: interrupts, EVENT_IDX, several queues, flushing (without that feature a write is done when it is answered).

mod error;
mod ring;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

pub use error::BlockError;
use virtio_iommu::transport::{DeviceStatus, Transport};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use self::ring::{DESCRIPTOR_BYTES, Descriptor, INDIRECT, NEXT, Ring, WRITE};
use super::dma::{Coherent, Dma};
use super::storage::{
    Completion, InFlight, Limits, Operation, Piece, Request, Started, Storage, StorageError, Strays,
};
use crate::mmio;
use crate::time::Deadline;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_INDIRECT_DESC: u64 = 1 << 28;
const F_VERSION_1: u64 = 1 << 32;
const F_ACCESS_PLATFORM: u64 = 1 << 33;
const F_ORDER_PLATFORM: u64 = 1 << 36;
/// What is accepted where it is offered.
const KNOWN: u64 =
    F_SIZE_MAX | F_SEG_MAX | F_INDIRECT_DESC | F_VERSION_1 | F_ACCESS_PLATFORM | F_ORDER_PLATFORM;

const CONFIG_CAPACITY: usize = 0;
const CONFIG_SIZE_MAX: usize = 8;
const CONFIG_SEG_MAX: usize = 12;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const STATUS_OK: u8 = 0;
/// What no device answers.
const STATUS_NONE: u8 = 0xff;

const QUEUE: u16 = 0;
const QUEUE_SIZE: u16 = 256;
/// Requests in flight at most.
const DEPTH: u16 = 64;
/// Descriptors of a request where the ring's own are used.
const CHAIN: u16 = 8;
const BATCH: usize = 32;
const SECTOR_BYTES: usize = 512;
const MAX_PIECES: u16 = 64;
const MAX_BYTES: usize = 256 * 1024;
const HEADER_BYTES: usize = 16;
/// How long a reset may take.
const RESET_TIMEOUT_NS: u64 = 1_000_000_000;
/// How often the capacity is read again because it changed meanwhile.
const MAX_CONFIG_READS: usize = 8;

/// What a request begins with.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

/// A disk at work. Dropping it leaves it at work, with all of its memory: [`close`](Self::close) ends it in order.
pub struct Block<'a> {
    dma: Dma<'a>,
    transport: Box<dyn Transport>,
    ring: Ring,
    slots: Slots,
    limits: Limits,
    in_flight: InFlight,
    strays: Strays,
    broken: Option<StorageError>,
}

impl fmt::Debug for Block<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Block({:?}, {:?})", self.limits, self.dma)
    }
}

/// How requests use the ring's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chains {
    /// One, which leads to the slot's table.
    Indirect,
    /// [`CHAIN`] of them.
    Direct,
}

impl Chains {
    /// Descriptors of the ring for each slot.
    const fn stride(self) -> u16 {
        match self {
            Self::Indirect => 1,
            Self::Direct => CHAIN,
        }
    }
}

/// What each request has apart from its data.
#[derive(Debug)]
struct Slots {
    memory: Coherent,
    chains: Chains,
    /// Descriptors of a slot's table.
    table: usize,
}

impl<'a> Block<'a> {
    /// Resets the disk, negotiates, and sets its ring up. Its bus mastering may come on after this.
    ///
    /// # Errors
    ///
    /// [`BlockError`]. What was allocated before stays allocated.
    pub fn new(transport: impl Transport + 'static, dma: Dma<'a>) -> Result<Self, BlockError> {
        let transport: Box<dyn Transport> = Box::new(transport);
        reset(&*transport)?;
        let mut status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        transport.set_status(status);
        // A device without ACCESS_PLATFORM uses physical addresses, whatever stands before it.
        let needed = match dma {
            Dma::Direct => F_VERSION_1,
            Dma::Through(_) => F_VERSION_1 | F_ACCESS_PLATFORM,
        };
        let features = negotiate(&*transport, needed)?;
        status |= DeviceStatus::FEATURES_OK;
        transport.set_status(status);
        if !transport.status().contains(DeviceStatus::FEATURES_OK) {
            return Err(BlockError::FeaturesRefused { features });
        }

        let chains = if features & F_INDIRECT_DESC != 0 { Chains::Indirect } else { Chains::Direct };
        let size = match transport.max_queue_size(QUEUE) {
            0 => return Err(BlockError::Unsupported { what: "the size of its queue", value: 0 }),
            most => 1 << most.min(QUEUE_SIZE).ilog2(),
        };
        let limits = limits(&*transport, features, chains, size)?;
        let ring = Ring::new(dma.alloc(Ring::len_bytes(size))?, size);
        let slots = dma.alloc(Slots::len_bytes(chains, limits))?;
        let block = Self::in_memory(transport, dma, ring, (slots, chains), limits);
        block.transport.enable_queue(QUEUE, size, block.ring.addresses())?;
        block.transport.set_status(status | DeviceStatus::DRIVER_OK);
        Ok(block)
    }

    /// Lays out ring and slots, all in zeroed memory.
    fn in_memory(
        transport: Box<dyn Transport>,
        dma: Dma<'a>,
        mut ring: Ring,
        (slots, chains): (Coherent, Chains),
        limits: Limits,
    ) -> Self {
        let mut slots = Slots { memory: slots, chains, table: Slots::table(chains, limits) };
        for slot in 0..limits.depth as u16 {
            slots.lay_out(&mut ring, slot);
        }
        let in_flight = InFlight::new(limits);
        Self { dma, transport, ring, slots, limits, in_flight, strays: Strays::default(), broken: None }
    }

    /// Resets the disk and gives everything back. Requests in flight are added to `done`, as cancelled.
    ///
    /// # Errors
    ///
    /// [`BlockError`]: all that the disk may still reach stays where it is, and is nobody's.
    pub fn close(mut self, done: &mut Vec<Completion>) -> Result<(), BlockError> {
        reset(&*self.transport)?;
        self.in_flight.cancel(self.dma);
        while let Some(completion) = self.in_flight.next() {
            done.push(completion);
        }
        let freed = self.dma.free(self.ring.into_memory());
        Ok(freed.and(self.dma.free(self.slots.memory))?)
    }

    /// What the device says of a request that it is done with.
    fn judge(&self, started: Started, len: u32) -> Result<(), StorageError> {
        let Started { slot, operation, sector, len_bytes } = started;
        let status = self.slots.memory.read::<u8>(self.slots.status_at(slot));
        if status != STATUS_OK {
            return Err(StorageError::Refused { sector, status: status.into() });
        }
        // The status byte, and what was read.
        let expected = match operation {
            Operation::Read => len_bytes as u32 + 1,
            Operation::Write => 1,
        };
        if len == expected { Ok(()) } else { Err(StorageError::Length { sector, wrote: len, expected }) }
    }
}

impl Slots {
    /// Descriptors of a slot's table.
    const fn table(chains: Chains, limits: Limits) -> usize {
        match chains {
            Chains::Indirect => 2 + limits.max_pieces,
            Chains::Direct => 0,
        }
    }

    const fn len_bytes(chains: Chains, limits: Limits) -> usize {
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

    /// The slot whose chain begins with a descriptor.
    fn of_head(&self, head: u32) -> Option<u32> {
        let stride = u32::from(self.chains.stride());
        head.is_multiple_of(stride).then_some(head / stride)
    }

    /// Writes a descriptor of a slot's chain, numbered from 0.
    fn set(
        &mut self,
        ring: &mut Ring,
        slot: u16,
        index: u16,
        to: (virtio_iommu::Iova, usize),
        flags: u16,
        next: u16,
    ) {
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
    fn put(&mut self, ring: &mut Ring, started: Started, pieces: &[Piece]) {
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

impl Storage for Block<'_> {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn submit(&mut self, operation: Operation, requests: &mut Vec<Request>) -> Result<(), StorageError> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        let Self { slots, ring, in_flight, .. } = self;
        in_flight.begin(self.dma, operation, requests, |started, pieces| slots.put(ring, started, pieces))?;
        if self.ring.publish() {
            mmio::memory_before_doorbell();
            self.transport.notify(QUEUE);
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<Option<Completion>, StorageError> {
        for _ in 0..self.ring.size() {
            let used = match self.ring.pop() {
                Ok(Some(used)) => used,
                Ok(None) => break,
                Err(ring::UsedIndexJumped(index)) => {
                    let broken = StorageError::Broken { what: "used index", value: index.into() };
                    self.broken = Some(broken);
                    break;
                }
            };
            let slot = self.slots.of_head(used.id);
            match slot.and_then(|slot| self.in_flight.started(slot)) {
                Some(started) => {
                    let result = self.judge(started, used.len);
                    self.in_flight.answer(self.dma, started, result);
                }
                None => self.strays.unknown_id += 1,
            }
        }
        match (self.in_flight.next(), self.broken) {
            (None, Some(broken)) => Err(broken),
            (completion, _) => Ok(completion),
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight.count()
    }

    fn check_health(&self) -> Result<(), StorageError> {
        let status = self.transport.status();
        // A function that is gone reads as ones.
        if status.contains(DeviceStatus::NEEDS_RESET) || !status.contains(DeviceStatus::DRIVER_OK) {
            return Err(StorageError::Broken { what: "device status", value: status.bits().into() });
        }
        Ok(())
    }

    fn strays(&self) -> Strays {
        self.strays
    }
}

fn reset(transport: &dyn Transport) -> Result<(), BlockError> {
    transport.set_status(DeviceStatus::empty());
    let mut deadline = Deadline::after_ns(RESET_TIMEOUT_NS);
    loop {
        let expired = deadline.expired();
        let status = transport.status();
        if status.is_empty() {
            return Ok(());
        }
        if expired {
            return Err(BlockError::ResetTimeout { status });
        }
        core::hint::spin_loop();
    }
}

/// Accepts what is known of what is offered.
fn negotiate(transport: &dyn Transport, needed: u64) -> Result<u64, BlockError> {
    let offered = transport.device_features();
    if offered & needed != needed {
        return Err(BlockError::Unsupported { what: "the set of its features", value: offered });
    }
    let features = offered & KNOWN;
    transport.set_driver_features(features);
    Ok(features)
}

fn limits(transport: &dyn Transport, features: u64, chains: Chains, size: u16) -> Result<Limits, BlockError> {
    let room = match chains {
        Chains::Indirect => MAX_PIECES,
        Chains::Direct => CHAIN - 2,
    };
    let depth = DEPTH.min(size / chains.stride());
    if depth == 0 {
        return Err(BlockError::Unsupported { what: "the size of its queue", value: size.into() });
    }
    // A disk that states no number takes one.
    let mut pieces = 1;
    if features & F_SEG_MAX != 0 {
        pieces = transport.read_config_u32(CONFIG_SEG_MAX)?.clamp(1, room.into());
    }
    let mut max_bytes = MAX_BYTES;
    if features & F_SIZE_MAX != 0 {
        let most = transport.read_config_u32(CONFIG_SIZE_MAX)?;
        if (most as usize) < SECTOR_BYTES {
            return Err(BlockError::Unsupported { what: "its longest segment", value: most.into() });
        }
        max_bytes = max_bytes.min(most as usize);
    }
    Ok(Limits {
        sector_bytes: SECTOR_BYTES,
        sectors: capacity(transport)?,
        max_bytes,
        max_pieces: pieces as usize,
        depth: depth.into(),
        batch: BATCH.min(depth.into()),
    })
}

/// The number of sectors, both halves of one moment.
fn capacity(transport: &dyn Transport) -> Result<u64, BlockError> {
    for _ in 0..MAX_CONFIG_READS {
        let before = transport.config_generation();
        let low = transport.read_config_u32(CONFIG_CAPACITY)?;
        let high = transport.read_config_u32(CONFIG_CAPACITY + 4)?;
        if transport.config_generation() == before {
            return Ok(u64::from(high) << 32 | u64::from(low));
        }
    }
    let generation = transport.config_generation();
    Err(BlockError::Unsupported { what: "its ever changing configuration", value: generation.into() })
}

#[cfg(test)]
mod tests;
