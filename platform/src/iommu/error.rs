//! Why the IOMMU could not be brought up.

use alloc::string::String;
use core::fmt;

use virtio_drivers::transport::mmio::MmioError;
use virtio_iommu::StartError;
use virtio_iommu::topology::viot::{IommuPlace, ViotError};
use virtio_iommu::transport::pci::{CapabilityError, DEVICE_ID, RegionError, Structure, VENDOR_ID};

use super::topology::{Place, Source};
use crate::firmware::device_tree::DeviceTreeError;
use crate::machine::BarError;
use crate::memory::MapRegistersError;

/// Why there is no IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BringUpError {
    /// The machine has none.
    NoDevice,
    /// It has one, and nobody says what is behind it.
    NoTopology {
        /// Where the device is.
        place: Place,
        /// Who should say it.
        source: Source,
        /// Why it does not.
        reason: String,
    },
    /// VIOT is broken.
    Viot(ViotError),
    /// VIOT names an IOMMU where none is.
    WrongPlace {
        /// The place.
        place: IommuPlace,
    },
    /// The device tree is broken.
    DeviceTree(DeviceTreeError),
    /// The word on the command line describes no IOMMU.
    Word {
        /// The word's value.
        word: String,
    },
    /// No IOMMU is where one should be.
    NotThere {
        /// The place.
        place: Place,
    },
    /// The registers are not those of virtio-mmio.
    Mmio {
        /// Where they are.
        base: u64,
        /// What is wrong.
        error: MmioError,
    },
    /// The registers have the layout from before virtio 1.
    Legacy {
        /// Where they are.
        base: u64,
    },
    /// Registers could not be mapped.
    Registers(MapRegistersError),
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
            Self::NoTopology { place, source, reason } => write!(
                f,
                "there is a virtio-iommu at {place}, but {source} does not say what is behind it ({reason}); its \
                 firmware must, or the word `iommu=` on the command line"
            ),
            Self::Viot(error) => write!(f, "{error}; the firmware's table is broken"),
            Self::WrongPlace { place: IommuPlace::Pci(place) } => {
                write!(f, "VIOT names a virtio-iommu at {place}, where none is")
            }
            Self::WrongPlace { place: IommuPlace::Mmio(base) } => {
                write!(f, "VIOT names a virtio-iommu at {base:#x}, where none is")
            }
            Self::DeviceTree(error) => error.fmt(f),
            Self::Word { word } => write!(
                f,
                "command line: iommu={word} describes no IOMMU; it can be pci:BB:DD.F or mmio:0xBASE, a multiple of 8"
            ),
            Self::NotThere { place } => {
                write!(f, "there should be a virtio-iommu at {place}, and none is there")
            }
            Self::Mmio { base, error } => write!(f, "no virtio-iommu at {base:#x}: {error}"),
            Self::Legacy { base } => write!(
                f,
                "the virtio-iommu at {base:#x} has the registers from before virtio 1; start QEMU with \
                 `-global virtio-mmio.force-legacy=false`"
            ),
            Self::Registers(error) => error.fmt(f),
            Self::Capabilities(error) => error.fmt(f),
            Self::Bar(error) => error.fmt(f),
            Self::StructureOutside(structure) => write!(f, "{structure:x?} reaches outside of its BAR"),
            Self::Region(error) => error.fmt(f),
            Self::Start(error) => write!(f, "the virtio-iommu does not start: {error}"),
        }
    }
}

impl core::error::Error for BringUpError {}

impl From<StartError> for BringUpError {
    fn from(error: StartError) -> Self {
        Self::Start(error)
    }
}
