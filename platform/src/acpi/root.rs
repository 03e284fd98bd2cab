//! The root pointer (RSDP) and what it points to.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{AcpiError, Signature, sum};
use crate::memory::physical::PhysicalMemory;
use crate::range::PhysRange;

const MARK: [u8; 8] = *b"RSD PTR ";
/// The area in which a BIOS puts the root pointer, at a multiple of 16.
const BIOS_AREA: core::ops::Range<u64> = 0xe_0000..0x10_0000;
/// The longest root pointer that is accepted. The specification's has 36 bytes.
const MAX_BYTES: u32 = 4096;

/// The root pointer of revision 0.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Pointer {
    mark: [u8; 8],
    checksum: u8,
    oem: [u8; 6],
    revision: u8,
    rsdt: U32,
}

/// What follows in revision 2.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Extension {
    len_bytes: U32,
    xsdt: U64,
    checksum: u8,
    reserved: [u8; 3],
}

/// Which root table there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// 32-bit pointers.
    Rsdt,
    /// 64-bit pointers.
    Xsdt,
}

impl Kind {
    pub(super) fn signature(self) -> Signature {
        Signature(match self {
            Self::Rsdt => *b"RSDT",
            Self::Xsdt => *b"XSDT",
        })
    }

    /// The pointers in a root table's body; what is left over at its end is none.
    pub(super) fn pointers(self, body: &[u8]) -> impl Iterator<Item = u64> {
        let width = match self {
            Self::Rsdt => 4,
            Self::Xsdt => 8,
        };
        body.chunks_exact(width)
            .map(|bytes| bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }
}

/// A root pointer that is whole.
#[derive(Clone, Copy, Debug)]
pub(super) struct Root {
    pub(super) kind: Kind,
    pub(super) table_phys: u64,
    /// Where the root pointer itself lies.
    pub(super) range: PhysRange,
}

/// Takes the root pointer at `rsdp`, or the first good one of the BIOS area.
pub(super) fn find(memory: &impl PhysicalMemory, rsdp: Option<u64>) -> Result<Root, AcpiError> {
    if let Some(phys) = rsdp {
        return read(memory, phys);
    }
    BIOS_AREA.step_by(16).find_map(|phys| read(memory, phys).ok()).ok_or(AcpiError::NoRootPointer)
}

fn read(memory: &impl PhysicalMemory, phys: u64) -> Result<Root, AcpiError> {
    let wrong = |reason| AcpiError::RootPointer { phys, reason };
    let bytes = memory.bytes(phys, size_of::<Pointer>()).ok_or(wrong("cannot be reached"))?;
    let pointer = Pointer::ref_from_bytes(bytes).map_err(|_| wrong("cannot be reached"))?;
    if pointer.mark != MARK {
        return Err(wrong("does not begin with \"RSD PTR \""));
    }
    if sum(bytes) != 0 {
        return Err(wrong("has a wrong checksum"));
    }
    let short = PhysRange::from_len(phys, bytes.len() as u64).ok_or(wrong("passes the end of memory"))?;
    if pointer.revision < 2 {
        let table_phys = u64::from(pointer.rsdt.get());
        return Ok(Root { kind: Kind::Rsdt, table_phys, range: short });
    }
    let extension_phys = short.last().checked_add(1).ok_or(wrong("passes the end of memory"))?;
    let extension = memory.bytes(extension_phys, size_of::<Extension>()).ok_or(wrong("is cut short"))?;
    let extension = Extension::ref_from_bytes(extension).map_err(|_| wrong("is cut short"))?;
    let len_bytes = extension.len_bytes.get();
    if !((size_of::<Pointer>() + size_of::<Extension>()) as u32..=MAX_BYTES).contains(&len_bytes) {
        return Err(wrong("states a length that it cannot have"));
    }
    let whole = memory.bytes(phys, len_bytes as usize).ok_or(wrong("is cut short"))?;
    if sum(whole) != 0 {
        return Err(wrong("has a wrong extended checksum"));
    }
    let range = PhysRange::from_len(phys, len_bytes.into()).ok_or(wrong("passes the end of memory"))?;
    match extension.xsdt.get() {
        // Allowed by the specification, and of use to nobody else: only the old list is there.
        0 => Ok(Root { kind: Kind::Rsdt, table_phys: pointer.rsdt.get().into(), range }),
        table_phys => Ok(Root { kind: Kind::Xsdt, table_phys, range }),
    }
}
