//! Page tables that a *device* walks, and never this CPU.
//!
//! A [`PageTable`] is written in one of the formats that IOMMUs know: x86-64 with four levels (the first stage of VT-d), Arm's
//! VMSAv8-64 stage 1 in its three granules, RISC-V's Sv39 and Sv48. A [`ContextTable`] is SMMUv3's table of context
//! descriptors, which finds a page table for each PASID.
//!
//! ```text
//!   map ----> entries that were not there: nothing to invalidate, unless the device caches what is not present
//!   unmap --> entries gone, huge ones split      stale ranges     device confirms INVALIDATE
//!             pages of empty tables retired --> begin_invalidation ------------------------> confirm: pages freed
//!                                                    '-- failed: abandon, they are stale again
//! ```
//! The driver keeps a copy of each entry and decides by that alone: the memory that the device sees is only written, and a
//! device that changes it confuses nobody but itself. What was unmapped cannot be mapped again before its invalidation was
//! confirmed, so that no two translations of one address are ever cached side by side; on Arm that is also what
//! break-before-make asks for when a block is split.
//!
//! All `unsafe` code is in `memory`.

mod arm;
mod error;
mod format;
mod map;
mod memory;
mod node;
mod options;
mod riscv;
mod smmu;
mod stale;
mod unmap;
mod x86;

pub use arm::ArmRegisters;
pub use error::{ContextTableError, TableError, TableMapError, TableUnmapError};
pub use format::{ArmGranule, TableFormat};
pub use memory::TableMemory;
pub use options::{NotPresent, TableOptions};
pub use smmu::{ContextDescriptors, ContextTable};
pub use stale::{Invalidation, Stale, StaleEntries};

use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::prot::Prot;
use alloc::vec::Vec;
use core::fmt;
use format::Shape;
use memory::TablePage;
use node::Node;
use stale::StaleList;

/// What a page table says about an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// The addresses of the page or block.
    pub range: IovaRange,
    /// Where it starts in memory.
    pub phys: PhysAddr,
    /// What it allows.
    pub prot: Prot,
}

/// A page table for a device, in memory from `M`.
///
/// Dropping it gives no memory back, since the device may still walk it: [`free`](Self::free) does.
pub struct PageTable<M: TableMemory> {
    memory: M,
    format: TableFormat,
    shape: Shape,
    not_present: NotPresent,
    root: Node,
    /// Pages of the tree, the root included.
    pages: usize,
    mapped_bytes: u64,
    /// What has to be invalidated, and is in no [`Invalidation`] yet.
    pending: StaleList,
    /// What is in an [`Invalidation`] that was neither confirmed nor abandoned.
    under_way: Vec<IovaRange>,
    /// Pages of tables that are gone, which the device may still walk.
    retired: Vec<TablePage>,
    /// Tables that take a block's place once its invalidation is confirmed: an address in them, and their level.
    unlinked: Vec<(u64, u32)>,
}

impl<M: TableMemory> PageTable<M> {
    /// An empty table. Allocates its root.
    ///
    /// # Errors
    /// [`TableError`], when the format cannot be as asked, or there is no memory.
    pub fn new(format: TableFormat, memory: M, options: TableOptions) -> Result<Self, TableError> {
        let shape = format.shape(&options)?;
        let page = TablePage::allocate(&memory, shape.page_len()).ok_or(TableError::NoMemory { pages: 1 })?;
        Ok(Self {
            memory,
            format,
            shape,
            not_present: options.not_present,
            root: Node::new(page),
            pages: 1,
            mapped_bytes: 0,
            pending: StaleList::default(),
            under_way: Vec::new(),
            retired: Vec::new(),
            unlinked: Vec::new(),
        })
    }

    /// The format.
    pub fn format(&self) -> TableFormat {
        self.format
    }

    /// Whether new mappings have to be invalidated.
    pub fn not_present(&self) -> NotPresent {
        self.not_present
    }

    /// Where the device begins to walk.
    pub fn root(&self) -> PhysAddr {
        self.root.page().phys()
    }

    /// The smallest page in bytes.
    pub fn granule(&self) -> u64 {
        self.shape.entry_len(0)
    }

    /// The addresses that the table translates. Of formats that extend a sign it is the lower half.
    pub fn input_range(&self) -> IovaRange {
        self.shape.input_range()
    }

    /// How many bytes are mapped.
    pub fn mapped_bytes(&self) -> u64 {
        self.mapped_bytes
    }

    /// Pages of memory that it has: those of the tree, and those that wait for an invalidation.
    pub fn pages(&self) -> usize {
        self.pages + self.retired.len()
    }

    /// What the registers of an Arm IOMMU, or its context descriptor, say about this table. `None` for other formats.
    pub fn arm_registers(&self) -> Option<ArmRegisters> {
        match self.format {
            TableFormat::Arm { granule, input_bits } => {
                Some(ArmRegisters::new(granule, input_bits, self.shape.output_bits, self.root()))
            }
            TableFormat::X86_64 | TableFormat::Sv39 | TableFormat::Sv48 => None,
        }
    }

