//! The guest's memory, which the front end shares, as the model sees it.

use std::sync::atomic::Ordering;

use virtio_iommu_model::{GuestMemory, OutOfMemoryRange};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace as _, GuestMemory as _, GuestMemoryAtomic, GuestMemoryMmap,
    Permissions,
};

/// The regions of memory that the front end shares now; none before it did. Clones see the same.
#[derive(Clone, Debug)]
pub(crate) struct Memory(pub(crate) GuestMemoryAtomic<GuestMemoryMmap>);

impl Memory {
    /// No memory at all.
    pub(crate) fn none() -> Self {
        Self(GuestMemoryAtomic::new(GuestMemoryMmap::new()))
    }
}

impl GuestMemory for Memory {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), OutOfMemoryRange> {
        let outside = OutOfMemoryRange { addr, len_bytes: buf.len() as u64 };
        let (memory, at) = (self.0.memory(), GuestAddress(addr));
        // The guest changes indices of two bytes meanwhile, of which no half may be an older one's.
        let read = match buf {
            [low, high] if addr.is_multiple_of(2) => {
                memory.load::<u16>(at, Ordering::Acquire).map(|value| [*low, *high] = value.to_ne_bytes())
            }
            _ => memory.read_slice(buf, at),
        };
        read.map_err(|_| outside)
    }

    fn write(&mut self, addr: u64, data: &[u8]) -> Result<(), OutOfMemoryRange> {
        let outside = OutOfMemoryRange { addr, len_bytes: data.len() as u64 };
        let (memory, at) = (self.0.memory(), GuestAddress(addr));
        // All of it or nothing.
        if !memory.check_range(at, data.len(), Permissions::Write) {
            return Err(outside);
        }
        let written = match *data {
            [low, high] if addr.is_multiple_of(2) => {
                memory.store(u16::from_ne_bytes([low, high]), at, Ordering::Release)
            }
            _ => memory.write_slice(data, at),
        };
        written.map_err(|_| outside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Memory {
        let regions = [(GuestAddress(0x1000), 0x1000), (GuestAddress(0x4000), 0x1000)];
        Memory(GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&regions).unwrap()))
    }

    #[test]
    fn bytes_come_back_whatever_their_length_and_alignment() {
        let mut memory = memory();
        for (len, addr) in [(1, 0x1003), (2, 0x1010), (2, 0x1021), (8, 0x1030), (33, 0x1047)] {
            let data: Vec<u8> = (1..=len).collect();
            memory.write(addr, &data).unwrap();
            let mut back = vec![0; data.len()];
            memory.read(addr, &mut back).unwrap();
            assert_eq!(back, data, "{len} bytes at {addr:#x}");
        }
    }

    #[test]
    fn what_is_not_memory_is_refused_and_nothing_written() {
        let mut memory = memory();
        for (addr, len) in
            [(0xfff, 2), (0x1ffe, 4), (0x2000, 2), (u64::MAX, 2), (u64::MAX - 1, 16), (0x4fff, 2)]
        {
            let refused = OutOfMemoryRange { addr, len_bytes: len as u64 };
            assert_eq!(memory.write(addr, &vec![7; len]), Err(refused));
            assert_eq!(memory.read(addr, &mut vec![0; len]), Err(refused));
        }
        let mut untouched = [0; 2];
        memory.read(0x1ffe, &mut untouched).unwrap();
        assert_eq!(untouched, [0; 2]);
        assert!(Memory::none().read(0, &mut [0]).is_err());
    }
}
