//! Walks of tables that were written by hand, bit by bit from the architectures' texts.

use virtio_iommu_model::walk::{ArmTable, Cache, DescriptorTable, Table, WalkFault};
use virtio_iommu_model::{AccessKind, GuestMemory, VecMemory};

use AccessKind::{Read, Write};

const BASE: u64 = 0x10_0000;

/// Memory with these words.
fn memory(words: &[(u64, u64)]) -> VecMemory {
    let mut mem = VecMemory::new(BASE, 0x10_0000);
    for (at, word) in words {
        mem.write(*at, &word.to_le_bytes()).unwrap();
    }
    mem
}

#[test]
fn x86_pages_and_large_pages() {
    // PML4[0] -> 0x101000; PDPT[1] is 1 GiB at 0x8000_0000; PDPT[0] -> 0x102000; PD[1] is 2 MiB, read-only; PD[0] -> PT.
    let mem = memory(&[
        (0x10_0000, 0x10_1007),
        (0x10_1008, 0x8000_0087),
        (0x10_1000, 0x10_2007),
        (0x10_2008, 0x0060_0085),
        (0x10_2000, 0x10_3007),
        (0x10_3008, 0x8000_0000_0000_5067),
        (0x10_3010, 0x0000_6003),
        (0x10_2010, 0x0060_1087),
        (0x10_2018, 0x0060_2087),
    ]);
    let table = Table::X86 { root: 0x10_0000 };
    let at = |address, kind| table.walk(&mem, address, kind).map(|page| page.phys_of(address));
    assert_eq!(at(0x1234, Write), Ok(0x5234));
    assert_eq!(at(0x20_0008, Read), Ok(0x60_0008));
    assert_eq!(at(0x20_0008, Write), Err(WalkFault::Permission));
    assert_eq!(at(0x4123_4567, Write), Ok(0x8123_4567));
    // A supervisor's page, and what is not there.
    assert_eq!(at(0x2000, Read), Err(WalkFault::Permission));
    assert_eq!(at(0x3000, Read), Err(WalkFault::NotPresent { level: 0 }));
    assert_eq!(at(0x80_0000_0000, Read), Err(WalkFault::NotPresent { level: 3 }));
    // Bit 12 of a large page is PAT; the next ones are reserved.
    assert_eq!(at(0x40_0000, Read), Ok(0x60_0000));
    assert_eq!(at(0x60_0000, Read), Err(WalkFault::Reserved { value: 0x60_2087 }));
    assert_eq!(at(0x8000_0000_0000, Read), Err(WalkFault::Address));
}

#[test]
fn riscv_pages_and_superpages() {
    let pointer = |page: u64| page << 10 | 1;
    let leaf = |page: u64, bits: u64| page << 10 | bits;
    let mem = memory(&[
        (0x10_0000, pointer(0x101)),
        (0x10_0008, leaf(0x4_0000, 0xd7)),
        (0x10_0010, leaf(0x4_0001, 0xd7)),
        (0x10_0018, pointer(0x101) | 0x10),
        (0x10_1000, pointer(0x102)),
        (0x10_2000, leaf(0x5, 0x53)),
        (0x10_2008, leaf(0x6, 0x57)),
        (0x10_2010, leaf(0x6, 0xd5)),
        (0x10_2018, pointer(0x103)),
    ]);
    let table = Table::Riscv { mode: 8, root_page: 0x100 };
    let at = |address, kind| table.walk(&mem, address, kind).map(|page| page.phys_of(address));
    assert_eq!(at(0x8, Read), Ok(0x5008));
    assert_eq!(at(0x8, Write), Err(WalkFault::Permission));
    assert_eq!(at(0x4000_0000, Write), Ok(0x4000_0000));
    // Writable without D; a superpage that is not aligned; U in a pointer; W without R; a pointer at the last level.
    assert_eq!(at(0x1000, Write), Err(WalkFault::Permission));
    for bad in [0x8000_0000, 0xc000_0000, 0x2000, 0x3000] {
        assert!(matches!(at(bad, Read), Err(WalkFault::Reserved { .. })), "{bad:#x}");
    }
    assert_eq!(at(1 << 38, Read), Err(WalkFault::Address));
    assert_eq!(
        Table::Riscv { mode: 7, root_page: 0x100 }.walk(&mem, 0, Read),
        Err(WalkFault::Reserved { value: 7 })
    );
}

fn arm(t0sz: u8, tg0: u8) -> ArmTable {
    ArmTable { t0sz, tg0, ips: 5, epd0: false, epd1: true, hpd0: false, ttbr0: 0x11_0000, mair: 0x04ff }
}

