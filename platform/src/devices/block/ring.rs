//! A split virtqueue in shared memory, for a driver that polls (virtio 1.4, split virtqueues).
//!
//! Nothing that was written is read back. Doorbells are suppressed by the flag, not by indices.

use core::sync::atomic::{Ordering, fence};

use virtio_iommu::Iova;
use virtio_iommu::transport::QueueAddresses;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::devices::dma::Coherent;

/// The chain goes on with the next descriptor.
pub(super) const NEXT: u16 = 1;
/// The device writes there.
pub(super) const WRITE: u16 = 2;
/// A table of descriptors is there.
pub(super) const INDIRECT: u16 = 4;

pub(super) const DESCRIPTOR_BYTES: usize = 16;
const USED_BYTES: usize = 8;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// A descriptor, in the ring's own table or in an indirect one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Descriptor {
    address: U64,
    len: U32,
    flags: U16,
    next: U16,
}

impl Descriptor {
    pub(super) fn new(address: Iova, len: usize, flags: u16, next: u16) -> Self {
        Self {
            address: address.get().into(),
            len: (len as u32).into(),
            flags: flags.into(),
            next: next.into(),
        }
    }
}

/// What the device is done with, in its own words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) id: u32,
    pub(super) len: u32,
}

/// The used index moved by more than the device was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UsedIndexJumped(pub(super) u16);

#[derive(Debug)]
pub(super) struct Ring {
    memory: Coherent,
    size: u16,
    avail: usize,
    used: usize,
    /// The next free entry, and what of it the device can see.
    next: u16,
    published: u16,
    /// The next entry of the device.
    taken: u16,
}

impl Ring {
    /// The bytes of a ring of `size` descriptors.
    pub(super) fn len_bytes(size: u16) -> usize {
        Self::used_offset(size) + 6 + USED_BYTES * usize::from(size)
    }

    fn used_offset(size: u16) -> usize {
        let avail = DESCRIPTOR_BYTES * usize::from(size);
        (avail + 6 + 2 * usize::from(size)).next_multiple_of(4)
    }

    /// An empty ring of `size`, a power of two, in zeroed memory.
    pub(super) fn new(mut memory: Coherent, size: u16) -> Self {
        let (avail, used) = (DESCRIPTOR_BYTES * usize::from(size), Self::used_offset(size));
        memory.store_release(avail, NO_INTERRUPT);
        Self { memory, size, avail, used, next: 0, published: 0, taken: 0 }
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Where its parts are, for the device.
    pub(super) fn addresses(&self) -> QueueAddresses {
        let at = |offset| virtio_iommu::PhysAddr::new(self.memory.iova_at(offset).get());
        QueueAddresses { descriptors: at(0), driver_area: at(self.avail), device_area: at(self.used) }
    }

    pub(super) fn into_memory(self) -> Coherent {
        self.memory
    }

    /// Puts a descriptor into the ring's table.
    pub(super) fn set(&mut self, index: u16, descriptor: Descriptor) {
        self.memory.write(DESCRIPTOR_BYTES * usize::from(index), descriptor);
    }

    /// Adds a chain. The device sees it after [`publish`](Self::publish).
    pub(super) fn push(&mut self, head: u16) {
        let entry = usize::from(self.next & (self.size - 1));
        self.memory.write(self.avail + 4 + 2 * entry, U16::new(head));
        self.next = self.next.wrapping_add(1);
    }

    /// Shows the device what was pushed, and says whether it wants the doorbell.
    #[must_use = "without the doorbell the device may never look"]
    pub(super) fn publish(&mut self) -> bool {
        if self.next == self.published {
            return false;
        }
        self.published = self.next;
        self.memory.store_release(self.avail + 2, self.next);
        // Our index, then our look at its wish; the device does it the other way round.
        fence(Ordering::SeqCst);
        self.memory.load_acquire(self.used) & NO_NOTIFY == 0
    }

    /// How much the device is done with that was not taken, by its own word.
    pub(super) fn ready(&self) -> u16 {
        self.memory.load_acquire(self.used + 2).wrapping_sub(self.taken)
    }

    /// What the device is done with next.
    pub(super) fn pop(&mut self) -> Result<Option<Used>, UsedIndexJumped> {
        let index = self.memory.load_acquire(self.used + 2);
        let ready = index.wrapping_sub(self.taken);
        if ready == 0 {
            return Ok(None);
        }
        if ready > self.published.wrapping_sub(self.taken) {
            return Err(UsedIndexJumped(index));
        }
        let entry = self.used + 4 + USED_BYTES * usize::from(self.taken & (self.size - 1));
        self.taken = self.taken.wrapping_add(1);
        let [id, len] = [entry, entry + 4].map(|offset| u32::from_le(self.memory.read(offset)));
        Ok(Some(Used { id, len }))
    }
}
