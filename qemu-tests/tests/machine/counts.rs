//! How many requests, doorbells and register accesses an operation may take.

use qemu_tests::bench::Asked;

/// A row, and for each of its operations the MAPs, the UNMAPs and the kicks.
const EXPECTED: [(&str, [u64; 3]); 24] = [
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
    // As many as the ring has room for, and one more.
    ("sg128_scattered_map", [128, 0, 1]),
    ("sg129_scattered_map", [129, 0, 2]),
    ("sg129_scattered_unmap", [0, 1, 1]),
    ("coherent_4k", [1, 1, 2]),
    ("map_unmap_4k_pool", [0, 0, 0]),
    // What waits for a flush is mapped again, buffer or list, and nothing asks for the flush.
    ("map_unmap_4k_deferred", [0, 0, 0]),
    ("blk_4k_qd1_deferred", [0, 0, 0]),
    ("blk_4k_qd32_deferred", [0, 0, 0]),
    ("blk_128k_qd1_deferred", [0, 0, 0]),
    ("blk_4k_qd1_strict", [1, 1, 2]),
    ("blk_128k_qd1_strict", [32, 1, 2]),
    // The disk reaches a pool all the time.
    ("blk_4k_qd1_pool", [0, 0, 0]),
    ("blk_4k_qd32_pool", [0, 0, 0]),
    ("blk_128k_qd1_pool", [0, 0, 0]),
    ("raw_request", [0, 1, 1]),
    ("map_unmap_4k_strict_live_1k", [1, 1, 2]),
];

/// A row whose operations share requests: how many share them, and the MAPs, the UNMAPs and the kicks that they take.
const SHARED: [(&str, u64, [u64; 3]); 4] = [
    // One doorbell for buffers that have nothing in common.
    ("batch64_map_each", 64, [64, 0, 1]),
    ("batch64_unmap_each", 64, [0, 64, 1]),
    // What is deferred adjoins: a flush of all that a domain defers is one request.
    ("map_unmap_4k_deferred_other", 256, [256, 1, 257]),
    // Requests of the disk that are submitted together are mapped by one doorbell, and unmapped by one request.
    ("blk_4k_qd32_strict", 32, [32, 1, 2]),
];

/// A row of contexts, and for each of its operations the requests and the kicks of the device in software.
const CONTEXTS: [(&str, [u64; 2]); 4] = [
    ("context_map_unmap", [2, 2]),
    // A table is written without the device.
    ("context_table_map_page", [0, 0]),
    ("context_table_unmap_page", [0, 0]),
    ("context_invalidate_page", [1, 1]),
];

/// Rows of nesting: at any depth QEMU's device is asked what it is asked without.
const NESTED: [&str; 3] = ["nested_map_unmap_depth1", "nested_map_unmap_depth2", "nested_map_unmap_depth3"];

/// Says what is not as it must be of contexts and of nesting.
pub(crate) fn judge_contexts(asked: &[Asked]) -> Result<(), String> {
    let row =
        |name: &str| asked.iter().find(|asked| asked.name == name).ok_or_else(|| format!("no row {name}"));
    for (name, expected) in CONTEXTS {
        let row = row(name)?;
        let counts = [row.requests, row.counts.kicks];
        if row.operations == 0 || counts != expected.map(|count| count * row.operations) {
            return Err(format!(
                "{} operations of {name} took {counts:?} requests and kicks; each may take {expected:?}",
                row.operations
            ));
        }
    }
    for name in NESTED {
        let row = row(name)?;
        let counts = [row.counts.map, row.counts.unmap, row.counts.kicks, row.requests, row.accesses];
        if row.operations == 0 || counts != [1, 1, 2, 2, 2].map(|count| count * row.operations) {
            let operations = row.operations;
            return Err(format!(
                "{operations} operations of {name} took {counts:?} MAPs, UNMAPs, kicks, requests and accesses"
            ));
        }
    }
    Ok(())
}

/// Says what is not as it must be.
pub(crate) fn judge(asked: &[Asked]) -> Result<(), String> {
    let each = EXPECTED.map(|(name, expected)| (name, 1, expected));
    for (name, shared_by, expected) in each.into_iter().chain(SHARED) {
        let row = asked.iter().find(|asked| asked.name == name).ok_or_else(|| format!("no row {name}"))?;
        let counts = [row.counts.map, row.counts.unmap, row.counts.kicks];
        let times = row.operations / shared_by;
        if times == 0
            || !row.operations.is_multiple_of(shared_by)
            || counts != expected.map(|count| count * times)
        {
            return Err(format!(
                "{} operations of {name} took {counts:?} MAPs, UNMAPs and kicks; \
                 {shared_by} of them may take {expected:?}",
                row.operations
            ));
        }
        if row.requests != row.counts.map + row.counts.unmap {
            return Err(format!("{name} sent {} requests of any type", row.requests));
        }
    }
    // Four CPUs at once: none of their requests is lost, and somebody else may have rung for one.
    let four = asked.iter().find(|asked| asked.name == "smp4").ok_or("no row smp4")?;
    let counts = [four.counts.map, four.counts.unmap, four.requests];
    if counts != [1, 1, 2].map(|count| count * four.operations) || four.counts.kicks > 2 * four.operations {
        let kicks = four.counts.kicks;
        return Err(format!("smp4 took {counts:?} MAPs, UNMAPs and requests, and {kicks} kicks"));
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
