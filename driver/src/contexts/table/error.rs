//! What can go wrong with tables. Each error names the value.

use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::prot::Prot;
use core::fmt;

/// A page table could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableError {
    /// Arm's tables have 25 to 48 bits of input.
    InputBits {
        /// What was asked for.
        bits: u8,
    },
    /// No page lies in so few bits of output.
    OutputBits {
        /// What was asked for.
        bits: u32,
    },
    /// There is no memory.
    NoMemory {
        /// Pages that were needed.
        pages: usize,
    },
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InputBits { bits } => write!(f, "a table of {bits:#x} bits of input, 0x19 to 0x30 can be"),
            Self::OutputBits { bits } => write!(f, "no page lies in {bits:#x} bits of output"),
            Self::NoMemory { pages } => write!(f, "no memory for {pages:#x} pages of a table"),
        }
    }
}

impl core::error::Error for TableError {}

/// Nothing was mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableMapError {
    /// The length is 0.
    Empty,
    /// An address or the length is not a multiple of the smallest page.
    Misaligned {
        /// The value.
        value: u64,
        /// The smallest page.
        granule: u64,
    },
    /// The addresses are not all in what the table translates.
    OutsideInput {
        /// The first address.
        iova: Iova,
        /// The length.
        len: u64,
        /// What the table translates.
        input: IovaRange,
    },
    /// The memory ends beyond what an entry can name.
    OutsideOutput {
        /// The first address.
        phys: PhysAddr,
        /// The length.
        len: u64,
        /// The bits of a physical address.
        bits: u32,
    },
    /// The format cannot say this: no format has memory that can be written and not read.
    Prot {
        /// What was asked for.
        prot: Prot,
    },
    /// Something is mapped there.
    Mapped {
        /// The first address of it.
        iova: Iova,
    },
    /// The device may still have another translation of these addresses: invalidate it first.
    Stale {
        /// The addresses.
        range: IovaRange,
    },
    /// There is no memory.
    NoMemory {
        /// Pages that were needed.
        pages: usize,
    },
}

impl fmt::Display for TableMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("no bytes to map"),
            Self::Misaligned { value, granule } => {
                write!(f, "{value:#x} is not a multiple of the page of {granule:#x} bytes")
            }
            Self::OutsideInput { iova, len, input } => {
                write!(f, "{len:#x} bytes at {iova} are not all in {input}, which the table translates")
            }
            Self::OutsideOutput { phys, len, bits } => {
                write!(f, "{len:#x} bytes of memory at {phys} are beyond {bits:#x} bits")
            }
            Self::Prot { prot } => {
                write!(f, "a table cannot say {:#x}: what is written is read too", prot.bits())
            }
            Self::Mapped { iova } => write!(f, "{iova} is mapped"),
            Self::Stale { range } => write!(f, "{range} was unmapped and not invalidated yet"),
            Self::NoMemory { pages } => write!(f, "no memory for {pages:#x} pages of a table"),
        }
    }
}

impl core::error::Error for TableMapError {}

/// Nothing was unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableUnmapError {
    /// The range does not begin and end with pages.
    Misaligned {
        /// The first or the last address.
        value: u64,
        /// The smallest page.
        granule: u64,
    },
    /// The addresses are not all in what the table translates.
    OutsideInput {
        /// The addresses.
        range: IovaRange,
        /// What the table translates.
        input: IovaRange,
    },
    /// There is no memory for the tables that take a block's place.
    NoMemory {
        /// Pages that were needed.
        pages: usize,
    },
}

impl fmt::Display for TableUnmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Misaligned { value, granule } => {
                write!(f, "{value:#x} is not at the edge of a page of {granule:#x} bytes")
            }
            Self::OutsideInput { range, input } => {
                write!(f, "{range} is not all in {input}, which the table translates")
            }
            Self::NoMemory { pages } => write!(f, "no memory for {pages:#x} pages to split a block"),
        }
    }
}

impl core::error::Error for TableUnmapError {}

/// A context table was not made, or not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ContextTableError {
    /// More bits of PASID than the table can have.
    PasidBits {
        /// What was asked for.
        bits: u32,
        /// The most.
        limit: u32,
    },
    /// The PASID is beyond the table.
    OutsideTable {
        /// The PASID.
        pasid: u32,
        /// The table's bits of PASID.
        bits: u32,
    },
    /// The PASID has a context.
    Present {
        /// The PASID.
        pasid: u32,
    },
    /// The PASID has no context.
    Absent {
        /// The PASID.
        pasid: u32,
    },
    /// There is no memory.
    NoMemory {
        /// Bytes that were needed.
        len: usize,
    },
}

impl fmt::Display for ContextTableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PasidBits { bits, limit } => {
                write!(f, "a table of {bits:#x} bits of PASID, {limit:#x} are the most")
            }
            Self::OutsideTable { pasid, bits } => {
                write!(f, "PASID {pasid:#x} is beyond a table of {bits:#x} bits")
            }
            Self::Present { pasid } => write!(f, "PASID {pasid:#x} has a context"),
            Self::Absent { pasid } => write!(f, "PASID {pasid:#x} has no context"),
            Self::NoMemory { len } => write!(f, "no memory for {len:#x} bytes of a context table"),
        }
    }
}

impl core::error::Error for ContextTableError {}
