//! Which IOMMUs there are, where, and what is behind each.
//!
//! From the first of these that says something:
//!
//! ```text
//! the command line   iommu=pci:00:01.0 or iommu=mmio:0x10001000, where firmware says nothing
//! ACPI               VIOT
//! the device tree    iommu-map of each PCI host bridge
//! ```

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use virtio_iommu::EndpointId;

use super::BringUpError;
use crate::command_line::CommandLine;
use crate::machine::{Firmware, Machine};
use crate::pci::PciAddress;

mod device_tree;
mod table;
mod viot;

/// Where an IOMMU's registers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the BARs of a PCI function.
    Pci(PciAddress),
    /// At a physical address, in the layout of virtio-mmio.
    Mmio(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => address.fmt(f),
            Self::Mmio(base) => write!(f, "{base:#x}"),
        }
    }
}

/// Who says what is behind an IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// ACPI's table.
    Viot,
    /// The device tree.
    DeviceTree,
    /// The kernel's command line.
    CommandLine,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Viot => "VIOT",
            Self::DeviceTree => "the device tree",
            Self::CommandLine => "the command line",
        })
    }
}

/// An IOMMU, and what is behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Who says so.
    pub source: Source,
    /// Where it is.
    pub place: Place,
    /// Its own endpoint number, if it is given one.
    pub own: Option<EndpointId>,
    /// The functions that are behind it, without itself, with the numbers that it knows them by.
    pub behind: Vec<(PciAddress, EndpointId)>,
}

/// Finds every IOMMU that has something to say where it is; never none.
///
/// `viot` is ACPI's table, or why there is none.
///
/// # Errors
///
/// [`BringUpError`] of discovery.
pub fn find(
    machine: &Machine,
    command_line: &CommandLine,
    viot: Result<&[u8], String>,
) -> Result<Vec<Topology>, BringUpError> {
    if let Some(word) = command_line.get("iommu") {
        return Ok(alloc::vec![table::read(&machine.pci, word)?]);
    }
    match &machine.firmware {
        Firmware::Acpi(_) => viot::read(&machine.pci, viot),
        Firmware::DeviceTree { tree, bridges } => device_tree::read(&machine.pci, tree, bridges),
    }
}

#[cfg(test)]
mod machines;
#[cfg(test)]
mod tests;
