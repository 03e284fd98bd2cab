//! Other code that runs around one doorbell: another CPU, or an interrupt handler.

use std::sync::{Arc, Mutex};

use virtio_iommu::Viommu;
use virtio_iommu::transport::{DeviceStatus, InterruptCause, QueueAddresses, Transport, TransportError};
use virtio_iommu_model::Config;

use super::machine::{EP, Machine};
use super::platform::TestPlatform;

/// When the other code runs, seen from the request queue's doorbell.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// An interrupt handler, just before the store.
    Before,
    /// Another CPU, after the device answered and before the waiter looks.
    After,
}

type Work = Box<dyn FnOnce() + Send>;

/// A transport that lets other code run around one doorbell.
struct Interposed {
    inner: Box<dyn Transport>,
    when: When,
    work: Meanwhile,
}

/// What runs at the next doorbell of the request queue.
#[derive(Clone, Default)]
pub(crate) struct Meanwhile(Arc<Mutex<Option<Work>>>);

impl Meanwhile {
    pub(crate) fn run_next(&self, work: impl FnOnce() + Send + 'static) {
        *self.0.lock().unwrap() = Some(Box::new(work));
    }

    fn run(&self) {
        let work = self.0.lock().unwrap().take();
        if let Some(work) = work {
            work();
        }
    }
}

impl Transport for Interposed {
    fn device_features(&self) -> u64 {
        self.inner.device_features()
    }

    fn set_driver_features(&self, features: u64) {
        self.inner.set_driver_features(features);
    }

    fn status(&self) -> DeviceStatus {
        self.inner.status()
    }

    fn set_status(&self, status: DeviceStatus) {
        self.inner.set_status(status);
    }

    fn config_generation(&self) -> u32 {
        self.inner.config_generation()
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        self.inner.read_config_u8(offset)
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        self.inner.read_config_u32(offset)
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        self.inner.write_config_u8(offset, value)
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.inner.max_queue_size(queue)
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        self.inner.enable_queue(queue, size, addresses)
    }

    fn notify(&self, queue: u16) {
        if queue == 0 && self.when == When::Before {
            self.work.run();
        }
        self.inner.notify(queue);
        if queue == 0 && self.when == When::After {
            self.work.run();
        }
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        self.inner.acknowledge_interrupt()
    }
}

/// A machine whose driver is up, and what runs around its doorbells.
pub(crate) fn interposed(when: When) -> (Machine, Viommu<TestPlatform>, Meanwhile) {
    let machine = Machine::new(Config::default());
    let work = Meanwhile::default();
    let transport = Interposed { inner: Box::new(machine.transport()), when, work: work.clone() };
    let staged = Viommu::start(transport, machine.platform(), Machine::options()).unwrap();
    staged.introduce(EP).unwrap();
    (machine, staged.go_live().unwrap(), work)
}
