//! The event queue: one buffer per descriptor, posted again as soon as it was read.

use crate::ring::{ALIGN, DESC_WRITE, Interrupts, Layout, Ring, Suppression};
use crate::shared_memory::SharedMemory;
use crate::wire::fault::{Fault, RECORD_LEN};

/// Bytes from one buffer to the next.
const STRIDE: usize = if cfg!(feature = "contexts") { 64 } else { 32 };
/// Bytes that a device can write: the draft's records are longer.
const BUFFER_LEN: usize = if cfg!(feature = "contexts") { 48 } else { RECORD_LEN };

/// What a used buffer held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Fault(Fault),
    /// Too short, or with reserved bytes set: to be ignored, and counted.
    Malformed,
}

pub(crate) struct EventQueue {
    ring: Ring,
    buffers: usize,
    broken: bool,
    /// Whether the device is one whose records go on behind the standard's.
    #[cfg(feature = "contexts")]
    long_records: bool,
}

impl EventQueue {
    /// Bytes of memory that a queue of `size` descriptors takes.
    pub(crate) fn memory_len(size: u16) -> usize {
        Layout::new(size).len + STRIDE * usize::from(size)
    }

    /// A queue in `memory` of [`memory_len`](Self::memory_len) zeroed bytes, with every buffer posted but not
    /// yet published.
    pub(crate) fn new(memory: SharedMemory, size: u16, suppression: Suppression) -> Self {
        let buffers = Layout::new(size).len.next_multiple_of(ALIGN);
        let ring = Ring::new(memory, size, suppression, Interrupts::Wanted);
        let mut queue = Self {
            ring,
            buffers,
            broken: false,
            #[cfg(feature = "contexts")]
            long_records: false,
        };
        queue.post_all();
        queue
    }

    fn post_all(&mut self) {
        for index in 0..self.ring.size() {
            let address = self.ring.memory().phys(self.buffers + STRIDE * usize::from(index));
            self.ring.set_descriptor(index, address, BUFFER_LEN as u32, DESC_WRITE, 0);
            self.ring.push(index);
        }
    }

    /// Begins anew with every buffer posted, not yet published: the device forgot the queue.
    pub(crate) fn restart(&mut self) {
        self.ring.restart();
        self.broken = false;
        self.post_all();
    }

    pub(crate) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Whether the device broke the ring, so that no event comes any more.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Shows the device the posted buffers, and says whether it wants the doorbell.
    #[must_use = "without the doorbell the device may never look"]
    pub(crate) fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    /// Says that records of the draft's length are to be read as such.
    #[cfg(feature = "contexts")]
    pub(crate) fn read_long_records(&mut self, long: bool) {
        self.long_records = long;
    }

    /// What a record has behind the standard's, on a device of the draft.
    #[cfg(feature = "contexts")]
    fn rest_of(&self, index: u16, used_len: u32) -> Option<[u8; BUFFER_LEN - RECORD_LEN]> {
        if !self.long_records || (used_len as usize) < BUFFER_LEN {
            return None;
        }
        let mut rest = [0; BUFFER_LEN - RECORD_LEN];
        let at = self.buffers + STRIDE * usize::from(index) + RECORD_LEN;
        self.ring.memory().read_bytes(at, &mut rest);
        Some(rest)
    }

    /// The next event. Its buffer is posted again; the device sees that after [`publish`](Self::publish).
    pub(crate) fn next(&mut self) -> Option<Event> {
        if self.broken {
            return None;
        }
        let used = match self.ring.pop() {
            Ok(used) => used?,
            Err(_jumped) => {
                self.broken = true;
                return None;
            }
        };
        let Some(index) = u16::try_from(used.id).ok().filter(|index| *index < self.ring.size()) else {
            // A buffer that was never posted: there is nothing to read or to post again.
            return Some(Event::Malformed);
        };
        let mut record = [0; RECORD_LEN];
        self.ring.memory().read_bytes(self.buffers + STRIDE * usize::from(index), &mut record);
        #[cfg(feature = "contexts")]
        let rest = self.rest_of(index, used.len);
        self.ring.push(index);
        let whole = used.len as usize >= RECORD_LEN;
        let fault = if whole { Fault::decode(&record) } else { None };
        #[cfg(feature = "contexts")]
        let fault = fault.map(|fault| fault.with_context(&record, rest.as_ref()));
        Some(fault.map_or(Event::Malformed, Event::Fault))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_memory::TestMemory;

    const SIZE: u16 = 4;

    /// I8: fails, by a panic, when `next` does not compare the used id with the queue's size, and by a buffer that is
    /// posted twice when it posts one for such an id.
    #[test]
    fn i08_a_buffer_that_was_never_posted_is_passed_over() {
        let memory = TestMemory::leak(EventQueue::memory_len(SIZE));
        // SAFETY: leaked, so valid for ever, and no one else uses it.
        let shared = unsafe { SharedMemory::new(memory) };
        let mut events = EventQueue::new(shared, SIZE, Suppression::Flags);
        let _ = events.publish();
        let used = (events.ring.addresses().device_area.get() - memory.phys.get()) as usize;
        for (index, id) in [u32::from(SIZE), 0x1_0000, u32::MAX, 2].into_iter().enumerate() {
            let memory = events.ring.memory_mut();
            memory.write_bytes(used + 4 + 8 * index, &id.to_le_bytes());
            memory.write_bytes(used + 8 + 8 * index, &(RECORD_LEN as u32).to_le_bytes());
            memory.store_release_u16(used + 2, index as u16 + 1);
            // Only the last one is a buffer, whose record is all zeros.
            let is_fault = matches!(events.next(), Some(Event::Fault(_)));
            assert_eq!(is_fault, id == 2, "{id:#x}");
        }
        assert!(events.next().is_none() && !events.is_broken());
        assert!(events.publish(), "one buffer is posted again");
        let avail = (events.ring.addresses().driver_area.get() - memory.phys.get()) as usize;
        assert_eq!(events.ring.memory().read_u16(avail + 2), SIZE + 1);
    }
}
