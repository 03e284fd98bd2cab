//! A virtio-iommu in software, and the way to it.

use alloc::sync::Arc;
use core::fmt;

use spin::Mutex;
use virtio_iommu::transport::{DeviceStatus, InterruptCause, QueueAddresses, Transport, TransportError};
use virtio_iommu_model::{Device, isr};

use super::memory::Guest;
use super::work::Work;

/// A virtio-iommu of a guest, whose rings and tables are in the guest's memory. Clones are handles to the same one, and each is
/// a [`Transport`] to it: registers are calls, and the doorbell returns when all requests are answered.
#[derive(Clone)]
pub struct VirtualIommu {
    device: Arc<Mutex<Device>>,
    guest: Guest,
    doorbells: Arc<Work>,
}

impl fmt::Debug for VirtualIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtualIommu").field("guest", &self.guest).finish_non_exhaustive()
    }
}

impl VirtualIommu {
    /// Puts a device into a guest.
    pub fn new(device: Device, guest: Guest) -> Self {
        Self { device: Arc::new(Mutex::new(device)), guest, doorbells: Arc::default() }
    }

    /// The guest that it is in.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The device's part of what the guest's driver does: all that happens between a doorbell and its return.
    pub fn doorbells(&self) -> &Work {
        &self.doorbells
    }

    /// What endpoints do, and what this kernel does to the device: with the guest's memory. `work` must not call the guest's
    /// driver.
    pub fn with<R>(&self, work: impl FnOnce(&mut Device, &mut Guest) -> R) -> R {
        work(&mut self.device.lock(), &mut self.guest.clone())
    }

    fn read_config<const N: usize>(&self, offset: usize) -> Result<[u8; N], TransportError> {
        let device = self.device.lock();
        let needed = offset.saturating_add(N);
        if needed > device.config_len() {
            return Err(TransportError::ConfigTooShort { needed });
        }
        let mut bytes = [0; N];
        device.read_config(offset, &mut bytes);
        Ok(bytes)
    }
}

impl Transport for VirtualIommu {
    fn device_features(&self) -> u64 {
        self.device.lock().device_features()
    }

    fn set_driver_features(&self, features: u64) {
        self.device.lock().set_driver_features(features);
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.device.lock().read_status())
    }

    fn set_status(&self, status: DeviceStatus) {
        self.device.lock().set_status(status.bits());
    }

    fn config_generation(&self) -> u32 {
        self.device.lock().config_generation()
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        self.read_config(offset).map(|[byte]| byte)
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        self.read_config(offset).map(u32::from_le_bytes)
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        let mut device = self.device.lock();
        if offset >= device.config_len() {
            return Err(TransportError::ConfigTooShort { needed: offset.saturating_add(1) });
        }
        device.write_config(offset, &[value]);
        Ok(())
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.device.lock().queue_max_size(queue)
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        let QueueAddresses { descriptors, driver_area, device_area } = addresses;
        let (descriptors, available, used) = (descriptors.get(), driver_area.get(), device_area.get());
        let set = self.device.lock().set_queue(queue, size, descriptors, available, used);
        set.map_err(|_| TransportError::NoQueue { queue })
    }

    fn notify(&self, queue: u16) {
        self.doorbells.count(|| self.with(|device, guest| device.notify(queue, guest)));
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        let cause = self.device.lock().take_isr();
        InterruptCause { queue: cause & isr::QUEUE != 0, config: cause & isr::CONFIG != 0 }
    }
}
