//! Where the interrupt line of a device goes, by what firmware says.

use alloc::format;
use alloc::string::ToString;

use super::{Firmware, Machine};
use crate::arch::interrupts as controller;
use crate::firmware::device_tree::interrupts::{Pin, of_node, of_pin};
use crate::firmware::device_tree::pci::HostBridge;
use crate::firmware::device_tree::{DeviceTree, DeviceTreeError};
use crate::interrupts::{InterruptError, Line, Trigger};
use crate::pci::PciAddress;
use crate::pci::config::{ConfigSpace, offset};

/// What firmware writes where a line is not connected.
const NO_LINE: u8 = 0xff;

impl Machine {
    /// The line of a PCI function. By the device tree's map, or on an ACPI machine by the number that firmware left in the
    /// function's register, which is an input of the 8259s: where else a line may go only AML says.
    ///
    /// # Errors
    ///
    /// [`InterruptError::NotConnected`].
    pub fn line_of_function(&self, address: PciAddress) -> Result<Line, InterruptError> {
        let (root, pin) = self
            .pci
            .pin_at_root(address)
            .ok_or_else(|| not_connected(format!("PCI function {address} has no interrupt pin")))?;
        match &self.firmware {
            Firmware::Acpi(_) => match self.pci.config().read8(address, offset::INTERRUPT_LINE) {
                0 | NO_LINE => Err(not_connected(format!("firmware gave PCI function {address} no line"))),
                line => Ok(Line { number: line.into(), trigger: Trigger::Level }),
            },
            Firmware::DeviceTree { tree, bridges } => {
                let bridge = bridges.iter().find(|bridge| bridge.area.segment == root.segment());
                let bridge =
                    bridge.ok_or_else(|| not_connected(format!("no host bridge leads to {root}")))?;
                of_function(tree, bridge, root, pin)
            }
        }
    }

    /// The line of a device with registers at `base`, by its node in the device tree.
    ///
    /// # Errors
    ///
    /// [`InterruptError::NotConnected`].
    pub fn line_of_registers(&self, base: u64) -> Result<Line, InterruptError> {
        let Firmware::DeviceTree { tree, .. } = &self.firmware else {
            return Err(not_connected(
                "ACPI says the lines of devices outside of PCI in AML only".to_string(),
            ));
        };
        let starts_there = |range: &crate::range::PhysRange| range.start() == base;
        let mut nodes = tree.nodes();
        let node =
            nodes.find(|node| node.registers().is_ok_and(|ranges| ranges.first().is_some_and(starts_there)));
        let node = node
            .ok_or_else(|| not_connected(format!("no node of the device tree has registers at {base:#x}")))?;
        line(of_node(tree, &node))
    }
}

fn of_function(
    tree: &DeviceTree<'_>,
    bridge: &HostBridge<'_>,
    root: PciAddress,
    pin: u8,
) -> Result<Line, InterruptError> {
    let pin = Pin { bus: root.bus(), device: root.device(), function: root.function(), pin };
    line(of_pin(tree, &bridge.node, pin))
}

fn line(specifier: Result<alloc::vec::Vec<u32>, DeviceTreeError>) -> Result<Line, InterruptError> {
    let specifier = specifier.map_err(|error| not_connected(error.to_string()))?;
    let unknown = || not_connected(format!("the controller's driver does not know {specifier:x?}"));
    controller::line(&specifier).ok_or_else(unknown)
}

fn not_connected(reason: alloc::string::String) -> InterruptError {
    InterruptError::NotConnected { reason }
}
