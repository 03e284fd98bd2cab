//! The unmodified device drivers of the `virtio-drivers` crate (0.13), each in a domain of its own.
//!
//! Two pieces go between a kernel and such a driver, and [`HalPlatform`] makes what this crate needs of the kernel from
//! the `Hal` that it has:
//! - [`IommuHal`] stands before the kernel's own `Hal`: what that allocates is mapped for the device, and
//!   buffers go through the endpoint's bounce pages. `Hal` has only static functions, so that each device needs
//!   a type: a *slot*, made by [`dma_slot!`](crate::dma_slot), which is filled when the device was attached.
//! - [`PlatformTransport`] stands before the device's transport and accepts ACCESS_PLATFORM, without which the
//!   device uses physical addresses and ignores the IOMMU. A device that does not offer it is refused.
//!
//! ```no_run
//! use virtio_drivers::{Hal, device::blk::VirtIOBlk, transport::Transport};
//! use virtio_iommu::{DmaDevice, bridge::virtio_drivers::{IommuHal, PlatformTransport}};
//!
//! virtio_iommu::dma_slot!(/** The system disk. */ pub Disk);
//!
//! # fn use_it<KernelHal: Hal, T: Transport>(
//! #     transport: T, endpoint: impl DmaDevice + 'static,
//! # ) -> virtio_drivers::Result {
//! Disk::fill(endpoint).map_err(|_endpoint| virtio_drivers::Error::AlreadyUsed)?;
//! let transport = PlatformTransport::<_, Disk>::new(transport);
//! let disk = VirtIOBlk::<IommuHal<KernelHal, Disk>, _>::new(transport)?;
//! # Ok(()) }
//! ```
//!
//! [`with_free_slot!`](crate::with_free_slot) picks a slot while the kernel runs. A kernel with a single `Hal` type for all
//! devices makes a single slot, and attaches them all to one domain; see [`slot`](super::slot), also for forks.
//!
//! # What `Hal` cannot say
//! - *That `share` failed.* When no bounce page is free it gives an address that always faults, and counts it
//!   ([`DeviceCell::exhausted`]): the device's request fails, or is never answered, and a fault is reported.
//! - *That memory must not go back.* Memory whose unmapping the device did not confirm is kept, and goes back to the
//!   kernel's `Hal` when it answers; `dma_dealloc` reports success all the same, since the crate panics otherwise.
//! - *Address 0.* It is the crate's sign for no memory, and this driver never maps it.
//! - *Where a buffer's neighbours are.* A mapping reaches whole granules, and with them what lies beside the buffer, on a
//!   stack for instance. So buffers bounce. [`DeviceCell::fill_in_place`] maps those in place that are whole granules.
//! - *The granule.* The crate's pages are of 4 KiB. Behind an IOMMU whose granule is larger, ring memory comes from the
//!   driver's [`Platform`](crate::Platform), which aligns it, and not from the kernel's `Hal`.

mod hal_platform;
mod platform_transport;

pub use super::slot::{DeviceCell, Slot};
pub use hal_platform::HalPlatform;
pub use platform_transport::PlatformTransport;

use super::slot::Buffers;
use crate::addr::{Iova, PhysAddr};
use crate::dma::{DmaDevice, HeldMemory, Unmapped};
use crate::error::{DmaError, MapError, UnmapError};
use crate::platform::DmaMemory;
use crate::prot::Direction;
use core::marker::PhantomData;
use core::ptr::NonNull;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE};

/// The `Hal` of one device behind the IOMMU, over the kernel's own `H`.
///
/// Ring memory is `H`'s, mapped for the device and kept until the device confirmed that it is not. Buffers are
/// copied through the endpoint's bounce pages, which were mapped once: sharing one sends no request. Where the slot was
/// filled by [`DeviceCell::fill_in_place`], whole granules are mapped in place instead, at the address that `H::share`
/// gives, and both are undone in reverse.
pub struct IommuHal<H, S>(PhantomData<(H, S)>);

fn direction(theirs: BufferDirection) -> Direction {
    match theirs {
        BufferDirection::DriverToDevice => Direction::ToDevice,
        BufferDirection::DeviceToDriver => Direction::FromDevice,
        BufferDirection::Both => Direction::Both,
    }
}

