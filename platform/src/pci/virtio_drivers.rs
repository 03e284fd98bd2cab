//! One segment's configuration space as the `virtio-drivers` crate wants to have it.

use pci_types::PciAddress;
use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction};

use super::config::ConfigSpace;

/// Configuration space of one segment, for `virtio_drivers::transport::pci::bus::PciRoot`.
#[derive(Clone, Copy, Debug)]
pub struct SegmentAccess<'a, C: ConfigSpace> {
    config: &'a C,
    segment: u16,
}

impl<'a, C: ConfigSpace> SegmentAccess<'a, C> {
    /// Wraps the segment.
    pub fn new(config: &'a C, segment: u16) -> Self {
        Self { config, segment }
    }

    fn address(&self, function: DeviceFunction) -> PciAddress {
        PciAddress::new(self.segment, function.bus, function.device, function.function)
    }
}

/// The number by which `virtio-drivers` names a function, within its segment.
pub fn device_function(address: PciAddress) -> DeviceFunction {
    DeviceFunction { bus: address.bus(), device: address.device(), function: address.function() }
}

impl<C: ConfigSpace> ConfigurationAccess for SegmentAccess<'_, C> {
    fn read_word(&self, device_function: DeviceFunction, register_offset: u8) -> u32 {
        self.config.read32(self.address(device_function), register_offset.into())
    }

    fn write_word(&mut self, device_function: DeviceFunction, register_offset: u8, data: u32) {
        self.config.write32(self.address(device_function), register_offset.into(), data);
    }

    // The trait's method is unsafe to call; configuration space itself is shared by reference.
    unsafe fn unsafe_clone(&self) -> Self {
        Self { config: self.config, segment: self.segment }
    }
}
