//! A split virtqueue, driver side (virtio 1.4, split virtqueues).
//!
//! Only the ring: descriptors, the available ring, the used ring, and when to ring the doorbell. What the
//! descriptors point at is the queues' business. The ring never reads back what it wrote, so a device that
//! scribbles over it confuses nobody but itself.

use crate::addr::PhysAddr;
use crate::shared_memory::SharedMemory;
use crate::sync::{Ordering, fence};
use crate::transport::QueueAddresses;

/// The descriptor continues with the next one.
pub(crate) const DESC_NEXT: u16 = 1;
/// The device writes to this descriptor's buffer.
pub(crate) const DESC_WRITE: u16 = 2;

const DESC_LEN: usize = 16;
const USED_ELEM_LEN: usize = 8;
/// Set in the available ring's flags: the driver polls and wants no interrupt.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Set in the used ring's flags: the device polls and wants no doorbell.
const USED_NO_NOTIFY: u16 = 1;

/// Where the parts of a ring of `size` descriptors lie, from the start of its memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) avail: usize,
    pub(crate) used: usize,
    /// The bytes that the ring takes: what follows is free for the queue.
    pub len: usize,
}

impl Layout {
    pub(crate) const fn new(size: u16) -> Self {
        let size = size as usize;
        let avail = DESC_LEN * size;
        // flags, index, ring, used_event
        let used = (avail + 6 + 2 * size).next_multiple_of(4);
        // flags, index, ring, avail_event
        let len = (used + 6 + USED_ELEM_LEN * size).next_multiple_of(64);
        Self { avail, used, len }
    }
}

/// Bytes of a cell in the memory behind a ring: a cache line, or two where the draft's longer requests can come.
pub(crate) const CELL_LEN: usize = if cfg!(feature = "contexts") { 128 } else { 64 };

/// The alignment that a ring's memory needs.
pub(crate) const ALIGN: usize = 64;

/// An owner that polls asks for an interrupt that is [2^15 entries](Ring::write_used_event) away, and moves it on each time
/// that the available index passes a multiple of this.
const EVENT_STEP: u16 = 0x4000;

/// Whether the queue's owner wants to be interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interrupts {
    Wanted,
    Unwanted,
}

/// How doorbells and interrupts are suppressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suppression {
    Flags,
    EventIndex,
}

/// What the device put into the used ring. Both are its own words, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    pub id: u32,
    pub len: u32,
}

/// The used index moved by more than was in flight: nothing in this ring can be trusted any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UsedIndexJumped {
    pub seen: u16,
    pub expected_at_most: u16,
}

pub(crate) struct Ring {
    memory: SharedMemory,
    layout: Layout,
    size: u16,
    suppression: Suppression,
    interrupts: Interrupts,
    /// Index of the next available entry, the ones not yet published included.
    avail_idx: u16,
    /// What the device can see of `avail_idx`.
    published: u16,
    /// Index of the next used entry to read.
    used_idx: u16,
    /// How many entries of the device's are known of and not passed over yet.
    left: u16,
}

impl Ring {
    /// A ring of `size` (a power of two) at the start of `memory`, which holds [`Layout::len`] zeroed bytes
    /// and may go on beyond them.
    pub(crate) fn new(
        memory: SharedMemory,
        size: u16,
        suppression: Suppression,
        interrupts: Interrupts,
    ) -> Self {
        debug_assert!(size.is_power_of_two());
        let layout = Layout::new(size);
        let memory = memory.with_ring(size, &layout);
        let mut ring = Self {
            memory,
            layout,
            size,
            suppression,
            interrupts,
            avail_idx: 0,
            published: 0,
            used_idx: 0,
            left: 0,
        };
        ring.write_wish();
        ring
    }

    pub(crate) fn interrupts(&self) -> Interrupts {
        self.interrupts
    }

    /// Changes whether the owner wants to be interrupted. What the device did before it sees a new wish comes without
    /// an interrupt, so that the owner has to look once more.
    pub(crate) fn set_interrupts(&mut self, interrupts: Interrupts) {
        if self.interrupts == interrupts {
            return;
        }
        self.interrupts = interrupts;
        self.write_wish();
        // Our wish, then our look; the device writes its index, then looks at our wish.
        fence(Ordering::SeqCst);
    }

