//! One endpoint's view of its domain, as device drivers see it.

use super::{DmaSegments, HeldMemory, MsiDoorbell};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::engine::{DomainKey, MappingHandle};
use crate::error::{DmaError, UnmapError};
use crate::exchange::Mapped;
use crate::id::EndpointId;
use crate::mappings::Translation;
use crate::prot::Direction;
use core::ptr::NonNull;

/// What a device driver maps its memory through. Object-safe: drivers hold a `&dyn DmaDevice`.
///
/// # Context
/// Mapping and unmapping wait for the device's answer, polling, and are bounded; they take the platform's lock
/// for short stretches and allocate nothing. Allocating calls say so. What an error leaves behind is said at
/// [`MapError`](crate::MapError) and [`UnmapError`]: memory whose unmapping was not confirmed never goes back.
///
/// # Constraints
/// What the endpoint can put on the bus is said when it is opened ([`EndpointOptions`](crate::EndpointOptions)): the
/// highest address, the longest segment, a boundary that no segment may cross. They are about IOVAs. Where memory
/// lies physically does not matter to an endpoint behind an IOMMU, so that none is allocated below a mask.
pub trait DmaDevice: Send + Sync {
    /// The endpoint.
    fn endpoint(&self) -> EndpointId;

    /// The smallest mapping in bytes, a power of two. In-place mappings let the endpoint reach whole granules.
    fn granule(&self) -> u64;

    /// The highest IOVA that the endpoint can use.
    fn limit(&self) -> Iova;

    /// The most bytes of one segment.
    fn max_segment(&self) -> u64;

    /// The power of two whose multiples no segment may cross, in bytes. `None` where there is none.
    fn boundary(&self) -> Option<u64>;

    /// Where `iova` leads in the endpoint's domain, by the driver's records, mappings in quarantine included.
    fn translate(&self, iova: Iova) -> Option<Translation>;

    /// Allocates `len` bytes, rounded up to granules, zeroed, mapped for one direction. Takes memory from the
    /// platform. What [`Streaming`](crate::Streaming) and [`DmaPool`](crate::DmaPool) are made of.
    ///
    /// # Errors
    /// [`DmaError::NoMemory`], or why it could not be mapped.
    fn alloc(&self, len: usize, direction: Direction) -> Result<CoherentMemory, DmaError>;

    /// Allocates `len` bytes, rounded up to granules, zeroed, that endpoint and driver both read and write.
    /// Takes memory from the platform.
    ///
    /// # Errors
    /// As for [`alloc`](Self::alloc).
    fn alloc_coherent(&self, len: usize) -> Result<CoherentMemory, DmaError> {
        self.alloc(len, Direction::Both)
    }

    /// Frees coherent memory. The driver of the endpoint must not touch it any more.
    ///
    /// # Errors
    /// [`UnmapError`]: the memory is then in quarantine, and goes back by itself when the device answers.
    fn free_coherent(&self, memory: CoherentMemory) -> Result<Unmapped, UnmapError> {
        self.unmap(memory.mapping)
    }

    /// Maps memory and keeps it until the mapping is gone for certain. Whole granules.
    ///
    /// # Errors
    /// Why not, with the memory, unless the device may have mapped it: then it is in quarantine.
    fn adopt(
        &self,
        memory: HeldMemory,
        direction: Direction,
    ) -> Result<DmaMapping, (DmaError, Option<HeldMemory>)>;

    /// Maps `len` bytes from `phys` in place. Need not be whole granules: the endpoint then reaches the
    /// neighbouring bytes of the first and last granule too.
    ///
    /// # Errors
    /// [`DmaError::Map`].
    ///
    /// # Safety
    /// Until the mapping is unmapped with success the memory, in whole granules, is one that the endpoint may
    /// access at any time as `direction` says: no Rust reference depends on it, and nobody else is given it.
    unsafe fn map(&self, phys: PhysAddr, len: usize, direction: Direction) -> Result<DmaMapping, DmaError>;

    /// Maps several segments in place, each by itself, with one doorbell for as many as the ring takes, and puts what was
    /// made into `mappings`, which is as long as the list and empty.
    ///
    /// # Errors
    /// [`DmaError::ListLength`], [`DmaError::Map`]: the first one. What was mapped all the same is in `mappings`, and is
    /// the caller's to unmap.
    ///
    /// # Safety
    /// As for [`map`](Self::map), for each segment.
    unsafe fn map_each(
        &self,
        segments: &[PhysSegment],
        direction: Direction,
        mappings: &mut [Option<DmaMapping>],
    ) -> Result<(), DmaError>;

    /// Unmaps several mappings, each by itself, with one doorbell for as many as the ring takes, and takes them out of
    /// the list. As [`unmap`](Self::unmap): `AtFlush` if any of them waits for a flush.
    ///
    /// # Errors
    /// As for [`unmap`](Self::unmap), the first one. What it is about is in quarantine. Where a mapping is of another domain
    /// nothing is unmapped, and all stay in the list.
    fn unmap_each(&self, mappings: &mut [Option<DmaMapping>]) -> Result<Unmapped, UnmapError>;

