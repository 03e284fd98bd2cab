//! The unmodified device drivers of the `virtio-drivers` crate (0.13), each in a domain of its own.
//!
//! Two pieces go between a kernel and such a driver:
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
//! # What `Hal` cannot say
//! `share` cannot fail: when no bounce page is free it gives an address that always faults, and counts it
//! ([`DeviceCell::exhausted`]). Memory whose unmapping the device did not confirm is kept; `dma_dealloc` reports
//! success all the same, since the crate panics otherwise. Sub-granule buffers always bounce. Its pages are of
//! 4 KiB: behind an IOMMU whose granule is larger, `dma_alloc` has none to give.

use crate::addr::{Iova, PhysAddr};
use crate::dma::{DmaDevice, HeldMemory};
use crate::platform::DmaMemory;
use crate::prot::Direction;
use alloc::boxed::Box;
use core::marker::PhantomData;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The place where a slot keeps its device's view. Filled before its driver is made, and emptied by
/// [`take`](Self::take) alone.
pub struct DeviceCell {
    /// Null while it can be filled; [`CLOSED`] when the driver began without; else a leaked box, so that the wide
    /// pointer is set in one step.
    device: AtomicPtr<Box<dyn DmaDevice>>,
    exhausted: AtomicU64,
}

/// Stands for a device that is not behind the IOMMU. Never dereferenced.
const CLOSED: *mut Box<dyn DmaDevice> = ptr::dangling_mut();

impl DeviceCell {
    /// An empty cell.
    #[expect(clippy::new_without_default, reason = "meant for statics, where `default` cannot be called")]
    pub const fn new() -> Self {
        Self { device: AtomicPtr::new(ptr::null_mut()), exhausted: AtomicU64::new(0) }
    }

    /// Fills the cell. Allocates.
    ///
    /// # Errors
    /// The device, if the cell is filled already, or its driver began without.
    pub fn fill<D: DmaDevice + 'static>(&self, device: D) -> Result<(), D> {
        let view: Box<dyn DmaDevice> = Box::new(device);
        let place = Box::into_raw(Box::new(view));
        let set = self.device.compare_exchange(ptr::null_mut(), place, Ordering::Release, Ordering::Relaxed);
        if set.is_ok() {
            return Ok(());
        }
        // SAFETY: the box from above, of this type, which nobody else saw.
        Err(unsafe { open(place) })
    }

    /// Empties the cell and gives the device back, to be closed; `None` where it is not filled. The cell can be filled
    /// again.
    ///
    /// # Safety
    /// `D` is the type that the cell was filled with. The slot's driver was dropped, and nobody uses what
    /// [`get`](Self::get) gave, or calls it meanwhile.
    pub unsafe fn take<D: DmaDevice + 'static>(&self) -> Option<D> {
        let place = self.device.load(Ordering::Acquire);
        if place.is_null() || place == CLOSED {
            return None;
        }
        self.device.store(ptr::null_mut(), Ordering::Release);
        // SAFETY: a box that `fill` leaked, of this type and used by nobody, by the caller's promise.
        Some(unsafe { open(place) })
    }

    /// The device's view, or `None` when there is no IOMMU in front of it. The first call decides: a cell that
    /// is empty then stays so, since its driver keeps addresses of the kernel's own `Hal`.
    pub fn get(&self) -> Option<&'static dyn DmaDevice> {
        let mut place = self.device.load(Ordering::Acquire);
        if place.is_null() {
            let closed =
                self.device.compare_exchange(ptr::null_mut(), CLOSED, Ordering::AcqRel, Ordering::Acquire);
            place = closed.err().unwrap_or(CLOSED);
        }
        // SAFETY: not null and not the mark, so a box that `fill` leaked; `take`'s caller sees to it that it stays
        // as long as it is used.
        (place != CLOSED).then(|| unsafe { &**place })
    }

    /// How often a buffer could not be shared, so that the device was given an address that faults.
    pub fn exhausted(&self) -> u64 {
        self.exhausted.load(Ordering::Relaxed)
    }
}

/// Opens the two boxes that [`DeviceCell::fill`] made.
///
/// # Safety
/// Both boxes are leaked, hold a `D`, and belong to the caller.
unsafe fn open<D: DmaDevice>(place: *mut Box<dyn DmaDevice>) -> D {
    // SAFETY: the caller's promise.
    unsafe { *Box::from_raw(Box::into_raw(*Box::from_raw(place)).cast::<D>()) }
}

/// A device, as a type. Implemented by [`dma_slot!`](crate::dma_slot).
pub trait Slot {
    /// Where its view is kept.
    fn cell() -> &'static DeviceCell;
}

/// Makes a type that stands for one device, for [`IommuHal`](crate::bridge::virtio_drivers::IommuHal).
///
/// `dma_slot!(pub Disk);` makes `Disk`, with `Disk::fill(endpoint)` to be called once before its driver is made;
/// [`DeviceCell::take`](crate::bridge::virtio_drivers::DeviceCell::take) gives the endpoint back in the end.
/// If it is not filled by then, the kernel's own `Hal` is used as it is, for good.
#[macro_export]
macro_rules! dma_slot {
    ($(#[$attribute:meta])* $visibility:vis $name:ident) => {
        $(#[$attribute])*
        $visibility enum $name {}

        impl $name {
            /// Fills the slot with the device's view of its domain, before its driver is made.
            ///
            /// # Errors
            /// The device, if the slot is filled already, or its driver began without.
            $visibility fn fill<D: $crate::DmaDevice + 'static>(device: D) -> Result<(), D> {
                <Self as $crate::bridge::virtio_drivers::Slot>::cell().fill(device)
            }
        }

        impl $crate::bridge::virtio_drivers::Slot for $name {
            fn cell() -> &'static $crate::bridge::virtio_drivers::DeviceCell {
                static CELL: $crate::bridge::virtio_drivers::DeviceCell =
                    $crate::bridge::virtio_drivers::DeviceCell::new();
                &CELL
            }
        }
    };
}