    /// Empties the ring, as it was when it was made: the device forgot the queue.
    pub(crate) fn restart(&mut self) {
        (self.avail_idx, self.published, self.used_idx, self.left) = (0, 0, 0, 0);
        let avail_end = self.layout.avail + 6 + 2 * usize::from(self.size);
        for at in (self.layout.avail..avail_end).step_by(2) {
            self.memory.write_u16(at, 0);
        }
        for at in (self.layout.used..self.avail_event_offset() + 2).step_by(2) {
            self.memory.write_u16(at, 0);
        }
        self.write_wish();
    }

    fn write_wish(&mut self) {
        match self.suppression {
            Suppression::Flags => {
                let flags = if self.interrupts == Interrupts::Wanted { 0 } else { AVAIL_NO_INTERRUPT };
                self.memory.write_u16(self.layout.avail, flags.to_le());
            }
            Suppression::EventIndex => self.write_used_event(),
        }
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn addresses(&self) -> QueueAddresses {
        QueueAddresses {
            descriptors: self.memory.phys(0),
            driver_area: self.memory.phys(self.layout.avail),
            device_area: self.memory.phys(self.layout.used),
        }
    }

    pub(crate) fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    pub(crate) fn memory_mut(&mut self) -> &mut SharedMemory {
        &mut self.memory
    }

    pub(crate) fn set_descriptor(&mut self, index: u16, address: PhysAddr, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; DESC_LEN];
        bytes[0..8].copy_from_slice(&address.get().to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&next.to_le_bytes());
        self.memory.write_bytes(DESC_LEN * usize::from(index), &bytes);
    }

