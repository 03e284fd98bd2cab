//! Any transport of the `virtio-drivers` crate (0.13) under this driver: MMIO, PCI, and those of kernels that
//! already use that crate.
//!
//! Its PCI transport makes three register accesses per doorbell and waits without bound when dropped; where
//! the choice is free, [`super::pci::PciTransport`] is better.

use super::{DeviceStatus, InterruptCause, QueueAddresses, Transport, TransportError};
use crate::lock::{Mutex, RawLock};
use virtio_drivers::transport as theirs;

/// One of their transports as ours.
///
/// Their doorbell takes `&mut self`, so a lock stands around the transport, also while the doorbell rings.
/// Interrupt handlers may use the IOMMU only if `L` disables interrupts.
pub struct Adapter<L, T>(Mutex<L, T>);

impl<L: RawLock, T: theirs::Transport + Send> Adapter<L, T> {
    /// Wraps a transport of a virtio-iommu. It is not touched until the driver starts.
    pub fn new(transport: T) -> Self {
        Self(Mutex::new(transport))
    }
}

impl<L: RawLock, T: theirs::Transport + Send> Transport for Adapter<L, T> {
    fn device_features(&self) -> u64 {
        self.0.lock().read_device_features()
    }

    fn set_driver_features(&self, features: u64) {
        self.0.lock().write_driver_features(features);
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.0.lock().get_status().bits() as u8)
    }

    fn set_status(&self, status: DeviceStatus) {
        let theirs = theirs::DeviceStatus::from_bits_retain(u32::from(status.bits()));
        self.0.lock().set_status(theirs);
    }

    fn config_generation(&self) -> u32 {
        self.0.lock().read_config_generation()
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        let needed = offset.saturating_add(1);
        self.0.lock().read_config_space(offset).map_err(|_| TransportError::ConfigTooShort { needed })
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        let needed = offset.saturating_add(4);
        let value = self.0.lock().read_config_space::<u32>(offset);
        Ok(u32::from_le(value.map_err(|_| TransportError::ConfigTooShort { needed })?))
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        let needed = offset.saturating_add(1);
        let written = self.0.lock().write_config_space(offset, value);
        written.map_err(|_| TransportError::ConfigTooShort { needed })
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        let size = self.0.lock().max_queue_size(queue);
        // A queue has at most 2^15 descriptors; more is a broken register, and less is always allowed.
        size.min(1 << 15) as u16
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        let QueueAddresses { descriptors, driver_area, device_area } = addresses;
        self.0.lock().queue_set(
            queue,
            u32::from(size),
            descriptors.get(),
            driver_area.get(),
            device_area.get(),
        );
        Ok(())
    }

    fn notify(&self, queue: u16) {
        self.0.lock().notify(queue);
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        let status = self.0.lock().ack_interrupt();
        InterruptCause {
            queue: status.contains(theirs::InterruptStatus::QUEUE_INTERRUPT),
            config: status.contains(theirs::InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT),
        }
    }
}
