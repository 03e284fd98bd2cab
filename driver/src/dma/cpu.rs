//! The CPU's side of memory that an endpoint reaches.

use crate::error::DmaError;
use core::ptr::{self, NonNull};

/// Memory that its holder may read and write, although the endpoint may at the same time.
///
/// # Invariants
/// `len` bytes from `ptr` are valid for reads and writes as long as this exists, and no Rust reference to them exists
/// but by [`bytes`](Self::bytes) and [`bytes_mut`](Self::bytes_mut).
pub(super) struct DeviceMemory {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to the holder, whoever that is.
unsafe impl Send for DeviceMemory {}
// SAFETY: through a shared reference it is only read, and the endpoint is outside of the program.
unsafe impl Sync for DeviceMemory {}

impl DeviceMemory {
    /// # Safety
    /// `len` bytes from `ptr` are valid for reads and writes, and nobody but this and the endpoint uses them, as long
    /// as this exists.
    pub(super) const unsafe fn new(ptr: NonNull<u8>, len: usize) -> Self {
        // INVARIANT: the caller's promise.
        Self { ptr, len }
    }

    pub(super) const fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    fn at(&self, offset: usize, len: usize) -> Result<*mut u8, DmaError> {
        if offset > self.len || len > self.len - offset {
            return Err(DmaError::OutOfBounds { offset, len, size: self.len });
        }
        // SAFETY: inside the memory by the check above.
        Ok(unsafe { self.ptr.as_ptr().add(offset) })
    }

    /// Copies out.
    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<(), DmaError> {
        let from = self.at(offset, bytes.len())?;
        // SAFETY: inside the memory, of which no Rust reference exists but a shared one.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies in.
    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<(), DmaError> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: inside the memory, of which no Rust reference exists.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// # Safety
    /// The endpoint does not write to the memory as long as the slice exists.
    pub(super) unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: valid by the invariant, and not written to by the caller's promise and the shared borrow.
        unsafe { core::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    /// # Safety
    /// The endpoint does not write to the memory as long as the slice exists.
    pub(super) unsafe fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and the borrow is the only one.
        unsafe { core::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}