/// Gives pages back to the kernel's `Hal`.
///
/// # Safety
/// The memory came from `H::dma_alloc`, and no device reaches it.
unsafe fn return_to<H: Hal>(memory: DmaMemory) {
    let pages = memory.len / PAGE_SIZE;
    // SAFETY: the caller's promise.
    let result = unsafe { H::dma_dealloc(memory.phys.get(), memory.ptr, pages) };
    if result != 0 {
        log::error!("the kernel's Hal did not take back {pages} pages at {}: {result}", memory.phys);
    }
}

// SAFETY: memory is `H`'s, which promises that it is valid, aligned, zeroed and nobody else's. Addresses are
// what the device has to use.
unsafe impl<H: Hal, S: Slot> Hal for IommuHal<H, S> {
    fn dma_alloc(pages: usize, buffer_direction: BufferDirection) -> (u64, NonNull<u8>) {
        let Some(device) = S::cell().get() else { return H::dma_alloc(pages, buffer_direction) };
        if device.granule() > PAGE_SIZE as u64 {
            return aligned_pages(device, pages);
        }
        let (phys, ptr) = H::dma_alloc(pages, buffer_direction);
        if phys == 0 {
            return (0, ptr);
        }
        let memory = DmaMemory { phys: PhysAddr::new(phys), ptr, len: pages * PAGE_SIZE };
        // SAFETY: fresh from `H`, and nobody else's until it goes back by `return_to`.
        let held = unsafe { HeldMemory::new(memory, return_to::<H>) };
        // Whatever the direction: devices read back the used ring that they write (QEMU does).
        match device.adopt(held, Direction::Both) {
            Ok(mapping) => (mapping.iova().get(), ptr),
            Err((error, held)) => {
                log::error!("endpoint {}: no DMA memory: {error}", device.endpoint());
                if held.is_some() {
                    // SAFETY: not mapped, so no device reaches it, and nobody was given it.
                    unsafe { return_to::<H>(memory) };
                }
                // 0 is how `Hal` says that there is none.
                (0, ptr)
            }
        }
    }

    unsafe fn dma_dealloc(iova: u64, ptr: NonNull<u8>, pages: usize) -> i32 {
        let Some(device) = S::cell().get() else {
            // SAFETY: then `dma_alloc` was `H`'s.
            return unsafe { H::dma_dealloc(iova, ptr, pages) };
        };
        // SAFETY: the caller got this address from `dma_alloc`, which forgot the mapping's handle.
        if let Err(error) = unsafe { device.unmap_at(Iova::new(iova)) } {
            log::error!("endpoint {}: DMA memory stays in quarantine: {error}", device.endpoint());
        }
        0
    }

    unsafe fn mmio_phys_to_virt(phys: u64, size: usize) -> NonNull<u8> {
        // SAFETY: the caller's promise.
        unsafe { H::mmio_phys_to_virt(phys, size) }
    }

    unsafe fn share(buffer: NonNull<[u8]>, buffer_direction: BufferDirection) -> u64 {
        let cell = S::cell();
        let Some((device, buffers)) = cell.with_buffers() else {
            // SAFETY: the caller's promise.
            return unsafe { H::share(buffer, buffer_direction) };
        };
        let iova = if buffers == Buffers::InPlace && is_whole(buffer, device.granule()) {
            // SAFETY: the caller's promise, and that of who filled the slot.
            let shared = unsafe { share_in_place::<H>(device, buffer, buffer_direction) };
            shared.unwrap_or_else(|error| {
                log::warn!("endpoint {}: a buffer cannot be shared: {error}", device.endpoint());
                if is_unclear(&error) {
                    cell.count_unconfirmed();
                }
                device.faulting_iova()
            })
        } else {
            // SAFETY: the caller promises that the buffer is valid and nobody accesses it meanwhile.
            unsafe { device.share_or_fault(buffer, direction(buffer_direction)) }
        };
        if iova == device.faulting_iova() {
            cell.count_exhausted();
        }
        iova.get()
    }

