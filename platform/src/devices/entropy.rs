//! A virtio entropy source, driven by this kernel itself: one queue, one buffer, nothing that waits without a bound.
//!
//! Ring and buffer lie in one piece of coherent memory, and all addresses that the device gets are IOVAs. What it answers
//! is checked: the used ring's index, the number of the buffer, and the length.

use core::fmt;
use core::sync::atomic::{Ordering, fence};

use virtio_iommu::transport::{
    DeviceStatus, QueueAddresses, Transport, TransportError, memory_before_doorbell,
};
use virtio_iommu::{CoherentMemory, DmaDevice, DmaError, PhysAddr, UnmapError};

use super::virtio::{TIMEOUT_NS, VirtioError, reset};
use crate::time::Deadline;

/// Bytes that the device is asked for at a time.
pub const BUFFER_BYTES: usize = 1024;

/// VERSION_1, and ACCESS_PLATFORM, without which the device ignores the IOMMU.
const FEATURES: u64 = 1 << 32 | 1 << 33;
/// The only queue.
const QUEUE: u16 = 0;
/// A descriptor's flag: the device writes.
const DESC_WRITE: u16 = 2;

/// Offsets in the memory, of a queue with one entry: its descriptor at 0, the available ring, the used ring, the buffer.
const AVAIL: usize = 16;
const USED: usize = 32;
const BUFFER: usize = 64;
const MEMORY_BYTES: usize = BUFFER + BUFFER_BYTES;

/// What went wrong with the entropy source.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum EntropyError {
    /// The device does not come out of its reset, and keeps what it was given.
    Reset(VirtioError),
    /// It does not offer VERSION_1 and ACCESS_PLATFORM, or does not accept them.
    Features {
        /// What it offers.
        offered: u64,
    },
    /// It has no queue, or a doorbell outside of its registers.
    Queue(TransportError),
    /// There is no memory for it.
    Memory(DmaError),
    /// Its memory is not confirmed to be out of its reach.
    Unmap(UnmapError),
    /// It did not answer in time, and keeps its buffer.
    Timeout,
    /// It has the buffer already.
    Busy,
    /// It answered for what it was not asked.
    Answer {
        /// The used ring's index.
        index: u16,
        /// The index that was expected.
        expected: u16,
        /// The buffer that it names; there is only number 0.
        id: u32,
        /// How many bytes it says that it wrote.
        len: u32,
    },
}

impl fmt::Display for EntropyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(error) => error.fmt(f),
            Self::Features { offered } => {
                write!(f, "entropy source: needs features {FEATURES:#x}, and offers {offered:#x}")
            }
            Self::Queue(error) => write!(f, "entropy source: {error}"),
            Self::Memory(error) => write!(f, "entropy source: {error}"),
            Self::Unmap(error) => write!(f, "entropy source: {error}"),
            Self::Timeout => f.write_str("entropy source: no answer"),
            Self::Busy => f.write_str("entropy source: it has its buffer already"),
            Self::Answer { index, expected, id, len } => write!(
                f,
                "entropy source: an answer for buffer {id:#x} of {len:#x} bytes, index {index:#x} instead of \
                 {expected:#x}"
            ),
        }
    }
}

impl core::error::Error for EntropyError {}

/// An entropy source. Dropping it leaves the device running, and its memory with it: [`close`](Self::close) ends it.
pub struct Entropy<T> {
    registers: T,
    memory: CoherentMemory,
    /// The available ring's index: how often the device was given the buffer.
    given: u16,
    /// When the answer is due, while the device has the buffer.
    due: Option<Deadline>,
}

impl<T: Transport> Entropy<T> {
    /// Resets the device and sets its queue up in memory of `device`. Its bus mastering may still be off.
    ///
    /// # Errors
    ///
    /// [`EntropyError`]; the device is not started then.
    pub fn new(device: &dyn DmaDevice, registers: T) -> Result<Self, EntropyError> {
        reset(&registers).map_err(EntropyError::Reset)?;
        let status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK;
        registers.set_status(status - DeviceStatus::FEATURES_OK);
        let offered = registers.device_features();
        registers.set_driver_features(offered & FEATURES);
        registers.set_status(status);
        if offered & FEATURES != FEATURES || !registers.status().contains(DeviceStatus::FEATURES_OK) {
            registers.set_status(DeviceStatus::FAILED);
            return Err(EntropyError::Features { offered });
        }
        let memory = device.alloc_coherent(MEMORY_BYTES).map_err(EntropyError::Memory)?;
        let entropy = Self { registers, memory, given: 0, due: None };
        if let Err(error) = entropy.set_queue_up() {
            entropy.registers.set_status(DeviceStatus::FAILED);
            entropy.close(device)?;
            return Err(EntropyError::Queue(error));
        }
        entropy.registers.set_status(status | DeviceStatus::DRIVER_OK);
        Ok(entropy)
    }

