//! Deferred mappings that become live again, as [`defer`](Space::defer) takes them.

use super::Space;
use crate::addr::{IovaRange, PhysAddr};
use crate::engine::Wish;
use crate::engine::mapping::{Holder, MappingHandle, MappingState, Purpose, Standing};
use crate::exchange::{Mapped, Run};

impl Space {
    /// The memory that a mapping leads to, the first if there are several.
    #[inline(always)]
    pub(crate) fn phys_of(&self, record: MappingHandle) -> PhysAddr {
        self.order.get(record.0).map_or(PhysAddr::new(0), |record| record.phys)
    }

    /// Makes a deferred mapping live again, under another name, if it is one of exactly the granules around a buffer, of which
    /// the first is at `first`, and at a place that suits. With its addresses. `None`, and nothing changed, where it is not.
    #[inline(always)]
    pub(crate) fn revive(
        &mut self,
        handle: MappingHandle,
        (first, mask): (PhysAddr, u64),
        Wish { buffer, prot, tag, reach }: Wish<'_>,
    ) -> Option<IovaRange> {
        let record = self.order.get_mut(handle.0)?;
        let (range, last) = (record.range, record.range.len_minus_one());
        // An empty one seems to be as long as can be, so that it is none. The sum cannot wrap then.
        let last_byte = (buffer.len as u64).wrapping_sub(1);
        let offset = buffer.phys.get() - first.get();
        let same = record.standing() == Standing::DEFERRED
            && record.phys == first
            && last_byte <= last
            && (offset + last_byte) | mask == last
            && record.prot() == prot
            && !record.holds_memory()
            && reach.suits(range, buffer.len as u64);
        if !same {
            return None;
        }
        // Before and after it adds nothing to the tally.
        record.make_live(Holder::Mapping);
        record.set_tag(tag);
        Some(range)
    }

    /// The same for a whole list of exactly these runs. How many they are.
    #[inline]
    pub(crate) fn revive_list(
        &mut self,
        Mapped { range, record: handle }: Mapped,
        mut runs: impl Iterator<Item = Run>,
        purpose: Purpose,
    ) -> Option<usize> {
        let (last, count) = self.whole_list(handle.0, range)?;
        let mut index = handle.0;
        for _ in 0..count {
            let (record, run) = (&self.order[index], runs.next()?);
            let same = record.phys == run.phys && record.range.len_minus_one() == run.len.wrapping_sub(1);
            if !same || record.state != MappingState::Deferred || record.prot() != purpose.prot {
                return None;
            }
            index = record.next;
        }
        if runs.next().is_some() {
            return None;
        }
        let mut index = handle.0;
        loop {
            let record = &mut self.order[index];
            // As above. It stays a whole list.
            record.make_live(record.holder);
            record.set_tag(purpose.tag);
            if index == last {
                return Some(count);
            }
            index = record.next;
        }
    }
}
