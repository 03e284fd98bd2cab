//! Why an NVMe controller cannot be used.

use core::fmt;

use virtio_iommu::{DmaError, UnmapError};

/// Why an NVMe controller could not be started or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NvmeError {
    /// It is not a controller that this driver knows how to use.
    Unsupported {
        /// What about it.
        what: &'static str,
        /// The value that says so.
        value: u64,
    },
    /// It reports that it failed and that only a reset helps.
    Fatal {
        /// The controller status register.
        csts: u32,
    },
    /// It did not do what it was told within the time that it states for itself.
    Timeout {
        /// What it was told.
        what: &'static str,
        /// The time.
        timeout_ns: u64,
        /// The controller status register.
        csts: u32,
    },
    /// It did not complete an admin command in time.
    NoAnswer {
        /// The command's opcode.
        opcode: u8,
        /// The controller status register.
        csts: u32,
    },
    /// It refused an admin command.
    Refused {
        /// The command's opcode.
        opcode: u8,
        /// Status code type and status code, without the phase.
        status: u16,
    },
    /// There is no memory for its queues.
    Dma(DmaError),
    /// The memory of its queues did not come back.
    Unmap(UnmapError),
}

impl fmt::Display for NvmeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nvme: ")?;
        match self {
            Self::Unsupported { what, value } => write!(f, "{what} is {value:#x}, which is not supported"),
            Self::Fatal { csts } => write!(f, "the controller failed, status register {csts:#x}"),
            Self::Timeout { what, timeout_ns, csts } => {
                let ms = timeout_ns / 1_000_000;
                write!(f, "{what} did not happen within {ms} ms, status register {csts:#x}")
            }
            Self::NoAnswer { opcode, csts } => {
                write!(f, "admin command {opcode:#04x} was not answered, status register {csts:#x}")
            }
            Self::Refused { opcode, status } => {
                write!(f, "admin command {opcode:#04x} was refused with status {status:#x}")
            }
            Self::Dma(error) => error.fmt(f),
            Self::Unmap(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for NvmeError {}

impl From<DmaError> for NvmeError {
    fn from(error: DmaError) -> Self {
        Self::Dma(error)
    }
}

impl From<UnmapError> for NvmeError {
    fn from(error: UnmapError) -> Self {
        Self::Unmap(error)
    }
}
