//! A virtio disk, with as little to map for a request as there can be: its data.
//!
//! Ring, headers, status bytes and tables of descriptors are mapped once. What `virtio-drivers` does for each request,
//! sharing header, status and data one by one, would take three mappings.
//!
//! Leaves out: interrupts, EVENT_IDX, several queues, flushing (without that feature a write is done when it is answered).

mod error;
mod ring;
mod slots;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

pub use error::BlockError;
use virtio_iommu::transport::{DeviceStatus, Transport};

use self::ring::Ring;
use self::slots::{CHAIN, Chains, STATUS_OK, Slots};
use super::dma::{Coherent, Dma};
use super::storage::{
    Completion, InFlight, Limits, Operation, Request, Started, Storage, StorageError, Strays, Unmapping,
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

const QUEUE: u16 = 0;
const QUEUE_SIZE: u16 = 256;
/// Requests in flight at most.
const DEPTH: u16 = 64;
const BATCH: usize = 32;
const SECTOR_BYTES: usize = 512;
const MAX_PIECES: u16 = 64;
const MAX_BYTES: usize = 256 * 1024;
/// How long a reset may take.
const RESET_TIMEOUT_NS: u64 = 1_000_000_000;
/// How often the capacity is read again because it changed meanwhile.
const MAX_CONFIG_READS: usize = 8;

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
        let slots = Slots::new(slots, chains, limits, &mut ring);
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
        while let Some(completion) = self.in_flight.next(self.dma) {
            done.push(completion);
        }
        let freed = self.dma.free(self.ring.into_memory());
        Ok(freed.and(self.dma.free(self.slots.into_memory()))?)
    }

    /// How many requests the disk answered, by its own word, that [`complete`](Storage::complete) did not look at: for
    /// whoever waits without taking them.
    pub fn answered(&self) -> usize {
        self.ring.ready().into()
    }

    /// From now on requests come back when they are done, though their frames may be in the disk's reach until a
    /// [`Dma::flush`], where the domain's policy is to defer.
    ///
    /// # Safety
    ///
    /// Frames that come back stay allocated, and are for nothing but more requests of this disk, until a flush
    /// succeeded.
    pub unsafe fn unmap_by_policy(&mut self) {
        self.in_flight.unmapping = Unmapping::ByPolicy;
    }

    /// What the device says of a request that it is done with.
    fn judge(&self, started: Started, len: u32) -> Result<(), StorageError> {
        let Started { slot, operation, sector, len_bytes } = started;
        let status = self.slots.status(slot);
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
        match (self.in_flight.next(self.dma), self.broken) {
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
