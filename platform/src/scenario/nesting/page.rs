//! Memory that an access is to reach, or not.

use alloc::string::String;

use virtio_iommu_model::GuestMemory;

use super::text;
use crate::guest::Guest;
use crate::memory::dma::DmaPages;
use crate::memory::frames::FRAME_BYTES;

/// A granule of memory.
pub(super) trait Page {
    /// Sets all of it.
    fn fill(&mut self, byte: u8);
    /// Copies to `offset`, inside of it.
    fn write(&mut self, offset: usize, bytes: &[u8]);
    /// Copies from `offset`, inside of it.
    fn read(&self, offset: usize, bytes: &mut [u8]);
    /// Whether all of it is this.
    fn all_bytes_are(&self, byte: u8) -> bool;
}

impl Page for DmaPages {
    fn fill(&mut self, byte: u8) {
        DmaPages::fill(self, byte);
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        DmaPages::write(self, offset, bytes);
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) {
        DmaPages::read(self, offset, bytes);
    }

    fn all_bytes_are(&self, byte: u8) -> bool {
        DmaPages::all_bytes_are(self, byte)
    }
}

/// A granule of a guest's, which stays taken.
#[derive(Debug)]
pub(super) struct GuestPage {
    guest: Guest,
    address: u64,
    len: usize,
}

impl GuestPage {
    pub(super) fn new(guest: &Guest, granule: u64) -> Result<Self, String> {
        let frames = (granule / FRAME_BYTES).max(1) as usize;
        let address = guest.allocate(frames, frames).map_err(text)?;
        Ok(Self { guest: guest.clone(), address, len: frames * FRAME_BYTES as usize })
    }

    /// What the guest knows it by.
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Page for GuestPage {
    fn fill(&mut self, byte: u8) {
        self.guest.fill(self.address, self.len, byte);
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        // What is beyond the guest's memory is seen by what is read back.
        let _ = GuestMemory::write(&mut self.guest, self.address + offset as u64, bytes);
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) {
        // As above.
        let _ = GuestMemory::read(&self.guest, self.address + offset as u64, bytes);
    }

    fn all_bytes_are(&self, byte: u8) -> bool {
        self.guest.all_bytes_are(self.address, self.len, byte)
    }
}
