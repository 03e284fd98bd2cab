//! A virtio function's registers: from capabilities over BARs to the driver's transport.

use virtio_iommu::transport::pci::{
    CapabilityError, PciTransport, Region, Regions, Structure, VirtioCapabilities,
};

use super::BringUpError;
use crate::machine::Machine;
use crate::pci::config::ConfigSpace;
use crate::pci::function::Function;

/// Maps the structures of a modern virtio function and turns its memory decoding on.
///
/// # Errors
///
/// [`BringUpError`], of its capabilities and regions.
pub fn transport(machine: &Machine, function: &Function) -> Result<PciTransport, BringUpError> {
    let config = machine.pci.config();
    let found = VirtioCapabilities::read(|offset| config.read32(function.address, offset));
    let found = found.map_err(BringUpError::Capabilities)?;
    let region = |structure: Structure| {
        let bar = machine.map_bar(function, structure.bar).map_err(BringUpError::Bar)?;
        let (offset, len) = (structure.offset as usize, structure.len as usize);
        let inside = offset.checked_add(len).is_some_and(|end| end <= bar.len_bytes());
        if !inside {
            return Err(BringUpError::StructureOutside(structure));
        }
        // SAFETY: inside the BAR's mapping, by the check above.
        Ok(Region { ptr: unsafe { bar.base().add(offset) }, len })
    };
    let regions = Regions {
        common: region(found.common)?,
        notify: region(found.notify)?,
        notify_multiplier: found.notify_multiplier,
        isr: region(found.isr)?,
        device: region(found.device.ok_or(BringUpError::Capabilities(CapabilityError::Missing(4)))?)?,
    };
    // SAFETY: mapped for good with decoding on, and the caller has the device for itself.
    unsafe { PciTransport::new(regions) }.map_err(BringUpError::Region)
}
