//! By ACPI's VIOT.

use alloc::string::String;
use alloc::vec::Vec;

use virtio_iommu::topology::viot::{IommuPlace, PciFunction, Viot};
use virtio_iommu::transport::pci::{DEVICE_ID, VENDOR_ID};

use super::{Place, Source, Topology};
use crate::iommu::BringUpError;
use crate::pci::config::ConfigSpace;
use crate::pci::function::Function;
use crate::pci::{Pci, PciAddress};

/// The most IOMMUs that are taken.
const MAX_IOMMUS: usize = 16;

/// Reads the table.
///
/// # Errors
///
/// [`BringUpError::NoDevice`], [`BringUpError::NoTopology`], [`BringUpError::Viot`] or [`BringUpError::WrongPlace`].
pub(super) fn read<C: ConfigSpace>(
    pci: &Pci<C>,
    viot: Result<&[u8], String>,
) -> Result<Vec<Topology>, BringUpError> {
    let device = pci.with_id(VENDOR_ID, DEVICE_ID).next().map(|function| Place::Pci(function.address));
    let without = |reason: String| match device {
        Some(place) => BringUpError::NoTopology { place, source: Source::Viot, reason },
        None => BringUpError::NoDevice,
    };
    let viot = Viot::parse(viot.map_err(without)?).map_err(BringUpError::Viot)?;
    let mut found = Vec::new();
    for named in viot.iommus().take(MAX_IOMMUS) {
        let place = match named.place {
            IommuPlace::Pci(at) => {
                let address = address_of(at);
                let is_one = |f: &&Function| (f.vendor, f.device) == (VENDOR_ID, DEVICE_ID);
                pci.at(address).filter(is_one).ok_or(BringUpError::WrongPlace { place: named.place })?;
                Place::Pci(address)
            }
            IommuPlace::Mmio(base) => Place::Mmio(base),
        };
        let own = match named.place {
            IommuPlace::Pci(at) => viot.pci_endpoint(at).map(|(id, _)| id),
            IommuPlace::Mmio(_) => None,
        };
        let others = pci.functions().iter().filter(|function| Place::Pci(function.address) != place);
        let behind = others.filter_map(|function| {
            let requester = pci.requester(function.address);
            let named_as = PciFunction { segment: function.address.segment(), bdf: requester };
            let (id, of) = viot.pci_endpoint(named_as)?;
            (of.node == named.node).then_some((function.address, id))
        });
        found.push(Topology { source: Source::Viot, place, own, behind: behind.collect() });
    }
    if found.is_empty() {
        return Err(without(String::from("it names no IOMMU")));
    }
    Ok(found)
}

fn address_of(at: PciFunction) -> PciAddress {
    let [device_function, bus] = at.bdf.to_le_bytes();
    PciAddress::new(at.segment, bus, device_function >> 3, device_function & 7)
}
