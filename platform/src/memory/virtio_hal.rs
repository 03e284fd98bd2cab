//! The kernel's memory as the `virtio-drivers` crate wants to have it, without any IOMMU: a device's addresses are
//! physical ones.
//!
//! For devices that no IOMMU translates, for the IOMMU's own queues, and below a `Hal` that translates.

use core::ptr::NonNull;

use virtio_drivers::{BufferDirection, Hal, PhysAddr};

use super::{frames, phys_to_virt, virt_to_phys};
use crate::arch::mmu;

/// The kernel's own `Hal`.
#[derive(Clone, Copy, Debug)]
pub struct KernelHal;

// SAFETY: `dma_alloc` gives frames that the frame allocator gave out just for it, zeroed, mapped and 4 KiB aligned;
// `mmio_phys_to_virt` gives mapped device memory. Both stay mapped at their physical address.
unsafe impl Hal for KernelHal {
    /// Address 0 when there is no memory, which `virtio-drivers` takes as the failure that it is.
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        match frames::allocate(pages, 1) {
            Ok(phys) => (phys, NonNull::new(phys_to_virt(phys)).unwrap_or(NonNull::dangling())),
            Err(error) => {
                log::error!("virtio-drivers: {error}");
                (0, NonNull::dangling())
            }
        }
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        // SAFETY: the caller gives back what `dma_alloc` gave, and the device does not use it any more.
        match unsafe { frames::free(paddr) } {
            Ok(()) => 0,
            Err(error) => {
                log::error!("virtio-drivers: {error}");
                -1
            }
        }
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, size: usize) -> NonNull<u8> {
        // The trait has no way to fail: a region that cannot be mapped must not be used, and the kernel ends here.
        match mmu::map_device(paddr, size as u64) {
            Ok(phys) => {
                NonNull::new(phys_to_virt(phys)).unwrap_or_else(|| unreachable!("page 0 is never mapped"))
            }
            Err(error) => panic!("virtio-drivers: {error}"),
        }
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        virt_to_phys(buffer.as_ptr())
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
