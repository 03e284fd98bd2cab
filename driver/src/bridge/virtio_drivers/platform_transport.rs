//! The transport of a device that is behind the IOMMU.

use super::Slot;
use core::marker::PhantomData;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const EVENT_IDX: u64 = 1 << 29;
const ACCESS_PLATFORM: u64 = 1 << 33;

/// A transport that accepts ACCESS_PLATFORM on behalf of a driver that does not know it.
///
/// It hides EVENT_IDX, whose notifications the crate's queue loses at the wrap of its index when requests come
/// in batches, and reads FEATURES_OK back, which the crate does not. When the device refuses the features, or
/// does not offer ACCESS_PLATFORM although it is behind the IOMMU (slot `S` is filled), it is marked as failed and
/// seems to have no queues, so that the driver's constructor returns an error: it would take the addresses that
/// it is given for physical ones.
pub struct PlatformTransport<T, S> {
    inner: T,
    offered: u64,
    refused: bool,
    slot: PhantomData<fn() -> S>,
}

impl<T: Transport, S: Slot> PlatformTransport<T, S> {
    /// Wraps a transport that no driver has yet.
    pub fn new(inner: T) -> Self {
        Self { inner, offered: 0, refused: false, slot: PhantomData }
    }

    /// Looks whether the device works with the features that were written.
    fn check_features(&mut self) {
        let ignores_iommu = self.offered & ACCESS_PLATFORM == 0 && S::cell().get().is_some();
        let status = self.inner.get_status();
        if ignores_iommu {
            log::error!(
                "a virtio device behind the IOMMU does not offer ACCESS_PLATFORM (QEMU: iommu_platform=on)"
            );
        } else if !status.contains(DeviceStatus::FEATURES_OK) {
            log::error!("a virtio device refused the features of its driver and ACCESS_PLATFORM");
        } else {
            return;
        }
        self.refused = true;
        self.inner.set_status(status | DeviceStatus::FAILED);
    }
}

impl<T: Transport, S: Slot> Transport for PlatformTransport<T, S> {
    fn device_type(&self) -> DeviceType {
        self.inner.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.offered = self.inner.read_device_features();
        self.offered & !EVENT_IDX
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        self.inner.write_driver_features(driver_features & !EVENT_IDX | self.offered & ACCESS_PLATFORM);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        if self.refused { 0 } else { self.inner.max_queue_size(queue) }
    }

    fn notify(&mut self, queue: u16) {
        self.inner.notify(queue);
    }

    fn get_status(&self) -> DeviceStatus {
        self.inner.get_status()
    }

    fn set_status(&mut self, status: DeviceStatus) {
        if status.is_empty() {
            self.refused = false;
        }
        if self.refused {
            return;
        }
        self.inner.set_status(status);
        if status.contains(DeviceStatus::FEATURES_OK) && !status.contains(DeviceStatus::DRIVER_OK) {
            self.check_features();
        }
    }

    fn set_guest_page_size(&mut self, guest_page_size: u32) {
        self.inner.set_guest_page_size(guest_page_size);
    }

    fn requires_legacy_layout(&self) -> bool {
        self.inner.requires_legacy_layout()
    }

    fn queue_set(&mut self, queue: u16, size: u32, descriptors: u64, driver_area: u64, device_area: u64) {
        self.inner.queue_set(queue, size, descriptors, driver_area, device_area);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.inner.queue_unset(queue);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.inner.queue_used(queue)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.inner.ack_interrupt()
    }

    fn read_config_generation(&self) -> u32 {
        self.inner.read_config_generation()
    }

    fn read_config_space<V: FromBytes + IntoBytes>(&self, offset: usize) -> virtio_drivers::Result<V> {
        self.inner.read_config_space(offset)
    }

    fn write_config_space<V: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: V,
    ) -> virtio_drivers::Result<()> {
        self.inner.write_config_space(offset, value)
    }
}
