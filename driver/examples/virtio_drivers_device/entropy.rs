//! A virtio entropy source in software, whose every access to memory goes through the IOMMU.

use crate::support::Machine;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_iommu::EndpointId;
use virtio_iommu_model::AccessError;
use zerocopy::{FromBytes, Immutable, IntoBytes};

const VERSION_1: u64 = 1 << 32;
const ACCESS_PLATFORM: u64 = 1 << 33;

/// The device, seen through its registers.
pub(crate) struct EntropyDevice {
    machine: Machine,
    endpoint: EndpointId,
    status: DeviceStatus,
    /// The queue's size, and where its three parts are for the device.
    queue: Option<(u16, [u64; 3])>,
    /// Requests done so far.
    done: u16,
}

impl EntropyDevice {
    pub(crate) fn new(machine: Machine, endpoint: EndpointId) -> Self {
        Self { machine, endpoint, status: DeviceStatus::empty(), queue: None, done: 0 }
    }

    fn read<const N: usize>(&self, at: u64) -> Result<[u8; N], AccessError> {
        let bytes = self.machine.device_reads(self.endpoint, at, N)?;
        Ok(std::array::from_fn(|index| bytes[index]))
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), AccessError> {
        self.machine.device_writes(self.endpoint, at, bytes)
    }

    /// Fills the buffer of each new request.
    fn run(&mut self) -> Result<(), AccessError> {
        let Some((size, [descriptors, driver, device])) = self.queue else { return Ok(()) };
        let offered = u16::from_le_bytes(self.read(driver + 2)?);
        // At most a ring full: what was offered is the driver's word.
        for _ in 0..size {
            if self.done == offered {
                break;
            }
            let place = u64::from(self.done % size);
            let head = u16::from_le_bytes(self.read(driver + 4 + 2 * place)?);
            let at = descriptors + 16 * u64::from(head);
            let (buffer, len) = (u64::from_le_bytes(self.read(at)?), u32::from_le_bytes(self.read(at + 8)?));
            let bytes: Vec<u8> = (0..len.min(4096)).map(|index| (index * 37 + 11) as u8).collect();
            self.write(buffer, &bytes)?;
            self.done = self.done.wrapping_add(1);
            self.write(device + 4 + 8 * place, &u32::from(head).to_le_bytes())?;
            self.write(device + 8 + 8 * place, &(bytes.len() as u32).to_le_bytes())?;
            self.write(device + 2, &self.done.to_le_bytes())?;
        }
        Ok(())
    }
}

impl Transport for EntropyDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::EntropySource
    }
    fn read_device_features(&mut self) -> u64 {
        VERSION_1 | ACCESS_PLATFORM
    }
    fn write_driver_features(&mut self, driver_features: u64) {
        println!("features that were accepted: {driver_features:#x}");
    }
    fn max_queue_size(&mut self, queue: u16) -> u32 {
        if queue == 0 { 64 } else { 0 }
    }
    fn notify(&mut self, _queue: u16) {
        if let Err(error) = self.run() {
            println!("the device stops: {error:?}");
        }
    }
    fn get_status(&self) -> DeviceStatus {
        self.status
    }
    fn set_status(&mut self, status: DeviceStatus) {
        self.status = status;
    }
    fn set_guest_page_size(&mut self, _guest_page_size: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(&mut self, _queue: u16, size: u32, descriptors: u64, driver_area: u64, device_area: u64) {
        println!("the ring is at {descriptors:#x}, {driver_area:#x} and {device_area:#x} for the device");
        self.queue = Some((size as u16, [descriptors, driver_area, device_area]));
    }
    fn queue_unset(&mut self, _queue: u16) {
        self.queue = None;
    }
    fn queue_used(&mut self, _queue: u16) -> bool {
        self.queue.is_some()
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }
    fn read_config_generation(&self) -> u32 {
        0
    }
    fn read_config_space<T: FromBytes + IntoBytes>(&self, _offset: usize) -> virtio_drivers::Result<T> {
        Err(virtio_drivers::Error::ConfigSpaceMissing)
    }
    fn write_config_space<T: IntoBytes + Immutable>(&mut self, _: usize, _: T) -> virtio_drivers::Result<()> {
        Err(virtio_drivers::Error::ConfigSpaceMissing)
    }
}
