//! An endpoint as the backend of the `dma-api` crate (0.10), for drivers that allocate and map through its `DeviceDma`.
//!
//! [`IommuDma`] stands before the kernel's own [`DmaOp`]. That one gives memory and takes care of caches, as it does
//! without an IOMMU; what it gives is mapped for the endpoint, within the constraints that the driver stated:
//! - *mask*: no address passes it, nor the endpoint's own limit;
//! - *alignment*: of the endpoint's address, besides the one that the layout asks of the memory;
//! - *boundary*, a power of two: no allocation or mapping crosses it. One that is longer fails;
//! - *segment size*: an allocation or mapping is one segment, and fails where it is longer.
//!
//! Streaming mappings go through bounce pages: those of the endpoint where one fits the constraints, else fresh ones. The
//! neighbours of a buffer stay invisible, and a buffer that was given back is never within reach.
//!
//! ```no_run
//! use dma_api::{DeviceDma, DmaCoherency, DmaConstraints, DmaOp};
//! use virtio_iommu::{Endpoint, Platform, bridge::dma_api_0_10::IommuDma};
//!
//! fn device_dma<P: Platform>(endpoint: Endpoint<P>, kernel: &'static dyn DmaOp) -> DeviceDma {
//!     let backend: &'static IommuDma<P> = Box::leak(Box::new(IommuDma::new(endpoint, kernel)));
//!     backend.device(DmaCoherency::Coherent, DmaConstraints::new(u32::MAX.into()))
//! }
//! ```
//!
//! # What `dma-api` cannot say
//! - *Why.* Its errors have no word for a refused MAP, or for one of unknown outcome: they are `NoMemory` to the driver,
//!   and allocations say no more than that anyway. [`IommuDma::take_failure`] has the error itself.
//! - *That a release failed*, but for coherent memory of devices that are not coherent. Memory whose unmapping the
//!   device did not confirm is in quarantine in each case: it goes back to the kernel's backend when the device
//!   answers, or never.
//! - *Lending a buffer in place.* A `StreamingMap` gives its buffer back without a way to hold it. Data that is worth
//!   mapping in place belongs into its owned buffers, which are mapped once.
//! - *Allocating nothing.* Memory of length 0 is refused, since no mapping can be empty.
//! - *When.* In a domain that defers unmapping, memory goes back at the flush.
//! - *Faults.* They are the kernel's to fetch: [`Viommu::next_fault`](crate::Viommu::next_fault).

use crate::addr::{Iova, PhysAddr};
use crate::dma::{DmaDevice, Endpoint, HeldMemory};
use crate::engine::Placement;
use crate::error::{DmaError, UnmapError};
use crate::lock::Mutex;
use crate::platform::{DmaMemory, Platform};
use crate::prot::Direction;
use alloc::boxed::Box;
use core::alloc::Layout;
use core::fmt;
use core::num::{NonZeroU64, NonZeroUsize};
use core::ptr::NonNull;
use dma_api::{
    DeviceDma, DmaAddr, DmaAllocHandle, DmaCoherency, DmaConstraints, DmaDeviceInfo, DmaDirection,
    DmaDomainId, DmaMapHandle, DmaOp,
};

/// An endpoint as a backend, over the kernel's own. For a static cell, or leaked.
///
/// # Context
/// Allocating, releasing and mapping wait for the device as [`DmaDevice`]'s methods do, and allocating allocates. A
/// streaming mapping through the endpoint's bounce pages does neither.
pub struct IommuDma<P: Platform> {
    endpoint: Endpoint<P>,
    kernel: &'static dyn DmaOp,
    failure: Mutex<P::Lock, Option<Failure>>,
}

/// Why something failed that `dma-api` has no words for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// The constraints, or the layout, cannot be met.
    Constraints(dma_api::DmaError),
    /// The kernel's backend has no memory.
    NoMemory {
        /// The bytes that were needed.
        len: usize,
    },
    /// The memory could not be mapped.
    Map(DmaError),
    /// Memory is in quarantine, since its unmapping was not confirmed.
    Unmap(UnmapError),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constraints(error) => error.fmt(f),
            Self::NoMemory { len } => write!(f, "the kernel has no memory for {len:#x} bytes"),
            Self::Map(error) => error.fmt(f),
            Self::Unmap(error) => write!(f, "memory stays in quarantine: {error}"),
        }
    }
}

impl core::error::Error for Failure {}

