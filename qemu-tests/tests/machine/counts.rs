//! How many requests, doorbells and register accesses an operation may take.

use qemu_tests::bench::Asked;

/// A row, and for each of its operations the MAPs, the UNMAPs and the kicks.
const EXPECTED: [(&str, [u64; 3]); 11] = [
    ("map_unmap_4k_strict", [1, 1, 2]),
    ("map_unmap_1m_strict", [1, 1, 2]),
    ("map_4k_strict", [1, 0, 1]),
    ("unmap_4k_strict", [0, 1, 1]),
    // One doorbell for a list that the ring has room for.
    ("sg64_scattered_map", [64, 0, 1]),
    // One request for all of it.
    ("sg64_scattered_unmap", [0, 1, 1]),
    ("sg64_contiguous_map", [1, 0, 1]),
    ("sg64_contiguous_unmap", [0, 1, 1]),
    ("coherent_4k", [1, 1, 2]),
    ("raw_request", [0, 1, 1]),
    ("map_unmap_4k_strict_live_1k", [1, 1, 2]),
];

/// Says what is not as it must be.
pub(crate) fn judge(asked: &[Asked]) -> Result<(), String> {
    for (name, expected) in EXPECTED {
        let row = asked.iter().find(|asked| asked.name == name).ok_or_else(|| format!("no row {name}"))?;
        let counts = [row.counts.map, row.counts.unmap, row.counts.kicks];
        if row.operations == 0 || counts != expected.map(|count| count * row.operations) {
            return Err(format!(
                "{} operations of {name} took {counts:?} MAPs, UNMAPs and kicks; each may take {expected:?}",
                row.operations
            ));
        }
        if row.requests != row.counts.map + row.counts.unmap {
            return Err(format!("{name} sent {} requests of any type", row.requests));
        }
    }
    let attach = asked.iter().find(|asked| asked.name == "attach_detach").ok_or("no row attach_detach")?;
    let counts = [attach.counts.attach, attach.counts.detach, attach.counts.kicks, attach.requests];
    if counts != [1, 1, 2, 2].map(|count| count * attach.operations) {
        return Err(format!("attach_detach took {counts:?} ATTACHs, DETACHs, kicks and requests"));
    }
    // The doorbell is the only register that an operation touches.
    let touched = asked.iter().find(|asked| asked.accesses != asked.counts.kicks);
    touched.map_or(Ok(()), |asked| {
        Err(format!("{} took {} accesses for {} kicks", asked.name, asked.accesses, asked.counts.kicks))
    })
}
