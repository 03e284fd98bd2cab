//! A virtio-iommu as raw requests meet it: QEMU's, or the model.

use virtio_iommu::PhysAddr;
use virtio_iommu::transport::pci::PciTransport;
use virtio_iommu::transport::{DeviceStatus, QueueAddresses, Transport as _};
use virtio_iommu_model::{Device, GuestMemory as _, VecMemory};

use crate::machine::Machine;
use crate::ram::Ram;

/// Where `bypass` is in the configuration.
const BYPASS: usize = 36;

/// Where a queue's descriptors, available ring and used ring are.
pub(crate) type QueuePlace = [u64; 3];

/// One device with its memory.
pub trait Peer {
    /// The features that it offers.
    fn features(&self) -> u64;
    /// Accepts features.
    fn accept_features(&mut self, features: u64);
    /// Reads the status.
    fn status(&mut self) -> u8;
    /// Writes the status.
    fn set_status(&mut self, status: u8);
    /// Enables a queue whose parts are at these addresses.
    fn enable_queue(&mut self, queue: u16, size: u16, place: [u64; 3]);
    /// Rings the doorbell.
    fn notify(&mut self, queue: u16);
    /// The first 40 bytes of the configuration.
    fn config(&mut self) -> [u8; 40];
    /// Writes one byte to `bypass`.
    fn write_bypass(&mut self, value: u8);
    /// Copies bytes out of memory.
    fn read(&self, phys: u64, bytes: &mut [u8]);
    /// Copies bytes into memory.
    fn write(&mut self, phys: u64, bytes: &[u8]);
}

/// QEMU's device, through the registers of the driver's own transport.
pub struct QemuPeer<'a> {
    machine: &'a Machine,
    transport: PciTransport,
}

impl<'a> QemuPeer<'a> {
    /// The device of this machine. A driver that used it before is forgotten.
    pub fn new(machine: &'a Machine) -> Self {
        Self { machine, transport: machine.transport() }
    }
}

impl Peer for QemuPeer<'_> {
    fn features(&self) -> u64 {
        self.transport.device_features()
    }

    fn accept_features(&mut self, features: u64) {
        self.transport.set_driver_features(features);
    }

    fn status(&mut self) -> u8 {
        self.transport.status().bits()
    }

    fn set_status(&mut self, status: u8) {
        self.transport.set_status(DeviceStatus::from_bits_retain(status));
    }

    fn enable_queue(&mut self, queue: u16, size: u16, place: QueuePlace) {
        let [descriptors, driver_area, device_area] = place.map(PhysAddr::new);
        let addresses = QueueAddresses { descriptors, driver_area, device_area };
        self.transport.enable_queue(queue, size, addresses).expect("a queue of the IOMMU");
    }

    fn notify(&mut self, queue: u16) {
        self.transport.notify(queue);
    }

    fn config(&mut self) -> [u8; 40] {
        let mut bytes = [0; 40];
        for (index, word) in bytes.chunks_exact_mut(4).enumerate() {
            let value = self.transport.read_config_u32(4 * index).expect("40 bytes of configuration");
            word.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    fn write_bypass(&mut self, value: u8) {
        self.transport.write_config_u8(BYPASS, value).expect("40 bytes of configuration");
    }

    fn read(&self, phys: u64, bytes: &mut [u8]) {
        self.machine.ram().read(phys, bytes);
    }

    fn write(&mut self, phys: u64, bytes: &[u8]) {
        self.machine.ram().write(phys, bytes);
    }
}

/// The model, with memory of its own.
pub struct ModelPeer {
    /// The device.
    pub device: Device,
    /// Its memory, from address 0 to where a machine's heap starts.
    pub memory: VecMemory,
}

impl ModelPeer {
    /// A model with cleared memory.
    pub fn new(device: Device) -> Self {
        Self { device, memory: VecMemory::new(0, Ram::HEAP as usize) }
    }
}

impl Peer for ModelPeer {
    fn features(&self) -> u64 {
        self.device.device_features()
    }

    fn accept_features(&mut self, features: u64) {
        self.device.set_driver_features(features);
    }

    fn status(&mut self) -> u8 {
        self.device.read_status()
    }

    fn set_status(&mut self, status: u8) {
        self.device.set_status(status);
    }

    fn enable_queue(&mut self, queue: u16, size: u16, [descriptors, available, used]: QueuePlace) {
        self.device.set_queue(queue, size, descriptors, available, used).expect("a queue of the model");
    }

    fn notify(&mut self, queue: u16) {
        self.device.notify(queue, &mut self.memory);
    }

    fn config(&mut self) -> [u8; 40] {
        let mut bytes = [0; 40];
        self.device.read_config(0, &mut bytes);
        bytes
    }

    fn write_bypass(&mut self, value: u8) {
        self.device.write_config(BYPASS, &[value]);
    }

    fn read(&self, phys: u64, bytes: &mut [u8]) {
        self.memory.read(phys, bytes).expect("the model's memory");
    }

    fn write(&mut self, phys: u64, bytes: &[u8]) {
        self.memory.write(phys, bytes).expect("the model's memory");
    }
}
