//! How the driver reaches the device's registers.
//!
//! [`Transport`] is the small face that the driver needs; [`pci::PciTransport`] is the fast way over virtio-pci,
//! and [`virtio_drivers::Adapter`] takes any transport of the `virtio-drivers` crate, MMIO among them. A kernel
//! with a virtio stack of its own implements the trait over that.

mod doorbell;
pub mod pci;
mod register;
#[cfg(feature = "virtio-drivers")]
pub mod virtio_drivers;

pub use crate::barrier::memory_before_doorbell;
pub use doorbell::Doorbell;
pub(crate) use doorbell::DoorbellCell;

use crate::addr::PhysAddr;
use bitflags::bitflags;
use core::fmt;

bitflags! {
    /// The device status field (virtio 1.4, device status field). Writing 0 resets the device.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceStatus: u8 {
        /// The device was noticed.
        const ACKNOWLEDGE = 1;
        /// There is a driver for it.
        const DRIVER = 2;
        /// The driver is ready.
        const DRIVER_OK = 4;
        /// Feature negotiation is done.
        const FEATURES_OK = 8;
        /// The device met an error that only a reset mends.
        const NEEDS_RESET = 64;
        /// The driver gave up.
        const FAILED = 128;
    }
}

/// Where the parts of a virtqueue lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueAddresses {
    /// The descriptor table.
    pub descriptors: PhysAddr,
    /// The available ring.
    pub driver_area: PhysAddr,
    /// The used ring.
    pub device_area: PhysAddr,
}

/// What an interrupt was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptCause {
    /// A queue has used buffers.
    pub queue: bool,
    /// The configuration changed, or the device needs a reset.
    pub config: bool,
}

/// A register access that cannot be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransportError {
    /// The configuration space ends before this field.
    ConfigTooShort {
        /// Where the access would have ended, in bytes.
        needed: usize,
    },
    /// The device has no such queue.
    NoQueue {
        /// The queue.
        queue: u16,
    },
    /// The device gives a doorbell outside of its notification region.
    DoorbellOutside {
        /// The queue.
        queue: u16,
        /// The offset in bytes that the device's numbers lead to.
        offset: u64,
    },
    /// This transport cannot do it, for instance reset a single queue.
    Unsupported,
}

impl fmt::Display for TransportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConfigTooShort { needed } => {
                write!(f, "the configuration space is shorter than the {needed:#x} bytes needed")
            }
            Self::NoQueue { queue } => write!(f, "the device has no queue {queue}"),
            Self::DoorbellOutside { queue, offset } => {
                write!(f, "the doorbell of queue {queue} at offset {offset:#x} lies outside its region")
            }
            Self::Unsupported => f.write_str("this transport cannot do that"),
        }
    }
}

impl core::error::Error for TransportError {}

/// Access to one virtio-iommu device.
///
/// [`notify`](Self::notify), [`acknowledge_interrupt`](Self::acknowledge_interrupt), [`status`](Self::status) and
/// the accesses to single bytes of the configuration may be called at any time from any CPU, the first two also
/// inside interrupt handlers. All others are called by one thread at a time, which the
/// driver sees to. No method waits for the device.
///
/// Values from the device come back as it gave them; the driver checks them.
pub trait Transport: Send + Sync {
    /// The feature bits that the device offers.
    fn device_features(&self) -> u64;

    /// Writes the feature bits that the driver accepts.
    fn set_driver_features(&self, features: u64);

    /// Reads the status field.
    fn status(&self) -> DeviceStatus;

    /// Writes the status field. Empty means reset; the caller polls [`status`](Self::status) until it is done.
    fn set_status(&self, status: DeviceStatus);

    /// Changes whenever the configuration may have.
    fn config_generation(&self) -> u32;

    /// Reads one byte of the configuration, by a one-byte access.
    ///
    /// # Errors
    /// [`TransportError::ConfigTooShort`].
    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError>;

    /// Reads four bytes of the configuration, by one access. `offset` is a multiple of four.
    ///
    /// # Errors
    /// [`TransportError::ConfigTooShort`].
    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError>;

    /// Writes one byte of the configuration, by a one-byte access.
    ///
    /// # Errors
    /// [`TransportError::ConfigTooShort`].
    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError>;

    /// The largest size of a queue, or 0 where there is no such queue.
    fn max_queue_size(&self, queue: u16) -> u16;

    /// Sets up and enables a queue of `size` descriptors.
    ///
    /// # Errors
    /// [`TransportError::NoQueue`], [`TransportError::DoorbellOutside`].
    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError>;

    /// Whether [`reset_queue`](Self::reset_queue) works: only then is RING_RESET accepted.
    fn can_reset_queues(&self) -> bool {
        false
    }

    /// Begins to reset one queue (virtio 1.4, virtqueue reset). The device forgets it when
    /// [`queue_is_reset`](Self::queue_is_reset) says so; it can then be enabled again.
    ///
    /// # Errors
    /// [`TransportError::Unsupported`].
    fn reset_queue(&self, queue: u16) -> Result<(), TransportError> {
        let _ = queue;
        Err(TransportError::Unsupported)
    }

    /// Whether the reset of a queue is done.
    ///
    /// # Errors
    /// [`TransportError::Unsupported`].
    fn queue_is_reset(&self, queue: u16) -> Result<bool, TransportError> {
        let _ = queue;
        Err(TransportError::Unsupported)
    }

    /// Rings the doorbell of a queue: one store where the hardware allows it.
    ///
    /// Takes no lock that code interrupted by a handler may hold, unless the implementation says so.
    fn notify(&self, queue: u16);

    /// The doorbell of a queue that is enabled, where [`notify`](Self::notify) is one store to a register that
    /// [`Doorbell`] can name, and nothing else. The driver then stores without a call.
    fn doorbell(&self, queue: u16) -> Option<Doorbell> {
        let _ = queue;
        None
    }

    /// Reads and clears the interrupt cause.
    fn acknowledge_interrupt(&self) -> InterruptCause;
}

/// A transport that is chosen while the kernel runs.
impl Transport for alloc::boxed::Box<dyn Transport> {
    fn device_features(&self) -> u64 {
        (**self).device_features()
    }

    fn set_driver_features(&self, features: u64) {
        (**self).set_driver_features(features);
    }

    fn status(&self) -> DeviceStatus {
        (**self).status()
    }

    fn set_status(&self, status: DeviceStatus) {
        (**self).set_status(status);
    }

    fn config_generation(&self) -> u32 {
        (**self).config_generation()
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        (**self).read_config_u8(offset)
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        (**self).read_config_u32(offset)
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        (**self).write_config_u8(offset, value)
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        (**self).max_queue_size(queue)
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        (**self).enable_queue(queue, size, addresses)
    }

    fn can_reset_queues(&self) -> bool {
        (**self).can_reset_queues()
    }

    fn reset_queue(&self, queue: u16) -> Result<(), TransportError> {
        (**self).reset_queue(queue)
    }

    fn queue_is_reset(&self, queue: u16) -> Result<bool, TransportError> {
        (**self).queue_is_reset(queue)
    }

    fn notify(&self, queue: u16) {
        (**self).notify(queue);
    }

    fn doorbell(&self, queue: u16) -> Option<Doorbell> {
        (**self).doorbell(queue)
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        (**self).acknowledge_interrupt()
    }
}