    fn set_queue_up(&self) -> Result<(), TransportError> {
        // The transport calls them physical; behind the IOMMU they are what the device has to use.
        let at = |offset: usize| PhysAddr::new(self.memory.iova().get() + offset as u64);
        let [address, len, flags] = [at(BUFFER).get(), BUFFER_BYTES as u64, DESC_WRITE.into()];
        let descriptor = [address.to_le(), (len | flags << 32).to_le()];
        // SAFETY: inside the memory, and the device does not know of it yet.
        unsafe { self.place::<[u64; 2]>(0).write_volatile(descriptor) };
        if self.registers.max_queue_size(QUEUE) == 0 {
            return Err(TransportError::NoQueue { queue: QUEUE });
        }
        let (descriptors, driver_area, device_area) = (at(0), at(AVAIL), at(USED));
        self.registers.enable_queue(QUEUE, 1, QueueAddresses { descriptors, driver_area, device_area })
    }

    /// Gives the device its buffer.
    ///
    /// # Errors
    ///
    /// [`EntropyError::Busy`].
    pub fn start(&mut self) -> Result<(), EntropyError> {
        if self.due.is_some() {
            return Err(EntropyError::Busy);
        }
        self.due = Some(Deadline::after_ns(TIMEOUT_NS));
        self.given = self.given.wrapping_add(1);
        // The ring's only entry always names descriptor 0, as it was zeroed.
        fence(Ordering::Release);
        // SAFETY: inside the memory, and only the device reads it.
        unsafe { self.place::<u16>(AVAIL + 2).write_volatile(self.given.to_le()) };
        memory_before_doorbell();
        self.registers.notify(QUEUE);
        Ok(())
    }

    /// Copies what the device wrote to `bytes`, if it is done, and says how many they are.
    ///
    /// # Errors
    ///
    /// [`EntropyError::Timeout`] and [`EntropyError::Answer`]; the device is to be closed then.
    pub fn finish(&mut self, bytes: &mut [u8; BUFFER_BYTES]) -> Result<Option<usize>, EntropyError> {
        let Some(due) = &mut self.due else { return Ok(None) };
        // Expired is asked first, so that a last look at the device comes after the deadline.
        let (expired, expected) = (due.expired(), self.given);
        // SAFETY: inside the memory.
        let index = u16::from_le(unsafe { self.place::<u16>(USED + 2).read_volatile() });
        if index == expected.wrapping_sub(1) {
            return if expired { Err(EntropyError::Timeout) } else { Ok(None) };
        }
        fence(Ordering::Acquire);
        // SAFETY: inside the memory.
        let [id, len] = unsafe { self.place::<[u32; 2]>(USED + 4).read_volatile() }.map(u32::from_le);
        let buffer = &mut bytes[..check_answer(index, expected, id, len)?];
        self.due = None;
        for (at, byte) in buffer.iter_mut().enumerate() {
            // SAFETY: inside the memory.
            *byte = unsafe { self.place::<u8>(BUFFER + at).read_volatile() };
        }
        Ok(Some(buffer.len()))
    }

    /// Resets the device and frees its memory. `device` is the one that it was made with.
    ///
    /// # Errors
    ///
    /// [`EntropyError::Reset`], [`EntropyError::Unmap`].
    pub fn close(self, device: &dyn DmaDevice) -> Result<(), EntropyError> {
        reset(&self.registers).map_err(EntropyError::Reset)?;
        device.free_coherent(self.memory).map(drop).map_err(EntropyError::Unmap)
    }

    /// Where a word of the memory is. The device may write there at any time.
    fn place<V>(&self, offset: usize) -> *mut V {
        assert!(offset + size_of::<V>() <= MEMORY_BYTES && offset.is_multiple_of(align_of::<V>()));
        self.memory.ptr().as_ptr().wrapping_add(offset).cast()
    }
}

/// The number of bytes in the buffer, of an answer in which everything is as it must be.
fn check_answer(index: u16, expected: u16, id: u32, len: u32) -> Result<usize, EntropyError> {
    let wrong = EntropyError::Answer { index, expected, id, len };
    let bytes = usize::try_from(len).ok().filter(|bytes| (1..=BUFFER_BYTES).contains(bytes));
    if index == expected && id == 0 { bytes.ok_or(wrong) } else { Err(wrong) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_answer_for_the_buffer_is_taken() {
        assert_eq!(check_answer(7, 7, 0, 1).ok(), Some(1));
        assert_eq!(check_answer(0, 0, 0, 1024).ok(), Some(1024));
        for (index, id, len) in
            [(8, 0, 1), (5, 0, 1), (7, 1, 1), (7, u32::MAX, 1), (7, 0, 0), (7, 0, 1025), (7, 0, u32::MAX)]
        {
            let error = check_answer(index, 7, id, len).expect_err("not what was asked for");
            let same = |text: &str| alloc::format!("{error}").contains(text);
            assert!(same(&alloc::format!("buffer {id:#x} of {len:#x} bytes, index {index:#x}")), "{error}");
        }
    }
}