    /// What is mapped at an address.
    pub fn lookup(&self, iova: Iova) -> Option<TableEntry> {
        let mut node = &self.root;
        // From the root down to the leaves.
        for level in (0..self.shape.levels).rev() {
            let index = self.shape.index(level, iova.get());
            if let Some(child) = node.child(index) {
                node = child;
                continue;
            }
            let entry = node.entry(index);
            if entry == 0 || !self.input_range().contains(IovaRange::from_len(iova, 1)?) {
                return None;
            }
            let start = Iova::new(iova.get() & !(self.shape.entry_len(level) - 1));
            return Some(TableEntry {
                range: IovaRange::from_len(start, self.shape.entry_len(level))?,
                phys: PhysAddr::new(self.format.leaf_phys(entry)),
                prot: self.format.leaf_prot(entry),
            });
        }
        None
    }

    /// What has to be invalidated before it counts as gone, in the order in which it became stale.
    pub fn stale(&self) -> &[Stale] {
        self.pending.as_slice()
    }

    /// Takes all that is stale out, to be invalidated. Its writes to the table come before whatever publishes the requests,
    /// which is a store with release order.
    #[must_use = "what is stale stays so until the invalidation is confirmed"]
    pub fn begin_invalidation(&mut self) -> Invalidation {
        let stale = self.pending.take();
        self.under_way.extend(stale.iter().map(|stale| stale.range));
        Invalidation {
            stale,
            pages: core::mem::take(&mut self.retired),
            unlinked: core::mem::take(&mut self.unlinked),
        }
    }

    /// Ends an invalidation that succeeded: frees the pages of tables that are gone, and puts tables in the place of blocks
    /// that were split.
    ///
    /// # Safety
    /// `invalidation` is this table's, and the device confirmed the invalidation of every range in it after
    /// [`begin_invalidation`](Self::begin_invalidation) returned it; or no device walks the table.
    pub unsafe fn confirm(&mut self, invalidation: Invalidation) {
        self.forget(&invalidation);
        for (iova, level) in invalidation.unlinked {
            self.link(iova, level);
        }
        for page in invalidation.pages {
            // SAFETY: the page left the tree before the invalidation began, and the caller's word is that no walk of
            // the device, nor anything that it cached, leads there any more.
            unsafe { page.free(&self.memory) };
        }
    }

    /// Ends an invalidation that failed, or of which it is not known whether it succeeded: all of it is stale again.
    pub fn abandon(&mut self, mut invalidation: Invalidation) {
        self.forget(&invalidation);
        for stale in invalidation.stale.drain(..) {
            self.pending.push(stale);
        }
        self.retired.append(&mut invalidation.pages);
        self.unlinked.append(&mut invalidation.unlinked);
    }

    /// Gives all memory of the table back.
    ///
    /// # Safety
    /// No device walks the table any more, and nothing that any device cached of it is left.
    pub unsafe fn free(self) {
        let Self { memory, root, retired, .. } = self;
        let mut pages = retired;
        root.into_pages(&mut pages);
        for page in pages {
            // SAFETY: the caller's promise.
            unsafe { page.free(&memory) };
        }
    }

    fn forget(&mut self, invalidation: &Invalidation) {
        for stale in &invalidation.stale {
            if let Some(at) = self.under_way.iter().position(|range| *range == stale.range) {
                self.under_way.swap_remove(at);
            }
        }
    }

    /// Makes the table at `level` over an address visible to the device, if it is still there.
    fn link(&mut self, iova: u64, level: u32) {
        let mut node = &mut self.root;
        for parent in (level + 1..self.shape.levels).rev() {
            let index = self.shape.index(parent, iova);
            if parent == level + 1 {
                node.show(index);
                return;
            }
            match node.child_mut(index) {
                Some(child) => node = child,
                None => return,
            }
        }
    }

    /// A stale range that meets this one.
    fn stale_in(&self, range: IovaRange) -> Option<IovaRange> {
        let pending = self.pending.as_slice().iter().map(|stale| stale.range);
        pending.chain(self.under_way.iter().copied()).find(|stale| stale.overlaps(range))
    }

    fn allocate(&self, pages: usize) -> Option<Vec<TablePage>> {
        let mut all = Vec::with_capacity(pages);
        for _ in 0..pages {
            match TablePage::allocate(&self.memory, self.shape.page_len()) {
                Some(page) => all.push(page),
                None => {
                    for page in all {
                        // SAFETY: no device ever saw it.
                        unsafe { page.free(&self.memory) };
                    }
                    return None;
                }
            }
        }
        Some(all)
    }
}

impl<M: TableMemory> fmt::Debug for PageTable<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable")
            .field("format", &self.format)
            .field("root", &self.root())
            .field("mapped_bytes", &self.mapped_bytes)
            .finish_non_exhaustive()
    }
}