impl Failure {
    /// The next best that `dma-api` can say.
    fn theirs(self) -> dma_api::DmaError {
        match self {
            Self::Constraints(error) => error,
            Self::NoMemory { .. } | Self::Map(_) => dma_api::DmaError::NoMemory,
            Self::Unmap(_) => dma_api::DmaError::CoherentReleaseFailed,
        }
    }
}

/// Which of the kernel's two allocators.
#[derive(Clone, Copy)]
enum Kind {
    Contiguous,
    Coherent,
}

/// Memory of the kernel's backend.
#[derive(Clone, Copy)]
struct Block {
    kernel: &'static dyn DmaOp,
    kind: Kind,
    handle: DmaAllocHandle,
}

// SAFETY: addresses of memory that its holder may give back from any thread.
unsafe impl Send for Block {}

impl Block {
    /// # Safety
    /// No device reaches the memory, nobody uses it, and it is given back once.
    unsafe fn give_back(self) {
        // SAFETY: the caller's promise; the kind is the one that it was allocated by.
        let released = match self.kind {
            Kind::Contiguous => {
                // SAFETY: as above.
                unsafe { self.kernel.dealloc_contiguous(self.handle) };
                Ok(())
            }
            // SAFETY: as above.
            Kind::Coherent => unsafe { self.kernel.dealloc_coherent(self.handle) },
        };
        if let Err(error) = released {
            log::error!("the kernel's backend did not take back {}: {error}", self.handle.dma_addr());
        }
    }
}

/// Gives a block back that is boxed at `ptr`: all that the driver keeps of held memory is an address.
///
/// # Safety
/// `memory` came from [`IommuDma::allocate`], no device reaches it, nobody uses it, and it is given back once.
unsafe fn give_back(memory: DmaMemory) {
    // SAFETY: the caller's promise: a box that was leaked for this.
    let block = unsafe { Box::from_raw(memory.ptr.cast::<Block>().as_ptr()) };
    // SAFETY: the caller's promise.
    unsafe { block.give_back() };
}

impl<P: Platform> IommuDma<P> {
    /// A backend for what `endpoint` reaches. `kernel` gives memory by its physical address, contiguous there; its
    /// streaming mappings are not used.
    pub fn new(endpoint: Endpoint<P>, kernel: &'static dyn DmaOp) -> Self {
        Self { endpoint, kernel, failure: Mutex::new(None) }
    }

    /// The endpoint.
    pub fn endpoint(&self) -> &Endpoint<P> {
        &self.endpoint
    }

    /// What drivers allocate and map through. Their mask is narrowed to the endpoint's limit. The number of the
    /// translated domain is one that no other domain has, and not the one in requests.
    pub fn device(&'static self, coherency: DmaCoherency, constraints: DmaConstraints) -> DeviceDma {
        let addr_mask = constraints.addr_mask.min(self.endpoint.limit().get());
        let number = u64::from(self.endpoint.domain().key().unique()) + 1;
        let domain = DmaDomainId::Translated(NonZeroU64::new(number).unwrap_or(NonZeroU64::MAX));
        DeviceDma::new(
            DmaDeviceInfo::new(domain, coherency, DmaConstraints { addr_mask, ..constraints }),
            self,
        )
    }

    /// The last failure that was not fetched yet: what `dma-api` made `NoMemory` of, or says nothing about.
    pub fn take_failure(&self) -> Option<Failure> {
        self.failure.lock().take()
    }

    fn note(&self, failure: &Failure) {
        log::error!("endpoint {}: {failure}", self.endpoint.endpoint());
        *self.failure.lock() = Some(failure.clone());
    }

    fn noted<T>(&self, result: Result<T, Failure>) -> Result<T, Failure> {
        result.inspect_err(|failure| self.note(failure))
    }

    /// Where `size` bytes may lie so that they meet the constraints.
    fn place(&self, constraints: &DmaConstraints, size: usize) -> Result<Placement, Failure> {
        let nowhere = DmaAddr::from(0);
        let fails = |error| Err(Failure::Constraints(error));
        if size == 0 {
            return fails(dma_api::DmaError::ZeroSizedBuffer);
        }
        if let Some(max) = constraints.max_segment_size.filter(|max| size > *max) {
            return fails(dma_api::DmaError::SegmentTooLarge { size, max });
        }
        let required = constraints.align.max(1);
        if !required.is_power_of_two() {
            return fails(dma_api::DmaError::AlignMismatch { required, address: nowhere });
        }
        let mut align = (required as u64).max(self.endpoint.granule());
        if let Some(boundary) = constraints.boundary {
            // At a multiple of a power of two that is no smaller, nothing crosses a larger one.
            let natural = size.checked_next_power_of_two().filter(|natural| *natural <= boundary);
            let Some(natural) = natural.filter(|_| boundary.is_power_of_two()) else {
                return fails(dma_api::DmaError::BoundaryCross { addr: nowhere, size, boundary });
            };
            align = align.max(natural as u64);
        }
        Ok(Placement { align, limit: Iova::new(constraints.addr_mask).min(self.endpoint.limit()) })
    }

