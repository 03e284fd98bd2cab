//! `iommu-map`, `iommu-map-mask` and `iommus`, against a second reading in wider numbers.
#![no_main]

use arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use virtio_iommu::topology::fdt::{FdtError, IommuMap, Iommus, Phandle};

fuzz_target!(|data: &[u8]| {
    let _ = check(Unstructured::new(data));
});

fn check(mut input: Unstructured<'_>) -> Result<()> {
    let mask = Option::<Vec<u8>>::arbitrary(&mut input)?;
    let rids = <[u32; 4]>::arbitrary(&mut input)?;
    let property = input.take_rest();
    iommu_map(property, mask.as_deref(), &rids);
    iommus(property);
    Ok(())
}

fn cells(bytes: &[u8]) -> Vec<u64> {
    let cell = |bytes: &[u8]| bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
    bytes.chunks_exact(4).map(cell).collect()
}

fn iommu_map(property: &[u8], mask: Option<&[u8]>, rids: &[u32]) {
    let wide_mask = match mask {
        None => Some(u64::from(u32::MAX)),
        Some(bytes) => cells(bytes).first().copied().filter(|_| bytes.len() == 4),
    };
    let wide = cells(property);
    let entries: Vec<&[u64]> = wide.chunks_exact(4).collect();
    let wraps = |base: u64, length: u64| base + length.max(1) - 1 > u64::from(u32::MAX);
    let good = wide_mask.is_some_and(|mask| {
        !property.is_empty()
            && property.len().is_multiple_of(16)
            && entries.iter().all(|entry| {
                entry[0] & !mask == 0 && !wraps(entry[0], entry[3]) && !wraps(entry[2], entry[3])
            })
    });
    let map = match IommuMap::new(property, mask) {
        Ok(map) => map,
        Err(error) => {
            assert!(!good && !error.to_string().is_empty(), "refused: {error}");
            return;
        }
    };
    assert!(good, "accepted {map:?}");
    assert_eq!(map.entries().count(), entries.len());
    let edges = entries.iter().take(16).flat_map(|entry| {
        let (first, end) = (entry[0], entry[0] + entry[3]);
        [first.wrapping_sub(1), first, end.wrapping_sub(1), end].map(|rid| rid as u32)
    });
    for rid in rids.iter().copied().chain(edges) {
        let masked = u64::from(rid) & wide_mask.unwrap_or(0);
        let entry = entries.iter().find(|entry| entry[0] <= masked && masked < entry[0] + entry[3]);
        let expected = entry.map(|entry| (entry[1], masked - entry[0] + entry[2]));
        let found = map.endpoint_of(rid).map(|(iommu, id)| (iommu.get().into(), id.get().into()));
        assert_eq!(found, expected, "{rid:#x}");
    }
}

/// Nodes of every small `#iommu-cells`, one that is not there, and one whose entries fit nowhere.
fn cells_of(iommu: Phandle) -> Option<u32> {
    match iommu.get() & 7 {
        count @ 0..6 => Some(count),
        6 => None,
        _ => Some(u32::MAX),
    }
}

fn iommus(property: &[u8]) {
    let found: Vec<_> = Iommus::new(property, cells_of).take(property.len() / 4 + 2).collect();
    assert!(found.len() <= property.len() / 4 + 1, "a step that did not move on");
    let mut rest = property;
    for (at, entry) in found.iter().enumerate() {
        let offset = property.len() - rest.len();
        match entry {
            Ok(specifier) => {
                assert_eq!(rest[..4], specifier.iommu.get().to_be_bytes());
                let len = 4 * cells_of(specifier.iommu).expect("known") as usize;
                assert_eq!(specifier.cells, &rest[4..4 + len]);
                let cell = cells(specifier.cells).first().copied().filter(|_| len == 4);
                assert_eq!(specifier.endpoint().map(|id| u64::from(id.get())), cell);
                rest = &rest[4 + len..];
            }
            Err(error) => {
                assert_eq!(at + 1, found.len(), "the walk went on after {error}");
                match *error {
                    FdtError::CutShort { offset: at, len, needed } => {
                        assert_eq!((at, len), (offset, rest.len()));
                        assert!(needed > len);
                    }
                    FdtError::UnknownIommu { offset: at, iommu } => {
                        assert_eq!((at, cells_of(iommu)), (offset, None));
                    }
                    other => panic!("{other}"),
                }
                return;
            }
        }
    }
    assert!(rest.is_empty() && !property.is_empty(), "ended too early");
}
