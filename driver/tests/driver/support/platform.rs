//! The kernel around the driver, and the transport to the model.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_iommu::transport::{DeviceStatus, InterruptCause, QueueAddresses, Transport, TransportError};
use virtio_iommu::{DmaMemory, EndpointId, Platform};
use virtio_iommu_model::{Device, isr};

use super::machine::Inner;
use super::watch::{self, WatchedLock};

/// How far the clock moves at each poll of a wait.
pub(crate) const POLL_NS: u64 = 1_000;

/// The tests' kernel: counts what the driver took, and can refuse it.
#[derive(Clone)]
pub(crate) struct TestPlatform(pub(super) Arc<Inner>);

// SAFETY: fresh zeroed blocks, aligned as asked, each handed out once.
unsafe impl Platform for TestPlatform {
    type Lock = WatchedLock;

    fn dma_alloc(&self, len: usize, align: usize) -> Option<DmaMemory> {
        watch::call_out();
        let left = |left: usize| left.checked_sub(1);
        self.0.allocations_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).ok()?;
        self.0.outstanding.fetch_add(1, Ordering::Relaxed);
        Some(watch::outside(|| self.0.ram.alloc(len, align)))
    }

    unsafe fn dma_free(&self, memory: DmaMemory, align: usize) {
        watch::call_out();
        self.0.outstanding.fetch_sub(1, Ordering::Relaxed);
        watch::outside(|| self.0.ram.free(memory, align));
    }

    fn now_ns(&self) -> Option<u64> {
        self.0.clock.as_ref().map(|clock| clock.load(Ordering::Relaxed))
    }

    fn quiesce(&self, endpoint: EndpointId) {
        watch::call_out();
        watch::outside(|| self.0.quiesced.lock().unwrap().push(endpoint));
    }

    fn relax(&self) {
        watch::relax();
        let before = self.0.relaxed.fetch_add(1, Ordering::Relaxed);
        if let Some(clock) = &self.0.clock {
            clock.fetch_add(POLL_NS, Ordering::Relaxed);
        }
        watch::outside(|| self.0.run_on_relax());
        // Now and then, for who holds what this thread waits for: each time costs a turn of every other process.
        if before % 64 == 63 {
            std::thread::yield_now();
        }
    }
}

/// The model as the driver's device.
pub(crate) struct ModelTransport(pub(super) Arc<Inner>);

impl ModelTransport {
    fn with<R>(&self, work: impl FnOnce(&mut Device) -> R) -> R {
        watch::outside(|| work(&mut self.0.device()))
    }
}

impl Transport for ModelTransport {
    fn device_features(&self) -> u64 {
        self.with(|device| device.device_features())
    }

    fn set_driver_features(&self, features: u64) {
        self.with(|device| device.set_driver_features(features));
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.with(Device::read_status))
    }

    fn set_status(&self, status: DeviceStatus) {
        self.with(|device| {
            device.set_status(status.bits());
            if status.contains(DeviceStatus::DRIVER_OK) {
                self.0.run_at_driver_ok(device);
            }
        });
    }

    fn config_generation(&self) -> u32 {
        self.with(Device::config_generation)
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        let bytes: [u8; 1] = self.read_config(offset)?;
        Ok(bytes[0])
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        self.read_config(offset).map(u32::from_le_bytes)
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        self.with(|device| {
            let too_short = offset >= device.config_len();
            device.write_config(offset, &[value]);
            if too_short { Err(TransportError::ConfigTooShort { needed: offset + 1 }) } else { Ok(()) }
        })
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.with(|device| device.queue_max_size(queue))
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        if self.0.refused_queue.load(Ordering::Relaxed) == u32::from(queue) {
            return Err(TransportError::NoQueue { queue });
        }
        let QueueAddresses { descriptors, driver_area, device_area } = addresses;
        let (desc, avail, used) = (descriptors.get(), driver_area.get(), device_area.get());
        let set = self.with(|device| device.set_queue(queue, size, desc, avail, used));
        set.map_err(|_| TransportError::NoQueue { queue })
    }

    fn can_reset_queues(&self) -> bool {
        true
    }

    fn reset_queue(&self, queue: u16) -> Result<(), TransportError> {
        self.with(|device| device.reset_queue(queue));
        Ok(())
    }

    fn queue_is_reset(&self, queue: u16) -> Result<bool, TransportError> {
        Ok(!self.with(|device| device.queue_enabled(queue)))
    }

    fn notify(&self, queue: u16) {
        watch::doorbell();
        watch::outside(|| self.0.device().notify(queue, &mut self.0.ram.clone()));
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        let cause = self.with(Device::take_isr);
        InterruptCause { queue: cause & isr::QUEUE != 0, config: cause & isr::CONFIG != 0 }
    }
}

impl ModelTransport {
    fn read_config<const N: usize>(&self, offset: usize) -> Result<[u8; N], TransportError> {
        let mut bytes = [0; N];
        self.with(|device| {
            device.read_config(offset, &mut bytes);
            let fits = offset + N <= device.config_len();
            if fits { Ok(bytes) } else { Err(TransportError::ConfigTooShort { needed: offset + N }) }
        })
    }
}
