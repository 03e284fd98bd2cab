//! Little-endian fields at byte offsets, and the same in guest memory.

use crate::memory::{GuestMemory, OutOfMemoryRange};

/// The `N` bytes at `offset`; zeros for bytes that lie past the end.
pub(crate) fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut out = [0; N];
    let source = bytes.get(offset..).unwrap_or(&[]);
    let len = source.len().min(N);
    out[..len].copy_from_slice(&source[..len]);
    out
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, offset))
}

pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, offset))
}

/// `base + offset`, or the error that an access there would have.
pub(crate) fn address(base: u64, offset: u64) -> Result<u64, OutOfMemoryRange> {
    base.checked_add(offset).ok_or(OutOfMemoryRange { addr: base, len_bytes: offset })
}

pub(crate) fn read_u16(mem: &dyn GuestMemory, base: u64, offset: u64) -> Result<u16, OutOfMemoryRange> {
    let mut bytes = [0; 2];
    mem.read(address(base, offset)?, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

pub(crate) fn write_u16(
    mem: &mut dyn GuestMemory,
    base: u64,
    offset: u64,
    value: u16,
) -> Result<(), OutOfMemoryRange> {
    mem.write(address(base, offset)?, &value.to_le_bytes())
}
