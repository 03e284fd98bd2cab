//! The ACPI VIOT: what a table that was accepted promises, and lookups against a second reading.
//!
//! The first byte says whether signature and length are put right, so that not every input fails on them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_iommu::topology::viot::{Endpoints, PciFunction, Viot};

fuzz_target!(|data: &[u8]| {
    let Some((mend, bytes)) = data.split_first() else { return };
    let mut table = bytes.to_vec();
    if mend & 1 != 0 && table.len() >= 8 {
        table[..4].copy_from_slice(b"VIOT");
        let len = table.len() as u32;
        table[4..8].copy_from_slice(&len.to_le_bytes());
    }
    match Viot::parse(&table) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(viot) => check(&viot, &table),
    }
});

fn le(table: &[u8], at: usize, len: usize) -> u64 {
    table[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn check(viot: &Viot<'_>, table: &[u8]) {
    let nodes = le(table, 36, 2) as usize;
    let (iommus, endpoints) = (viot.iommus().count(), viot.endpoints().count());
    // The shortest node of a known type has 16 bytes, of an unknown one 4.
    assert!(iommus + endpoints <= nodes.min((table.len() - 48) / 16), "a step that did not move on");
    for iommu in viot.iommus() {
        assert_eq!(viot.iommu(iommu.node), Some(iommu));
    }
    let mut functions =
        vec![PciFunction { segment: 0, bdf: 0 }, PciFunction { segment: u16::MAX, bdf: u16::MAX }];
    for endpoints in viot.endpoints() {
        match endpoints {
            Endpoints::PciRange { start, first, last, iommu } => {
                assert!(first.segment <= last.segment && first.bdf <= last.bdf, "inverted");
                assert!(viot.iommu(iommu).is_some());
                let span = u64::from(last.segment - first.segment) << 16 | u64::from(last.bdf - first.bdf);
                assert!(u64::from(start.get()) + span <= u64::from(u32::MAX), "numbers wrap");
                functions.extend([first, last]);
                functions.push(PciFunction { segment: last.segment, bdf: last.bdf.wrapping_add(1) });
                functions.push(PciFunction { segment: first.segment, bdf: first.bdf.wrapping_sub(1) });
            }
            Endpoints::Mmio { iommu, .. } => assert!(viot.iommu(iommu).is_some()),
        }
    }
    for function in functions.into_iter().take(64) {
        let found =
            viot.pci_endpoint(function).map(|(id, iommu)| (u64::from(id.get()), u64::from(iommu.node)));
        assert_eq!(found, expected(table, function), "{function}");
    }
}

/// The first range that has the function, read from the bytes of a table whose nodes are all inside.
fn expected(table: &[u8], function: PciFunction) -> Option<(u64, u64)> {
    let (segment, bdf) = (u64::from(function.segment), u64::from(function.bdf));
    let mut at = le(table, 38, 2) as usize;
    for _ in 0..le(table, 36, 2) {
        if table[at] == 1 {
            let (first_segment, last_segment) = (le(table, at + 8, 2), le(table, at + 10, 2));
            let (first_bdf, last_bdf) = (le(table, at + 12, 2), le(table, at + 14, 2));
            let inside =
                first_segment <= segment && segment <= last_segment && first_bdf <= bdf && bdf <= last_bdf;
            if inside {
                let id = le(table, at + 4, 4) + (segment - first_segment) * 0x1_0000 + (bdf - first_bdf);
                return Some((id, le(table, at + 16, 2)));
            }
        }
        at += le(table, at + 2, 2) as usize;
    }
    None
}