    /// Adds a chain to the available ring. The device sees it after [`publish`](Self::publish).
    pub(crate) fn push(&mut self, head: u16) {
        self.memory.set_avail_entry(self.avail_idx.into(), head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// How many chains were added whose entries were not passed over yet.
    #[inline(always)]
    pub(crate) fn in_flight(&self) -> u16 {
        self.avail_idx.wrapping_sub(self.used_idx)
    }

    /// Where the next chain goes, of several that are added [ahead](Self::pushed) and then counted.
    #[inline(always)]
    pub(crate) fn next_avail(&self) -> usize {
        self.avail_idx.into()
    }

    /// Counts chains whose entries were written one behind the other, from the [next](Self::next_avail) on.
    #[inline(always)]
    pub(crate) fn pushed(&mut self, count: u16) {
        self.avail_idx = self.avail_idx.wrapping_add(count);
    }

    /// [`push`](Self::push) and [`publish`](Self::publish) for one chain, where all that was pushed before is published.
    #[must_use = "without the doorbell the device may never look"]
    #[inline(always)]
    pub(crate) fn publish_one(&mut self, head: u16) -> bool {
        debug_assert_eq!(self.avail_idx, self.published);
        let old = self.avail_idx;
        let new = old.wrapping_add(1);
        self.memory.set_avail_entry(old.into(), head);
        (self.avail_idx, self.published) = (new, new);
        if new.is_multiple_of(EVENT_STEP) {
            self.move_event_on();
        }
        self.memory.publish_avail_index(new);
        // As in `publish`.
        fence(Ordering::SeqCst);
        match self.suppression {
            Suppression::Flags => self.memory.used_flags() & USED_NO_NOTIFY == 0,
            Suppression::EventIndex => self.memory.avail_event() == old,
        }
    }

    /// Shows the device what was pushed, and says whether it wants the doorbell for it.
    #[must_use = "without the doorbell the device may never look"]
    pub(crate) fn publish(&mut self) -> bool {
        if self.avail_idx == self.published {
            return false;
        }
        let old = core::mem::replace(&mut self.published, self.avail_idx);
        // Far enough away for as long as the index does not pass the next multiple.
        if (old ^ self.avail_idx) & !(EVENT_STEP - 1) != 0 {
            self.move_event_on();
        }
        self.memory.publish_avail_index(self.avail_idx);
        // The device may go to sleep between our index and our look at its wish: both sides write, then look.
        fence(Ordering::SeqCst);
        match self.suppression {
            Suppression::Flags => self.memory.used_flags() & USED_NO_NOTIFY == 0,
            Suppression::EventIndex => crossed(self.memory.avail_event(), old, self.avail_idx),
        }
    }

    #[cold]
    fn move_event_on(&mut self) {
        if self.suppression == Suppression::EventIndex && self.interrupts == Interrupts::Unwanted {
            self.write_used_event();
        }
    }

    /// The next entry that the device is done with. Bounded by what is in flight.
    #[inline]
    pub(crate) fn pop(&mut self) -> Result<Option<Used>, UsedIndexJumped> {
        if self.left == 0 && !self.look()? {
            return Ok(None);
        }
        let (id, len) = self.memory.used_entry(self.used_idx.into());
        self.pass(1);
        if self.suppression == Suppression::EventIndex && self.interrupts == Interrupts::Wanted {
            self.write_used_event();
        }
        Ok(Some(Used { id, len }))
    }

    /// How many entries the device is done with, while no interrupt is wanted. None also where the index makes no sense, as
    /// [`pop`](Self::pop) finds out.
    #[inline(always)]
    pub(crate) fn ready(&mut self) -> u16 {
        debug_assert_eq!(self.interrupts, Interrupts::Unwanted);
        if self.left == 0 {
            let ready = self.memory.used_index().wrapping_sub(self.used_idx);
            if ready <= self.published.wrapping_sub(self.used_idx) {
                self.left = ready;
            }
        }
        self.left
    }

    /// Where the first of those that are [ready](Self::ready) is.
    #[inline(always)]
    pub(crate) fn next_used(&self) -> usize {
        self.used_idx.into()
    }

    /// The next entry that the device is done with, left where it is, where it is the only one that is there.
    #[inline(always)]
    pub(crate) fn sole(&mut self) -> Option<Used> {
        debug_assert_eq!((self.interrupts, self.left), (Interrupts::Unwanted, 0));
        let at = self.used_idx;
        if self.published == at {
            return None;
        }
        let (id, len) = self.memory.used_entry_if_last(at)?;
        Some(Used { id, len })
    }

    /// Whether entries were seen and not passed over.
    #[inline(always)]
    pub(crate) fn has_left_any(&self) -> bool {
        self.left > 0
    }

    /// Passes over so many of the entries that are [ready](Self::ready).
    #[inline(always)]
    pub(crate) fn pass(&mut self, count: u16) {
        debug_assert!(count <= self.left);
        self.left -= count;
        self.used_idx = self.used_idx.wrapping_add(count);
    }

    /// Passes over the entry that [`sole`](Self::sole) returned.
    #[inline(always)]
    pub(crate) fn pass_sole(&mut self) {
        self.used_idx = self.used_idx.wrapping_add(1);
    }

    /// Whether the device is done with more than was seen before.
    #[inline]
    fn look(&mut self) -> Result<bool, UsedIndexJumped> {
        let mut seen = self.memory.used_index();
        if seen == self.used_idx && self.interrupts == Interrupts::Wanted {
            // The device may have looked at `used_event` before it was moved on: then no interrupt comes for what
            // it added since, and this is the last look.
            fence(Ordering::SeqCst);
            seen = self.memory.used_index();
        }
        let ready = seen.wrapping_sub(self.used_idx);
        if ready > self.published.wrapping_sub(self.used_idx) {
            return Err(UsedIndexJumped { seen, expected_at_most: self.published });
        }
        self.left = ready;
        Ok(ready > 0)
    }

    /// Says after which used entry the device is to interrupt: the next one, or, for an owner that polls, one
    /// that is 2^15 entries away and moves on before it is reached.
    fn write_used_event(&mut self) {
        let event = match self.interrupts {
            Interrupts::Wanted => self.used_idx,
            Interrupts::Unwanted => self.avail_idx.wrapping_add(0x8000),
        };
        self.memory.set_used_event(event);
    }

    fn avail_event_offset(&self) -> usize {
        self.layout.used + 4 + USED_ELEM_LEN * usize::from(self.size)
    }
}

/// Whether an index that moved from `old` to `new` passed `event`, in arithmetic modulo 2^16
/// (virtio 1.4, available buffer notification suppression).
#[inline]
fn crossed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(all(test, loom))]
pub(crate) mod loom;
#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_memory::TestMemory;
    use alloc::vec;
    use alloc::vec::Vec;

