//! Memory that goes back and forth between CPU and endpoint, with the direction in its type.
//!
//! ```text
//!   Streaming   stays mapped; the endpoint reaches it all the time; the CPU through `cpu`
//!   Bounced     stays the CPU's; the endpoint reaches a copy; `cpu` is where the copies are made
//! ```
//! The ends of an access are the sync points: when it begins, what the endpoint wrote before it said that it is done
//! is seen; when it ends, what the CPU wrote is seen by an endpoint that is told of it after.

use super::cpu::DeviceMemory;
use super::{CoherentMemory, DmaDevice, DmaMapping, HeldMemory, Unmapped};
use crate::addr::Iova;
use crate::barrier;
use crate::error::{DmaError, UnmapError};
use crate::prot::Direction;
use core::fmt;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::NonNull;

mod sealed {
    pub trait Sealed {}
}

/// The direction of a [`Streaming`] or [`Bounced`] buffer: [`ToDevice`], [`FromDevice`] or [`Bidirectional`].
pub trait DmaDirection: sealed::Sealed {
    /// What the endpoint is allowed.
    const DIRECTION: Direction;
    /// How a buffer is borrowed for it.
    type Borrowed<'a>: Deref<Target = [u8]>;
}

/// Directions in which the CPU writes.
pub trait CpuWrites: DmaDirection {}

/// Directions in which the endpoint writes, so that what the CPU reads may change at any time.
pub trait DeviceWrites: for<'a> DmaDirection<Borrowed<'a> = &'a mut [u8]> {}

macro_rules! direction {
    ($(#[$doc:meta])* $name:ident, $direction:ident, $borrowed:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {}

        impl sealed::Sealed for $name {}
        impl DmaDirection for $name {
            const DIRECTION: Direction = Direction::$direction;
            type Borrowed<'a> = $borrowed;
        }
    };
}

direction!(
    /// The CPU writes and the endpoint reads.
    ToDevice, ToDevice, &'a [u8]
);
direction!(
    /// The endpoint writes and the CPU reads.
    FromDevice, FromDevice, &'a mut [u8]
);
direction!(
    /// Both read and write.
    Bidirectional, Both, &'a mut [u8]
);

impl CpuWrites for ToDevice {}
impl CpuWrites for Bidirectional {}
impl DeviceWrites for FromDevice {}
impl DeviceWrites for Bidirectional {}

/// Memory that is mapped for one direction and stays so, which the CPU accesses between sync points.
///
/// It owns its memory, so that nothing else of the program is near it: what the endpoint reaches is whole granules of
/// this memory. Dropping it puts the memory in quarantine; [`unmap`](Self::unmap) gives it back.
#[must_use = "dropping it leaves its memory in quarantine"]
pub struct Streaming<'d, D: DmaDirection> {
    device: &'d dyn DmaDevice,
    /// There until it is unmapped.
    mapping: Option<DmaMapping>,
    iova: Iova,
    memory: DeviceMemory,
    direction: PhantomData<fn() -> D>,
}

impl<'d, D: DmaDirection> Streaming<'d, D> {
    /// `len` bytes from the platform, rounded up to granules, zeroed.
    ///
    /// # Errors
    /// As for [`DmaDevice::alloc`].
    pub fn alloc(device: &'d dyn DmaDevice, len: usize) -> Result<Self, DmaError> {
        let CoherentMemory { mapping, ptr } = device.alloc(len, D::DIRECTION)?;
        let len = mapping.len_bytes();
        // SAFETY: fresh memory of this length, which nobody else has, and which the driver keeps while it is mapped.
        Ok(Self::new(device, mapping, unsafe { DeviceMemory::new(ptr, len) }))
    }

    /// Memory that the caller lends: whole granules.
    ///
    /// # Errors
    /// As for [`DmaDevice::adopt`]: with the memory, unless the device may have mapped it.
    pub fn adopt(
        device: &'d dyn DmaDevice,
        memory: HeldMemory,
    ) -> Result<Self, (DmaError, Option<HeldMemory>)> {
        let place = memory.memory();
        let mapping = device.adopt(memory, D::DIRECTION)?;
        // SAFETY: by the promise of whoever made the held memory nobody uses it before the driver gives it back, which
        // is when it is unmapped: after this is gone.
        Ok(Self::new(device, mapping, unsafe { DeviceMemory::new(place.ptr, place.len) }))
    }

    fn new(device: &'d dyn DmaDevice, mapping: DmaMapping, memory: DeviceMemory) -> Self {
        let iova = mapping.iova();
        Self { device, mapping: Some(mapping), iova, memory, direction: PhantomData }
    }

    /// Where it is for the endpoint.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// Its length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.memory.len()
    }

    /// Begins the CPU's turn, which ends when the access is dropped. Call it when the endpoint said that it is done.
    pub fn cpu(&mut self) -> CpuAccess<'_, D> {
        barrier::device_before_memory();
        CpuAccess { memory: &mut self.memory, direction: PhantomData }
    }

    /// Unmaps it, as the domain's policy says, and gives the memory back to its owner then.
    ///
    /// # Errors
    /// [`UnmapError`]: the memory is in quarantine.
    pub fn unmap(mut self) -> Result<Unmapped, UnmapError> {
        self.mapping.take().map_or(Ok(Unmapped::Now), |mapping| self.device.unmap(mapping))
    }
}

impl<D: DmaDirection> Drop for Streaming<'_, D> {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take() {
            self.device.abandon(mapping);
        }
    }
}

impl<D: DmaDirection> fmt::Debug for Streaming<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Streaming({:?}, {:#x} bytes at {})", D::DIRECTION, self.len_bytes(), self.iova)
    }
}

