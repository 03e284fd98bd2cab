//! An IOMMU's registers as the driver's transport: a virtio function's, from capabilities over BARs, or those of
//! virtio-mmio.

use alloc::boxed::Box;

use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::Transport as _;
use virtio_drivers::transport::mmio::{MmioTransport, MmioVersion};
use virtio_iommu::transport::Transport;
use virtio_iommu::transport::pci::{
    CapabilityError, PciTransport, Region, Regions, Structure, VirtioCapabilities,
};
use virtio_iommu::transport::virtio_drivers::Adapter;

use super::BringUpError;
use super::topology::Place;
use crate::lock::InterruptsOff;
use crate::machine::Machine;
use crate::memory::map_registers;
#[cfg(feature = "contexts")]
use crate::mmio::Mmio;
use crate::pci::PciAddress;
use crate::pci::config::ConfigSpace;
use crate::pci::function::Function;

/// The length of virtio-mmio's registers, with room for the configuration.
const MMIO_BYTES: u64 = 0x200;

/// The transport over virtio-mmio, for use in handlers of interrupts too.
pub(super) type MmioAdapter = Adapter<InterruptsOff, MmioTransport<'static>>;

/// Maps the structures of a modern virtio function and turns its memory decoding on.
///
/// # Errors
///
/// [`BringUpError`], of its capabilities and regions.
pub fn transport(machine: &Machine, function: &Function) -> Result<PciTransport, BringUpError> {
    transport_over(regions(machine, function)?)
}

/// The same for a function whose configuration belongs to the driver up to `own_len` bytes, and what lies behind that, which is
/// somebody else's: nothing where it is not 8-byte aligned.
///
/// # Errors
///
/// As [`transport`].
#[cfg(feature = "contexts")]
pub fn transport_apart(
    machine: &Machine,
    function: &Function,
    own_len: usize,
) -> Result<(PciTransport, Mmio), BringUpError> {
    let regions = regions(machine, function)?;
    let Region { ptr, len } = regions.device;
    let own_len = own_len.min(len);
    // SAFETY: inside the region.
    let behind = unsafe { ptr.add(own_len) };
    let is_aligned = behind.addr().get().is_multiple_of(8);
    // SAFETY: mapped for good, and the transport below does not know of it. What is not aligned is no register.
    let rest = unsafe { Mmio::new(behind, if is_aligned { len - own_len } else { 0 }) };
    let own = Regions { device: Region { ptr, len: own_len }, ..regions };
    Ok((transport_over(own)?, rest))
}

fn transport_over(regions: Regions) -> Result<PciTransport, BringUpError> {
    // SAFETY: mapped for good with decoding on, and the caller has the device for itself.
    unsafe { PciTransport::new(regions) }.map_err(BringUpError::Region)
}

/// Maps the structures of a modern virtio function and turns its memory decoding on.
fn regions(machine: &Machine, function: &Function) -> Result<Regions, BringUpError> {
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
    Ok(Regions {
        common: region(found.common)?,
        notify: region(found.notify)?,
        notify_multiplier: found.notify_multiplier,
        isr: region(found.isr)?,
        device: region(found.device.ok_or(BringUpError::Capabilities(CapabilityError::Missing(4)))?)?,
    })
}

/// The transport of an IOMMU on PCI.
pub(super) fn pci(machine: &Machine, address: PciAddress) -> Result<PciTransport, BringUpError> {
    let function = machine.pci.at(address).ok_or(BringUpError::NotThere { place: Place::Pci(address) })?;
    transport(machine, function)
}

/// The transport of an IOMMU with virtio-mmio's registers at `base`.
pub(super) fn mmio(base: u64) -> Result<MmioAdapter, BringUpError> {
    let place = Place::Mmio(base);
    // SAFETY: firmware, or the command line, says that a device's registers are there; no reference is made of them.
    let registers = unsafe { map_registers(base, MMIO_BYTES) }.map_err(BringUpError::Registers)?;
    // SAFETY: mapped for good, aligned, and as long as said.
    let transport = unsafe { MmioTransport::new(registers.base().cast(), registers.len_bytes()) };
    let transport = transport.map_err(|error| BringUpError::Mmio { base, error })?;
    if transport.device_type() != DeviceType::IOMMU {
        return Err(BringUpError::NotThere { place });
    }
    if transport.version() != MmioVersion::Modern {
        return Err(BringUpError::Legacy { base });
    }
    Ok(Adapter::new(transport))
}

/// Either of them.
pub(super) fn any(machine: &Machine, place: Place) -> Result<Box<dyn Transport>, BringUpError> {
    match place {
        Place::Pci(address) => Ok(Box::new(pci(machine, address)?)),
        Place::Mmio(base) => Ok(Box::new(mmio(base)?)),
    }
}