    const SIZE: u16 = 4;

    fn ring(suppression: Suppression) -> Ring {
        let memory = TestMemory::leak(Layout::new(SIZE).len);
        // SAFETY: leaked, so valid for ever, and no one else uses it.
        let memory = unsafe { SharedMemory::new(memory) };
        Ring::new(memory, SIZE, suppression, Interrupts::Unwanted)
    }

    /// Plays the device: gives back `id` with `len`.
    fn complete(ring: &mut Ring, index: &mut u16, id: u32, len: u32) {
        let entry = usize::from(*index % SIZE);
        let offset = ring.layout.used + 4 + USED_ELEM_LEN * entry;
        ring.memory.write_bytes(offset, &id.to_le_bytes());
        ring.memory.write_bytes(offset + 4, &len.to_le_bytes());
        *index = index.wrapping_add(1);
        let used = ring.layout.used;
        ring.memory.store_release_u16(used + 2, *index);
    }

    #[test]
    fn parts_are_aligned_as_the_standard_asks() {
        for size in [1, 2, 4, 64, 256, 1024, 32768] {
            let layout = Layout::new(size);
            assert_eq!((layout.avail % 2, layout.used % 4), (0, 0));
            assert!(layout.used >= layout.avail + 6 + 2 * usize::from(size));
        }
        // Counted by hand for four: 64 bytes of descriptors, 14 available, two of padding, 38 used.
        let layout = Layout::new(4);
        assert_eq!((layout.avail, layout.used, layout.len), (64, 80, 128));
    }

    #[test]
    fn nothing_is_visible_before_publish() {
        let mut ring = ring(Suppression::Flags);
        ring.push(2);
        assert_eq!(ring.memory.read_u16(ring.layout.avail + 2), 0);
        assert!(ring.publish());
        assert_eq!(ring.memory.read_u16(ring.layout.avail + 2), 1);
        assert_eq!(ring.memory.read_u16(ring.layout.avail + 4), 2);
        assert!(!ring.publish(), "nothing new, nothing to ring for");
    }

    #[test]
    fn a_device_that_polls_gets_no_doorbell() {
        let mut ring = ring(Suppression::Flags);
        let used = ring.layout.used;
        ring.memory.write_u16(used, USED_NO_NOTIFY);
        ring.push(0);
        assert!(!ring.publish());
    }

    #[test]
    fn used_entries_come_once_and_in_ring_order() {
        let mut ring = ring(Suppression::Flags);
        let mut index = 0;
        for head in 0..3 {
            ring.push(head);
        }
        let _ = ring.publish();
        complete(&mut ring, &mut index, 2, 4);
        complete(&mut ring, &mut index, 0, 0);
        assert_eq!(ring.pop(), Ok(Some(Used { id: 2, len: 4 })));
        assert_eq!(ring.pop(), Ok(Some(Used { id: 0, len: 0 })));
        assert_eq!(ring.pop(), Ok(None));
    }

    #[test]
    fn indices_wrap() {
        let mut ring = ring(Suppression::EventIndex);
        let mut index = 0;
        for round in 0..70_000u32 {
            ring.push(0);
            // The device wants the doorbell for the next entry each time.
            let event = ring.avail_event_offset();
            ring.memory.write_u16(event, ring.published);
            assert!(ring.publish(), "round {round}");
            complete(&mut ring, &mut index, round, 4);
            assert_eq!(ring.pop(), Ok(Some(Used { id: round, len: 4 })));
        }
    }

