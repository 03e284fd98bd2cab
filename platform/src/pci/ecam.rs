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