    /// Memory of the kernel's, mapped at `place`, zeroed. Gives the handle with the endpoint's address.
    ///
    /// # Safety
    /// As for the allocating methods of [`DmaOp`].
    unsafe fn allocate(
        &self,
        place: Placement,
        layout: Layout,
        kind: Kind,
        direction: Direction,
    ) -> Result<DmaAllocHandle, Failure> {
        let whole = self.whole(layout)?;
        let constraints = DmaConstraints::new(u64::MAX).with_align(whole.align());
        let handle = match kind {
            // SAFETY: the caller's promise.
            Kind::Contiguous => unsafe { self.kernel.alloc_contiguous(constraints, whole) },
            // SAFETY: as above.
            Kind::Coherent => unsafe { self.kernel.alloc_coherent(constraints, whole) },
        };
        let handle = handle.ok_or(Failure::NoMemory { len: whole.size() })?;
        let block = Block { kernel: self.kernel, kind, handle };
        // The endpoint reaches whole granules, and with them what `dma-api` does not clear.
        // SAFETY: fresh memory of this length.
        unsafe { handle.as_ptr().write_bytes(0, whole.size()) };
        if let Kind::Contiguous = kind {
            self.kernel.flush(handle.as_ptr(), whole.size());
        }
        let memory = DmaMemory {
            phys: PhysAddr::new(handle.dma_addr().as_u64()),
            ptr: NonNull::from(Box::leak(Box::new(block))).cast(),
            len: whole.size(),
        };
        // SAFETY: fresh from the kernel's backend, and nobody's until it goes back there.
        let held = unsafe { HeldMemory::new(memory, give_back) };
        let adopted = self.endpoint.adopt_within(held, direction, place);
        match self.endpoint.block_on(adopted) {
            // SAFETY: the same memory, by the address that the endpoint has for it; the rest is the kernel's.
            Ok(mapping) => Ok(unsafe {
                let iova = DmaAddr::from(mapping.iova().get());
                DmaAllocHandle::new(handle.as_ptr(), handle.allocation_ptr(), iova, layout)
            }),
            Err((error, held)) => {
                if let Some(held) = held {
                    // SAFETY: not mapped, and nobody was given it.
                    unsafe { give_back(held.into_memory()) };
                }
                Err(Failure::Map(error))
            }
        }
    }

    /// The whole granules that memory of this layout is part of.
    fn whole(&self, layout: Layout) -> Result<Layout, Failure> {
        let granule = self.endpoint.granule();
        let whole = usize::try_from(granule).ok().and_then(|granule| {
            // At least two bytes, since no MAP can say one.
            let size = layout.size().max(2).checked_next_multiple_of(granule)?;
            Layout::from_size_align(size, layout.align().max(granule)).ok()
        });
        whole.ok_or(Failure::NoMemory { len: layout.size() })
    }

    /// Unmaps what [`allocate`](Self::allocate) gave, which lets the memory go back.
    ///
    /// # Safety
    /// The address came from there, and nobody uses the memory any more.
    unsafe fn release(&self, at: DmaAddr) -> Result<(), Failure> {
        // SAFETY: the caller's promise; the mapping's handle was forgotten.
        let unmapped = unsafe { self.endpoint.unmap_at(Iova::new(at.as_u64())) };
        self.noted(unmapped.map(drop).map_err(Failure::Unmap))
    }

    /// A handle as the kernel's backend gave it, for its cache maintenance.
    fn kernels(&self, handle: &DmaAllocHandle) -> DmaAllocHandle {
        let phys = self.endpoint.translate(Iova::new(handle.dma_addr().as_u64()));
        let phys = phys.map_or(handle.dma_addr(), |found| DmaAddr::from(found.phys.get()));
        // SAFETY: the memory of the given handle, with its physical address.
        unsafe { DmaAllocHandle::new(handle.as_ptr(), handle.allocation_ptr(), phys, handle.layout()) }
    }

