//! Why a virtio disk cannot be used.

use core::fmt;

use virtio_iommu::transport::{DeviceStatus, TransportError};
use virtio_iommu::{DmaError, UnmapError};

/// Why a virtio disk could not be started or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockError {
    /// It is not a disk that this driver knows how to use.
    Unsupported {
        /// What about it.
        what: &'static str,
        /// The value that says so.
        value: u64,
    },
    /// It did not accept the features that were chosen of those that it offers.
    FeaturesRefused {
        /// The features.
        features: u64,
    },
    /// It was not reset in time.
    ResetTimeout {
        /// The device status.
        status: DeviceStatus,
    },
    /// Its registers are not as they must be.
    Transport(TransportError),
    /// There is no memory for its ring.
    Dma(DmaError),
    /// The memory of its ring did not come back.
    Unmap(UnmapError),
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("virtio disk: ")?;
        match self {
            Self::Unsupported { what, value } => write!(f, "{what} is {value:#x}, which is not supported"),
            Self::FeaturesRefused { features } => write!(f, "it refuses the features {features:#x}"),
            Self::ResetTimeout { status } => {
                write!(f, "it was not reset in time, status {:#x}", status.bits())
            }
            Self::Transport(error) => error.fmt(f),
            Self::Dma(error) => error.fmt(f),
            Self::Unmap(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for BlockError {}

impl From<TransportError> for BlockError {
    fn from(error: TransportError) -> Self {
        Self::Transport(error)
    }
}

impl From<DmaError> for BlockError {
    fn from(error: DmaError) -> Self {
        Self::Dma(error)
    }
}

impl From<UnmapError> for BlockError {
    fn from(error: UnmapError) -> Self {
        Self::Unmap(error)
    }
}
