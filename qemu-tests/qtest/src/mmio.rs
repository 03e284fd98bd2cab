//! What a register access of the driver does here: one command to QEMU.
//!
//! A [`Window`] is address space of this process that stands for guest-physical addresses of one machine.
//! Nothing is mapped there, so that an access that went past `safe-mmio` would end this process instead of
//! reading something.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context as _, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use safe_mmio::{MmioOps, set_mmio_ops};

use crate::wire::{Width, Wire};

/// All windows that exist: register access has no other way to find its machine.
static WINDOWS: RwLock<Vec<Span>> = RwLock::new(Vec::new());

#[derive(Clone, Debug)]
struct Span {
    start: usize,
    len: usize,
    phys: u64,
    wire: Arc<Wire>,
}

/// Addresses of this process that lead to registers of one machine, as long as this exists.
#[derive(Debug)]
pub(crate) struct Window {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: reserved address space belongs to no thread, and nothing is read or written there.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// A window onto `len` bytes of registers, whole pages, from the guest-physical address `phys`.
    pub(crate) fn new(wire: Arc<Wire>, phys: u64, len: usize) -> Result<Self> {
        let size = NonZeroUsize::new(len).context("an empty window")?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: fresh address space, placed by the kernel, over nothing that is in use.
        let start = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, flags) };
        let start = start.context("cannot reserve address space")?.cast::<u8>();
        let span = Span { start: start.addr().get(), len, phys, wire };
        WINDOWS.write().unwrap_or_else(PoisonError::into_inner).push(span);
        Ok(Self { start, len })
    }

    /// The address that stands for the byte at `offset`.
    pub(crate) fn at(&self, offset: usize) -> Option<NonNull<u8>> {
        let inside = offset < self.len;
        // SAFETY: inside the reserved range by the check.
        inside.then(|| unsafe { self.start.add(offset) })
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let start = self.start.addr().get();
        WINDOWS.write().unwrap_or_else(PoisonError::into_inner).retain(|span| span.start != start);
        // SAFETY: the range that `new` reserved, into which there are no references.
        if let Err(error) = unsafe { munmap(self.start.cast(), self.len) } {
            eprintln!("cannot release a window of registers: {error}");
        }
    }
}

/// The machine and the guest-physical address behind an address of this process.
///
/// # Panics
/// When it is in no window: the access would have been a stray one on hardware too.
fn resolve(address: usize, width: Width) -> (Arc<Wire>, u64) {
    let windows = WINDOWS.read().unwrap_or_else(PoisonError::into_inner);
    let bytes = width as usize;
    for span in windows.iter() {
        let offset = address.wrapping_sub(span.start);
        if offset < span.len && bytes <= span.len - offset {
            return (Arc::clone(&span.wire), span.phys + offset as u64);
        }
    }
    drop(windows);
    panic!("a register access of {bytes} bytes at {address:#x}, where no machine is");
}

fn read(address: usize, width: Width) -> u64 {
    let (wire, phys) = resolve(address, width);
    wire.read(phys, width)
}

fn write(address: usize, width: Width, value: u64) {
    let (wire, phys) = resolve(address, width);
    wire.write(phys, width, value);
}

/// Register access of everything in this program that uses `safe-mmio`.
struct QtestMmio;

impl MmioOps for QtestMmio {
    unsafe fn read_u8(src: *const u8) -> u8 {
        read(src.addr(), Width::Byte) as u8
    }

    unsafe fn read_u16(src: *const u16) -> u16 {
        read(src.addr(), Width::Word) as u16
    }

    unsafe fn read_u32(src: *const u32) -> u32 {
        read(src.addr(), Width::Long) as u32
    }

    unsafe fn read_u64(src: *const u64) -> u64 {
        read(src.addr(), Width::Quad)
    }

    unsafe fn write_u8(dst: *mut u8, value: u8) {
        write(dst.addr(), Width::Byte, value.into());
    }

    unsafe fn write_u16(dst: *mut u16, value: u16) {
        write(dst.addr(), Width::Word, value.into());
    }

    unsafe fn write_u32(dst: *mut u32, value: u32) {
        write(dst.addr(), Width::Long, value.into());
    }

    unsafe fn write_u64(dst: *mut u64, value: u64) {
        write(dst.addr(), Width::Quad, value);
    }
}

set_mmio_ops!(QtestMmio);
