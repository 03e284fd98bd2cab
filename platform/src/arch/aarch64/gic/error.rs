//! What can be wrong with a GIC.

use core::fmt;

use crate::firmware::device_tree::DeviceTreeError;
use crate::memory::MapRegistersError;
use crate::memory::frames::OutOfFrames;
use crate::range::PhysRange;

/// A controller, or a part of it, that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GicError {
    /// What the device tree says about it.
    Tree(DeviceTreeError),
    /// Its registers could not be mapped.
    Map(MapRegistersError),
    /// No memory for its tables.
    Memory(OutOfFrames),
    /// A register did not follow in time.
    Stuck {
        /// Its name.
        register: &'static str,
    },
    /// No redistributor is this CPU's.
    NoRedistributor {
        /// The CPU's affinity.
        affinity: u64,
    },
    /// It reads its tables past the caches, which this kernel does not clean.
    NotCoherent {
        /// The register that says so.
        register: &'static str,
    },
    /// There is no such interrupt, or no further one.
    NoInterrupt {
        /// Its number.
        number: u32,
    },
    /// There are no message-based interrupts: no ITS, or a GIC without them.
    NoMessages,
    /// The device tree does not lead a function's messages to the ITS.
    NoRoute {
        /// The function's segment.
        segment: u16,
        /// What it is to its bus.
        requester: u16,
    },
    /// Firmware turned message-based interrupts on, with tables of its own.
    MessagesInUse,
    /// The registers of a distributor or an ITS are fewer than it has.
    TooFewRegisters {
        /// Where the device tree has them.
        range: PhysRange,
    },
    /// An ITS takes no table that is large enough.
    TableSize {
        /// How large it has to be.
        len_bytes: u64,
    },
    /// A device or an event that the ITS's tables have no room for.
    NoTranslation {
        /// The device.
        device: u32,
        /// The event.
        event: u32,
    },
    /// The ITS refused a command.
    CommandRefused {
        /// Where it stands in the ring.
        at: u64,
    },
}

impl fmt::Display for GicError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tree(error) => error.fmt(f),
            Self::Map(error) => write!(f, "GIC: {error}"),
            Self::Memory(error) => write!(f, "GIC: {error}"),
            Self::Stuck { register } => write!(f, "GIC: {register} does not follow"),
            Self::NoRedistributor { affinity } => {
                write!(f, "GIC: no redistributor belongs to the CPU with affinity {affinity:#x}")
            }
            Self::NotCoherent { register } => {
                write!(f, "GIC: {register} does not accept cached, shareable memory")
            }
            Self::NoInterrupt { number } => write!(f, "GIC: there is no interrupt {number}"),
            Self::NoMessages => f.write_str("GIC: there are no message-based interrupts"),
            Self::NoRoute { segment, requester } => write!(
                f,
                "GIC: the device tree leads no messages of requester {requester:#x} in segment {segment:#x} to the ITS"
            ),
            Self::MessagesInUse => f.write_str("GIC: firmware uses message-based interrupts already"),
            Self::TooFewRegisters { range } => {
                write!(f, "GIC: a distributor or an ITS has more registers than {range}")
            }
            Self::TableSize { len_bytes } => {
                write!(f, "GIC: the ITS takes no table of {len_bytes:#x} bytes")
            }
            Self::NoTranslation { device, event } => {
                write!(f, "GIC: the ITS's tables have no room for event {event:#x} of device {device:#x}")
            }
            Self::CommandRefused { at } => write!(f, "GIC: the ITS refused the command at {at:#x}"),
        }
    }
}

impl core::error::Error for GicError {}
