//! SMMUv3's context descriptors, found by the model's own look-up.

use virtio_iommu::contexts::table::{
    ArmGranule, ContextDescriptors, ContextTable, ContextTableError, TableFormat,
};
use virtio_iommu_model::AccessKind::Write;
use virtio_iommu_model::walk::{DescriptorTable, Table, WalkFault};

use super::{Tables, map};
use crate::support::RW;

const ARRANGEMENTS: [(ContextDescriptors, u32); 5] = [
    (ContextDescriptors::Linear, 0),
    (ContextDescriptors::Linear, 8),
    (ContextDescriptors::TwoLevel4K, 20),
    (ContextDescriptors::TwoLevel64K, 20),
    (ContextDescriptors::TwoLevel64K, 4),
];

fn for_walker(table: &ContextTable<Tables>) -> DescriptorTable {
    DescriptorTable {
        s1fmt: table.arrangement().s1fmt(),
        s1cdmax: table.pasid_bits() as u8,
        s1contextptr: table.root().get(),
    }
}

#[test]
fn each_pasid_has_its_own_table_in_every_granule() {
    for (arrangement, bits) in ARRANGEMENTS {
        let memory = Tables::new();
        let mut contexts = ContextTable::new(arrangement, bits, memory.clone()).unwrap();
        let granules = [ArmGranule::K4, ArmGranule::K16, ArmGranule::K64];
        let last = (1u32 << bits) - 1;
        let mut tables = Vec::new();
        for (number, (pasid, granule)) in [0, last / 2, last].into_iter().zip(granules).enumerate() {
            if contexts.contains(pasid) {
                continue;
            }
            let mut table = memory.table(TableFormat::Arm { granule, input_bits: 40 });
            let phys = 0x100_0000 * (number as u64 + 1);
            map(&mut table, (0x1_0000, phys, 0x1_0000), RW).unwrap();
            contexts.set(pasid, table.arm_registers().unwrap(), 7 + number as u16).unwrap();
            tables.push((pasid, table, phys, 7 + number as u16));
        }
        for (pasid, _, phys, asid) in &tables {
            let found = for_walker(&contexts).find(&memory.ram, *pasid).unwrap();
            assert_eq!(found.asid, *asid);
            let page = Table::Arm(found.table).walk(&memory.ram, 0x1_0008, Write).unwrap();
            assert_eq!(page.phys_of(0x1_0008), phys + 8, "{arrangement:?}, PASID {pasid:#x}");
        }
        assert_eq!(for_walker(&contexts).find(&memory.ram, last + 1), Err(WalkFault::Address));
        for (pasid, table, ..) in tables {
            contexts.clear(pasid).unwrap();
            let gone = for_walker(&contexts).find(&memory.ram, pasid);
            assert!(matches!(gone, Err(WalkFault::NotPresent { level: 0 })), "{gone:?}");
            assert_eq!(contexts.clear(pasid), Err(ContextTableError::Absent { pasid }));
            // SAFETY: nobody walks it.
            unsafe { table.free() };
        }
        // SAFETY: as above.
        unsafe { contexts.free() };
        assert_eq!(memory.out(), 0);
    }
}

#[test]
fn what_cannot_be_is_named() {
    let memory = Tables::new();
    let too_many = ContextTable::new(ContextDescriptors::Linear, 11, memory.clone());
    assert_eq!(too_many.err(), Some(ContextTableError::PasidBits { bits: 11, limit: 10 }));
    let too_many = ContextTable::new(ContextDescriptors::TwoLevel4K, 21, memory.clone());
    assert_eq!(too_many.err(), Some(ContextTableError::PasidBits { bits: 21, limit: 20 }));

    let table = memory.table(TableFormat::Arm { granule: ArmGranule::K4, input_bits: 48 });
    let registers = table.arm_registers().unwrap();
    let mut contexts = ContextTable::new(ContextDescriptors::TwoLevel4K, 8, memory.clone()).unwrap();
    let outside = ContextTableError::OutsideTable { pasid: 256, bits: 8 };
    assert_eq!(contexts.set(256, registers, 1), Err(outside));
    assert_eq!(contexts.clear(256), Err(outside));
    contexts.set(70, registers, 1).unwrap();
    assert_eq!(contexts.set(70, registers, 2), Err(ContextTableError::Present { pasid: 70 }));
    memory.limit(0);
    assert_eq!(contexts.set(200, registers, 1), Err(ContextTableError::NoMemory { len: 4096 }));
    assert!(!contexts.contains(200));
    // In the same second-level table as 70.
    contexts.set(71, registers, 1).unwrap();
    let nothing = for_walker(&contexts).find(&memory.ram, 200);
    assert!(matches!(nothing, Err(WalkFault::NotPresent { level: 1 })), "{nothing:?}");
}
