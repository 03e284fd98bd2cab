//! Memory that a driver here shares with its device, whether an IOMMU stands between them or not.
//!
//! The one place where these drivers meet [`DmaDevice`].

use core::fmt;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, Ordering};

use virtio_iommu::{
    CoherentMemory, Direction, DmaDevice, DmaError, DmaMapping, Iova, PhysSegment, UnmapError, Unmapped,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::memory::dma::DmaPages;
use crate::memory::frames::FRAME_BYTES;

/// How a device reaches memory.
#[derive(Clone, Copy)]
pub enum Dma<'a> {
    /// By physical addresses: no IOMMU translates what it does.
    Direct,
    /// Through its endpoint.
    Through(&'a dyn DmaDevice),
}

impl fmt::Debug for Dma<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => f.write_str("Direct"),
            Self::Through(device) => write!(f, "Through({})", device.endpoint()),
        }
    }
}

/// Memory in a device's reach. Dropping it leaves it there.
#[derive(Debug)]
#[must_use = "dropping a mapping leaves its memory in the device's reach"]
pub enum Mapped {
    /// As all memory is.
    Direct,
    /// By a mapping.
    Through(DmaMapping),
}

impl Dma<'_> {
    /// The smallest piece of memory that a mapping can say, in bytes.
    pub fn granule(&self) -> u64 {
        match self {
            Self::Direct => FRAME_BYTES,
            Self::Through(device) => device.granule(),
        }
    }

    /// Allocates zeroed memory that device and driver share until it is [freed](Self::free).
    ///
    /// # Errors
    ///
    /// [`DmaError`].
    pub fn alloc(&self, len_bytes: usize) -> Result<Coherent, DmaError> {
        match self {
            Self::Direct => {
                let no_memory = DmaError::NoMemory { len: len_bytes };
                let count = len_bytes.div_ceil(FRAME_BYTES as usize);
                let pages = DmaPages::allocate(count).map_err(|_| no_memory)?;
                let (iova, ptr, len) = (Iova::new(pages.phys()), pages.as_ptr(), pages.len_bytes());
                Ok(Coherent { iova, ptr, len, owner: Owner::Frames(ManuallyDrop::new(pages)) })
            }
            Self::Through(device) => {
                let memory = device.alloc_coherent(len_bytes)?;
                let (iova, ptr, len) = (memory.iova(), memory.ptr(), memory.len_bytes());
                Ok(Coherent { iova, ptr, len, owner: Owner::Device(memory) })
            }
        }
    }

    /// Frees shared memory, which the device must be done with where nothing but this takes it out of its reach.
    ///
    /// # Errors
    ///
    /// [`UnmapError`]: the memory is in quarantine.
    pub fn free(&self, memory: Coherent) -> Result<(), UnmapError> {
        match (memory.owner, self) {
            (Owner::Device(memory), Self::Through(device)) => device.free_coherent(memory).map(drop),
            (Owner::Device(memory), Self::Direct) => Err(UnmapError::NotMapped(memory.iova())),
            (Owner::Frames(pages), _) => {
                drop(ManuallyDrop::into_inner(pages));
                Ok(())
            }
            (Owner::Nobody, _) => Ok(()),
        }
    }

    /// Brings a list of segments into the device's reach, by one doorbell of the IOMMU, and writes the address of each
    /// into `iovas`, which is as long as the list. Allocates nothing.
    ///
    /// # Errors
    ///
    /// [`DmaError`]; nothing is mapped then.
    ///
    /// # Safety
    ///
    /// As for [`DmaDevice::map_scatter`].
    pub unsafe fn map(
        &self,
        segments: &[PhysSegment],
        direction: Direction,
        iovas: &mut [Iova],
    ) -> Result<Mapped, DmaError> {
        let Self::Through(device) = self else {
            for (iova, segment) in iovas.iter_mut().zip(segments) {
                *iova = Iova::new(segment.phys.get());
            }
            return Ok(Mapped::Direct);
        };
        if let ([segment], [iova]) = (segments, &mut *iovas) {
            // SAFETY: the caller's promise.
            let mapping = unsafe { device.map(segment.phys, segment.len, direction) }?;
            *iova = mapping.iova();
            return Ok(Mapped::Through(mapping));
        }
        // SAFETY: the caller's promise.
        unsafe { device.map_scatter(segments, direction, iovas) }.map(Mapped::Through)
    }

    /// Takes memory out of the device's reach, where there is an IOMMU to do that. With [`Unmapped::AtFlush`] the memory
    /// must not be reused before [`flush`](Self::flush).
    ///
    /// # Errors
    ///
    /// [`UnmapError`]: the memory must not be reused.
    pub fn unmap(&self, mapped: Mapped) -> Result<Unmapped, UnmapError> {
        match (mapped, self) {
            (Mapped::Direct, _) => Ok(Unmapped::Now),
            (Mapped::Through(mapping), Self::Through(device)) => device.unmap(mapping),
            (Mapped::Through(mapping), Self::Direct) => Err(UnmapError::NotMapped(mapping.iova())),
        }
    }

    /// Makes sure that everything that was unmapped is out of the device's reach.
    ///
    /// # Errors
    ///
    /// [`UnmapError`]: what was to be unmapped by it must not be reused.
    pub fn flush(&self) -> Result<(), UnmapError> {
        match self {
            Self::Direct => Ok(()),
            Self::Through(device) => device.flush(),
        }
    }
}

