//! A doorbell that is rung by one store, without a call of the transport.

use super::register::Register;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, Ordering};

/// A register of 16 bits that a queue's number is written to.
#[derive(Clone, Copy, Debug)]
pub struct Doorbell(NonNull<u8>);

impl Doorbell {
    /// # Safety
    /// `register` points at a mapped device register, aligned to two bytes, which takes the queue's number as its
    /// notification (virtio 1.4, available buffer notifications), and stays mapped as long as the transport that it comes
    /// from exists.
    pub unsafe fn new(register: NonNull<u8>) -> Self {
        Self(register)
    }
}

/// The doorbell of a transport's queue, where it has one.
pub(crate) struct DoorbellCell(AtomicPtr<u8>);

impl DoorbellCell {
    /// # Safety
    /// The transport that doorbells come from exists as long as this.
    pub(crate) unsafe fn new(doorbell: Option<Doorbell>) -> Self {
        let cell = Self(AtomicPtr::new(ptr::null_mut()));
        cell.set(doorbell);
        cell
    }

    /// Takes note that the queue was enabled.
    pub(crate) fn set(&self, doorbell: Option<Doorbell>) {
        let register = doorbell.map_or(ptr::null_mut(), |Doorbell(register)| register.as_ptr());
        self.0.store(register, Ordering::Release);
    }

    /// Rings for `queue`, if there is a doorbell.
    #[inline(always)]
    pub(crate) fn ring(&self, queue: u16) -> bool {
        match NonNull::new(self.0.load(Ordering::Acquire)) {
            Some(register) => {
                // SAFETY: a doorbell's register stays mapped as long as its transport, which outlives this.
                unsafe { Register::<u16>::new(register) }.write(queue);
                true
            }
            None => false,
        }
    }
}
