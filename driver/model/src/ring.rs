//! The device's side of a split virtqueue.
//!
//! Nothing that the driver writes can make it loop or panic: a chain is bounded by the queue size, an available index that
//! runs ahead by more than the queue size is an error, and every index is checked before use.

use core::sync::atomic::{Ordering, fence};

use crate::bytes::{address, array_at, read_u16, u32_at, u64_at, write_u16};
use crate::chain::{Chain, Segment};
use crate::memory::{GuestMemory, OutOfMemoryRange};

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const DESC_LEN: u64 = 16;
const AVAIL_NO_INTERRUPT: u16 = 1;

/// What is wrong with a ring. The device then asks for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// A ring, an indirect table, or a buffer is not guest memory.
    Memory(OutOfMemoryRange),
    /// The available index is ahead by more than the queue size.
    AvailableIndex(u16),
    /// A descriptor index lies outside its table.
    DescriptorIndex(u16),
    /// The chain has more descriptors than the queue, or loops.
    ChainTooLong,
    /// A readable descriptor follows a writable one.
    ReadableAfterWritable,
    /// A descriptor has length 0.
    EmptyDescriptor,
    /// An indirect descriptor without the feature, inside an indirect table, or together with NEXT.
    IndirectNotAllowed,
    /// The length of an indirect table is 0 or not a multiple of 16.
    IndirectLength(u32),
}

impl From<OutOfMemoryRange> for RingError {
    fn from(error: OutOfMemoryRange) -> Self {
        Self::Memory(error)
    }
}

/// Why a queue could not be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueError {
    /// The device has no such queue.
    NoSuchQueue,
    /// The size is 0, not a power of two, or above the largest.
    Size(u16),
    /// An address is not aligned (16, 2 and 4 bytes).
    Alignment,
}

/// Whether an interrupt is to be raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interrupt {
    NothingNew,
    Due,
    Suppressed,
}

/// One split virtqueue.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    next_avail: u16,
    next_used: u16,
    /// `next_used` when an interrupt was last considered.
    signalled: u16,
}

impl Ring {
    pub(crate) fn new(size: u16, max: u16, desc: u64, avail: u64, used: u64) -> Result<Self, QueueError> {
        if !size.is_power_of_two() || size > max {
            return Err(QueueError::Size(size));
        }
        if desc & 15 != 0 || avail & 1 != 0 || used & 3 != 0 {
            return Err(QueueError::Alignment);
        }
        Ok(Self { size, desc, avail, used, next_avail: 0, next_used: 0, signalled: 0 })
    }

    /// Chains that the driver made available and that were not yet popped.
    pub(crate) fn pending(&self, mem: &dyn GuestMemory) -> Result<u16, RingError> {
        let index = read_u16(mem, self.avail, 2)?;
        fence(Ordering::Acquire);
        let pending = index.wrapping_sub(self.next_avail);
        if pending > self.size {
            return Err(RingError::AvailableIndex(index));
        }
        Ok(pending)
    }

    /// Takes the next available chain.
    pub(crate) fn pop(&mut self, mem: &dyn GuestMemory, indirect: bool) -> Result<Option<Chain>, RingError> {
        if self.pending(mem)? == 0 {
            return Ok(None);
        }
        let slot = u64::from(self.next_avail % self.size);
        let head = read_u16(mem, self.avail, 4 + 2 * slot)?;
        let chain = self.collect(mem, head, indirect)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(chain))
    }

    fn collect(&self, mem: &dyn GuestMemory, head: u16, indirect: bool) -> Result<Chain, RingError> {
        let mut chain = Chain::new(head);
        let (mut table, mut table_len, mut index) = (self.desc, u32::from(self.size), head);
        let mut in_indirect = false;
        let mut count = 0;
        loop {
            if u32::from(index) >= table_len {
                return Err(RingError::DescriptorIndex(index));
            }
            let mut bytes = [0; DESC_LEN as usize];
            mem.read(address(table, DESC_LEN * u64::from(index))?, &mut bytes)?;
            let (addr, len) = (u64_at(&bytes, 0), u32_at(&bytes, 8));
            let flags = u16::from_le_bytes(array_at(&bytes, 12));
            if flags & DESC_INDIRECT != 0 {
                if !indirect || in_indirect || flags & DESC_NEXT != 0 {
                    return Err(RingError::IndirectNotAllowed);
                }
                if len == 0 || u64::from(len) % DESC_LEN != 0 {
                    return Err(RingError::IndirectLength(len));
                }
                (table, table_len, index, in_indirect) = (addr, len / 16, 0, true);
                continue;
            }
            count += 1;
            if count > self.size {
                return Err(RingError::ChainTooLong);
            }
            if len == 0 {
                return Err(RingError::EmptyDescriptor);
            }
            if flags & DESC_WRITE != 0 {
                chain.writable.push(Segment { addr, len });
            } else if chain.writable.is_empty() {
                chain.readable.push(Segment { addr, len });
            } else {
                return Err(RingError::ReadableAfterWritable);
            }
            if flags & DESC_NEXT == 0 {
                return Ok(chain);
            }
            index = u16::from_le_bytes(array_at(&bytes, 14));
        }
    }

    /// Publishes one used element.
    pub(crate) fn push_used(
        &mut self,
        mem: &mut dyn GuestMemory,
        id: u32,
        len: u32,
    ) -> Result<(), RingError> {
        let mut element = [0; 8];
        element[..4].copy_from_slice(&id.to_le_bytes());
        element[4..].copy_from_slice(&len.to_le_bytes());
        let slot = u64::from(self.next_used % self.size);
        mem.write(address(self.used, 4 + 8 * slot)?, &element)?;
        self.skip_used(mem, 1)
    }

    /// Moves the used index by `count` without writing elements; a conforming device never does so for more than 1.
    pub(crate) fn skip_used(&mut self, mem: &mut dyn GuestMemory, count: u16) -> Result<(), RingError> {
        fence(Ordering::Release);
        self.next_used = self.next_used.wrapping_add(count);
        Ok(write_u16(mem, self.used, 2, self.next_used)?)
    }

    /// Asks, by EVENT_IDX, for a kick at the next chain.
    pub(crate) fn request_kick(&self, mem: &mut dyn GuestMemory) -> Result<(), RingError> {
        write_u16(mem, self.used, 4 + 8 * u64::from(self.size), self.next_avail)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// What the used elements since the last call mean for the interrupt.
    pub(crate) fn interrupt(
        &mut self,
        mem: &dyn GuestMemory,
        event_idx: bool,
    ) -> Result<Interrupt, RingError> {
        let (old, new) = (self.signalled, self.next_used);
        if old == new {
            return Ok(Interrupt::NothingNew);
        }
        self.signalled = new;
        fence(Ordering::SeqCst);
        let due = if event_idx {
            let wanted = read_u16(mem, self.avail, 4 + 2 * u64::from(self.size))?;
            new.wrapping_sub(wanted).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            read_u16(mem, self.avail, 0)? & AVAIL_NO_INTERRUPT == 0
        };
        Ok(if due { Interrupt::Due } else { Interrupt::Suppressed })
    }
}