    fn bounce(
        &self,
        constraints: &DmaConstraints,
        size: usize,
        direction: DmaDirection,
    ) -> Result<(DmaAddr, NonNull<u8>), Failure> {
        let place = self.place(constraints, size)?;
        if let Some((iova, ptr)) = self.endpoint.take_bounce(size) {
            let fits = iova.get().is_multiple_of(place.align)
                && iova.checked_add(size as u64 - 1).is_some_and(|last| last <= place.limit);
            if fits {
                // So that a cache does not keep the zeroes from the device.
                self.kernel.flush(ptr, size);
                return Ok((iova.get().into(), ptr));
            }
            self.endpoint.give_back_bounce(iova, size);
        }
        let direction = match direction {
            DmaDirection::ToDevice => Direction::ToDevice,
            DmaDirection::FromDevice => Direction::FromDevice,
            DmaDirection::Bidirectional => Direction::Both,
        };
        let layout = Layout::from_size_align(size, 1).map_err(|_| Failure::NoMemory { len: size })?;
        // SAFETY: it lives until `unmap_streaming`.
        let pages = unsafe { self.allocate(place, layout, Kind::Contiguous, direction) }?;
        Ok((pages.dma_addr(), pages.as_ptr()))
    }
}

impl<P: Platform> DmaOp for IommuDma<P> {
    fn page_size(&self) -> usize {
        self.kernel.page_size()
    }

    unsafe fn alloc_contiguous(&self, constraints: DmaConstraints, layout: Layout) -> Option<DmaAllocHandle> {
        let allocated = self.place(&constraints, layout.size()).and_then(|place| {
            // SAFETY: the caller's promise.
            unsafe { self.allocate(place, layout, Kind::Contiguous, Direction::Both) }
        });
        self.noted(allocated).ok()
    }

    unsafe fn dealloc_contiguous(&self, handle: DmaAllocHandle) {
        // SAFETY: the caller's promise. What failed was noted, and the memory is not lost.
        let _ = unsafe { self.release(handle.dma_addr()) };
    }

    unsafe fn alloc_coherent(&self, constraints: DmaConstraints, layout: Layout) -> Option<DmaAllocHandle> {
        let allocated = self.place(&constraints, layout.size()).and_then(|place| {
            // SAFETY: the caller's promise.
            unsafe { self.allocate(place, layout, Kind::Coherent, Direction::Both) }
        });
        self.noted(allocated).ok()
    }

    unsafe fn dealloc_coherent(&self, handle: DmaAllocHandle) -> Result<(), dma_api::DmaError> {
        // SAFETY: the caller's promise.
        unsafe { self.release(handle.dma_addr()) }.map_err(Failure::theirs)
    }

    unsafe fn map_streaming(
        &self,
        constraints: DmaConstraints,
        addr: NonNull<u8>,
        size: NonZeroUsize,
        direction: DmaDirection,
    ) -> Result<DmaMapHandle, dma_api::DmaError> {
        let layout = Layout::from_size_align(size.get(), constraints.align.max(1))?;
        let bounced = self.noted(self.bounce(&constraints, size.get(), direction));
        let (iova, ptr) = bounced.map_err(Failure::theirs)?;
        // SAFETY: the caller's buffer, and pages that are its own until `unmap_streaming`.
        Ok(unsafe { DmaMapHandle::new(addr, iova, layout, Some(ptr)) })
    }

    unsafe fn unmap_streaming(&self, handle: DmaMapHandle) {
        let iova = Iova::new(handle.dma_addr().as_u64());
        if !self.endpoint.give_back_bounce(iova, handle.size()) {
            // SAFETY: the pages of `bounce`. What failed was noted, and the memory is not lost.
            let _ = unsafe { self.release(handle.dma_addr()) };
        }
    }

    fn flush(&self, addr: NonNull<u8>, size: usize) {
        self.kernel.flush(addr, size);
    }

    fn invalidate(&self, addr: NonNull<u8>, size: usize) {
        self.kernel.invalidate(addr, size);
    }

    fn flush_invalidate(&self, addr: NonNull<u8>, size: usize) {
        self.kernel.flush_invalidate(addr, size);
    }

    fn sync_alloc_for_device(
        &self,
        handle: &DmaAllocHandle,
        offset: usize,
        size: usize,
        direction: DmaDirection,
    ) {
        self.kernel.sync_alloc_for_device(&self.kernels(handle), offset, size, direction);
    }

    fn sync_alloc_for_cpu(
        &self,
        handle: &DmaAllocHandle,
        offset: usize,
        size: usize,
        direction: DmaDirection,
    ) {
        self.kernel.sync_alloc_for_cpu(&self.kernels(handle), offset, size, direction);
    }
}
