//! Configuration space in memory: 4 KiB for each function, 1 MiB for each bus, where ACPI's MCFG or the device tree says.

use alloc::vec::Vec;

use pci_types::PciAddress;

use super::config::{BusRange, CONFIG_BYTES, ConfigSpace, Width};
use crate::memory::{MapRegistersError, map_registers};
use crate::mmio::Mmio;
use crate::range::PhysRange;

/// The configuration space of one bus.
pub const BUS_BYTES: u64 = 1 << 20;

const DEVICE_BYTES: usize = 8 * CONFIG_BYTES as usize;

/// The configuration space of some buses of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EcamArea {
    /// The segment.
    pub segment: u16,
    /// Its first bus here.
    pub first_bus: u8,
    /// Its last bus here.
    pub last_bus: u8,
    /// The memory, from the first bus to the last.
    pub range: PhysRange,
}

impl EcamArea {
    /// The area that a word describes, of segment 0: `0xBASE` for all buses, or `0xBASE:FIRST-LAST` with bus numbers in
    /// hexadecimal. As in MCFG the base is that of bus 0.
    pub fn from_word(word: &str) -> Option<Self> {
        let (base, buses) = word.split_once(':').unwrap_or((word, "0-ff"));
        let base = u64::from_str_radix(base.strip_prefix("0x")?, 16).ok()?;
        let (first, last) = buses.split_once('-')?;
        let (first_bus, last_bus) = (u8::from_str_radix(first, 16).ok()?, u8::from_str_radix(last, 16).ok()?);
        let count = u64::from(last_bus.checked_sub(first_bus)?) + 1;
        let start = base.checked_add(u64::from(first_bus) * BUS_BYTES)?;
        let range = PhysRange::from_len(start, count * BUS_BYTES)?;
        let usable = base != 0 && base.is_multiple_of(BUS_BYTES);
        usable.then_some(Self { segment: 0, first_bus, last_bus, range })
    }
}

#[derive(Clone, Copy, Debug)]
struct MappedArea {
    area: EcamArea,
    registers: Mmio,
}

/// The machine's configuration space.
#[derive(Clone, Debug)]
pub struct Ecam {
    areas: Vec<MappedArea>,
}

impl Ecam {
    /// Maps all areas.
    ///
    /// # Errors
    ///
    /// [`MapRegistersError`] for the first area that cannot be mapped.
    ///
    /// # Safety
    ///
    /// The areas must be the machine's configuration space.
    pub unsafe fn map(areas: &[EcamArea]) -> Result<Self, MapRegistersError> {
        let map = |area: &EcamArea| {
            // SAFETY: the caller promises that these are registers; no reference is ever made of them.
            let registers = unsafe { map_registers(area.range.start(), area.range.len_bytes()) }?;
            Ok(MappedArea { area: *area, registers })
        };
        Ok(Self { areas: areas.iter().map(map).collect::<Result<_, _>>()? })
    }

    /// The registers of the function's area, and where its own begin.
    fn locate(&self, function: PciAddress, offset: u16, width: Width) -> Option<(Mmio, usize)> {
        if offset >= CONFIG_BYTES || !offset.is_multiple_of(width.bytes()) {
            return None;
        }
        let holds = |area: &EcamArea| {
            area.segment == function.segment() && (area.first_bus..=area.last_bus).contains(&function.bus())
        };
        let mapped = self.areas.iter().find(|mapped| holds(&mapped.area))?;
        let bus = usize::from(function.bus() - mapped.area.first_bus);
        let start = bus * BUS_BYTES as usize
            + usize::from(function.device()) * DEVICE_BYTES
            + usize::from(function.function()) * usize::from(CONFIG_BYTES);
        Some((mapped.registers, start + usize::from(offset)))
    }
}

impl ConfigSpace for Ecam {
    fn read(&self, function: PciAddress, offset: u16, width: Width) -> u32 {
        let Some((registers, at)) = self.locate(function, offset, width) else { return width.all_ones() };
        match width {
            Width::Byte => registers.read8(at).into(),
            Width::Word => registers.read16(at).into(),
            Width::DoubleWord => registers.read32(at),
        }
    }

    fn write(&self, function: PciAddress, offset: u16, width: Width, value: u32) {
        let Some((registers, at)) = self.locate(function, offset, width) else { return };
        match width {
            Width::Byte => registers.write8(at, value as u8),
            Width::Word => registers.write16(at, value as u16),
            Width::DoubleWord => registers.write32(at, value),
        }
    }

    fn buses(&self) -> Vec<BusRange> {
        let range = |mapped: &MappedArea| BusRange {
            segment: mapped.area.segment,
            first: mapped.area.first_bus,
            last: mapped.area.last_bus,
        };
        self.areas.iter().map(range).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_describe_areas() {
        let all = EcamArea::from_word("0xe0000000").expect("a good word");
        assert_eq!((all.segment, all.first_bus, all.last_bus), (0, 0, 255));
        assert_eq!(Some(all.range), PhysRange::from_len(0xe000_0000, 256 * BUS_BYTES));
        let some = EcamArea::from_word("0xe0000000:2-1f").expect("a good word");
        assert_eq!((some.first_bus, some.last_bus), (2, 31));
        assert_eq!(Some(some.range), PhysRange::from_len(0xe020_0000, 30 * BUS_BYTES));
        let others = [
            "",
            "e0000000",
            "0x",
            "0x0",
            "0xe0000001",
            "0xe0000000:",
            "0xe0000000:2",
            "0xe0000000:3-2",
            "0xe0000000:0-100",
        ];
        for word in others {
            assert_eq!(EcamArea::from_word(word), None, "{word}");
        }
        assert_eq!(EcamArea::from_word("0xfffffffffff00000:1-1"), None, "passes the end");
    }
}
