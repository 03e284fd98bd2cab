//! The machine, discovered: ACPI tables or device tree, configuration space, functions with their BARs.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::acpi::{AcpiError, Tables, mcfg};
use crate::arch::mmu;
use crate::boot::BootInfo;
use crate::command_line::CommandLine;
use crate::firmware::device_tree::pci::{HostBridge, host_bridges};
use crate::firmware::device_tree::{DeviceTree, DeviceTreeError};
use crate::memory::map::MemoryMap;
use crate::memory::physical::MachineMemory;
use crate::memory::{MapRegistersError, map_registers};
use crate::mmio::Mmio;
use crate::pci::assign::{AssignError, HostWindow};
use crate::pci::ecam::{Ecam, EcamArea};
use crate::pci::function::{Function, MemoryDecode};
use crate::pci::{Pci, PciAddress};
use crate::range::PhysRange;

mod line;

static MEMORY: MachineMemory = MachineMemory;

/// What the kernel found.
#[derive(Debug)]
pub struct Machine {
    /// What firmware says.
    pub firmware: Firmware,
    /// The PCI functions.
    pub pci: Pci<Ecam>,
    /// BARs that have no address. Their functions may work without.
    pub unassigned: Vec<AssignError>,
}

/// What firmware says about the machine.
#[derive(Debug)]
pub enum Firmware {
    /// ACPI tables.
    Acpi(Tables<'static>),
    /// A device tree.
    DeviceTree {
        /// The tree.
        tree: DeviceTree<'static>,
        /// The PCI host bridges in it.
        bridges: Vec<HostBridge<'static>>,
    },
}

impl Firmware {
    /// Reads ACPI's tables, if the boot loader gave a root pointer or no device tree, and else the device tree.
    fn find(info: &BootInfo) -> Result<Self, DiscoverError> {
        match info.device_tree {
            Some(range) if info.rsdp.is_none() => {
                let tree = DeviceTree::read(&MEMORY, range.start()).map_err(DiscoverError::DeviceTree)?;
                let bridges = host_bridges(&tree).map_err(DiscoverError::DeviceTree)?;
                Ok(Self::DeviceTree { tree, bridges })
            }
            _ => Tables::find_all(&MEMORY, info.rsdp).map(Self::Acpi).map_err(DiscoverError::Acpi),
        }
    }

    /// Where configuration space is. The word `ecam=` on the command line says it where firmware does in AML only.
    fn configuration_space(&self, command_line: &CommandLine) -> Result<Vec<EcamArea>, DiscoverError> {
        if let Some(word) = command_line.get("ecam") {
            let area = EcamArea::from_word(word);
            return Ok(alloc::vec![area.ok_or_else(|| DiscoverError::Word { word: word.into() })?]);
        }
        match self {
            Self::Acpi(tables) => {
                tables.find(mcfg::SIGNATURE).and_then(mcfg::parse).map_err(DiscoverError::Acpi)
            }
            Self::DeviceTree { bridges, .. } => Ok(bridges.iter().map(|bridge| bridge.area).collect()),
        }
    }

    /// The addresses that BARs can be given.
    fn windows(&self, map: &MemoryMap, areas: &[EcamArea]) -> Vec<HostWindow> {
        let ecam: Vec<PhysRange> = areas.iter().map(|area| area.range).collect();
        let highest = mmu::highest_reachable_address();
        match self {
            Self::Acpi(_) => alloc::vec![HostWindow::new(map, ecam, highest)],
            Self::DeviceTree { bridges, .. } => {
                let window = |bridge: &HostBridge<'_>| {
                    let (segment, windows) = (bridge.area.segment, bridge.windows.iter().copied());
                    HostWindow::of_bridge(segment, windows, map, ecam.iter().copied(), highest)
                };
                bridges.iter().map(window).collect()
            }
        }
    }
}

/// A machine that the kernel cannot use.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiscoverError {
    /// The tables, or the one that says where configuration space is.
    Acpi(AcpiError),
    /// The device tree, or the node that says where configuration space is.
    DeviceTree(DeviceTreeError),
    /// The word on the command line describes no configuration space.
    Word {
        /// The word's value.
        word: String,
    },
    /// Configuration space could not be mapped.
    Ecam(MapRegistersError),
}

impl fmt::Display for DiscoverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Acpi(error) => error.fmt(f),
            Self::DeviceTree(error) => error.fmt(f),
            Self::Word { word } => write!(
                f,
                "command line: ecam={word} describes no PCI configuration space; it can be 0xBASE, a multiple of 1 MiB, \
                 with :FIRST-LAST for its buses"
            ),
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
    /// Finds what firmware says and the functions, numbers buses that have no number, and gives addresses to BARs that
    /// have none.
    ///
    /// No function's bus mastering is touched; see [`Pci::quiesce_all`].
    ///
    /// # Errors
    ///
    /// [`DiscoverError`].
    pub fn discover(info: &BootInfo) -> Result<Self, DiscoverError> {
        let firmware = Firmware::find(info)?;
        let areas = firmware.configuration_space(&info.command_line)?;
        // SAFETY: firmware says that configuration space is there, and the page tables refuse RAM.
        let ecam = unsafe { Ecam::map(&areas) }.map_err(DiscoverError::Ecam)?;
        let mut pci = Pci::scan(ecam);
        let windows = firmware.windows(&info.memory_map, &areas);
        let unassigned = windows.iter().flat_map(|window| pci.assign_bars(window)).collect();
        pci.isolate();
        Ok(Self { firmware, pci, unassigned })
    }

    /// Looks again at a bus whose devices may have come or gone, and gives addresses to the BARs of new ones; gives those
    /// that could not be assigned. Bus mastering of a new device is off.
    ///
    /// # Errors
    ///
    /// [`DiscoverError`].
    pub fn look_again(&mut self, info: &BootInfo, bus: u8) -> Result<Vec<AssignError>, DiscoverError> {
        let areas = self.firmware.configuration_space(&info.command_line)?;
        let windows = self.firmware.windows(&info.memory_map, &areas);
        self.pci.look_again(0, bus);
        let errors = windows.iter().flat_map(|window| self.pci.assign_bars(window));
        let errors = errors.filter(|error| error.function.bus() == bus).collect();
        self.pci.isolate();
        Ok(errors)
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
