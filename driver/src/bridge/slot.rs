//! Places where interfaces of static functions find an endpoint's view: one type for each.
//!
//! Interfaces like the `Hal` of `virtio-drivers` know no device: their functions have no `self`. A *slot* is a type
//! that stands for a device, or for a class of them, over a static [`DeviceCell`] that is filled when the device was
//! attached:
//! - [`dma_slot!`](crate::dma_slot) makes one for a device that the kernel knows by name;
//! - [`with_free_slot!`](crate::with_free_slot) picks one of several while the kernel runs, for devices that it finds
//!   late;
//! - one slot serves a whole *class* of devices: fill it with the view of one, and attach the others to the same
//!   domain, by [`Viommu::attach`](crate::Viommu::attach). What is mapped for one is then mapped for all of them.
//!
//! # Forks
//! A fork, or another version of `virtio-drivers`, has a `Hal` of its own, which `IommuHal` is not. Over a slot it
//! takes a line for each function, and no feature of this crate. Its transport, too, has to accept ACCESS_PLATFORM (bit
//! 33), without which a device uses physical addresses and ignores the IOMMU.
//!
//! ```
//! use core::ptr::NonNull;
//! use virtio_iommu::{Direction, DmaDevice, Iova, bridge::slot::Slot};
//! # mod fork {
//! #     use core::ptr::NonNull;
//! #     #[derive(Clone, Copy)]
//! #     pub enum BufferDirection { DriverToDevice, DeviceToDriver, Both }
//! #     pub unsafe trait Hal {
//! #         fn dma_alloc(pages: usize, direction: BufferDirection) -> (usize, NonNull<u8>);
//! #         unsafe fn dma_dealloc(paddr: usize, vaddr: NonNull<u8>, pages: usize) -> i32;
//! #         unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> usize;
//! #         unsafe fn unshare(paddr: usize, buffer: NonNull<[u8]>, direction: BufferDirection);
//! #     }
//! # }
//! # use fork::{BufferDirection, Hal};
//!
//! virtio_iommu::dma_slot!(pub Disk);
//!
//! fn disk() -> &'static dyn DmaDevice {
//!     Disk::cell().get().expect("filled before the disk's driver is made")
//! }
//! # fn ours(direction: BufferDirection) -> Direction {
//! #     match direction {
//! #         BufferDirection::DriverToDevice => Direction::ToDevice,
//! #         BufferDirection::DeviceToDriver => Direction::FromDevice,
//! #         BufferDirection::Both => Direction::Both,
//! #     }
//! # }
//!
//! struct DiskHal;
//!
//! # #[rustfmt::skip]
//! unsafe impl Hal for DiskHal {
//!     fn dma_alloc(pages: usize, _: BufferDirection) -> (usize, NonNull<u8>) {
//!         disk().alloc_coherent(pages * 4096).map_or((0, NonNull::dangling()), |m| (m.iova().get() as usize, m.ptr()))
//!     }
//!     unsafe fn dma_dealloc(iova: usize, _: NonNull<u8>, _: usize) -> i32 {
//! # // SAFETY: the caller's promise, as the trait has it.
//!         unsafe { disk().unmap_at(Iova::new(iova as u64)) }.map_or_else(|error| { log::error!("{error}"); 0 }, |_| 0)
//!     }
//!     unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> usize {
//! # // SAFETY: the caller's promise, as the trait has it.
//!         unsafe { disk().share_or_fault(buffer, ours(direction)) }.get() as usize
//!     }
//!     unsafe fn unshare(iova: usize, buffer: NonNull<[u8]>, direction: BufferDirection) {
//! # // SAFETY: the caller's promise, as the trait has it.
//!         unsafe { disk().unshare(Iova::new(iova as u64), buffer, ours(direction)) }
//!     }
//! }
//! ```

use crate::dma::DmaDevice;
use alloc::boxed::Box;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// The place where a slot keeps its device's view. Filled before its driver is made, and emptied by
/// [`take`](Self::take) alone.
pub struct DeviceCell {
    /// Null while it can be filled; [`CLOSED`] when the driver began without; else a leaked box.
    place: AtomicPtr<Filled>,
    exhausted: AtomicUsize,
    unconfirmed: AtomicUsize,
}

/// What a filled cell has.
struct Filled {
    device: Box<dyn DmaDevice>,
    buffers: Buffers,
}