    /// Maps a list of segments in place, with one doorbell and as few requests as their neighbourhood allows,
    /// and writes the IOVA of each into `iovas`, which is as long as the list. All or nothing. What the endpoint is
    /// to be given are the [`segments`](Self::segments) of the list.
    ///
    /// # Errors
    /// [`DmaError::ListLength`], [`DmaError::Map`]; what was mapped already is unmapped again. `iovas` say nothing then.
    ///
    /// # Safety
    /// As for [`map`](Self::map), for each segment.
    unsafe fn map_scatter(
        &self,
        segments: &[PhysSegment],
        direction: Direction,
        iovas: &mut [Iova],
    ) -> Result<DmaMapping, DmaError>;

    /// The segments that the endpoint is given for a list that was mapped: merged where they are contiguous for it,
    /// split where its longest segment or its boundary demands.
    fn segments<'a>(&self, list: &'a [PhysSegment], iovas: &'a [Iova]) -> DmaSegments<'a> {
        DmaSegments::new(list, iovas, self.max_segment(), self.boundary())
    }

    /// Maps `len` bytes of another device's registers or memory (MMIO) from `phys`, for this endpoint to access:
    /// as device registers where the IOMMU has that flag, else as memory. By a request of its own, never with RAM.
    ///
    /// # Errors
    /// [`DmaError::Map`].
    ///
    /// # Safety
    /// As for [`map`](Self::map), and the endpoint's accesses to all of the registers in these granules do no harm.
    unsafe fn map_resource(
        &self,
        phys: PhysAddr,
        len: usize,
        direction: Direction,
    ) -> Result<DmaMapping, DmaError>;

    /// Unmaps as the domain's [`UnmapPolicy`](crate::UnmapPolicy) says. With [`Unmapped::Now`] the endpoint does not
    /// reach the memory any more; adopted memory went back to its owner. With [`Unmapped::AtFlush`] the endpoint
    /// reaches it until a flush: adopted memory goes back then, by itself, and memory that was mapped on the
    /// caller's word is his again only when [`flush`](Self::flush) returned `Ok`.
    ///
    /// # Errors
    /// [`UnmapError`]: the mapping is in quarantine, and its memory must not be reused. A mapping of another
    /// domain is [`UnmapError::NotMapped`], and stays as it is.
    fn unmap(&self, mapping: DmaMapping) -> Result<Unmapped, UnmapError>;

    /// Unmaps what starts at `iova`, for interfaces that keep only an address.
    ///
    /// # Errors
    /// As for [`unmap`](Self::unmap).
    ///
    /// # Safety
    /// The address came from [`DmaMapping::iova`] of a mapping of whole granules by this endpoint, whose handle
    /// was forgotten, and the caller is the one who made it.
    unsafe fn unmap_at(&self, iova: Iova) -> Result<Unmapped, UnmapError>;

    /// Gives up a mapping that its owner cannot unmap, since he goes away: it is in quarantine, and
    /// [`Viommu::reclaim`](crate::Viommu::reclaim) unmaps it. Sends nothing and waits for nothing, so that it fits
    /// `Drop`.
    fn abandon(&self, mapping: DmaMapping);

    /// Lets the endpoint use a borrowed buffer through bounce pages: copies it there, unless `direction` is
    /// `FromDevice`, in which case the pages are zeroed. Its neighbours stay invisible. Sends nothing.
    ///
    /// # Errors
    /// [`DmaError::NoBounce`] when no pages are free, or the endpoint has none, [`DmaError::Closed`].
    ///
    /// # Safety
    /// The buffer is valid for reads, and nobody writes to it during the call.
    unsafe fn share(&self, buffer: NonNull<[u8]>, direction: Direction) -> Result<Iova, DmaError>;

    /// [`share`](Self::share) for interfaces that cannot say that it failed: gives
    /// [`faulting_iova`](Self::faulting_iova) then, and logs why.
    ///
    /// # Safety
    /// As for [`share`](Self::share).
    unsafe fn share_or_fault(&self, buffer: NonNull<[u8]>, direction: Direction) -> Iova {
        // SAFETY: the caller's promise.
        unsafe { self.share(buffer, direction) }.unwrap_or_else(|error| {
            log::warn!("endpoint {}: a buffer cannot be shared: {error}", self.endpoint());
            self.faulting_iova()
        })
    }

    /// Copies what the endpoint wrote so far to a buffer that stays [shared](Self::share). An address that did not come
    /// from `share` is ignored.
    ///
    /// # Safety
    /// As for [`unshare`](Self::unshare), but that the endpoint goes on with it.
    unsafe fn sync_for_cpu(&self, iova: Iova, buffer: NonNull<[u8]>);