/// The CPU's turn with a [`Streaming`] buffer.
#[must_use = "the turn ends when this is dropped"]
pub struct CpuAccess<'s, D: DmaDirection> {
    memory: &'s mut DeviceMemory,
    direction: PhantomData<fn() -> D>,
}

impl<D: DmaDirection> Drop for CpuAccess<'_, D> {
    fn drop(&mut self) {
        barrier::memory_before_doorbell();
    }
}

impl<D: CpuWrites> CpuAccess<'_, D> {
    /// Copies bytes in from `offset` on.
    ///
    /// # Errors
    /// [`DmaError::OutOfBounds`].
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<(), DmaError> {
        self.memory.write(offset, bytes)
    }
}

impl CpuAccess<'_, ToDevice> {
    /// All of it. The endpoint can only read.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: it is mapped for reading only.
        unsafe { self.memory.bytes_mut() }
    }
}

impl<D: DeviceWrites> CpuAccess<'_, D> {
    /// Copies bytes out from `offset` on. An endpoint that writes out of turn does not change the copy.
    ///
    /// # Errors
    /// [`DmaError::OutOfBounds`].
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<(), DmaError> {
        self.memory.read(offset, bytes)
    }

    /// All of it.
    ///
    /// # Safety
    /// The endpoint does not write to the memory as long as the slice exists: it finished what it was told to do, and
    /// is believed not to do what it was not told.
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: the caller's promise.
        unsafe { self.memory.bytes() }
    }
}

impl CpuAccess<'_, Bidirectional> {
    /// All of it.
    ///
    /// # Safety
    /// As for [`bytes`](Self::bytes).
    pub unsafe fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the caller's promise.
        unsafe { self.memory.bytes_mut() }
    }
}

/// A borrowed buffer of any place and length, of which the endpoint has a copy in bounce pages. What lies beside the
/// buffer stays invisible, and the endpoint never reaches the buffer itself. Sends nothing.
///
/// The endpoint must be done with it when it is dropped, which copies nothing back: [`finish`](Self::finish) does.
#[must_use = "dropping it takes the buffer from the endpoint, and copies nothing back"]
pub struct Bounced<'a, D: DmaDirection> {
    device: &'a dyn DmaDevice,
    /// There until it is given back.
    buffer: Option<D::Borrowed<'a>>,
    iova: Iova,
}

impl<'a, D: DmaDirection> Bounced<'a, D> {
    /// Copies the buffer to bounce pages, or clears them where the endpoint only writes.
    ///
    /// # Errors
    /// [`DmaError::NoBounce`], [`DmaError::Closed`].
    pub fn new(device: &'a dyn DmaDevice, buffer: D::Borrowed<'a>) -> Result<Self, DmaError> {
        // SAFETY: a borrowed slice, which nobody writes to meanwhile.
        let iova = unsafe { device.share(NonNull::from(&*buffer), D::DIRECTION) }?;
        barrier::memory_before_doorbell();
        Ok(Self { device, buffer: Some(buffer), iova })
    }

    /// Where the copy is for the endpoint.
    pub fn iova(&self) -> Iova {
        self.iova
    }
}

impl<'a, D: DeviceWrites> Bounced<'a, D> {
    /// Copies back what the endpoint wrote, and begins the CPU's turn with the buffer. Call it when the endpoint said
    /// that it is done.
    pub fn cpu(&mut self) -> BouncedAccess<'_, D> {
        barrier::device_before_memory();
        let buffer: &mut [u8] = self.buffer.as_deref_mut().unwrap_or_default();
        // SAFETY: shared by `new` at this address, borrowed, and accessed by nobody else meanwhile.
        unsafe { self.device.sync_for_cpu(self.iova, NonNull::from(&mut *buffer)) };
        BouncedAccess { device: self.device, iova: self.iova, buffer, direction: PhantomData }
    }

    /// Ends it: copies back what the endpoint wrote, and gives the buffer back.
    pub fn finish(mut self) -> &'a mut [u8] {
        barrier::device_before_memory();
        let buffer = self.buffer.take().unwrap_or_default();
        // SAFETY: as in `cpu`, and the endpoint is done with it.
        unsafe { self.device.unshare(self.iova, NonNull::from(&mut *buffer), D::DIRECTION) };
        buffer
    }
}

impl<D: DmaDirection> Drop for Bounced<'_, D> {
    fn drop(&mut self) {
        let Some(buffer) = &self.buffer else { return };
        // SAFETY: shared by `new` at this address; in this direction nothing is written to the buffer.
        unsafe { self.device.unshare(self.iova, NonNull::from(&**buffer), Direction::ToDevice) };
    }
}

impl<D: DmaDirection> fmt::Debug for Bounced<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bounced({:?} at {})", D::DIRECTION, self.iova)
    }
}

/// The CPU's turn with a [`Bounced`] buffer: a plain slice, which the endpoint does not reach. What the CPU wrote is
/// copied to the endpoint when this is dropped, where it reads at all.
#[must_use = "the turn ends when this is dropped"]
pub struct BouncedAccess<'s, D: DmaDirection> {
    device: &'s dyn DmaDevice,
    iova: Iova,
    buffer: &'s mut [u8],
    direction: PhantomData<fn() -> D>,
}

impl<D: DmaDirection> BouncedAccess<'_, D> {
    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        self.buffer
    }
}

impl<D: CpuWrites> BouncedAccess<'_, D> {
    /// All of it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer
    }
}

impl<D: DmaDirection> Drop for BouncedAccess<'_, D> {
    fn drop(&mut self) {
        if D::DIRECTION != Direction::FromDevice {
            // SAFETY: shared at this address, borrowed, and written to by nobody meanwhile.
            unsafe { self.device.sync_for_device(self.iova, NonNull::from(&*self.buffer)) };
        }
        barrier::memory_before_doorbell();
    }
}
