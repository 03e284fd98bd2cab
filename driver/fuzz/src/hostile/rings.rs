//! The device's side of the rings, and of the requests in them, read byte by byte.

use virtio_iommu::transport::QueueAddresses;
use virtio_iommu_model::GuestMemory;

use super::account::{Ask, Said};
use crate::ram::Ram;

/// A queue that the driver enabled.
#[derive(Clone, Debug)]
pub struct Queue {
    /// Its descriptors.
    pub size: u16,
    /// Where its parts are.
    pub addresses: QueueAddresses,
    seen: u16,
    used: u16,
}

/// A request that was not answered yet.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    /// Its head descriptor.
    pub head: u16,
    /// What it asks.
    pub ask: Ask,
    /// Where the answer goes.
    pub writable: (u64, u32),
    /// Whether the device keeps it to itself for now.
    pub kept: bool,
}

/// Reads a little-endian number.
///
/// # Panics
/// When it is not in memory: the driver gave the address.
fn read(ram: &Ram, at: u64, len: usize) -> u64 {
    let mut bytes = [0; 8];
    ram.read(at, &mut bytes[..len]).expect("an address from the driver that is not memory");
    u64::from_le_bytes(bytes)
}

impl Queue {
    /// A queue that nothing was done with.
    pub fn new(size: u16, addresses: QueueAddresses) -> Self {
        Self { size, addresses, seen: 0, used: 0 }
    }

    /// The next head that the driver made available.
    pub fn next(&mut self, ram: &Ram) -> Option<u16> {
        let avail = self.addresses.driver_area.get();
        if read(ram, avail + 2, 2) as u16 == self.seen {
            return None;
        }
        let entry = u64::from(self.seen % self.size);
        let head = read(ram, avail + 4 + 2 * entry, 2) as u16;
        self.seen = self.seen.wrapping_add(1);
        Some(head)
    }

    fn descriptor(&self, ram: &Ram, index: u16) -> (u64, u32, u16, u16) {
        assert!(index < self.size, "descriptor {index} of {}", self.size);
        let at = self.addresses.descriptors.get() + 16 * u64::from(index);
        (
            read(ram, at, 8),
            read(ram, at + 8, 4) as u32,
            read(ram, at + 12, 2) as u16,
            read(ram, at + 14, 2) as u16,
        )
    }

    /// The request at a head: one readable and one writable descriptor.
    pub fn request(&self, ram: &Ram, head: u16) -> Pending {
        let (readable, readable_len, flags, next) = self.descriptor(ram, head);
        assert_eq!(flags, 1, "the first descriptor of a request");
        let (writable, writable_len, flags, _) = self.descriptor(ram, next);
        assert_eq!(flags, 2, "the second descriptor of a request");
        assert!(ram.is_live(writable, writable_len as usize), "an answer that has no place");
        let number = |offset: u64, len: usize| {
            assert!(offset + len as u64 <= readable_len.into(), "a request of {readable_len} bytes");
            read(ram, readable + offset, len)
        };
        let domain = || number(4, 4) as u32;
        let endpoint = || number(8, 4) as u32;
        let virt = || (number(8, 8), number(16, 8));
        let ask = match number(0, 4) {
            1 => Ask::Attach { domain: domain(), endpoint: endpoint() },
            2 => Ask::Detach { domain: domain(), endpoint: endpoint() },
            3 => Ask::Map { domain: domain(), virt: virt(), phys: number(24, 8) },
            4 => Ask::Unmap { domain: domain(), virt: virt() },
            5 => Ask::Probe,
            other => panic!("a request of type {other:#x}"),
        };
        Pending { head, ask, writable: (writable, writable_len), kept: false }
    }

    /// The buffer at a head: one writable descriptor.
    pub fn buffer(&self, ram: &Ram, head: u16) -> (u64, u32) {
        let (writable, len, flags, _) = self.descriptor(ram, head);
        assert_eq!(flags, 2, "the descriptor of an event");
        assert!(ram.is_live(writable, len as usize), "an event that has no place");
        (writable, len)
    }

    /// Puts an entry into the used ring and shows it.
    pub fn put(&mut self, ram: &mut Ram, id: u32, len: u32) {
        let at = self.addresses.device_area.get() + 4 + 8 * u64::from(self.used % self.size);
        let _ = ram.write(at, &id.to_le_bytes());
        let _ = ram.write(at + 4, &len.to_le_bytes());
        self.jump(ram, 1);
    }

    /// Moves the used index on.
    pub fn jump(&mut self, ram: &mut Ram, by: u16) {
        self.used = self.used.wrapping_add(by);
        let _ = ram.write(self.addresses.device_area.get() + 2, &self.used.to_le_bytes());
    }

    /// Writes the fields by which the device says when it wants the doorbell.
    pub fn suppress(&self, ram: &mut Ram, flags: u16, event: u16) {
        let area = self.addresses.device_area.get();
        let _ = ram.write(area, &flags.to_le_bytes());
        let _ = ram.write(area + 4 + 8 * u64::from(self.size), &event.to_le_bytes());
    }

    /// Whether a block has any part of the queue.
    pub fn meets(&self, first: u64, last: u64) -> bool {
        let QueueAddresses { descriptors, driver_area, device_area } = self.addresses;
        [descriptors, driver_area, device_area].iter().any(|part| (first..=last).contains(&part.get()))
    }
}

impl Pending {
    /// Writes an answer's status, and what it then says.
    pub fn write_answer(&self, ram: &mut Ram, status: Option<u8>, used_len: u32) -> Said {
        let (at, len) = self.writable;
        let tail = at + u64::from(len) - 4;
        if let Some(status) = status {
            let _ = ram.write(tail, &[status]);
        }
        let mut now = [0];
        let _ = ram.read(tail, &mut now);
        Said::new(used_len, len, now[0])
    }
}
