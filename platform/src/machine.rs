//! The machine, discovered: ACPI tables, configuration space, functions with their BARs.

use alloc::vec::Vec;
use core::fmt;

use crate::acpi::{AcpiError, Tables, mcfg};
use crate::arch::mmu;
use crate::boot::BootInfo;
use crate::memory::physical::MachineMemory;
use crate::memory::{MapRegistersError, map_registers};
use crate::mmio::Mmio;
use crate::pci::assign::{AssignError, HostWindow};
use crate::pci::ecam::Ecam;
use crate::pci::function::{Function, MemoryDecode};
use crate::pci::{Pci, PciAddress};

static MEMORY: MachineMemory = MachineMemory;

/// What the kernel found.
#[derive(Debug)]
pub struct Machine {
    /// The ACPI tables.
    pub tables: Tables<'static>,
    /// The PCI functions.
    pub pci: Pci<Ecam>,
    /// BARs that have no address. Their functions may work without.
    pub unassigned: Vec<AssignError>,
}

/// A machine that the kernel cannot use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiscoverError {
    /// The tables, or the one that says where configuration space is.
    Acpi(AcpiError),
    /// Configuration space could not be mapped.
    Ecam(MapRegistersError),
}

impl fmt::Display for DiscoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Acpi(error) => error.fmt(f),
            Self::Ecam(error) => write!(f, "PCI configuration space: {error}"),
        }
    }
}

impl core::error::Error for DiscoverError {}

/// Registers of a function that could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BarError {
    /// The function has no such memory BAR, or it has no address.
    Absent {
        /// The function.
        function: PciAddress,
        /// The BAR's number.
        bar: u8,
    },
    /// It could not be mapped.
    Map(MapRegistersError),
}

impl fmt::Display for BarError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent { function, bar } => {
                write!(f, "PCI function {function} has no memory BAR {bar} with an address")
            }
            Self::Map(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for BarError {}

impl Machine {
    /// Finds the tables and the functions, and gives addresses to BARs that have none.
    ///
    /// No function's bus mastering is touched; see [`Pci::quiesce_all`].
    ///
    /// # Errors
    ///
    /// [`DiscoverError`].
    pub fn discover(info: &BootInfo) -> Result<Self, DiscoverError> {
        let tables = Tables::find_all(&MEMORY, info.rsdp).map_err(DiscoverError::Acpi)?;
        let areas = tables.find(mcfg::SIGNATURE).and_then(mcfg::parse).map_err(DiscoverError::Acpi)?;
        // SAFETY: MCFG is firmware's word for where configuration space is, and the page tables refuse RAM.
        let ecam = unsafe { Ecam::map(&areas) }.map_err(DiscoverError::Ecam)?;
        let mut pci = Pci::scan(ecam);
        let ecam_ranges = areas.iter().map(|area| area.range);
        let host = HostWindow::new(&info.memory_map, ecam_ranges, mmu::highest_reachable_address());
        let unassigned = pci.assign_bars(&host);
        Ok(Self { tables, pci, unassigned })
    }

    /// Maps a memory BAR of a function and turns its memory decoding on.
    ///
    /// # Errors
    ///
    /// [`BarError`].
    pub fn map_bar(&self, function: &Function, index: u8) -> Result<Mmio, BarError> {
        let absent = BarError::Absent { function: function.address, bar: index };
        let range = function.bar(index).and_then(|bar| bar.range()).ok_or(absent)?;
        // SAFETY: a BAR's range holds the function's registers, and assignment kept it clear of RAM.
        let registers = unsafe { map_registers(range.start(), range.len_bytes()) }.map_err(BarError::Map)?;
        self.pci.set_memory_decode(function.address, MemoryDecode::On);
        Ok(registers)
    }
}
