//! Memory: what firmware says is there, who owns which part, and how to reach a physical address.
//!
//! All physical memory that the kernel touches is mapped at its physical address; [`phys_to_virt`] and [`virt_to_phys`]
//! are the only places that say so.
//!
//! ```text
//! memory map of the firmware  -  kernel image, boot data, modules, tables or tree, firmware's memory  =  usable
//! usable  =  heap (a quarter)  +  frames (page tables, DMA memory)
//! ```

use core::fmt;
use core::ptr::NonNull;

pub mod dma;
pub mod frames;
pub mod heap;
pub mod map;
pub mod physical;
pub mod virtio_hal;

use crate::arch::mmu::{self, MapError};
use crate::mmio::Mmio;

/// The pointer by which the kernel reaches physical memory that is mapped.
pub const fn phys_to_virt(phys: u64) -> *mut u8 {
    phys as *mut u8
}

/// The physical address of memory that the kernel has a pointer to.
pub fn virt_to_phys<T: ?Sized>(pointer: *const T) -> u64 {
    pointer.cast::<u8>().addr() as u64
}

/// Maps device registers and gives access to them.
///
/// # Errors
///
/// [`MapError`] when the region is out of the CPU's reach, unaligned, or mapped as RAM.
///
/// # Safety
///
/// The physical range must be the registers of a device, and no Rust reference may point there.
pub unsafe fn map_registers(phys: u64, len_bytes: u64) -> Result<Mmio, MapRegistersError> {
    if !phys.is_multiple_of(8) {
        return Err(MapRegistersError::Unaligned { phys });
    }
    let virt = mmu::map_device(phys, len_bytes).map_err(MapRegistersError::Map)?;
    let base = NonNull::new(phys_to_virt(virt)).ok_or(MapRegistersError::Unaligned { phys })?;
    // SAFETY: just mapped, for good; aligned; the caller promises that it is device memory.
    Ok(unsafe { Mmio::new(base, len_bytes as usize) })
}

/// Device registers that could not be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapRegistersError {
    /// The region does not start at a multiple of 8.
    Unaligned {
        /// Where it starts.
        phys: u64,
    },
    /// The page tables refused.
    Map(MapError),
}

impl fmt::Display for MapRegistersError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unaligned { phys } => {
                write!(f, "cannot map device registers at {phys:#x}: not a multiple of 8")
            }
            Self::Map(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for MapRegistersError {}