impl Filled {
    /// Opens the boxes that [`DeviceCell::fill`] made.
    ///
    /// # Safety
    /// The box is leaked, holds a `D`, and belongs to the caller.
    unsafe fn open<D: DmaDevice>(place: *mut Self) -> D {
        // SAFETY: the caller's promise.
        let filled = unsafe { Box::from_raw(place) };
        // SAFETY: as above: the view is a `D`.
        unsafe { *Box::from_raw(Box::into_raw(filled.device).cast::<D>()) }
    }
}

/// How borrowed buffers get to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Buffers {
    /// Through bounce pages.
    Bounce,
    /// In place where they are whole granules, else through bounce pages.
    InPlace,
}

/// Stands for a device that is not behind the IOMMU. Never dereferenced.
const CLOSED: *mut Filled = ptr::dangling_mut();

impl DeviceCell {
    /// An empty cell.
    #[expect(clippy::new_without_default, reason = "meant for statics, where `default` cannot be called")]
    pub const fn new() -> Self {
        Self {
            place: AtomicPtr::new(ptr::null_mut()),
            exhausted: AtomicUsize::new(0),
            unconfirmed: AtomicUsize::new(0),
        }
    }

    /// Fills the cell. Borrowed buffers go through the device's bounce pages. Allocates.
    ///
    /// # Errors
    /// The device, if the cell is filled already, or its driver began without.
    pub fn fill<D: DmaDevice + 'static>(&self, device: D) -> Result<(), D> {
        self.fill_with(device, Buffers::Bounce)
    }

    /// Fills the cell as [`fill`](Self::fill) does, and lets `IommuHal` map borrowed buffers in place: those that begin
    /// and end on a granule. All others bounce. Worth it for buffers that are much longer than a page, since each costs a MAP
    /// and an UNMAP.
    ///
    /// # Errors
    /// As for [`fill`](Self::fill).
    ///
    /// # Safety
    /// The driver above gives a buffer back to its owner as soon as the device answered the request, and has no way to
    /// hold it back when MAP or UNMAP is not confirmed ([`unconfirmed`](Self::unconfirmed) counts these): until the
    /// quarantine is empty again the device may then access memory that is its owner's. The caller makes sure that
    /// this does no harm, for instance since such buffers come from memory that only such buffers use. The
    /// kernel's own `Hal::share` gives an address on a granule for a buffer on a granule.
    pub unsafe fn fill_in_place<D: DmaDevice + 'static>(&self, device: D) -> Result<(), D> {
        self.fill_with(device, Buffers::InPlace)
    }

    fn fill_with<D: DmaDevice + 'static>(&self, device: D, buffers: Buffers) -> Result<(), D> {
        let filled = Filled { device: Box::new(device), buffers };
        let place = Box::into_raw(Box::new(filled));
        let set = self.place.compare_exchange(ptr::null_mut(), place, Ordering::Release, Ordering::Relaxed);
        if set.is_ok() {
            return Ok(());
        }
        // SAFETY: the box from above, of this type, which nobody else saw.
        Err(unsafe { Filled::open(place) })
    }

    /// Empties the cell and gives the device back, to be closed; `None` where it is not filled. The cell can be filled
    /// again.
    ///
    /// # Safety
    /// `D` is the type that the cell was filled with. The slot's driver was dropped, and nobody uses what
    /// [`get`](Self::get) gave, or calls it meanwhile.
    pub unsafe fn take<D: DmaDevice + 'static>(&self) -> Option<D> {
        let place = self.place.load(Ordering::Acquire);
        if place.is_null() || place == CLOSED {
            return None;
        }
        self.place.store(ptr::null_mut(), Ordering::Release);
        // SAFETY: a box that `fill` leaked, of this type and used by nobody, by the caller's promise.
        Some(unsafe { Filled::open(place) })
    }

    /// The device's view, or `None` when there is no IOMMU in front of it. The first call decides: a cell that
    /// is empty then stays so, since its driver keeps addresses of the kernel's own `Hal`.
    pub fn get(&self) -> Option<&'static dyn DmaDevice> {
        self.filled().map(|filled| &*filled.device)
    }

    fn filled(&self) -> Option<&'static Filled> {
        let mut place = self.place.load(Ordering::Acquire);
        if place.is_null() {
            let closed =
                self.place.compare_exchange(ptr::null_mut(), CLOSED, Ordering::AcqRel, Ordering::Acquire);
            place = closed.err().unwrap_or(CLOSED);
        }
        // SAFETY: not null and not the mark, so a box that `fill` leaked; `take`'s caller sees to it that it stays
        // as long as it is used.
        (place != CLOSED).then(|| unsafe { &*place })
    }

    /// How often a buffer could not be shared, so that the device was given an address that faults. Wraps with the
    /// target's `usize`.
    pub fn exhausted(&self) -> u64 {
        self.exhausted.load(Ordering::Relaxed) as u64
    }

    /// How often a buffer that was mapped in place went back to its owner although its UNMAP was not confirmed, or what
    /// became of its MAP is not known. 0 without [`fill_in_place`](Self::fill_in_place). Wraps with the target's `usize`.
    pub fn unconfirmed(&self) -> u64 {
        self.unconfirmed.load(Ordering::Relaxed) as u64
    }
}

