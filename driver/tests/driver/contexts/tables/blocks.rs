//! Blocks, where they can be; splitting them; and what is stale after each change, exactly.

use virtio_iommu::contexts::table::{
    ArmGranule, NotPresent, PageTable, Stale, StaleEntries, TableFormat, TableMapError, TableOptions,
};
use virtio_iommu::{Iova, Prot};
use virtio_iommu_model::AccessKind::{Read, Write};
use virtio_iommu_model::walk::{Cache, WalkFault};

use super::{FORMATS, Tables, confirm, for_walker, map, range};

const RW: Prot = Prot::READ.union(Prot::WRITE);
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn stale(start: u64, len: u64, entries: StaleEntries) -> Stale {
    Stale { range: range(start, len), entries }
}

#[test]
fn the_largest_block_is_one_entry() {
    let arm = |granule| TableFormat::Arm { granule, input_bits: 48 };
    // Format, block, pages of the table from the root to the block.
    let all = [
        (TableFormat::X86_64, GIB, 2),
        (TableFormat::Sv39, GIB, 1),
        (TableFormat::Sv48, 512 * GIB, 1),
        (arm(ArmGranule::K4), GIB, 2),
        (arm(ArmGranule::K16), 32 * MIB, 3),
        (arm(ArmGranule::K64), 512 * MIB, 2),
    ];
    for (format, block, pages) in all {
        let memory = Tables::new();
        let mut table = memory.table(format);
        map(&mut table, (block, 8 * block, block), RW).unwrap();
        assert_eq!((table.pages(), memory.out()), (pages, pages), "{format:?}");
        let found = for_walker(&table).walk(&memory.ram, block + 5, Write).unwrap();
        assert_eq!((found.first, found.last, found.phys), (block, 2 * block - 1, 8 * block), "{format:?}");
        // Memory that is aligned to less takes smaller ones.
        let granule = table.granule();
        map(&mut table, (4 * block, granule, 8 * granule), RW).unwrap();
        let found = for_walker(&table).walk(&memory.ram, 4 * block, Read).unwrap();
        assert_eq!(found.last - found.first + 1, granule, "{format:?}");
        // SAFETY: nobody walks it any more.
        unsafe { table.free() };
        assert_eq!(memory.out(), 0);
    }
}

#[test]
fn blocks_are_no_larger_than_was_allowed() {
    let memory = Tables::new();
    let options = TableOptions { largest_leaf: 2 * MIB, ..TableOptions::default() };
    let mut table = PageTable::new(TableFormat::X86_64, memory.clone(), options).unwrap();
    map(&mut table, (0, 0, GIB), RW).unwrap();
    let found = table.lookup(Iova::new(0x1234)).unwrap();
    assert_eq!(found.range, range(0, 2 * MIB));
    assert_eq!(table.pages(), 3);
}

#[test]
fn a_block_is_split_around_a_hole_and_only_it_is_stale() {
    for format in FORMATS {
        let memory = Tables::new();
        let mut table = memory.table(format);
        let granule = table.granule();
        let block = granule * (granule / 8);
        map(&mut table, (block, 4 * block, block), RW).unwrap();
        let hole = block + 3 * granule;
        assert_eq!(table.unmap(range(hole, granule)), Ok(granule));
        assert_eq!(table.stale(), [stale(block, block, StaleEntries::LeafOnly)], "{format:?}");
        assert_eq!(table.lookup(Iova::new(hole)), None);
        let walk = |at| for_walker(&table).walk(&memory.ram, at, Write).map(|page| page.phys_of(at));
        // Break before make: on Arm all of the block faults until the caches know that it is gone.
        let arm = matches!(format, TableFormat::Arm { .. });
        let beside = walk(hole - 1);
        assert_eq!(beside.is_err(), arm, "{format:?}");
        assert!(matches!(walk(hole), Err(WalkFault::NotPresent { .. })));
        confirm(&mut table);
        let walk = |at| for_walker(&table).walk(&memory.ram, at, Write).map(|page| page.phys_of(at));
        assert_eq!(walk(hole - 1), Ok(4 * block + 3 * granule - 1), "{format:?}");
        assert_eq!(walk(hole + granule), Ok(4 * block + 4 * granule));
        assert!(matches!(walk(hole), Err(WalkFault::NotPresent { .. })));
    }
}

