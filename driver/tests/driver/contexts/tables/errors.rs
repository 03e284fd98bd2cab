//! What tables refuse, and that nothing changes then.

use virtio_iommu::contexts::table::{
    ArmGranule, PageTable, TableError, TableFormat, TableMapError, TableOptions, TableUnmapError,
};
use virtio_iommu::{Iova, PhysAddr, Prot};

use super::{FORMATS, Tables, map, range};

const RW: Prot = Prot::READ.union(Prot::WRITE);

#[test]
fn what_cannot_be_mapped_is_named() {
    for format in FORMATS {
        let memory = Tables::new();
        let mut table = memory.table(format);
        let granule = table.granule();
        let input = table.input_range();
        let top = input.last().get() + 1;
        let misaligned = |value| Err(TableMapError::Misaligned { value, granule });
        assert_eq!(map(&mut table, (8, 0, granule), RW), misaligned(8));
        assert_eq!(map(&mut table, (0, 8, granule), RW), misaligned(8));
        assert_eq!(map(&mut table, (0, 0, granule + 8), RW), misaligned(granule + 8));
        assert_eq!(map(&mut table, (0, 0, 0), RW), Err(TableMapError::Empty));
        for (iova, len) in [(top, granule), (top - granule, 2 * granule), (!(granule - 1), granule)] {
            let outside = TableMapError::OutsideInput { iova: Iova::new(iova), len, input };
            assert_eq!(map(&mut table, (iova, 0, len), RW), Err(outside));
        }
        for phys in [1 << 56, !(granule - 1)] {
            let refused = map(&mut table, (0, phys, granule), RW);
            assert!(matches!(refused, Err(TableMapError::OutsideOutput { .. })), "{refused:?}");
        }
        for prot in [Prot::WRITE, Prot::empty(), Prot::MMIO, Prot::from_bits_retain(9)] {
            assert_eq!(map(&mut table, (0, 0, granule), prot), Err(TableMapError::Prot { prot }));
        }
        map(&mut table, (2 * granule, 0, granule), RW).unwrap();
        let mapped = TableMapError::Mapped { iova: Iova::new(2 * granule) };
        assert_eq!(map(&mut table, (0, 0, 4 * granule), RW), Err(mapped));
        assert_eq!(table.mapped_bytes(), granule);
        let unmapped = table.unmap(range(8, granule - 8));
        assert_eq!(unmapped, Err(TableUnmapError::Misaligned { value: 8, granule }));
        let unmapped = table.unmap(range(0, granule - 8));
        assert_eq!(unmapped, Err(TableUnmapError::Misaligned { value: granule - 9, granule }));
        let outside = range(top, granule);
        assert_eq!(table.unmap(outside), Err(TableUnmapError::OutsideInput { range: outside, input }));
        assert_eq!(table.unmap(range(0, top)), Ok(granule));
    }
}

#[test]
fn without_memory_nothing_changes() {
    for format in FORMATS {
        let memory = Tables::new();
        let mut table = memory.table(format);
        let granule = table.granule();
        let block = granule * (granule / 8);
        memory.limit(1);
        let refused = map(&mut table, (0, 0, granule), RW);
        let needed = match refused {
            Err(TableMapError::NoMemory { pages }) => pages,
            Ok(()) => 1,
            other => panic!("{other:?}"),
        };
        memory.limit(usize::MAX);
        if refused.is_err() {
            assert_eq!((table.pages(), memory.out(), table.mapped_bytes()), (1, 1, 0), "{format:?}");
            memory.limit(needed);
            map(&mut table, (0, 0, granule), RW).unwrap();
        }
        memory.limit(usize::MAX);
        map(&mut table, (block, 0, block), RW).unwrap();
        let (pages, bytes) = (table.pages(), table.mapped_bytes());
        memory.limit(0);
        assert_eq!(table.unmap(range(block, granule)), Err(TableUnmapError::NoMemory { pages: 1 }));
        assert_eq!((table.pages(), table.mapped_bytes()), (pages, bytes));
        assert!(table.stale().is_empty());
        // All of it takes none.
        assert_eq!(table.unmap(range(block, block)), Ok(block));
    }
}

#[test]
fn formats_that_cannot_be_are_refused() {
    let memory = Tables::new();
    for bits in [0, 24, 49, 255] {
        let format = TableFormat::Arm { granule: ArmGranule::K4, input_bits: bits };
        let refused = PageTable::new(format, memory.clone(), TableOptions::default());
        assert_eq!(refused.err(), Some(TableError::InputBits { bits }));
    }
    let options = TableOptions { output_bits: 11, ..TableOptions::default() };
    let refused = PageTable::new(TableFormat::Sv39, memory.clone(), options);
    assert_eq!(refused.err(), Some(TableError::OutputBits { bits: 11 }));
    memory.limit(0);
    let refused = PageTable::new(TableFormat::Sv39, memory, TableOptions::default());
    assert_eq!(refused.err(), Some(TableError::NoMemory { pages: 1 }));
}

#[test]
fn a_device_with_fewer_output_bits_has_less_memory() {
    let memory = Tables::new();
    let options = TableOptions { output_bits: 36, ..TableOptions::default() };
    let mut table = PageTable::new(TableFormat::X86_64, memory, options).unwrap();
    map(&mut table, (0, (1 << 36) - 0x1000, 0x1000), RW).unwrap();
    let beyond = TableMapError::OutsideOutput { phys: PhysAddr::new(1 << 36), len: 0x1000, bits: 36 };
    assert_eq!(map(&mut table, (0x1000, 1 << 36, 0x1000), RW), Err(beyond));
}

#[test]
fn messages_name_the_value() {
    let text = TableMapError::Misaligned { value: 8, granule: 0x4000 }.to_string();
    assert_eq!(text, "0x8 is not a multiple of the page of 0x4000 bytes");
    let text = TableMapError::Stale { range: range(0x1000, 0x1000) }.to_string();
    assert_eq!(text, "0x1000..=0x1fff was unmapped and not invalidated yet");
}
