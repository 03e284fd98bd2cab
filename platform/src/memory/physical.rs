//! Reading physical memory that firmware filled, behind a trait, so that its parsers run over generated images on a host.

use crate::arch::mmu;

/// Physical memory to read from.
pub trait PhysicalMemory {
    /// The `len_bytes` bytes at `phys`; `None` when they cannot be reached. The length is bounded by the caller.
    fn bytes(&self, phys: u64, len_bytes: usize) -> Option<&[u8]>;
}

/// The machine's memory: what lies outside RAM is mapped when it is asked for.
#[derive(Clone, Copy, Debug)]
pub struct MachineMemory;

impl MachineMemory {
    /// As [`PhysicalMemory::bytes`], and the slice lives on, since mappings do.
    pub fn static_bytes(phys: u64, len_bytes: usize) -> Option<&'static [u8]> {
        mmu::map_firmware(phys, len_bytes as u64).ok()?;
        // SAFETY: mapped for reading, for good. The callers read tables that firmware left, which are kept out of the
        // frame allocator, so nothing writes them.
        Some(unsafe { core::slice::from_raw_parts(super::phys_to_virt(phys), len_bytes) })
    }
}

impl PhysicalMemory for MachineMemory {
    fn bytes(&self, phys: u64, len_bytes: usize) -> Option<&[u8]> {
        Self::static_bytes(phys, len_bytes)
    }
}

/// A piece of physical memory made up for a test.
#[cfg(test)]
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    pieces: alloc::vec::Vec<(u64, alloc::vec::Vec<u8>)>,
}

#[cfg(test)]
impl Image {
    /// Puts bytes somewhere.
    pub(crate) fn put(&mut self, phys: u64, bytes: &[u8]) {
        self.pieces.push((phys, bytes.to_vec()));
    }
}

#[cfg(test)]
impl PhysicalMemory for Image {
    fn bytes(&self, phys: u64, len_bytes: usize) -> Option<&[u8]> {
        self.pieces.iter().find_map(|(start, bytes)| {
            let from = usize::try_from(phys.checked_sub(*start)?).ok()?;
            bytes.get(from..from.checked_add(len_bytes)?)
        })
    }
}