/// Memory that driver and device share. Dropping it takes nothing out of the device's reach; see [`Dma::free`].
///
/// The device may write to it at any time, so no reference ever points there.
#[derive(Debug)]
#[must_use = "dropping shared memory leaves it mapped"]
pub struct Coherent {
    iova: Iova,
    /// # Invariants
    /// `len` bytes from here are mapped, aligned to 8, and `owner`'s.
    ptr: NonNull<u8>,
    len: usize,
    owner: Owner,
}

#[derive(Debug)]
enum Owner {
    /// Not given back by dropping: the device may still use them.
    Frames(ManuallyDrop<DmaPages>),
    Device(CoherentMemory),
    /// Memory that is never freed.
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests have memory of the host"))]
    Nobody,
}

// SAFETY: the memory belongs to the holder, whoever that is.
unsafe impl Send for Coherent {}

impl Coherent {
    /// Where it is for the device.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// Where `offset` is for the device.
    pub fn iova_at(&self, offset: usize) -> Iova {
        Iova::new(self.iova.get() + offset as u64)
    }

    /// Its length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len
    }

    /// Reads a value, once. It may be torn if the device writes it at the same time.
    ///
    /// # Panics
    ///
    /// When `offset` is unaligned or the value does not lie inside, which the driver's own layout decides.
    pub fn read<T: FromBytes>(&self, offset: usize) -> T {
        // SAFETY: inside and aligned; any bytes are a `T`.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    /// Writes a value. The device sees it with what is published after it, by [`store_release`](Self::store_release)
    /// or a doorbell.
    ///
    /// # Panics
    ///
    /// As [`read`](Self::read).
    pub fn write<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) {
        // SAFETY: inside and aligned, and no reference points there.
        unsafe { self.at::<T>(offset).write(value) }
    }

    /// Reads a word. What the device wrote before it is visible after.
    ///
    /// # Panics
    ///
    /// As [`read`](Self::read).
    pub fn load_acquire(&self, offset: usize) -> u16 {
        // SAFETY: inside and aligned; the device's accesses to it are atomic ones.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.at(offset)) }.load(Ordering::Acquire))
    }

    /// Writes a word. A device that sees it sees everything that was written before.
    ///
    /// # Panics
    ///
    /// As [`read`](Self::read).
    pub fn store_release(&mut self, offset: usize, value: u16) {
        // SAFETY: as in `load_acquire`.
        unsafe { AtomicU16::from_ptr(self.at(offset)) }.store(value.to_le(), Ordering::Release);
    }

    /// Copies bytes in.
    ///
    /// # Panics
    ///
    /// When they do not fit.
    pub fn copy_in(&mut self, offset: usize, bytes: &[u8]) {
        let to = self.bytes_at(offset, bytes.len());
        // SAFETY: inside, and `bytes` is elsewhere, since no reference points to shared memory.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Copies bytes out, when the device is done with them.
    ///
    /// # Panics
    ///
    /// When they are not inside.
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.bytes_at(offset, bytes.len());
        for (index, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: inside; volatile, since the device may write there.
            *byte = unsafe { from.add(index).read_volatile() };
        }
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        const { assert!(align_of::<T>() <= 8, "the memory itself is aligned to 8") };
        assert!(offset.is_multiple_of(align_of::<T>()), "offset {offset:#x} is not aligned");
        self.bytes_at(offset, size_of::<T>()).cast()
    }

    fn bytes_at(&self, offset: usize, len: usize) -> *mut u8 {
        let inside = offset <= self.len && len <= self.len - offset;
        assert!(inside, "{len:#x} bytes at offset {offset:#x} of {:#x} bytes", self.len);
        // SAFETY: inside the memory, by the check above.
        unsafe { self.ptr.as_ptr().add(offset) }
    }

    /// Memory of the host that is never freed: the device of a test is the test itself, by physical addresses.
    #[cfg(test)]
    pub(crate) fn leak(len: usize) -> Self {
        let words = alloc::vec![0u64; len.div_ceil(8)].leak();
        let ptr = NonNull::from(words).cast::<u8>();
        Self { iova: Iova::new(ptr.addr().get() as u64), ptr, len, owner: Owner::Nobody }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_stay_inside() {
        let mut memory = Coherent::leak(64);
        memory.write(8, 0x1122_3344_5566_7788u64);
        assert_eq!(memory.read::<u32>(12), 0x1122_3344);
        memory.store_release(62, 0xbeef);
        assert_eq!(memory.load_acquire(62), 0xbeef);
        let outside: [fn(&Coherent); 5] = [
            |memory| assert_eq!(memory.read::<u32>(61), 0),
            |memory| assert_eq!(memory.read::<u64>(60), 0),
            |memory| assert_eq!(memory.read::<u8>(64), 0),
            |memory| assert_eq!(memory.read::<u64>(usize::MAX - 7), 0),
            |memory| memory.copy_out(60, &mut [0; 5]),
        ];
        for access in outside {
            let memory = std::panic::AssertUnwindSafe(&memory);
            let panicked = std::panic::catch_unwind(|| access(*memory)).unwrap_err();
            let text = panicked.downcast_ref::<std::string::String>().expect("a panic with a value in it");
            assert!(text.contains("offset"), "{text}");
        }
    }

    #[test]
    fn without_an_iommu_addresses_are_physical() {
        let segments = [0x1000, 0x8000]
            .map(|phys| PhysSegment { phys: virtio_iommu::PhysAddr::new(phys), len: FRAME_BYTES as usize });
        let mut iovas = [Iova::new(0); 2];
        // SAFETY: no device is told of them.
        let mapped = unsafe { Dma::Direct.map(&segments, Direction::Both, &mut iovas) };
        assert!(matches!(mapped, Ok(Mapped::Direct)));
        assert_eq!(iovas, [Iova::new(0x1000), Iova::new(0x8000)]);
    }
}
