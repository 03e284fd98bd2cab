//! Guest memory: blocks of host memory, at the same addresses.
//!
//! Only what was handed out can be reached: an access outside of it, or to a block that went back, is refused and
//! noted. A block that went back is poisoned, and not used again while the memory exists, so that a late access has
//! nothing to hide in. The host gets all blocks back when the last handle goes, which the machine and its drivers have.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_iommu::{DmaMemory, PhysAddr};
use virtio_iommu_model::{GuestMemory, OutOfMemoryRange};

/// What a block that went back is filled with.
pub(crate) const POISON: u8 = 0xdb;

/// The guest's memory. Clones are handles to the same.
#[derive(Clone, Default)]
pub(crate) struct Ram(Arc<Mutex<Blocks>>);

#[derive(Default)]
struct Blocks {
    by_start: BTreeMap<u64, Block>,
    strays: Vec<OutOfMemoryRange>,
}

struct Block {
    len: usize,
    align: usize,
    live: bool,
}

fn layout(len: usize, align: usize) -> Layout {
    Layout::from_size_align(len.max(1), align.max(8)).unwrap()
}

impl Drop for Blocks {
    fn drop(&mut self) {
        for (start, block) in &self.by_start {
            let at = ptr::with_exposed_provenance_mut(*start as usize);
            // SAFETY: allocated with this layout and not freed before. Nobody is left who could ask for it to be
            // accessed: the machine is gone, and all drivers that it had.
            unsafe { dealloc(at, layout(block.len, block.align)) };
        }
    }
}

impl Ram {
    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Zeroed memory, whose address stays its own while there is a handle.
    pub(crate) fn alloc(&self, len: usize, align: usize) -> DmaMemory {
        // SAFETY: the size is not 0.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout(len, align)) }).unwrap();
        let start = ptr.as_ptr().expose_provenance() as u64;
        self.blocks().by_start.insert(start, Block { len, align, live: true });
        DmaMemory { phys: PhysAddr::new(start), ptr, len }
    }

    /// Takes a block back, exactly as it was handed out, and once.
    pub(crate) fn free(&self, memory: DmaMemory, align: usize) {
        let mut blocks = self.blocks();
        let block = blocks.by_start.get_mut(&memory.phys.get()).expect("memory that was never handed out");
        assert!(block.live, "memory went back twice: {memory:?}");
        assert_eq!((block.len, block.align), (memory.len, align), "memory went back in another shape");
        block.live = false;
        // SAFETY: a block of this length, which nobody uses any more.
        unsafe { ptr::write_bytes(memory.ptr.as_ptr(), POISON, memory.len) };
    }

    pub(crate) fn is_live(&self, phys: PhysAddr) -> bool {
        self.blocks().by_start.get(&phys.get()).is_some_and(|block| block.live)
    }

    /// Accesses that hit no live block, and forgets them.
    pub(crate) fn take_strays(&self) -> Vec<OutOfMemoryRange> {
        std::mem::take(&mut self.blocks().strays)
    }

    /// The host's pointer to a range that lies in one live block.
    fn find(&self, addr: u64, len: usize) -> Result<*mut u8, OutOfMemoryRange> {
        let mut blocks = self.blocks();
        let inside = blocks.by_start.range(..=addr).next_back().is_some_and(|(start, block)| {
            let offset = addr - start;
            block.live && offset <= block.len as u64 && len as u64 <= block.len as u64 - offset
        });
        if inside {
            return Ok(ptr::with_exposed_provenance_mut(addr as usize));
        }
        let stray = OutOfMemoryRange { addr, len_bytes: len as u64 };
        blocks.strays.push(stray);
        Err(stray)
    }
}

/// Whether an access has to be atomic: the indices of a ring are.
fn is_index(addr: u64, len: usize) -> bool {
    len == 2 && addr.is_multiple_of(2)
}

impl GuestMemory for Ram {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), OutOfMemoryRange> {
        let from = self.find(addr, buf.len())?;
        if is_index(addr, buf.len()) {
            // SAFETY: two aligned bytes in a live block.
            let value = unsafe { AtomicU16::from_ptr(from.cast()) }.load(Ordering::Acquire);
            buf.copy_from_slice(&value.to_ne_bytes());
        } else {
            // SAFETY: inside a live block; `buf` is the test's own.
            unsafe { ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
        }
        Ok(())
    }

    fn write(&mut self, addr: u64, data: &[u8]) -> Result<(), OutOfMemoryRange> {
        let to = self.find(addr, data.len())?;
        if is_index(addr, data.len()) {
            let value = u16::from_ne_bytes([data[0], data[1]]);
            // SAFETY: two aligned bytes in a live block.
            unsafe { AtomicU16::from_ptr(to.cast()) }.store(value, Ordering::Release);
        } else {
            // SAFETY: as in `read`.
            unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        }
        Ok(())
    }
}