    unsafe fn unshare(iova: u64, buffer: NonNull<[u8]>, buffer_direction: BufferDirection) {
        let cell = S::cell();
        let Some((device, buffers)) = cell.with_buffers() else {
            // SAFETY: the caller's promise.
            return unsafe { H::unshare(iova, buffer, buffer_direction) };
        };
        let iova = Iova::new(iova);
        if iova == device.faulting_iova() {
            return;
        }
        if buffers == Buffers::InPlace && is_whole(buffer, device.granule()) {
            // SAFETY: the caller promises that this is the buffer that was shared, in place by the same rule.
            if !unsafe { unshare_in_place::<H>(device, iova, buffer, buffer_direction) } {
                cell.count_unconfirmed();
            }
        } else {
            // SAFETY: the caller promises that this is the buffer that was shared, and that nobody accesses it.
            unsafe { device.unshare(iova, buffer, direction(buffer_direction)) };
        }
    }
}

/// Ring memory of the platform's, for granules that are larger than the crate's pages.
fn aligned_pages(device: &dyn DmaDevice, pages: usize) -> (u64, NonNull<u8>) {
    let memory = pages.checked_mul(PAGE_SIZE).map(|len| device.alloc_coherent(len));
    match memory {
        Some(Ok(memory)) => (memory.iova().get(), memory.ptr()),
        Some(Err(error)) => {
            log::error!("endpoint {}: no DMA memory: {error}", device.endpoint());
            (0, NonNull::dangling())
        }
        None => (0, NonNull::dangling()),
    }
}

/// Whether a buffer begins and ends on a granule, so that it has no neighbours in its mapping.
fn is_whole(buffer: NonNull<[u8]>, granule: u64) -> bool {
    let on_granule = |number: usize| (number as u64).is_multiple_of(granule);
    !buffer.is_empty() && on_granule(buffer.addr().get()) && on_granule(buffer.len())
}

/// Whether the device may have what could not be mapped.
fn is_unclear(error: &DmaError) -> bool {
    matches!(error, DmaError::Map(MapError::Quarantined { .. }))
}

/// Maps a buffer where `H` says that it is.
///
/// # Safety
/// As for `Hal::share`. The buffer is whole granules, which the device may access until they are unmapped.
unsafe fn share_in_place<H: Hal>(
    device: &dyn DmaDevice,
    buffer: NonNull<[u8]>,
    theirs: BufferDirection,
) -> Result<Iova, DmaError> {
    // SAFETY: the caller's promise.
    let phys = unsafe { H::share(buffer, theirs) };
    let mapped = if phys.is_multiple_of(device.granule()) {
        // SAFETY: whole granules, which the caller lends.
        unsafe { device.map(PhysAddr::new(phys), buffer.len(), direction(theirs)) }
    } else {
        Err(MapError::Misaligned { value: phys, granule: device.granule() }.into())
    };
    if mapped.as_ref().is_err_and(|error| !is_unclear(error)) {
        // SAFETY: shared above, and not mapped.
        unsafe { H::unshare(phys, buffer, theirs) };
    }
    mapped.map(|mapping| mapping.iova())
}

/// Undoes [`share_in_place`]. Returns whether the device does not reach the buffer any more.
///
/// # Safety
/// As for `Hal::unshare`; the address came from `share_in_place` for this buffer.
unsafe fn unshare_in_place<H: Hal>(
    device: &dyn DmaDevice,
    iova: Iova,
    buffer: NonNull<[u8]>,
    theirs: BufferDirection,
) -> bool {
    let phys = device.translate(iova).map(|translation| translation.phys);
    // SAFETY: the caller's promise.
    let unmapped = unsafe { device.unmap_at(iova) };
    // The buffer is not the driver's to hold until a flush that comes by itself.
    let unmapped = unmapped.and_then(|unmapped| match unmapped {
        Unmapped::Now => Ok(()),
        Unmapped::AtFlush => device.flush(),
    });
    match (phys, unmapped) {
        (Some(phys), Ok(())) => {
            // SAFETY: shared at this address, and the device is done with it.
            unsafe { H::unshare(phys.get(), buffer, theirs) };
            true
        }
        (_, unmapped) => {
            // What `H` shared stays so: the device may still reach it.
            let error = unmapped.err().unwrap_or(UnmapError::NotMapped(iova));
            log::error!("endpoint {}: a buffer goes back while it may be mapped: {error}", device.endpoint());
            false
        }
    }
}