#[test]
fn arm_pages_blocks_and_hierarchical_permissions() {
    // 4 KiB, 39 bits: level 1 at the root. Entry 1 is a block of 1 GiB, entry 2 a table whose writes are taken away.
    let mem = memory(&[
        (0x11_0000, 0x11_1003),
        (0x11_0008, 0x8000_0441),
        (0x11_0010, 0x4000_0000_0011_1003),
        (0x11_1000, 0x11_2003),
        (0x11_2000, 0x5443),
        (0x11_2008, 0x64c7),
        (0x11_2010, 0x7043),
        (0x11_2018, 0x8441),
    ]);
    let table = Table::Arm(arm(25, 0));
    let at = |address, kind| table.walk(&mem, address, kind).map(|page| page.phys_of(address));
    assert_eq!(at(0x10, Write), Ok(0x5010));
    assert_eq!(at(0x1000, Write), Err(WalkFault::Permission));
    let registers = table.walk(&mem, 0x1000, Read).unwrap();
    assert_eq!((registers.phys, registers.device), (0x6000, true));
    // No access flag; a block where only pages can be.
    assert_eq!(at(0x2000, Read), Err(WalkFault::Permission));
    assert_eq!(at(0x3000, Read), Err(WalkFault::NotPresent { level: 0 }));
    assert_eq!(at(0x4000_0123, Write), Ok(0x8000_0123));
    assert_eq!((at(0x8000_0000, Read), at(0x8000_0000, Write)), (Ok(0x5000), Err(WalkFault::Permission)));
    assert_eq!(at(1 << 39, Read), Err(WalkFault::Address));
    let hpd = Table::Arm(ArmTable { hpd0: true, ..arm(25, 0) });
    assert!(hpd.walk(&mem, 0x8000_0000, Write).is_ok());
    let off = Table::Arm(ArmTable { epd0: true, ..arm(25, 0) });
    assert_eq!(off.walk(&mem, 0, Read), Err(WalkFault::Address));
    let small = Table::Arm(ArmTable { ips: 0, ..arm(25, 0) });
    assert_eq!(small.walk(&mem, 0x4000_0123, Read).map(|page| page.phys), Ok(0x8000_0000));
}

#[test]
fn registers_and_context_descriptors_say_the_same() {
    // T0SZ 25, IRGN0 and ORGN0 1, SH0 3, TG0 2 (16 KiB), EPD1, IPS 5, HPD0.
    let tcr = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 2 << 14 | 1 << 23 | 5 << 32 | 1 << 41;
    let from_registers = ArmTable::from_registers(tcr, 0x11_0000, 0x04ff);
    assert_eq!(from_registers, ArmTable { hpd0: true, ..arm(25, 2) });
    // The same as a descriptor: TG0 in bits 7:6, EPD1 in 30, V 31, AA64 41, R 45, A 46, ASET 47, ASID 9. HAD0 in word 1.
    let first =
        25 | 2 << 6 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 7 << 45 | 9 << 48;
    let mem =
        memory(&[(0x10_4140, first), (0x10_4148, 0x11_0002), (0x10_4158, 0x04ff), (0x10_0008, 0x10_4001)]);
    // Substream 69 is number 5 in the second table of 64.
    let two = DescriptorTable { s1fmt: 1, s1cdmax: 8, s1contextptr: 0x10_0000 };
    let found = two.find(&mem, 69).unwrap();
    assert_eq!((found.table, found.asid), (from_registers, 9));
    assert_eq!(two.find(&mem, 5), Err(WalkFault::NotPresent { level: 1 }));
    assert_eq!(two.find(&mem, 70), Err(WalkFault::NotPresent { level: 0 }));
    assert_eq!(two.find(&mem, 256), Err(WalkFault::Address));
    let linear = DescriptorTable { s1fmt: 0, s1cdmax: 5, s1contextptr: 0x10_4000 };
    assert_eq!(linear.find(&mem, 5).map(|found| found.asid), Ok(9));
}

#[test]
fn a_cache_is_as_stale_as_it_is_left() {
    let mut mem = memory(&[
        (0x10_0000, 0x10_1007),
        (0x10_1000, 0x10_2007),
        (0x10_2000, 0x10_3007),
        (0x10_3000, 0x5067),
        (0x10_3008, 0x6067),
        (0x10_4008, 0x9067),
    ]);
    let table = Table::X86 { root: 0x10_0000 };
    let mut cache = Cache::default();
    let find =
        |cache: &mut Cache, mem: &VecMemory, at| cache.translate(&table, mem, at, Read).map(|page| page.phys);
    assert_eq!(find(&mut cache, &mem, 0), Ok(0x5000));
    mem.write(0x10_3000, &0x7067u64.to_le_bytes()).unwrap();
    assert_eq!(find(&mut cache, &mem, 0), Ok(0x5000));
    cache.invalidate(0x1000, 0xffff, false);
    assert_eq!(find(&mut cache, &mem, 0), Ok(0x5000));
    cache.invalidate(0, 0xfff, true);
    assert_eq!(find(&mut cache, &mem, 0), Ok(0x7000));
    // Another table in place of the lowest: only leaf entries are forgotten, so that the old one is walked.
    mem.write(0x10_2000, &0x10_4007u64.to_le_bytes()).unwrap();
    cache.invalidate(0, u64::MAX, true);
    assert_eq!(find(&mut cache, &mem, 0x1000), Ok(0x6000));
    cache.invalidate(0x1000, 0x1fff, false);
    assert_eq!(find(&mut cache, &mem, 0x1000), Ok(0x9000));
    assert_eq!(cache.len(), 1);
    cache.clear();
    assert!(cache.is_empty());
}

#[test]
fn tables_outside_of_memory_fault_and_nothing_overflows() {
    let mem = memory(&[(0x10_0000, 0xf_ffff_ffff_f007)]);
    for root in [0, 0xf_ffff_ffff_f000, 0x10_0000] {
        let walked = Table::X86 { root }.walk(&mem, 0x7fff_ffff_ffff, Read);
        assert!(walked.is_err());
    }
    assert!(matches!(Table::X86 { root: 0x10_0000 }.walk(&mem, 0, Read), Err(WalkFault::Memory(_))));
    for pointer in [u64::MAX, u64::MAX - 63, 0] {
        let table = DescriptorTable { s1fmt: 2, s1cdmax: 255, s1contextptr: pointer };
        assert!(table.find(&mem, u32::MAX).is_err());
    }
    for t0sz in 0..=255 {
        for tg0 in 0..=3 {
            assert!(
                Table::Arm(ArmTable { ttbr0: u64::MAX, ..arm(t0sz, tg0) })
                    .walk(&mem, u64::MAX, Read)
                    .is_err()
            );
        }
    }
}
