//! Page tables of every format, walked by the model's own walker, which shares nothing with the driver.

mod blocks;
mod descriptors;
mod errors;
mod random;
mod reference;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_iommu::contexts::table::{ArmGranule, PageTable, TableFormat, TableMemory, TableOptions};
use virtio_iommu::{DmaMemory, Iova, IovaRange, PhysAddr};
use virtio_iommu_model::walk::{ArmTable, Table};

use crate::support::Ram;

/// Every format.
pub(super) const FORMATS: [TableFormat; 9] = [
    TableFormat::X86_64,
    TableFormat::Sv39,
    TableFormat::Sv48,
    TableFormat::Arm { granule: ArmGranule::K4, input_bits: 48 },
    TableFormat::Arm { granule: ArmGranule::K4, input_bits: 39 },
    TableFormat::Arm { granule: ArmGranule::K16, input_bits: 48 },
    TableFormat::Arm { granule: ArmGranule::K16, input_bits: 40 },
    TableFormat::Arm { granule: ArmGranule::K64, input_bits: 48 },
    TableFormat::Arm { granule: ArmGranule::K64, input_bits: 42 },
];

/// Memory for tables, which knows how many blocks are out and can run short.
#[derive(Clone)]
pub(super) struct Tables {
    pub(super) ram: Ram,
    out: Arc<AtomicUsize>,
    left: Arc<AtomicUsize>,
}

impl Tables {
    pub(super) fn new() -> Self {
        Self { ram: Ram::default(), out: Arc::default(), left: Arc::new(AtomicUsize::new(usize::MAX)) }
    }

    /// Blocks that did not come back.
    pub(super) fn out(&self) -> usize {
        self.out.load(Ordering::Relaxed)
    }

    /// How many more there are.
    pub(super) fn limit(&self, left: usize) {
        self.left.store(left, Ordering::Relaxed);
    }

    pub(super) fn table(&self, format: TableFormat) -> PageTable<Self> {
        PageTable::new(format, self.clone(), TableOptions::default()).unwrap()
    }
}

// SAFETY: `Ram` gives out zeroed blocks of the host's heap, aligned as asked, each to one.
unsafe impl TableMemory for Tables {
    fn allocate(&self, len: usize, align: usize) -> Option<DmaMemory> {
        let left = self.left.load(Ordering::Relaxed);
        self.left.store(left.checked_sub(1)?, Ordering::Relaxed);
        self.out.fetch_add(1, Ordering::Relaxed);
        Some(self.ram.alloc(len, align))
    }

    unsafe fn free(&self, memory: DmaMemory, align: usize) {
        self.out.fetch_sub(1, Ordering::Relaxed);
        self.ram.free(memory, align);
    }
}

/// The table as the model's walker is told of it.
pub(super) fn for_walker<M: TableMemory>(table: &PageTable<M>) -> Table {
    let root = table.root().get();
    match table.format() {
        TableFormat::X86_64 => Table::X86 { root },
        TableFormat::Sv39 => Table::Riscv { mode: 8, root_page: root >> 12 },
        TableFormat::Sv48 => Table::Riscv { mode: 9, root_page: root >> 12 },
        TableFormat::Arm { .. } => {
            let registers = table.arm_registers().unwrap();
            Table::Arm(ArmTable::from_registers(registers.tcr, registers.ttbr0, registers.mair))
        }
    }
}

/// Confirms all that is stale, as if the device had answered.
pub(super) fn confirm<M: TableMemory>(table: &mut PageTable<M>) {
    let invalidation = table.begin_invalidation();
    // SAFETY: nothing but the test walks the table.
    unsafe { table.confirm(invalidation) };
}

/// Maps memory that is never touched.
pub(super) fn map<M: TableMemory>(
    table: &mut PageTable<M>,
    (iova, phys, len): (u64, u64, u64),
    prot: virtio_iommu::Prot,
) -> Result<(), virtio_iommu::contexts::table::TableMapError> {
    // SAFETY: walks of this table are numbers in a test.
    unsafe { table.map(Iova::new(iova), PhysAddr::new(phys), len, prot) }
}

pub(super) fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}