    /// Fails when an index, a used entry, or what the device wished of the first life is found in the second.
    #[test]
    fn a_ring_that_restarts_is_as_new() {
        for suppression in [Suppression::Flags, Suppression::EventIndex] {
            for interrupts in [Interrupts::Wanted, Interrupts::Unwanted] {
                let mut ring = ring(suppression);
                ring.set_interrupts(interrupts);
                let new: Vec<u8> = bytes(&ring);
                let mut index = 0;
                for round in 0..7 {
                    ring.push(3);
                    let _ = ring.publish();
                    complete(&mut ring, &mut index, round, 4);
                    assert!(ring.pop().unwrap().is_some());
                }
                ring.push(2);
                let _ = ring.publish();
                complete(&mut ring, &mut index, 2, 4);
                let event = ring.avail_event_offset();
                ring.memory.write_u16(event, 0x1234);
                let used = ring.layout.used;
                ring.memory.write_u16(used, USED_NO_NOTIFY);

                ring.restart();
                assert_eq!(bytes(&ring), new);
                assert_eq!(ring.pop(), Ok(None), "an answer of the first life");
                ring.push(1);
                assert!(ring.publish());
                assert_eq!(ring.memory.read_u16(ring.layout.avail + 2), 1);
                complete(&mut ring, &mut 0, 1, 4);
                assert_eq!(ring.pop(), Ok(Some(Used { id: 1, len: 4 })));
            }
        }
    }

    /// All but the descriptors.
    fn bytes(ring: &Ring) -> Vec<u8> {
        let mut bytes = vec![0; ring.layout.len - ring.layout.avail];
        ring.memory.read_bytes(ring.layout.avail, &mut bytes);
        bytes
    }

    #[test]
    fn a_used_index_from_nowhere_is_an_error() {
        let mut ring = ring(Suppression::Flags);
        ring.push(0);
        let _ = ring.publish();
        let used = ring.layout.used;
        ring.memory.write_u16(used + 2, 2);
        assert_eq!(ring.pop(), Err(UsedIndexJumped { seen: 2, expected_at_most: 1 }));
    }

    /// Fails when the look at one entry does not ask whether anything is in flight.
    #[test]
    fn an_entry_that_nobody_asked_for_is_not_the_only_one() {
        let mut ring = ring(Suppression::Flags);
        let mut index = 0;
        ring.push(0);
        let _ = ring.publish();
        complete(&mut ring, &mut index, 0, 4);
        assert_eq!(ring.sole(), Some(Used { id: 0, len: 4 }));
        ring.pass_sole();
        complete(&mut ring, &mut index, 0, 4);
        assert_eq!((ring.sole(), ring.ready()), (None, 0));
        assert_eq!(ring.pop(), Err(UsedIndexJumped { seen: 2, expected_at_most: 1 }));
    }

    #[test]
    fn batches_across_the_wrap_lose_no_doorbell() {
        // For every place of the index and every batch: the doorbell is due exactly if the device, which
        // stopped after `done` entries, has not seen the first new one.
        for old in [0u16, 1, 0x7fff, 0xfffe, 0xffff] {
            for batch in 1..=16u16 {
                let new = old.wrapping_add(batch);
                assert!(crossed(old, old, new), "idle device, index {old:#x}, batch {batch}");
                assert!(!crossed(new, old, new), "device that polls ahead");
                assert!(!crossed(old.wrapping_sub(1), old, new), "device that is busy");
            }
        }
    }

    /// Fails when the entry that an owner who polls asks an interrupt for is not moved on in time, also by batches.
    #[test]
    fn no_interrupt_is_asked_for() {
        let mut ring = ring(Suppression::EventIndex);
        let used_event = ring.layout.avail + 4 + 2 * usize::from(SIZE);
        let mut used = 0u16;
        for round in 0..100_000u32 {
            for _ in 0..=round % u32::from(SIZE) {
                ring.push(0);
            }
            let _ = ring.publish();
            let event = ring.memory.read_u16(used_event);
            while used != ring.avail_idx {
                let next = used.wrapping_add(1);
                assert!(!crossed(event, used, next), "round {round}: an interrupt for entry {used:#x}");
                complete(&mut ring, &mut used, 0, 4);
                assert!(ring.pop().unwrap().is_some());
            }
        }
        let flags = self::ring(Suppression::Flags);
        assert_eq!(flags.memory.read_u16(flags.layout.avail), AVAIL_NO_INTERRUPT);
    }
}
