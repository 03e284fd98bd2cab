//! By the command line: one IOMMU, and every other function of segment 0 behind it, by its own number.
//!
//! ```text
//! iommu=pci:BB:DD.F      a PCI function, in hexadecimal
//! iommu=mmio:0xBASE      registers at a physical address
//! ```

use virtio_iommu::EndpointId;
use virtio_iommu::transport::pci::{DEVICE_ID, VENDOR_ID};

use super::{Place, Source, Topology};
use crate::iommu::BringUpError;
use crate::pci::config::ConfigSpace;
use crate::pci::{Pci, PciAddress};

/// Makes the topology that a word describes.
///
/// # Errors
///
/// [`BringUpError::Word`] when it describes none, and [`BringUpError::NotThere`] when no IOMMU is there.
pub(super) fn read<C: ConfigSpace>(pci: &Pci<C>, word: &str) -> Result<Topology, BringUpError> {
    let place = parse(word).ok_or_else(|| BringUpError::Word { word: word.into() })?;
    if let Place::Pci(address) = place {
        let found = pci.at(address).map(|function| (function.vendor, function.device));
        if found != Some((VENDOR_ID, DEVICE_ID)) {
            return Err(BringUpError::NotThere { place });
        }
    }
    let others = pci.functions().iter().map(|function| function.address);
    let others = others.filter(|address| address.segment() == 0 && Place::Pci(*address) != place);
    let behind = others.map(|address| (address, EndpointId::new(pci.requester(address).into()))).collect();
    let own = match place {
        Place::Pci(address) => Some(EndpointId::new(pci.requester(address).into())),
        Place::Mmio(_) => None,
    };
    Ok(Topology { source: Source::CommandLine, place, own, behind })
}

fn parse(word: &str) -> Option<Place> {
    let (kind, place) = word.split_once(':')?;
    match kind {
        "mmio" => {
            let base = u64::from_str_radix(place.strip_prefix("0x")?, 16).ok()?;
            (base != 0 && base.is_multiple_of(8)).then_some(Place::Mmio(base))
        }
        "pci" => {
            let (bus, rest) = place.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            let number =
                |text: &str, last: u8| u8::from_str_radix(text, 16).ok().filter(|number| *number <= last);
            Some(Place::Pci(PciAddress::new(
                0,
                number(bus, 0xff)?,
                number(device, 31)?,
                number(function, 7)?,
            )))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read() {
        assert_eq!(parse("mmio:0x10001000"), Some(Place::Mmio(0x1000_1000)));
        assert_eq!(parse("pci:00:01.0"), Some(Place::Pci(PciAddress::new(0, 0, 1, 0))));
        assert_eq!(parse("pci:ff:1f.7"), Some(Place::Pci(PciAddress::new(0, 255, 31, 7))));
    }

    #[test]
    fn anything_else_is_none() {
        let words = [
            "",
            "mmio",
            "pci",
            "mmio:",
            "mmio:10001000",
            "mmio:0x",
            "mmio:0x0",
            "mmio:0x10001001",
            "mmio:0x1_0000",
            "mmio:0x10000000000000000",
            "pci:",
            "pci:00",
            "pci:00:01",
            "pci:00:20.0",
            "pci:00:01.8",
            "pci:100:01.0",
            "pci:00:01.0.0",
            "PCI:00:01.0",
        ];
        for word in words {
            assert_eq!(parse(word), None, "{word}");
        }
    }
}
