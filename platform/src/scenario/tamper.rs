//! A transport that misbehaves, for scenarios that must fail.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};

use spin::Once;
use virtio_iommu::transport::{DeviceStatus, InterruptCause, QueueAddresses, Transport, TransportError};

use crate::memory::phys_to_virt;

/// What is done to the request queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tamper {
    /// Once armed, its doorbell does not reach the device.
    HoldDoorbell,
    /// Once armed, every answer reads as success.
    Lie,
}

/// The switch, for whoever holds the other end.
#[derive(Default)]
pub(super) struct Arm {
    armed: Arc<AtomicBool>,
    transport: Once<Arc<Tampered>>,
}

impl Arm {
    pub(super) fn arm(&self) {
        self.armed.store(true, Ordering::SeqCst);
    }

    /// Goes back to what a transport does, and rings the doorbell as often as it was held: the device counts each.
    pub(super) fn release(&self) {
        self.armed.store(false, Ordering::SeqCst);
        if let Some(transport) = self.transport.get() {
            for _ in 0..transport.held.swap(0, Ordering::SeqCst) {
                transport.inner.notify(REQUEST_QUEUE);
            }
        }
    }
}

const REQUEST_QUEUE: u16 = 0;

/// A transport with something before it.
pub(super) struct Tampered {
    inner: Box<dyn Transport>,
    tamper: Tamper,
    armed: Arc<AtomicBool>,
    descriptors: AtomicU64,
    used: AtomicU64,
    size: AtomicU16,
    /// Used entries that were falsified.
    falsified: AtomicU16,
    /// Doorbells that were held.
    held: AtomicU16,
}

impl Tampered {
    /// Goes before a transport, one for each switch.
    pub(super) fn boxed(inner: Box<dyn Transport>, tamper: Tamper, arm: &Arm) -> Box<dyn Transport> {
        let armed = Arc::clone(&arm.armed);
        let (descriptors, used) = (AtomicU64::new(0), AtomicU64::new(0));
        let (size, falsified, held) = (AtomicU16::new(0), AtomicU16::new(0), AtomicU16::new(0));
        let tampered = Arc::new(Self { inner, tamper, armed, descriptors, used, size, falsified, held });
        arm.transport.call_once(|| Arc::clone(&tampered));
        Box::new(Handle(tampered))
    }

    /// Turns the answers that came since the last time into successes, by the rings in memory. QEMU answers
    /// before the doorbell's store is done, so they are there.
    fn falsify(&self, armed: bool) {
        let used = self.used.load(Ordering::SeqCst);
        let size = self.size.load(Ordering::SeqCst);
        if size == 0 {
            return;
        }
        let index = read::<u16>(used + 2);
        let mut next = self.falsified.load(Ordering::SeqCst);
        while next != index {
            if armed {
                self.falsify_entry(used + 4 + 8 * u64::from(next % size));
            }
            next = next.wrapping_add(1);
        }
        self.falsified.store(next, Ordering::SeqCst);
    }

    fn falsify_entry(&self, entry: u64) {
        let descriptors = self.descriptors.load(Ordering::SeqCst);
        let head = descriptors + 16 * u64::from(read::<u32>(entry));
        // A request is a readable and a writable descriptor; the tail ends the second.
        let answer = descriptors + 16 * u64::from(read::<u16>(head + 14));
        let (address, len) = (read::<u64>(answer), read::<u32>(answer + 8));
        write(address + u64::from(len) - 4, 0u32);
        write(entry + 4, len);
    }
}

fn read<T: Copy>(phys: u64) -> T {
    // SAFETY: the driver's ring, which it allocated for the device and which is mapped; aligned by the layout.
    unsafe { phys_to_virt(phys).cast::<T>().read_volatile() }
}

fn write<T: Copy>(phys: u64, value: T) {
    // SAFETY: as for `read`: this plays the device, which may write here at any time.
    unsafe { phys_to_virt(phys).cast::<T>().write_volatile(value) }
}

/// The transport, as the driver has it.
struct Handle(Arc<Tampered>);

impl Transport for Handle {
    fn device_features(&self) -> u64 {
        self.0.inner.device_features()
    }

    fn set_driver_features(&self, features: u64) {
        self.0.inner.set_driver_features(features);
    }

    fn status(&self) -> DeviceStatus {
        self.0.inner.status()
    }

    fn set_status(&self, status: DeviceStatus) {
        self.0.inner.set_status(status);
    }

    fn config_generation(&self) -> u32 {
        self.0.inner.config_generation()
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        self.0.inner.read_config_u8(offset)
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        self.0.inner.read_config_u32(offset)
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        self.0.inner.write_config_u8(offset, value)
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.0.inner.max_queue_size(queue)
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        if queue == REQUEST_QUEUE {
            self.0.descriptors.store(addresses.descriptors.get(), Ordering::SeqCst);
            self.0.used.store(addresses.device_area.get(), Ordering::SeqCst);
            self.0.size.store(size, Ordering::SeqCst);
        }
        self.0.inner.enable_queue(queue, size, addresses)
    }

    fn notify(&self, queue: u16) {
        let armed = self.0.armed.load(Ordering::SeqCst);
        let request = queue == REQUEST_QUEUE;
        if request && armed && self.0.tamper == Tamper::HoldDoorbell {
            self.0.held.fetch_add(1, Ordering::SeqCst);
            return;
        }
        self.0.inner.notify(queue);
        if request && self.0.tamper == Tamper::Lie {
            self.0.falsify(armed);
        }
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        self.0.inner.acknowledge_interrupt()
    }
}
