//! The guest's RAM: a file that QEMU and this process map.

use std::collections::BTreeMap;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use virtio_iommu::{DmaMemory, PhysAddr};

/// What memory is filled with that was given back: a device that still reads it is seen to.
pub(crate) const POISON: u8 = 0xdb;

/// The memory of one machine, by guest-physical addresses, which are offsets in the file. An allocator hands
/// out what lies above [`HEAP`](Self::HEAP); below it [`Requester`](crate::Requester) has its rings.
#[derive(Debug)]
pub struct Ram {
    start: NonNull<u8>,
    heap: Mutex<Heap>,
}

#[derive(Debug)]
struct Heap {
    /// What was never handed out starts here.
    next: u64,
    /// Blocks that came back: address by length and alignment.
    free: Vec<(usize, usize, u64)>,
    /// Blocks that are out: length by address.
    live: BTreeMap<u64, usize>,
}

// SAFETY: plain shared memory; every access here is by copy, and QEMU accesses it at any time anyway.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// Bytes of RAM. So little that all of it lies below the hole for devices.
    pub const LEN: u64 = 64 << 20;
    /// Where the heap starts.
    pub const HEAP: u64 = 8 << 20;

    /// Maps a file of [`LEN`](Self::LEN) bytes.
    pub(crate) fn map(file: &File) -> Result<Self> {
        let len = NonZeroUsize::new(Self::LEN as usize).context("no memory")?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: fresh address space, placed by the kernel. The file is this machine's own and keeps its
        // length.
        let start = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, file, 0) };
        let start = start.context("cannot map the guest's memory")?.cast();
        let heap = Heap { next: Self::HEAP, free: Vec::new(), live: BTreeMap::new() };
        Ok(Self { start, heap: Mutex::new(heap) })
    }

    /// The address in this process of `len` bytes at `phys`.
    ///
    /// # Panics
    /// When they are not RAM.
    fn at(&self, phys: u64, len: usize) -> *mut u8 {
        let end = phys.checked_add(len as u64);
        assert!(end.is_some_and(|end| end <= Self::LEN), "{len:#x} bytes at {phys:#x} are not RAM");
        // SAFETY: inside the mapping by the check.
        unsafe { self.start.as_ptr().add(phys as usize) }
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// When they are not RAM.
    pub fn read(&self, phys: u64, bytes: &mut [u8]) {
        let from = self.at(phys, bytes.len());
        // SAFETY: mapped, and never referenced by Rust. QEMU writes while it works on a command or a
        // transfer, and both are waited for.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// When they are not RAM.
    pub fn write(&self, phys: u64, bytes: &[u8]) {
        let to = self.at(phys, bytes.len());
        // SAFETY: as in `read`.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// `len` bytes at `phys`.
    ///
    /// # Panics
    /// When they are not RAM.
    pub fn bytes(&self, phys: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(phys, &mut bytes);
        bytes
    }

    /// Hands out zeroed memory.
    pub(crate) fn alloc(&self, len: usize, align: usize) -> Option<DmaMemory> {
        let mut heap = self.heap();
        let recycled = heap.free.iter().position(|block| (block.0, block.1) == (len, align));
        let phys = match recycled {
            Some(at) => heap.free.swap_remove(at).2,
            None => {
                let phys = heap.next.checked_next_multiple_of(align as u64)?;
                heap.next = phys.checked_add(len as u64).filter(|end| *end <= Self::LEN)?;
                phys
            }
        };
        heap.live.insert(phys, len);
        let to = self.at(phys, len);
        // SAFETY: inside the mapping, and nobody has it.
        unsafe { to.write_bytes(0, len) };
        Some(DmaMemory { phys: PhysAddr::new(phys), ptr: NonNull::new(to)?, len })
    }

    /// Takes memory back.
    ///
    /// # Panics
    /// When it was not handed out, or came back before.
    pub(crate) fn free(&self, memory: DmaMemory, align: usize) {
        let phys = memory.phys.get();
        let mut heap = self.heap();
        assert_eq!(heap.live.remove(&phys), Some(memory.len), "memory at {phys:#x} was given back wrongly");
        // SAFETY: inside the mapping, and its owner gave it up.
        unsafe { self.at(phys, memory.len).write_bytes(POISON, memory.len) };
        heap.free.push((memory.len, align, phys));
    }

    /// Blocks of the heap that are handed out.
    pub fn live_blocks(&self) -> usize {
        self.heap().live.len()
    }

    fn heap(&self) -> MutexGuard<'_, Heap> {
        self.heap.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; whoever holds an address in it holds this too.
        if let Err(error) = unsafe { munmap(self.start.cast(), Self::LEN as usize) } {
            eprintln!("cannot unmap the guest's memory: {error}");
        }
    }
}
