//! From what is stale in a table to requests that say so, and to their end.

use super::claim::Claim;
use super::pasid::Pasid;
use super::table::{Invalidation, PageTable, Stale, StaleEntries, TableMemory};
use super::wire::{ContextRequest, Invalidate};
use crate::platform::Platform;
use crate::queue::Outcome;
use alloc::vec::Vec;

/// More requests than this are one for the whole context.
const MAX_REQUESTS: usize = 32;

/// Has the device forget all that is stale in a table: of one context, or of one of a table of descriptors.
pub(super) async fn stale<P: Platform, M: TableMemory>(
    claim: &Claim<P>,
    pasid: Pasid,
    table: &mut PageTable<M>,
) -> Outcome {
    let granule = table.granule();
    let mut begun = Begun { invalidation: Some(table.begin_invalidation()), table };
    let ranges = begun.invalidation.as_ref().map_or(&[][..], Invalidation::ranges);
    let (requests, key) = (requests(pasid, ranges, granule), claim.key);
    let shared = claim.contexts.shared();
    shared.invalidate(key.domain, &requests, |state| state.engine.is_cached(key)).await?;
    if let Some(invalidation) = begun.invalidation.take() {
        // SAFETY: this table's, and the device confirmed each of its ranges just now, or has nothing of the context.
        unsafe { begun.table.confirm(invalidation) };
    }
    Ok(())
}

/// An invalidation that failed, or was dropped, unless it was taken out: all of it is stale again.
struct Begun<'a, M: TableMemory> {
    table: &'a mut PageTable<M>,
    invalidation: Option<Invalidation>,
}

impl<M: TableMemory> Drop for Begun<'_, M> {
    fn drop(&mut self) {
        if let Some(invalidation) = self.invalidation.take() {
            self.table.abandon(invalidation);
        }
    }
}

/// INVALIDATE requests for exactly these ranges: each for a power of two of the smallest pages, aligned to it, since some
/// hardware knows no others and would do less for them. Or one for the whole context, where that is shorter.
pub(super) fn requests(pasid: Pasid, stale: &[Stale], granule: u64) -> Vec<ContextRequest> {
    let mut requests = Vec::new();
    for Stale { range, entries } in stale {
        let leaf_only = *entries == StaleEntries::LeafOnly;
        let (mut start, last) = (range.start().get(), range.last().get());
        loop {
            if requests.len() == MAX_REQUESTS {
                let leaf_only = stale.iter().all(|stale| stale.entries == StaleEntries::LeafOnly);
                let all = Invalidate::Context { pasid, leaf_only };
                return [ContextRequest::Invalidate(all)].into();
            }
            let left = (last - start) / granule + 1;
            let aligned = if start == 0 { u64::MAX } else { 1 << (start / granule).trailing_zeros() };
            let pages = (1 << left.ilog2()).min(aligned);
            let granule_log2 = granule.trailing_zeros() as u8;
            let part = Invalidate::Pages { pasid, start, pages, granule: granule_log2, leaf_only };
            requests.push(ContextRequest::Invalidate(part));
            match start.checked_add(pages * granule) {
                Some(next) if next <= last => start = next,
                _ => break,
            }
        }
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Iova, IovaRange};

    fn stale(start: u64, len: u64, entries: StaleEntries) -> Stale {
        Stale { range: IovaRange::from_len(Iova::new(start), len).unwrap(), entries }
    }

    fn parts(stale: &[Stale]) -> Vec<(u64, u64)> {
        let page = |request: &ContextRequest| match request {
            ContextRequest::Invalidate(Invalidate::Pages { start, pages, granule: 12, .. }) => {
                (*start, *pages)
            }
            other => panic!("{other:?}"),
        };
        requests(Pasid::new(1).unwrap(), stale, 0x1000).iter().map(page).collect()
    }

    use StaleEntries::{AllLevels, LeafOnly};

    #[test]
    fn pieces_are_powers_of_two_that_are_aligned_and_together_are_the_range() {
        assert_eq!(parts(&[stale(0x1000, 0x1000, LeafOnly)]), [(0x1000, 1)]);
        assert_eq!(parts(&[stale(0, 0x20_0000, LeafOnly)]), [(0, 512)]);
        assert_eq!(parts(&[stale(0x3000, 0x6000, LeafOnly)]), [(0x3000, 1), (0x4000, 4), (0x8000, 1)]);
        for (start, count) in [(1, 30), (7, 9), (0, 31), (63, 2)] {
            let all = parts(&[stale(start * 0x1000, count * 0x1000, AllLevels)]);
            let mut next = start * 0x1000;
            for (at, pages) in all {
                assert!(at == next && pages.is_power_of_two() && at % (pages * 0x1000) == 0);
                next += pages * 0x1000;
            }
            assert_eq!(next, (start + count) * 0x1000);
        }
    }

    #[test]
    fn very_many_are_one_for_the_context() {
        let pasid = Pasid::new(1).unwrap();
        let mut many: Vec<Stale> = (0..33).map(|n| stale(n * 0x2000, 0x1000, LeafOnly)).collect();
        let context = |leaf_only| [ContextRequest::Invalidate(Invalidate::Context { pasid, leaf_only })];
        assert_eq!(requests(pasid, &many[..32], 0x1000).len(), 32);
        assert_eq!(requests(pasid, &many, 0x1000), context(true));
        many.push(stale(1 << 30, 0x20_0000, AllLevels));
        assert_eq!(requests(pasid, &many, 0x1000), context(false));
    }
}
