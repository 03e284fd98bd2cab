//! The software IOMMU's registers. A kernel uses `transport::pci`, or one of `virtio-drivers`.

use super::Machine;
use virtio_iommu::transport::{DeviceStatus, InterruptCause, QueueAddresses, Transport, TransportError};
use virtio_iommu_model::{Device, isr};

impl Machine {
    fn config<const N: usize>(&self, offset: usize) -> Result<[u8; N], TransportError> {
        let device = self.iommu();
        let mut bytes = [0; N];
        device.read_config(offset, &mut bytes);
        let needed = offset + N;
        if needed <= device.config_len() { Ok(bytes) } else { Err(TransportError::ConfigTooShort { needed }) }
    }
}

impl Transport for Machine {
    fn device_features(&self) -> u64 {
        self.iommu().device_features()
    }

    fn set_driver_features(&self, features: u64) {
        self.iommu().set_driver_features(features);
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(Device::read_status(&mut self.iommu()))
    }

    fn set_status(&self, status: DeviceStatus) {
        self.iommu().set_status(status.bits());
    }

    fn config_generation(&self) -> u32 {
        Device::config_generation(&mut self.iommu())
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        self.config(offset).map(|[byte]| byte)
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        self.config(offset).map(u32::from_le_bytes)
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        self.config::<1>(offset)?;
        self.iommu().write_config(offset, &[value]);
        Ok(())
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.iommu().queue_max_size(queue)
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        let QueueAddresses { descriptors, driver_area, device_area } = addresses;
        let (descriptors, driver, device) = (descriptors.get(), driver_area.get(), device_area.get());
        let set = self.iommu().set_queue(queue, size, descriptors, driver, device);
        set.map_err(|_| TransportError::NoQueue { queue })
    }

    fn notify(&self, queue: u16) {
        self.iommu().notify(queue, &mut self.0.memory.clone());
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        let cause = self.iommu().take_isr();
        InterruptCause { queue: cause & isr::QUEUE != 0, config: cause & isr::CONFIG != 0 }
    }
}
