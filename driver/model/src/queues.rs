//! The face that a virtio transport shows to the driver: queues, doorbells, interrupts.

use alloc::vec::Vec;

use crate::device::Device;
use crate::memory::GuestMemory;
use crate::number::{EVENT_QUEUE, REQUEST_QUEUE, device_status, feature};
use crate::ring::{Interrupt, QueueError, Ring, RingError};

/// Causes of an interrupt, as the ISR register of virtio-pci and virtio-mmio has them.
pub mod isr {
    /// A queue has used elements.
    pub const QUEUE: u8 = 1;
    /// The configuration or the device status changed.
    pub const CONFIG: u8 = 2;
}

impl Device {
    /// Largest size of a queue; 0 if there is no such queue.
    pub fn queue_max_size(&self, queue: u16) -> u16 {
        self.iommu.config.queue_sizes.get(usize::from(queue)).copied().unwrap_or(0)
    }

    /// Sets up and enables a queue.
    ///
    /// # Errors
    ///
    /// When there is no such queue, or size or addresses are not allowed; the queue is then as before.
    pub fn set_queue(
        &mut self,
        queue: u16,
        size: u16,
        desc: u64,
        avail: u64,
        used: u64,
    ) -> Result<(), QueueError> {
        let max = self.queue_max_size(queue);
        if max == 0 {
            return Err(QueueError::NoSuchQueue);
        }
        self.rings[usize::from(queue)] = Some(Ring::new(size, max, desc, avail, used)?);
        Ok(())
    }

    /// Whether a queue is set up.
    pub fn queue_enabled(&self, queue: u16) -> bool {
        self.rings.get(usize::from(queue)).is_some_and(Option::is_some)
    }

    /// Resets one queue (RING_RESET): its requests are forgotten, domains and mappings stay.
    pub fn reset_queue(&mut self, queue: u16) {
        if self.iommu.negotiated & feature::RING_RESET == 0 {
            self.violate("core", "a queue was reset without RING_RESET negotiated", None);
        }
        if let Some(ring) = self.rings.get_mut(usize::from(queue)) {
            *ring = None;
        }
        match queue {
            REQUEST_QUEUE => self.forget_requests(),
            EVENT_QUEUE => self.held_events.clear(),
            _ => {}
        }
    }

    /// Forgets every unanswered request.
    pub(crate) fn forget_requests(&mut self) {
        self.held = Vec::new();
        self.dropped = Vec::new();
    }

    /// The doorbell of a queue: handles every available request, or delivers kept events.
    pub fn notify(&mut self, queue: u16, mem: &mut dyn GuestMemory) {
        let index = usize::from(queue);
        if !self.queue_enabled(queue) {
            self.violate("core", "a queue that is not set up was notified", None);
            return;
        }
        self.counters.kicks[index] += 1;
        if self.status & device_status::DRIVER_OK == 0 {
            self.violate("core", "a queue was notified before DRIVER_OK", None);
        }
        if !self.is_running() {
            return;
        }
        if queue == REQUEST_QUEUE {
            self.drain_requests(mem);
        } else {
            self.deliver_held_events(mem);
        }
        self.interrupt_if_due(queue, mem);
    }

    /// Interrupt causes ([`isr`]) since the last call, as one shared line has them.
    pub fn take_isr(&mut self) -> u8 {
        let queues = self.take_queue_interrupt(REQUEST_QUEUE) | self.take_queue_interrupt(EVENT_QUEUE);
        let config = self.take_config_interrupt();
        (if queues { isr::QUEUE } else { 0 }) | (if config { isr::CONFIG } else { 0 })
    }

    /// Whether a queue's interrupt was raised since the last call.
    pub fn take_queue_interrupt(&mut self, queue: u16) -> bool {
        self.pending_interrupts.get_mut(usize::from(queue)).is_some_and(core::mem::take)
    }

    /// Whether the configuration interrupt was raised since the last call.
    pub fn take_config_interrupt(&mut self) -> bool {
        core::mem::take(&mut self.pending_config_interrupt)
    }

    /// Raises a queue's interrupt unless the driver suppressed it.
    pub(crate) fn interrupt_if_due(&mut self, queue: u16, mem: &dyn GuestMemory) {
        let index = usize::from(queue);
        let event_idx = self.event_idx();
        let Some(ring) = self.rings[index].as_mut() else {
            return;
        };
        match ring.interrupt(mem, event_idx) {
            Ok(Interrupt::Due) if !self.inject.lose_interrupts => {
                self.pending_interrupts[index] = true;
                self.counters.interrupts[index] += 1;
            }
            Ok(Interrupt::Suppressed) => self.counters.suppressed[index] += 1,
            Ok(Interrupt::Due | Interrupt::NothingNew) => {}
            Err(error) => self.ring_failed(error),
        }
    }

    pub(crate) fn event_idx(&self) -> bool {
        self.iommu.negotiated & feature::RING_EVENT_IDX != 0
    }

    pub(crate) fn ring_failed(&mut self, error: RingError) {
        self.ring_error = Some(error);
        self.violate("core", "a ring is malformed", None);
        self.fail();
    }
}