#[test]
fn a_table_that_is_left_empty_takes_its_way_along_and_its_page_waits() {
    let memory = Tables::new();
    let mut table = memory.table(TableFormat::X86_64);
    map(&mut table, (0x5000, 0x10_0000, 0x2000), RW).unwrap();
    map(&mut table, (4 * MIB, 0x20_0000, 0x1000), RW).unwrap();
    let mut cache = Cache::default();
    let walker = for_walker(&table);
    cache.translate(&walker, &memory.ram, 0x5000, Read).unwrap();
    // One page of two: the leaf alone.
    table.unmap(range(0x5000, 0x1000)).unwrap();
    assert_eq!(table.stale(), [stale(0x5000, 0x1000, StaleEntries::LeafOnly)]);
    // The other: nothing is left in the 2 MiB.
    table.unmap(range(0x6000, 0x1000)).unwrap();
    assert_eq!(table.stale(), [stale(0, 2 * MIB, StaleEntries::AllLevels)]);
    assert_eq!(memory.out(), 5, "the page is not free before the invalidation");
    // All over the 2 MiB the device may still walk the old page: nothing is mapped there now.
    let refused = map(&mut table, (0x8000, 0, 0x1000), RW);
    assert_eq!(refused, Err(TableMapError::Stale { range: range(0, 2 * MIB) }));
    confirm(&mut table);
    assert_eq!(memory.out(), 4);
    map(&mut table, (0x8000, 0x30_0000, 0x1000), RW).unwrap();
    // A device that was never told still finds the old translation, and walks through a page that is not a table any more.
    assert!(cache.translate(&walker, &memory.ram, 0x5000, Read).is_ok());
    assert!(matches!(
        cache.translate(&walker, &memory.ram, 0x8000, Read),
        Err(WalkFault::Memory(_) | WalkFault::Reserved { .. })
    ));
    memory.ram.take_strays();
}

#[test]
fn an_invalidation_that_failed_is_stale_again() {
    let memory = Tables::new();
    let mut table = memory.table(TableFormat::Arm { granule: ArmGranule::K4, input_bits: 39 });
    map(&mut table, (2 * MIB, 0, 2 * MIB), RW).unwrap();
    table.unmap(range(2 * MIB, MIB)).unwrap();
    let invalidation = table.begin_invalidation();
    assert!(table.stale().is_empty());
    assert!(matches!(map(&mut table, (2 * MIB, 0, 0x1000), RW), Err(TableMapError::Stale { .. })));
    table.abandon(invalidation);
    assert_eq!(table.stale(), [stale(2 * MIB, 2 * MIB, StaleEntries::LeafOnly)]);
    let walk = |table: &PageTable<Tables>| for_walker(table).walk(&memory.ram, 3 * MIB, Read);
    assert!(walk(&table).is_err());
    confirm(&mut table);
    assert_eq!(walk(&table).map(|page| page.phys), Ok(MIB));
    map(&mut table, (2 * MIB, 0, 0x1000), RW).unwrap();
}

#[test]
fn where_absence_is_cached_new_mappings_are_stale() {
    let memory = Tables::new();
    let options = TableOptions { not_present: NotPresent::MayBeCached, ..TableOptions::default() };
    let mut table = PageTable::new(TableFormat::X86_64, memory, options).unwrap();
    map(&mut table, (0x1000, 0, 0x2000), Prot::READ).unwrap();
    assert_eq!(table.stale(), [stale(0x1000, 0x2000, StaleEntries::AllLevels)]);
}

#[test]
fn registers_are_marked_as_such_where_the_format_can() {
    for format in FORMATS {
        let memory = Tables::new();
        let mut table = memory.table(format);
        let granule = table.granule();
        map(&mut table, (granule, granule, granule), RW | Prot::MMIO).unwrap();
        let found = for_walker(&table).walk(&memory.ram, granule, Write).unwrap();
        let riscv = matches!(format, TableFormat::Sv39 | TableFormat::Sv48);
        assert_eq!(found.device, !riscv, "{format:?}");
    }
}
