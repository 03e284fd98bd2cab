//! Page tables, which a process has no access to: every mapping is refused.

use core::fmt;

/// Why nothing was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError {
    /// A process has no physical memory.
    NoMachine {
        /// The address asked for.
        phys: u64,
    },
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::NoMachine { phys } = self;
        write!(f, "cannot map {phys:#x}: a host process has no physical memory")
    }
}

impl core::error::Error for MapError {}

/// The highest physical address of a CPU: 40 bits, as QEMU's default one.
pub fn highest_physical_address() -> u64 {
    (1 << 40) - 1
}

/// The highest physical address that could be mapped.
pub fn highest_reachable_address() -> u64 {
    highest_physical_address()
}

/// Refuses.
///
/// # Errors
///
/// Always [`MapError::NoMachine`].
pub fn map_device(phys: u64, _len_bytes: u64) -> Result<u64, MapError> {
    Err(MapError::NoMachine { phys })
}

/// Refuses.
///
/// # Errors
///
/// Always [`MapError::NoMachine`].
pub fn map_firmware(phys: u64, _len_bytes: u64) -> Result<u64, MapError> {
    Err(MapError::NoMachine { phys })
}
