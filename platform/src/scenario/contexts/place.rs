//! Where the device is: in this kernel, or on the machine's bus.

use alloc::boxed::Box;
use alloc::string::String;

use virtio_iommu::transport::Transport;
use virtio_iommu::transport::pci::{DEVICE_ID, VENDOR_ID};
use virtio_iommu_model::{Config, Device, Endpoint};

use super::agents::{Agents, WINDOW, Window};
use super::{AGENTS, GUEST_BASE, GUEST_PAGES, text};
use crate::guest::{Guest, VirtualIommu};
use crate::iommu;
use crate::machine::Machine;
use crate::pci::PciAddress;
use crate::pci::function::BusMaster;
use crate::scenario::setup;

/// A device of the draft, the memory that it and its driver share, and the agents behind it.
pub(super) struct Place {
    pub(super) transport: Box<dyn Transport>,
    pub(super) guest: Guest,
    pub(super) agents: Agents,
}

impl Place {
    /// A device that is software in a guest inside this kernel.
    pub(super) fn in_software() -> Result<Self, String> {
        let guest = Guest::new(GUEST_BASE, GUEST_PAGES, 1).map_err(text)?;
        let mut device = Device::new(Config { bypass: false, ..Config::contexts() });
        for agent in AGENTS {
            device.add_endpoint(Endpoint::new(agent.get()));
        }
        let device = VirtualIommu::new(device, guest.clone());
        Ok(Self { transport: Box::new(device.clone()), guest, agents: Agents::Software(device) })
    }

    /// The machine's own virtio-iommu on PCI, where it has agents behind it, and where it is.
    pub(super) fn on_bus(machine: &Machine) -> Result<(Self, PciAddress), String> {
        let function = setup::find(machine, VENDOR_ID, DEVICE_ID, "virtio-iommu")?;
        machine.pci.quiesce_all();
        machine.pci.set_bus_master(function.address, BusMaster::On);
        let (transport, registers) = iommu::transport_apart(machine, function, WINDOW).map_err(text)?;
        let agents = Agents::Window(Window::new(registers)?);
        let guest = Guest::at_home(GUEST_PAGES).map_err(text)?;
        Ok((Self { transport: Box::new(transport), guest, agents }, function.address))
    }
}
