//! ACPI tables: found, bounded, checked, and handed out as bytes.
//!
//! From the root pointer (given by the boot loader, or found in the BIOS area) by the XSDT or the RSDT to every table
//! that these list. Tables may lie at any byte, inside or outside of the memory map. A table that is cut, whose checksum
//! is wrong or that lies nowhere is remembered as broken and does not hide the others. Of tables that hang below another
//! one there is only the DSDT below the FADT; the kernel runs no AML.
//!
//! Bounds: a table has at most [`MAX_TABLE_BYTES`], the list at most [`MAX_TABLES`].

use alloc::vec::Vec;
use core::fmt;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

pub mod fadt;
pub mod madt;
pub mod mcfg;
pub mod root;

use crate::memory::physical::PhysicalMemory;
use crate::range::PhysRange;

/// The longest table that is accepted.
pub const MAX_TABLE_BYTES: u32 = 16 << 20;
/// The most tables that are looked at.
pub const MAX_TABLES: usize = 256;

/// A table's name: four characters, such as `VIOT`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Signature(pub [u8; 4]);

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What every table begins with.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    signature: [u8; 4],
    len_bytes: U32,
    revision: u8,
    checksum: u8,
    oem: [u8; 6],
    oem_table: [u8; 8],
    oem_revision: U32,
    creator: U32,
    creator_revision: U32,
}

/// The length of the header that every table begins with.
pub const HEADER_BYTES: usize = size_of::<Header>();

/// A table that is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table<'m> {
    /// Its name.
    pub signature: Signature,
    /// Where it lies.
    pub phys: u64,
    /// All its bytes, with the header.
    pub bytes: &'m [u8],
}

/// A table, or the list of tables, that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AcpiError {
    /// Neither did the boot loader give a root pointer, nor is one in the BIOS area.
    NoRootPointer,
    /// The root pointer is none.
    RootPointer {
        /// Where it should be.
        phys: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The root table has another name than the root pointer's revision asks for.
    RootSignature {
        /// Where it lies.
        phys: u64,
        /// Its name.
        found: Signature,
    },
    /// An address at which no memory can be reached.
    Unreachable {
        /// The address.
        phys: u64,
        /// How many bytes should be there.
        len_bytes: u32,
    },
    /// A length that is shorter than the header, or beyond the bound.
    Length {
        /// The table's name.
        signature: Signature,
        /// Where it lies.
        phys: u64,
        /// What it says.
        len_bytes: u32,
    },
    /// Bytes that do not sum up to 0.
    Checksum {
        /// The table's name.
        signature: Signature,
        /// Where it lies.
        phys: u64,
        /// What they sum up to.
        sum: u8,
    },
    /// No such table.
    Absent {
        /// The name asked for.
        signature: Signature,
    },
    /// A table that is too short for its own content.
    Content {
        /// The table's name.
        signature: Signature,
        /// Its length.
        len_bytes: usize,
        /// What is wrong.
        reason: &'static str,
    },
}

impl fmt::Display for AcpiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRootPointer => {
                f.write_str("no ACPI root pointer: neither from the boot loader nor in the BIOS area")
            }
            Self::RootPointer { phys, reason } => write!(f, "the ACPI root pointer at {phys:#x} {reason}"),
            Self::RootSignature { phys, found } => {
                write!(
                    f,
                    "the ACPI root table at {phys:#x} is named {found}, not XSDT or RSDT as the root pointer says"
                )
            }
            Self::Unreachable { phys, len_bytes } => {
                write!(
                    f,
                    "an ACPI table should be at {phys:#x}, where {len_bytes:#x} bytes cannot be reached"
                )
            }
            Self::Length { signature, phys, len_bytes } => write!(
                f,
                "ACPI table {signature} at {phys:#x} states a length of {len_bytes:#x} bytes, outside {HEADER_BYTES:#x}..={MAX_TABLE_BYTES:#x}"
            ),
            Self::Checksum { signature, phys, sum } => {
                write!(
                    f,
                    "ACPI table {signature} at {phys:#x} has a wrong checksum: its bytes sum up to {sum:#x}, not 0"
                )
            }
            Self::Absent { signature } => write!(f, "this machine has no ACPI table {signature}"),
            Self::Content { signature, len_bytes, reason } => {
                write!(f, "ACPI table {signature} of {len_bytes:#x} bytes {reason}")
            }
        }
    }
}

