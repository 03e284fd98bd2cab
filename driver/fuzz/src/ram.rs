//! Memory that a device reaches by made-up physical addresses, the same in each run.
//!
//! A block that went back to the host is gone: the address sanitizer sees a driver that still uses it, and the device
//! cannot reach it. What never went back is freed with the whole memory.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_iommu::{DmaMemory, PhysAddr};
use virtio_iommu_model::{GuestMemory, OutOfMemoryRange};

/// Where the first block lies.
const BASE: u64 = 1 << 32;
/// The most bytes of a block.
pub const MAX_BLOCK: usize = 1 << 20;
/// The most bytes in all, so that an input does not take the host's memory.
const MAX_TOTAL: usize = 64 << 20;

/// Memory of one run. Clones are handles to the same.
#[derive(Clone, Default)]
pub struct Ram(Arc<Mutex<Blocks>>);

#[derive(Default)]
struct Blocks {
    /// In the order of their addresses, which are never used again.
    list: Vec<Block>,
    total: usize,
}

struct Block {
    memory: DmaMemory,
    layout: Layout,
    live: bool,
}

impl Drop for Blocks {
    fn drop(&mut self) {
        for block in self.list.iter().filter(|block| block.live) {
            // SAFETY: allocated with this layout, not freed since, and nobody has a handle any more.
            unsafe { dealloc(block.memory.ptr.as_ptr(), block.layout) };
        }
    }
}

impl Ram {
    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A zeroed block of `len` bytes, aligned to a power of two. `None` where it is too large.
    pub fn alloc(&self, len: usize, align: usize) -> Option<DmaMemory> {
        let mut blocks = self.blocks();
        if len == 0 || len > MAX_BLOCK || align > MAX_BLOCK || blocks.total + len > MAX_TOTAL {
            return None;
        }
        let layout = Layout::from_size_align(len, align.max(8)).ok()?;
        let end = blocks.list.last().map_or(BASE, |block| block.memory.phys.get() + block.memory.len as u64);
        // A gap, so that blocks never touch unless they are made to.
        let phys = PhysAddr::new((end + 1).next_multiple_of(layout.align() as u64));
        // SAFETY: the size is not 0.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        let memory = DmaMemory { phys, ptr, len };
        blocks.total += len;
        blocks.list.push(Block { memory, layout, live: true });
        Some(memory)
    }

    /// Takes a block back, exactly as it was handed out, and once.
    ///
    /// # Panics
    /// When it is not, or was back already.
    pub fn free(&self, memory: DmaMemory) {
        let mut blocks = self.blocks();
        let block = blocks.list.iter_mut().find(|block| block.memory.phys == memory.phys);
        let block = block.expect("memory went back that was never handed out");
        assert_eq!(block.memory, memory, "memory went back in another shape");
        assert!(block.live, "memory went back twice");
        block.live = false;
        // SAFETY: allocated with this layout, and not freed before.
        unsafe { dealloc(memory.ptr.as_ptr(), block.layout) };
        blocks.total -= memory.len;
    }

    /// The host's pointer to a range that lies in one live block.
    fn find(&self, addr: u64, len: usize) -> Option<*mut u8> {
        let blocks = self.blocks();
        let after = blocks.list.partition_point(|block| block.memory.phys.get() <= addr);
        let block = &blocks.list[after.checked_sub(1)?];
        let offset = usize::try_from(addr - block.memory.phys.get()).ok()?;
        let inside = block.live && offset <= block.memory.len && len <= block.memory.len - offset;
        // SAFETY: inside the block.
        inside.then(|| unsafe { block.memory.ptr.as_ptr().add(offset) })
    }

    /// Whether all bytes of a range are in one live block.
    pub fn is_live(&self, addr: u64, len: usize) -> bool {
        self.find(addr, len).is_some()
    }
}

impl GuestMemory for Ram {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), OutOfMemoryRange> {
        let len_bytes = buf.len() as u64;
        let from = self.find(addr, buf.len()).ok_or(OutOfMemoryRange { addr, len_bytes })?;
        // SAFETY: inside a live block; `buf` is somebody else's, and nothing else runs meanwhile.
        unsafe { ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    fn write(&mut self, addr: u64, data: &[u8]) -> Result<(), OutOfMemoryRange> {
        let len_bytes = data.len() as u64;
        let to = self.find(addr, data.len()).ok_or(OutOfMemoryRange { addr, len_bytes })?;
        // SAFETY: as in `read`.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        Ok(())
    }
}