    /// Copies a buffer that stays [shared](Self::share) to the endpoint once more. An address that did not come from
    /// `share` is ignored.
    ///
    /// # Safety
    /// The buffer is the one that was shared under this address, valid for reads, and nobody writes to it during the
    /// call.
    unsafe fn sync_for_device(&self, iova: Iova, buffer: NonNull<[u8]>);

    /// Ends [`share`](Self::share): copies what the endpoint wrote back, unless `direction` is `ToDevice`, and
    /// frees the pages. An address that did not come from `share` is ignored.
    ///
    /// # Safety
    /// The buffer is the one that was shared under this address, valid for writes, and nobody accesses it
    /// during the call. The endpoint is done with it.
    unsafe fn unshare(&self, iova: Iova, buffer: NonNull<[u8]>, direction: Direction);

    /// Lets the endpoint ring an interrupt controller's doorbell, and gives the address for its MSIs: the doorbell's
    /// own where it lies in an MSI window of the endpoint, which is not translated; else one where its granule is
    /// mapped, for writing only, as device registers where the device has that flag.
    ///
    /// # Errors
    /// [`DmaError::Map`].
    ///
    /// # Safety
    /// `doorbell` is a register of four bytes that the endpoint may write at any time until
    /// [`unmap_msi`](Self::unmap_msi), and so are all registers in the granule around it.
    unsafe fn map_msi(&self, doorbell: PhysAddr) -> Result<MsiDoorbell, DmaError>;

    /// Ends [`map_msi`](Self::map_msi). The endpoint sends no MSI any more.
    ///
    /// # Errors
    /// As for [`unmap`](Self::unmap).
    fn unmap_msi(&self, doorbell: MsiDoorbell) -> Result<Unmapped, UnmapError>;

    /// An address that never leads anywhere: a device that uses it faults.
    fn faulting_iova(&self) -> Iova;

    /// Makes sure that everything unmapped so far in the endpoint's domain, and not mapped again since, is out of its reach.
    /// Nothing to do where unmapping is strict.
    ///
    /// # Errors
    /// [`UnmapError`], as long as anything that was unmapped before is in quarantine instead, whoever unmapped it.
    fn flush(&self) -> Result<(), UnmapError>;
}

/// When unmapped memory is out of the endpoint's reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmapped {
    /// It is: the device confirmed it, or the domain is dead.
    Now,
    /// When the domain's next flush succeeded.
    AtFlush,
}

/// A physically contiguous part of a scatter list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysSegment {
    /// Where it starts.
    pub phys: PhysAddr,
    /// Its length in bytes, not 0.
    pub len: usize,
}

/// A mapping that its maker has to unmap. Dropping it leaves the memory mapped.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "dropping a mapping leaves its memory mapped"]
pub struct DmaMapping {
    /// Tells mappings of different endpoints apart, which may have the same addresses.
    pub(super) domain: DomainKey,
    pub(super) iova: Iova,
    pub(super) len: usize,
    /// The whole granules around it.
    pub(super) range: IovaRange,
    /// Where its record is, if that is known.
    pub(super) record: MappingHandle,
}

impl DmaMapping {
    /// Of memory of any place in its granules, which are mapped as a whole.
    #[inline(always)]
    pub(crate) fn around(
        PhysSegment { phys, len }: PhysSegment,
        granule: u64,
        (domain, Mapped { range, record }): (DomainKey, Mapped),
    ) -> Self {
        let iova = Iova::new(range.start().get() + (phys.get() & (granule - 1)));
        Self { domain, iova, len, range, record }
    }

    /// The segments that the endpoint is given for a mapping of one piece, see [`DmaDevice::segments`].
    pub fn segments(&self, device: &dyn DmaDevice) -> DmaSegments<'static> {
        DmaSegments::of_one(self.iova, self.len as u64, device.max_segment(), device.boundary())
    }

    /// The whole granules around it.
    pub(crate) fn range(&self) -> IovaRange {
        self.range
    }

    /// Where its record is, if that is known.
    pub(crate) fn record(&self) -> MappingHandle {
        self.record
    }

    /// Where the first byte is for the endpoint.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// The length in bytes that was asked for; of a list the span from its first granule to its last.
    pub fn len_bytes(&self) -> usize {
        self.len
    }
}

/// Memory that endpoint and driver share. Dropping it leaves it mapped; see [`DmaDevice::free_coherent`].
#[derive(Debug)]
#[must_use = "dropping coherent memory leaves it mapped"]
pub struct CoherentMemory {
    pub(super) mapping: DmaMapping,
    pub(super) ptr: NonNull<u8>,
}

// SAFETY: the memory belongs to the holder, whoever that is.
unsafe impl Send for CoherentMemory {}
// SAFETY: shared access gives out only addresses.
unsafe impl Sync for CoherentMemory {}

impl CoherentMemory {
    /// Where it is for the endpoint.
    pub fn iova(&self) -> Iova {
        self.mapping.iova
    }

    /// Where it is for the driver. The endpoint may change what is there at any time: access it volatile, or
    /// when the endpoint is known to be done.
    pub fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// Its length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.mapping.len
    }
}