/// For the bridge.
#[cfg_attr(not(feature = "virtio-drivers"), expect(dead_code, reason = "there is no bridge then"))]
impl DeviceCell {
    /// The device's view, and how buffers get to it.
    pub(super) fn with_buffers(&self) -> Option<(&'static dyn DmaDevice, Buffers)> {
        self.filled().map(|filled| (&*filled.device, filled.buffers))
    }

    pub(super) fn count_exhausted(&self) {
        self.exhausted.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_unconfirmed(&self) {
        self.unconfirmed.fetch_add(1, Ordering::Relaxed);
    }
}

/// A device, or a class of devices, as a type. Implemented by [`dma_slot!`](crate::dma_slot).
pub trait Slot {
    /// Where its view is kept.
    fn cell() -> &'static DeviceCell;
}

/// Makes a type that stands for a device, or for a class of devices that share a domain.
///
/// `dma_slot!(pub Disk);` makes `Disk`, with `Disk::fill(endpoint)` to be called once before its driver is made;
/// [`DeviceCell::take`](crate::bridge::slot::DeviceCell::take) gives the endpoint back in the end.
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
            #[allow(dead_code, reason = "`with_free_slot!` fills it in another way")]
            $visibility fn fill<D: $crate::DmaDevice + 'static>(
                device: D,
            ) -> ::core::result::Result<(), D> {
                <Self as $crate::bridge::slot::Slot>::cell().fill(device)
            }
        }

        impl $crate::bridge::slot::Slot for $name {
            fn cell() -> &'static $crate::bridge::slot::DeviceCell {
                static CELL: $crate::bridge::slot::DeviceCell = $crate::bridge::slot::DeviceCell::new();
                &CELL
            }
        }
    };
}

/// Fills the first of several slots that is free, and goes on with its type: for kernels that find their devices late.
///
/// `with_free_slot!(endpoint, [Disk0, Disk1], S => expression)` is `Ok(expression)`, with `S` standing for the slot
/// that was filled, or `Err(endpoint)` when none was free. The expression is compiled once for each slot.
///
/// ```no_run
/// use virtio_iommu::{DmaDevice, dma_slot, with_free_slot};
/// # trait Block {}
/// # struct Driver<S>(core::marker::PhantomData<S>);
/// # impl<S> Driver<S> { fn new() -> Self { Self(core::marker::PhantomData) } }
/// # impl<S> Block for Driver<S> {}
/// dma_slot!(Disk0);
/// dma_slot!(Disk1);
///
/// fn add_disk(endpoint: impl DmaDevice + 'static) -> Option<Box<dyn Block>> {
///     let disk = with_free_slot!(endpoint, [Disk0, Disk1], S => Box::new(Driver::<S>::new()) as Box<dyn Block>);
///     disk.ok()
/// }
/// ```
#[macro_export]
macro_rules! with_free_slot {
    ($device:expr, [$($slot:ty),+ $(,)?], $name:ident => $body:expr) => {
        'slot: {
            let device = $device;
            $(
                let device = match <$slot as $crate::bridge::slot::Slot>::cell().fill(device) {
                    ::core::result::Result::Ok(()) => {
                        type $name = $slot;
                        break 'slot ::core::result::Result::Ok($body);
                    }
                    ::core::result::Result::Err(device) => device,
                };
            )+
            ::core::result::Result::Err(device)
        }
    };
}
