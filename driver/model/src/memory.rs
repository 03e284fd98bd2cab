//! The guest's memory, as the device sees it.
//!
//! The device holds no memory: each call that may touch rings, requests, or DMA targets is given a [`GuestMemory`]. All
//! addresses are guest-physical. Every access is checked by the implementation, never by the device.

use alloc::vec;
use alloc::vec::Vec;

/// Guest-physical memory that the device may read and write.
///
/// An implementation must not panic for any address and length.
pub trait GuestMemory {
    /// Copies the bytes from `addr` into `buf`.
    ///
    /// # Errors
    ///
    /// When any byte of the range is not memory; `buf` may then be partly filled.
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), OutOfMemoryRange>;

    /// Copies `data` to `addr`.
    ///
    /// # Errors
    ///
    /// When any byte of the range is not memory; nothing is written then.
    fn write(&mut self, addr: u64, data: &[u8]) -> Result<(), OutOfMemoryRange>;
}

/// An access to a range that is not wholly guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemoryRange {
    /// First address of the access.
    pub addr: u64,
    /// Length of the access in bytes.
    pub len_bytes: u64,
}

impl core::fmt::Display for OutOfMemoryRange {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} bytes at {:#x} are not guest memory", self.len_bytes, self.addr)
    }
}

impl core::error::Error for OutOfMemoryRange {}

/// One contiguous block of guest memory in a vector, for tests.
#[derive(Clone, Debug)]
pub struct VecMemory {
    base: u64,
    bytes: Vec<u8>,
}

impl VecMemory {
    /// Makes `len_bytes` zero bytes of memory that start at guest-physical `base`.
    pub fn new(base: u64, len_bytes: usize) -> Self {
        Self { base, bytes: vec![0; len_bytes] }
    }

    /// Guest-physical address of the first byte.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// All bytes, the first at [`base`](Self::base).
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All bytes, for changing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    fn span(&self, addr: u64, len: usize) -> Result<core::ops::Range<usize>, OutOfMemoryRange> {
        let error = OutOfMemoryRange { addr, len_bytes: len as u64 };
        let offset = addr.checked_sub(self.base).ok_or(error)?;
        let start = usize::try_from(offset).map_err(|_| error)?;
        let end = start.checked_add(len).filter(|end| *end <= self.bytes.len()).ok_or(error)?;
        Ok(start..end)
    }
}

impl GuestMemory for VecMemory {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), OutOfMemoryRange> {
        let span = self.span(addr, buf.len())?;
        buf.copy_from_slice(&self.bytes[span]);
        Ok(())
    }

    fn write(&mut self, addr: u64, data: &[u8]) -> Result<(), OutOfMemoryRange> {
        let span = self.span(addr, data.len())?;
        self.bytes[span].copy_from_slice(data);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_of_a_block_are_checked_without_overflow() {
        let mut mem = VecMemory::new(u64::MAX - 15, 16);
        assert_eq!(mem.write(u64::MAX, &[7]), Ok(()));
        let mut byte = [0];
        assert_eq!(mem.read(u64::MAX, &mut byte), Ok(()));
        assert_eq!(byte, [7]);
        assert!(mem.write(u64::MAX, &[1, 2]).is_err());
        assert!(mem.read(u64::MAX - 16, &mut byte).is_err());
    }
}
