//! Base address registers: what a function wants to have mapped, and where.

use alloc::vec::Vec;
use core::fmt;

use pci_types::PciAddress;

use super::config::{ConfigSpace, offset};
use super::function::with_decode_off;
use crate::range::PhysRange;

const IO_SPACE: u32 = 1;
const PREFETCHABLE: u32 = 8;
const MEMORY_TYPE: u32 = 0b110;
const MEMORY_64: u32 = 0b100;
const MEMORY_RESERVED: u32 = 0b110;
const IO_ADDRESS: u32 = !0b11;
const MEMORY_ADDRESS: u32 = !0b1111;

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere.
    Memory64,
    /// I/O ports.
    Io,
}

/// Whether reads of a memory BAR have no side effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefetch {
    /// They have none.
    Allowed,
    /// They may have some.
    NotAllowed,
}

/// One BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its number, 0 to 5; a 64-bit one takes the next number too.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Whether it is prefetchable.
    pub prefetch: Prefetch,
    /// Its address, if it has one.
    pub address: Option<u64>,
    /// Its length, a power of two.
    pub len_bytes: u64,
}

impl Bar {
    /// The memory that it decodes; `None` for I/O ports and without an address.
    pub fn range(&self) -> Option<PhysRange> {
        if self.kind == BarKind::Io { None } else { PhysRange::from_len(self.address?, self.len_bytes) }
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match (self.kind, self.prefetch) {
            (BarKind::Io, _) => "I/O",
            (BarKind::Memory32, Prefetch::NotAllowed) => "32-bit",
            (BarKind::Memory32, Prefetch::Allowed) => "32-bit prefetchable",
            (BarKind::Memory64, Prefetch::NotAllowed) => "64-bit",
            (BarKind::Memory64, Prefetch::Allowed) => "64-bit prefetchable",
        };
        write!(f, "BAR {} {kind}, {:#x} bytes ", self.index, self.len_bytes)?;
        match self.address {
            Some(address) => write!(f, "at {address:#x}"),
            None => f.write_str("without an address"),
        }
    }
}

/// Reads and sizes a function's BARs, with its decoding off meanwhile.
pub(super) fn read_all(config: &impl ConfigSpace, address: PciAddress, count: u8) -> Vec<Bar> {
    with_decode_off(config, address, || {
        let mut bars = Vec::new();
        let mut index = 0;
        while index < count {
            let (bar, taken) = read_one(config, address, index, count);
            bars.extend(bar);
            index += taken;
        }
        bars
    })
}

/// Writes the address of a memory BAR, with decoding off meanwhile, and gives what it then reads as.
pub(super) fn write_address(config: &impl ConfigSpace, function: PciAddress, bar: &Bar, address: u64) -> u64 {
    let low = offset_of(bar.index);
    with_decode_off(config, function, || {
        config.write32(function, low, address as u32);
        let upper = if bar.kind == BarKind::Memory64 {
            config.write32(function, low + 4, (address >> 32) as u32);
            u64::from(config.read32(function, low + 4)) << 32
        } else {
            0
        };
        upper | u64::from(config.read32(function, low) & MEMORY_ADDRESS)
    })
}

fn offset_of(index: u8) -> u16 {
    offset::BAR0 + 4 * u16::from(index)
}

/// Reads one BAR; gives it, if it is implemented, and how many registers it takes.
fn read_one(config: &impl ConfigSpace, address: PciAddress, index: u8, count: u8) -> (Option<Bar>, u8) {
    let (value, writable) = probe(config, address, index);
    if value & IO_SPACE != 0 {
        // The upper half of an I/O BAR may be fixed at 0, which would look like an enormous length.
        let writable = if writable >> 16 == 0 { writable | 0xffff_0000 } else { writable };
        let bar = length(u64::from(writable & IO_ADDRESS) | 0xffff_ffff_0000_0000).map(|len_bytes| Bar {
            index,
            kind: BarKind::Io,
            prefetch: Prefetch::NotAllowed,
            address: assigned(u64::from(value & IO_ADDRESS)),
            len_bytes,
        });
        return (bar.filter(|_| writable & 0xffff & IO_ADDRESS != 0), 1);
    }
    let prefetch = if value & PREFETCHABLE != 0 { Prefetch::Allowed } else { Prefetch::NotAllowed };
    let low = u64::from(value & MEMORY_ADDRESS);
    let low_writable = u64::from(writable & MEMORY_ADDRESS);
    match value & MEMORY_TYPE {
        MEMORY_64 if index + 1 < count => {
            let (high, high_writable) = probe(config, address, index + 1);
            let mask = u64::from(high_writable) << 32 | low_writable;
            let bar = length(mask).map(|len_bytes| Bar {
                index,
                kind: BarKind::Memory64,
                prefetch,
                address: assigned(u64::from(high) << 32 | low),
                len_bytes,
            });
            (bar, 2)
        }
        // A 64-bit BAR in the last register has no upper half, and a reserved type cannot be read at all.
        MEMORY_64 | MEMORY_RESERVED => (None, 1),
        _ => {
            let mask = if low_writable == 0 { 0 } else { low_writable | 0xffff_ffff_0000_0000 };
            let bar = length(mask).map(|len_bytes| Bar {
                index,
                kind: BarKind::Memory32,
                prefetch,
                address: assigned(low),
                len_bytes,
            });
            (bar, 1)
        }
    }
}

/// The register's value, and which of its bits can be written.
fn probe(config: &impl ConfigSpace, address: PciAddress, index: u8) -> (u32, u32) {
    let offset = offset_of(index);
    let value = config.read32(address, offset);
    config.write32(address, offset, u32::MAX);
    let writable = config.read32(address, offset);
    config.write32(address, offset, value);
    (value, writable)
}

/// The length that belongs to the writable address bits: the lowest of them. `None` without any.
fn length(writable: u64) -> Option<u64> {
    (writable != 0).then(|| 1 << writable.trailing_zeros())
}

/// Address 0 is what a BAR holds that nobody wrote.
fn assigned(address: u64) -> Option<u64> {
    (address != 0).then_some(address)
}
