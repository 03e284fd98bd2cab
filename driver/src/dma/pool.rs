//! Buffers that are mapped once, and then cost no request.

use super::cpu::DeviceMemory;
use super::slots::Slots;
use super::{CoherentMemory, DmaDevice, Unmapped};
use crate::addr::Iova;
use crate::error::{DmaError, UnmapError};
use crate::prot::Direction;
use core::fmt;
use core::mem;
use core::ptr::NonNull;

/// Buffers of one size in memory from the platform, mapped by one request, taken and given back without any: the third
/// unmap policy, beside those of [`UnmapPolicy`](crate::UnmapPolicy).
///
/// Taking and giving back take no lock, wait for nothing and allocate nothing, on any CPU and in interrupt handlers.
///
/// # What it does not promise
/// The endpoint reaches all buffers as long as the pool exists, whoever has them, and what a buffer held before. It
/// protects the rest of memory, and not one buffer from the endpoint's use of another.
///
/// Dropping the pool puts its memory in quarantine; [`close`](Self::close) unmaps it.
pub struct DmaPool<'d> {
    device: &'d dyn DmaDevice,
    /// There until the pool is closed.
    memory: Option<CoherentMemory>,
    start: NonNull<u8>,
    iova: Iova,
    /// The bytes of a buffer.
    len: usize,
    /// From one buffer to the next, at least `len`, and [`LINE`].
    stride: usize,
    slots: Slots,
}

// SAFETY: the memory belongs to the pool, and each buffer to whoever took it, on any thread.
unsafe impl Send for DmaPool<'_> {}
// SAFETY: as above; the only shared state is atomic.
unsafe impl Sync for DmaPool<'_> {}

/// Buffers start at multiples of this, so that CPUs that use neighbours do not fight for a line of their caches.
const LINE: usize = 64;

impl<'d> DmaPool<'d> {
    /// `count` buffers of `len` bytes, zeroed, for one direction. None crosses the endpoint's boundary, if it fits
    /// between two. Takes memory from the platform, allocates, and maps.
    ///
    /// # Errors
    /// [`DmaError::TooLong`] for more than the endpoint's longest segment, [`DmaError::NoMemory`], or why it could not
    /// be mapped.
    pub fn new(
        device: &'d dyn DmaDevice,
        count: usize,
        len: usize,
        direction: Direction,
    ) -> Result<Self, DmaError> {
        let max = device.max_segment();
        if len as u64 > max {
            return Err(DmaError::TooLong { len, max });
        }
        let no_memory = DmaError::NoMemory { len };
        let stride = match device.boundary() {
            Some(boundary) if len as u64 <= boundary => len.max(LINE).checked_next_power_of_two(),
            _ => len.max(1).checked_next_multiple_of(LINE),
        };
        let stride = stride.ok_or(no_memory)?;
        let memory = device.alloc(stride.checked_mul(count).ok_or(no_memory)?, direction)?;
        let (start, iova) = (memory.ptr(), memory.iova());
        Ok(Self { device, memory: Some(memory), start, iova, len, stride, slots: Slots::new(count) })
    }

    /// Takes a buffer, with whatever is in it. `None` when all are out.
    #[inline]
    pub fn take(&self) -> Option<PoolBuffer<'_>> {
        self.slots.take().map(|index| self.buffer(index))
    }

    #[inline]
    fn buffer(&self, index: usize) -> PoolBuffer<'_> {
        let offset = index * self.stride;
        // SAFETY: inside of the pool's memory, since its index is one of the slots; nobody else has the buffer.
        let memory = unsafe { DeviceMemory::new(self.start.add(offset), self.len) };
        PoolBuffer { pool: self, index, memory }
    }

    /// Makes a buffer of the number that [`PoolBuffer::into_raw`] gave. `None` where no buffer of that number is out.
    ///
    /// # Safety
    /// The number came from `into_raw`, and no buffer was made of it since.
    #[inline]
    pub unsafe fn from_raw(&self, number: usize) -> Option<PoolBuffer<'_>> {
        self.slots.is_out(number).then(|| self.buffer(number))
    }

    /// The buffers that there are.
    pub fn count(&self) -> usize {
        self.slots.count()
    }

    /// How many are out. Counts: not for the way of an I/O.
    pub fn out(&self) -> usize {
        self.slots.out()
    }

    /// The bytes of a buffer.
    pub fn buffer_len(&self) -> usize {
        self.len
    }

    /// Unmaps the pool, as the domain's policy says, and gives its memory back then.
    ///
    /// # Errors
    /// [`UnmapError::BuffersOut`] when some were [made raw](PoolBuffer::into_raw) or forgotten: the endpoint may be
    /// using them. [`UnmapError`] for other reasons. The memory is in quarantine either way.
    pub fn close(mut self) -> Result<Unmapped, UnmapError> {
        let buffers = self.slots.out();
        if buffers > 0 {
            return Err(UnmapError::BuffersOut { iova: self.iova, buffers });
        }
        self.memory.take().map_or(Ok(Unmapped::Now), |memory| self.device.free_coherent(memory))
    }
}

impl Drop for DmaPool<'_> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.device.abandon(memory.mapping);
        }
    }
}

impl fmt::Debug for DmaPool<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaPool({} of {} out at {})", self.out(), self.count(), self.iova)
    }
}

/// A buffer of a pool, which goes back when this is dropped. Its endpoint must be done with it then.
#[must_use = "dropping it gives the buffer back"]
pub struct PoolBuffer<'p> {
    pool: &'p DmaPool<'p>,
    index: usize,
    memory: DeviceMemory,
}

impl PoolBuffer<'_> {
    /// Where it is for the endpoint.
    #[inline]
    pub fn iova(&self) -> Iova {
        Iova::new(self.pool.iova.get() + (self.index * self.pool.stride) as u64)
    }

    /// Where it is for this CPU.
    #[inline]
    pub fn ptr(&self) -> NonNull<u8> {
        self.memory.ptr()
    }

    /// Its length in bytes.
    #[inline]
    pub fn len_bytes(&self) -> usize {
        self.memory.len()
    }

    /// Copies bytes out from `offset` on. The endpoint may change them meanwhile: what is decided on is the copy.
    ///
    /// # Errors
    /// [`DmaError::OutOfBounds`].
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<(), DmaError> {
        self.memory.read(offset, bytes)
    }

    /// Copies bytes in from `offset` on.
    ///
    /// # Errors
    /// [`DmaError::OutOfBounds`].
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<(), DmaError> {
        self.memory.write(offset, bytes)
    }

    /// All of it.
    ///
    /// # Safety
    /// The endpoint does not write to the buffer as long as the slice exists: it finished what it was told to do.
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: the caller's promise.
        unsafe { self.memory.bytes() }
    }

    /// All of it.
    ///
    /// # Safety
    /// As for [`bytes`](Self::bytes).
    pub unsafe fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the caller's promise.
        unsafe { self.memory.bytes_mut() }
    }

    /// Keeps the buffer out, for drivers that know it by its number, below [`DmaPool::count`], until the endpoint is done
    /// with it: [`DmaPool::from_raw`].
    #[inline]
    pub fn into_raw(self) -> usize {
        let number = self.index;
        mem::forget(self);
        number
    }
}

impl Drop for PoolBuffer<'_> {
    #[inline]
    fn drop(&mut self) {
        self.pool.slots.give_back(self.index);
    }
}

impl fmt::Debug for PoolBuffer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PoolBuffer({:#x} bytes at {})", self.len_bytes(), self.iova())
    }
}
