//! Where the virtio-iommu is, and what is behind it, by ACPI's VIOT.

use alloc::string::String;
use alloc::vec::Vec;

use virtio_iommu::EndpointId;
use virtio_iommu::topology::viot::{IommuPlace, PciFunction, Viot};
use virtio_iommu::transport::pci::{DEVICE_ID, VENDOR_ID};

use super::BringUpError;
use crate::machine::Machine;
use crate::pci::PciAddress;
use crate::pci::function::Function;

/// The first IOMMU that VIOT names. Others would have to be brought up each by itself.
pub(super) struct Topology<'m> {
    /// Its function.
    pub(super) iommu: &'m Function,
    /// Its own endpoint number, if the table gives it one.
    pub(super) own: Option<EndpointId>,
    /// The other functions that are behind it, with the numbers that it knows them by.
    pub(super) behind: Vec<(PciAddress, EndpointId)>,
}

/// Reads the table.
///
/// # Errors
///
/// [`BringUpError::NoDevice`], [`BringUpError::NoTopology`], [`BringUpError::Viot`] or [`BringUpError::WrongPlace`].
pub(super) fn read<'m>(
    machine: &'m Machine,
    viot: Result<&[u8], String>,
) -> Result<Topology<'m>, BringUpError> {
    let functions = || machine.pci.with_id(VENDOR_ID, DEVICE_ID);
    let device = functions().next().ok_or(BringUpError::NoDevice)?.address;
    let viot = viot.map_err(|reason| BringUpError::NoTopology { device, reason })?;
    let viot = Viot::parse(viot).map_err(BringUpError::Viot)?;
    let none = || BringUpError::NoTopology { device, reason: String::from("it names no IOMMU") };
    let named = viot.iommus().next().ok_or_else(none)?;
    let wrong = BringUpError::WrongPlace { place: named.place };
    let IommuPlace::Pci(at) = named.place else { return Err(wrong) };
    let iommu = functions().find(|function| place(function) == at).ok_or(wrong)?;
    let others = machine.pci.functions().iter().filter(|function| function.address != iommu.address);
    let behind = others.filter_map(|function| {
        let (id, of) = viot.pci_endpoint(place(function))?;
        (of.node == named.node).then_some((function.address, id))
    });
    Ok(Topology { iommu, own: viot.pci_endpoint(at).map(|(id, _)| id), behind: behind.collect() })
}

fn place(function: &Function) -> PciFunction {
    PciFunction { segment: function.address.segment(), bdf: function.bdf() }
}