impl core::error::Error for AcpiError {}

/// One entry of the root table.
#[derive(Clone, Copy, Debug)]
struct Entry<'m> {
    signature: Option<Signature>,
    table: Result<Table<'m>, AcpiError>,
}

/// The machine's tables.
#[derive(Clone, Debug)]
pub struct Tables<'m> {
    /// The root table first.
    entries: Vec<Entry<'m>>,
    root_pointer: PhysRange,
}

impl<'m> Tables<'m> {
    /// Finds all tables from the root pointer at `rsdp`, or from one in the BIOS area.
    ///
    /// # Errors
    ///
    /// [`AcpiError`] when there is no root pointer, or it or the root table is broken. Other tables that are broken are
    /// in [`Tables::broken`].
    pub fn find_all(memory: &'m impl PhysicalMemory, rsdp: Option<u64>) -> Result<Self, AcpiError> {
        let root = root::find(memory, rsdp)?;
        let table = read_table(memory, root.table_phys).table?;
        if table.signature != root.kind.signature() {
            return Err(AcpiError::RootSignature { phys: table.phys, found: table.signature });
        }
        let mut entries = Vec::new();
        entries.push(Entry { signature: Some(table.signature), table: Ok(table) });
        let pointers = root.kind.pointers(&table.bytes[HEADER_BYTES..]);
        // A null pointer is an empty place in the list, not a table that is missing.
        entries
            .extend(pointers.filter(|phys| *phys != 0).take(MAX_TABLES).map(|phys| read_table(memory, phys)));
        Ok(Self { entries, root_pointer: root.range })
    }

    /// The tables that are whole, the root table first.
    pub fn iter(&self) -> impl Iterator<Item = Table<'m>> + '_ {
        self.entries.iter().filter_map(|entry| entry.table.ok())
    }

    /// What is wrong with the tables that are broken.
    pub fn broken(&self) -> impl Iterator<Item = AcpiError> + '_ {
        self.entries.iter().filter_map(|entry| entry.table.err())
    }

    /// The bytes of the first whole table with this name, header included.
    ///
    /// # Errors
    ///
    /// [`AcpiError::Absent`], or what is wrong with the table if the only one with that name is broken.
    pub fn find(&self, signature: Signature) -> Result<&'m [u8], AcpiError> {
        if let Some(table) = self.iter().find(|table| table.signature == signature) {
            return Ok(table.bytes);
        }
        let broken = self.entries.iter().find(|entry| entry.signature == Some(signature));
        Err(broken.and_then(|entry| entry.table.err()).unwrap_or(AcpiError::Absent { signature }))
    }

    /// Where the root pointer and the whole tables lie, for keeping them.
    pub fn ranges(&self) -> impl Iterator<Item = PhysRange> + '_ {
        let tables =
            self.iter().filter_map(|table| PhysRange::from_len(table.phys, table.bytes.len() as u64));
        core::iter::once(self.root_pointer).chain(tables)
    }
}

fn read_table(memory: &impl PhysicalMemory, phys: u64) -> Entry<'_> {
    let Some(header) = read_header(memory, phys) else {
        let error = AcpiError::Unreachable { phys, len_bytes: HEADER_BYTES as u32 };
        return Entry { signature: None, table: Err(error) };
    };
    let signature = Signature(header.signature);
    Entry { signature: Some(signature), table: read_body(memory, phys, signature, header.len_bytes.get()) }
}

fn read_header(memory: &impl PhysicalMemory, phys: u64) -> Option<&Header> {
    Header::ref_from_bytes(memory.bytes(phys, HEADER_BYTES)?).ok()
}

fn read_body(
    memory: &impl PhysicalMemory,
    phys: u64,
    signature: Signature,
    len_bytes: u32,
) -> Result<Table<'_>, AcpiError> {
    if !(HEADER_BYTES as u32..=MAX_TABLE_BYTES).contains(&len_bytes) {
        return Err(AcpiError::Length { signature, phys, len_bytes });
    }
    let bytes = memory.bytes(phys, len_bytes as usize).ok_or(AcpiError::Unreachable { phys, len_bytes })?;
    match sum(bytes) {
        0 => Ok(Table { signature, phys, bytes }),
        sum => Err(AcpiError::Checksum { signature, phys, sum }),
    }
}

/// The sum of all bytes, which a good table makes 0.
fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[cfg(test)]
pub(crate) mod tests;