/// The `Hal` of one device behind the IOMMU, over the kernel's own `H`.
///
/// Ring memory is `H`'s, mapped for the device and kept until the device confirmed that it is not. Buffers are
/// copied through the endpoint's bounce pages, which were mapped once: sharing one sends no request.
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
        let (phys, ptr) = H::dma_alloc(pages, buffer_direction);
        let Some(device) = S::cell().get() else { return (phys, ptr) };
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
        let Some(device) = S::cell().get() else {
            // SAFETY: the caller's promise.
            return unsafe { H::share(buffer, buffer_direction) };
        };
        // SAFETY: the caller promises that the buffer is valid and nobody accesses it meanwhile.
        match unsafe { device.share(buffer, direction(buffer_direction)) } {
            Ok(iova) => iova.get(),
            Err(error) => {
                S::cell().exhausted.fetch_add(1, Ordering::Relaxed);
                log::warn!("endpoint {}: a buffer cannot be shared: {error}", device.endpoint());
                device.faulting_iova().get()
            }
        }
    }

    unsafe fn unshare(iova: u64, buffer: NonNull<[u8]>, buffer_direction: BufferDirection) {
        match S::cell().get() {
            // SAFETY: the caller's promise.
            None => unsafe { H::unshare(iova, buffer, buffer_direction) },
            // SAFETY: the caller promises that this is the buffer that was shared, and that nobody accesses it.
            Some(device) => unsafe { device.unshare(Iova::new(iova), buffer, direction(buffer_direction)) },
        }
    }
}

const EVENT_IDX: u64 = 1 << 29;
const ACCESS_PLATFORM: u64 = 1 << 33;

/// A transport that accepts ACCESS_PLATFORM on behalf of a driver that does not know it.
///
/// It hides EVENT_IDX, whose notifications the crate's queue loses at the wrap of its index when requests come
/// in batches, and reads FEATURES_OK back, which the crate does not. When the device refuses the features, or
/// does not offer ACCESS_PLATFORM although it is behind the IOMMU (slot `S` is filled), it is marked as failed and
/// seems to have no queues, so that the driver's constructor returns an error: it would take the addresses that
/// it is given for physical ones.
pub struct PlatformTransport<T, S> {
    inner: T,
    offered: u64,
    refused: bool,
    slot: PhantomData<fn() -> S>,
}

impl<T: Transport, S: Slot> PlatformTransport<T, S> {
    /// Wraps a transport that no driver has yet.
    pub fn new(inner: T) -> Self {
        Self { inner, offered: 0, refused: false, slot: PhantomData }
    }

    /// Looks whether the device works with the features that were written.
    fn check_features(&mut self) {
        let ignores_iommu = self.offered & ACCESS_PLATFORM == 0 && S::cell().get().is_some();
        let status = self.inner.get_status();
        if ignores_iommu {
            log::error!(
                "a virtio device behind the IOMMU does not offer ACCESS_PLATFORM (QEMU: iommu_platform=on)"
            );
        } else if !status.contains(DeviceStatus::FEATURES_OK) {
            log::error!("a virtio device refused the features of its driver and ACCESS_PLATFORM");
        } else {
            return;
        }
        self.refused = true;
        self.inner.set_status(status | DeviceStatus::FAILED);
    }
}

impl<T: Transport, S: Slot> Transport for PlatformTransport<T, S> {
    fn device_type(&self) -> DeviceType {
        self.inner.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.offered = self.inner.read_device_features();
        self.offered & !EVENT_IDX
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        self.inner.write_driver_features(driver_features & !EVENT_IDX | self.offered & ACCESS_PLATFORM);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        if self.refused { 0 } else { self.inner.max_queue_size(queue) }
    }

    fn notify(&mut self, queue: u16) {
        self.inner.notify(queue);
    }

    fn get_status(&self) -> DeviceStatus {
        self.inner.get_status()
    }

    fn set_status(&mut self, status: DeviceStatus) {
        if status.is_empty() {
            self.refused = false;
        }
        if self.refused {
            return;
        }
        self.inner.set_status(status);
        if status.contains(DeviceStatus::FEATURES_OK) && !status.contains(DeviceStatus::DRIVER_OK) {
            self.check_features();
        }
    }

    fn set_guest_page_size(&mut self, guest_page_size: u32) {
        self.inner.set_guest_page_size(guest_page_size);
    }

    fn requires_legacy_layout(&self) -> bool {
        self.inner.requires_legacy_layout()
    }

    fn queue_set(&mut self, queue: u16, size: u32, descriptors: u64, driver_area: u64, device_area: u64) {
        self.inner.queue_set(queue, size, descriptors, driver_area, device_area);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.inner.queue_unset(queue);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.inner.queue_used(queue)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.inner.ack_interrupt()
    }

    fn read_config_generation(&self) -> u32 {
        self.inner.read_config_generation()
    }

    fn read_config_space<V: FromBytes + IntoBytes>(&self, offset: usize) -> virtio_drivers::Result<V> {
        self.inner.read_config_space(offset)
    }

    fn write_config_space<V: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: V,
    ) -> virtio_drivers::Result<()> {
        self.inner.write_config_space(offset, value)
    }
}
