//! Why the IOMMU could not be brought up.

use alloc::string::String;
use core::fmt;

use virtio_iommu::StartError;
use virtio_iommu::topology::viot::{IommuPlace, ViotError};
use virtio_iommu::transport::pci::{CapabilityError, DEVICE_ID, RegionError, Structure, VENDOR_ID};

use crate::machine::BarError;
use crate::pci::PciAddress;

/// Why there is no IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BringUpError {
    /// The machine has none.
    NoDevice,
    /// It has one, and no VIOT that says what is behind it: why not.
    NoTopology {
        /// Where the device is.
        device: PciAddress,
        /// What is wrong with the table.
        reason: String,
    },
    /// VIOT is broken.
    Viot(ViotError),
    /// VIOT names an IOMMU where none is.
    WrongPlace {
        /// The place.
        place: IommuPlace,
    },
    /// The device's capabilities are broken.
    Capabilities(CapabilityError),
    /// A register region could not be mapped.
    Bar(BarError),
    /// A structure reaches outside of its BAR.
    StructureOutside(Structure),
    /// A register region is too small.
    Region(RegionError),
    /// The device could not be started.
    Start(StartError),
}

impl fmt::Display for BringUpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDevice => write!(
                f,
                "no virtio-iommu: the machine has no PCI function {VENDOR_ID:04x}:{DEVICE_ID:04x}; \
                 start QEMU with `-device virtio-iommu-pci`"
            ),
            Self::NoTopology { device, reason } => write!(
                f,
                "there is a virtio-iommu at {device}, but no VIOT says what is behind it ({reason}); \
                 its firmware must provide one"
            ),
            Self::Viot(error) => write!(f, "{error}; the firmware's table is broken"),
            Self::WrongPlace { place: IommuPlace::Pci(place) } => {
                write!(f, "VIOT names a virtio-iommu at {place}, where none is")
            }
            Self::WrongPlace { place: IommuPlace::Mmio(base) } => {
                write!(f, "VIOT names a virtio-iommu at {base:#x}, which is not on PCI")
            }
            Self::Capabilities(error) => error.fmt(f),
            Self::Bar(error) => error.fmt(f),
            Self::StructureOutside(structure) => write!(f, "{structure:x?} reaches outside of its BAR"),
            Self::Region(error) => error.fmt(f),
            Self::Start(error) => write!(f, "the virtio-iommu does not start: {error}"),
        }
    }
}

impl core::error::Error for BringUpError {}
