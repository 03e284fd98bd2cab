//! Why a request was not done.

use core::fmt;

use virtio_iommu::{DmaError, UnmapError};

/// Why a request was not done, or a disk cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StorageError {
    /// More requests than the device has room for now. Nothing was started.
    Full {
        /// How many were given.
        requests: usize,
        /// How many would have fitted.
        room: usize,
    },
    /// A request that the device cannot be asked. Nothing was started.
    Request {
        /// How long it is in bytes.
        len_bytes: usize,
        /// How long its buffer is.
        buffer_bytes: usize,
        /// The pieces that its buffer lies in.
        pieces: usize,
    },
    /// The data could not be mapped. Nothing was started.
    Map(DmaError),
    /// The device refused.
    Refused {
        /// The first sector.
        sector: u64,
        /// What it said: a status of its own kind.
        status: u16,
    },
    /// The device wrote another number of bytes than a request of this kind makes it write.
    Length {
        /// The first sector.
        sector: u64,
        /// How many bytes it wrote.
        wrote: u32,
        /// How many it should have written.
        expected: u32,
    },
    /// The IOMMU did not confirm the unmapping, so that the request's memory is nobody's.
    Unmap(UnmapError),
    /// The device was reset before it was done.
    Cancelled,
    /// No request was done in time.
    Timeout {
        /// How many are in flight.
        in_flight: usize,
    },
    /// The device gave up, or cannot be trusted with anything any more.
    Broken {
        /// How that shows.
        what: &'static str,
        /// The value that says so.
        value: u32,
    },
}

impl fmt::Display for StorageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { requests, room } => write!(f, "{requests} requests, and room for {room}"),
            Self::Request { len_bytes, buffer_bytes, pieces } => write!(
                f,
                "a request of {len_bytes:#x} bytes, in a buffer of {buffer_bytes:#x} and {pieces} pieces, \
                 is not one for this device"
            ),
            Self::Map(error) => error.fmt(f),
            Self::Refused { sector, status } => {
                write!(f, "the device refuses sector {sector:#x}: status {status:#x}")
            }
            Self::Length { sector, wrote, expected } => {
                write!(f, "sector {sector:#x}: the device wrote {wrote:#x} bytes instead of {expected:#x}")
            }
            Self::Unmap(error) => error.fmt(f),
            Self::Cancelled => f.write_str("the device was reset before the request was done"),
            Self::Timeout { in_flight } => write!(f, "no answer in time, {in_flight} requests in flight"),
            Self::Broken { what, value } => write!(f, "the device is unusable: {what} {value:#x}"),
        }
    }
}

impl core::error::Error for StorageError {}

impl From<DmaError> for StorageError {
    fn from(error: DmaError) -> Self {
        Self::Map(error)
    }
}
