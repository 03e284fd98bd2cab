//! Lists: mappings of addresses that were taken together, made in one go and unmapped in one go.
//!
//! ```text
//!   taken     [A              T              ]
//!   made      [A    ][B ][C     ][D ]  T          A: Head, B, C, D: Part, T: the rest, still taken
//!   whole     [A    ][B ][C     ][D ][T      ]    B knows that T is the last, and how many there are
//!   free      [A                             ]    the places of B to T go back as the chain that they are
//! ```
//! Each part has a record of its own, which says at any time what has become of it. That all of a list is as its making
//! left it needs no look at them: the space counts how often anything happened to a part by itself, and a list whose
//! making saw the same count is whole.

use super::Space;
use super::order::MAX_BEHIND;
use super::quick::suits;
use super::slab::{Index, NIL};
use crate::addr::{Iova, IovaRange};
use crate::engine::Placement;
use crate::engine::mapping::{Holder, ListId, Making, MappingHandle, MappingState, Purpose};
use crate::exchange::{Mapped, Run};

/// In place of how often something had happened to a part by itself, which is never so seldom: the list is not whole.
const NO_NOTE: u32 = 0;

/// A list that is about to be made.
pub(crate) struct Parts<'a> {
    space: &'a mut Space,
    making: Making,
    /// The record that has the addresses, which is the first part's then.
    first: Index,
    range: IovaRange,
    rank: i8,
    /// The record that follows the list.
    following: Index,
    /// How many parts there can be.
    most: usize,
    /// Whether they are [expected](Space::expect_parts).
    expected: bool,
}

impl Space {
    /// Begins to make so many mappings at most of addresses that were taken for a list, whose record the handle may name, and
    /// of which these are expected.
    #[inline(always)]
    pub(crate) fn begin_parts(
        &mut self,
        Mapped { range, record: handle }: Mapped,
        (purpose, list): (Purpose, ListId),
        most: usize,
    ) -> Option<Parts<'_>> {
        let first = if handle == MappingHandle::UNKNOWN { self.find(range.start())? } else { handle.0 };
        let record = self.order.get(first)?;
        if record.holder != Holder::Taken || record.range != range {
            return None;
        }
        let mut parts = self.parts_of(first, (purpose, list), most)?;
        parts.expected = true;
        Some(parts)
    }

    #[inline(always)]
    fn parts_of(
        &mut self,
        first: Index,
        (purpose, list): (Purpose, ListId),
        most: usize,
    ) -> Option<Parts<'_>> {
        let record = self.order.get(first)?;
        let (range, following, rank) = (record.range, record.next, record.rank.min(0));
        // The first one has a record, and what is left at the end needs one.
        let in_a_row = (MAX_BEHIND + rank) as usize + 1;
        let room = self.room.mappings.saturating_sub(self.mappings).min(self.order.room());
        let most = room.min(in_a_row).min(most);
        let making = Making::new(purpose, list);
        Some(Parts { space: self, making, first, range, rank, following, most, expected: false })
    }

    /// Takes so many bytes of addresses where this allows, for as many parts at most, and begins to make mappings of them, so
    /// many at most now. `None`, and nothing changed, where that cannot be. Of what is not made then the caller
    /// [says](Self::expect_parts) how much is to come.
    #[inline(always)]
    pub(crate) fn begin_list(
        &mut self,
        (len, placement): (u64, Placement),
        (purpose, list): (Purpose, ListId),
        (most, now): (usize, usize),
    ) -> Option<Parts<'_>> {
        // Ranges that were given back keep records, which they have to give away first. What is searched takes one.
        if most > self.most.saturating_sub(self.mappings) || most >= self.order.room() {
            return None;
        }
        let granules = self.order.page(Iova::new(len));
        let first = match self.magazines.pop(&mut self.order, granules, |range| suits(placement, range)) {
            Some((index, record)) => {
                record.holder = Holder::Taken;
                index
            }
            None => self.search_for_one(len, placement.align, placement.limit)?,
        };
        self.parts_of(first, (purpose, list), now)
    }

    /// So many parts of addresses that were taken for a list are still to be made.
    pub(crate) fn expect_parts(&mut self, count: usize) {
        self.set_others(self.others + count);
    }

    /// A part of a list by its record, and the record that follows. `None` where it is another's.
    pub(crate) fn part(
        &self,
        MappingHandle(index): MappingHandle,
        list: ListId,
    ) -> Option<(Mapped, MappingHandle)> {
        let record =
            self.order.get(index).filter(|record| record.holder.is_mapping() && record.is_of(list))?;
        Some((Mapped { range: record.range, record: MappingHandle(index) }, MappingHandle(record.next)))
    }

    /// The device confirmed all MAPs of a list of exactly this range, all of which wait for that. How many they are. `None`,
    /// and nothing changed, where it is not so, or they have to be looked at one by one.
    #[inline(always)]
    pub(crate) fn confirm_list(
        &mut self,
        MappingHandle(first): MappingHandle,
        range: IovaRange,
    ) -> Option<usize> {
        let (last, count) = self.whole_list(first, range)?;
        if self.order[first].state != MappingState::Mapping {
            return None;
        }
        let mut index = first;
        loop {
            let record = &mut self.order[index];
            // Nothing happened to a part of it by itself, nor to all of it: it is as it was made.
            debug_assert!(record.state == MappingState::Mapping && record.on_device);
            record.make_live(record.holder);
            if index == last {
                return Some(count);
            }
            index = record.next;
        }
    }

    /// The last part of a list of exactly this range, and how many there are, if nothing happened to it but what happened
    /// to all of it.
    #[inline]
    pub(super) fn whole_list(&self, first: Index, range: IovaRange) -> Option<(Index, usize)> {
        let head = self.order.get(first)?;
        if head.holder != Holder::Head || head.range.start() != range.start() {
            return None;
        }
        // The second part has no other use for these, as it is not in the tree.
        let second = self.order.get(head.next)?;
        let whole = second.holder == Holder::Part && second.rank < 0 && second.gap == self.touched;
        let last = self.order.get(second.left).filter(|_| whole)?;
        (last.range.last() == range.last()).then_some((second.left, second.right as usize))
    }

    /// Takes note of a list that was made in one go.
    #[inline(always)]
    fn note_list(&mut self, first: Index, last: Index, count: usize) {
        if count == 1 {
            // It is like any other mapping.
            self.order[first].holder = Holder::Mapping;
        } else {
            let note = if self.touched < u32::MAX { self.touched } else { NO_NOTE };
            let second = self.order[first].next;
            let second = &mut self.order[second];
            (second.left, second.right, second.gap) = (last, count as u32, note);
        }
    }

    /// Takes note that something happened to a part of a list by itself. Once it is not known any more how often that was,
    /// no list counts as whole.
    #[inline]
    pub(super) fn touch(touched: &mut u32, holder: Holder) {
        if holder != Holder::Mapping {
            *touched = touched.saturating_add(1);
        }
    }

    /// Marks a list of exactly this range, whose owner unmaps it, if all of it is in this state. How many it is.
    #[inline(always)]
    pub(super) fn mark_list(
        &mut self,
        first: Index,
        range: IovaRange,
        from: MappingState,
        to: MappingState,
    ) -> Option<usize> {
        let (last, count) = self.whole_list(first, range)?;
        let mut index = first;
        loop {
            let record = &mut self.order[index];
            // It is not live before its MAP was answered.
            if record.state != from {
                self.unmark(first, index, from);
                return None;
            }
            (record.state, record.owned) = (to, false);
            if index == last {
                return Some(count);
            }
            index = record.next;
        }
    }

    /// Takes the marks of the parts from the first to the one before `end` back.
    #[cold]
    fn unmark(&mut self, first: Index, end: Index, back: MappingState) {
        let mut index = first;
        while index != end {
            let record = &mut self.order[index];
            (record.state, record.owned) = (back, back == MappingState::Live);
            index = record.next;
        }
    }

    /// Marks a list of exactly this range, all of which is live, as deferred.
    #[cold]
    pub(super) fn defer_list(&mut self, range: IovaRange) -> Option<(MappingHandle, usize)> {
        let first = self.find(range.start())?;
        let count = self.mark_list(first, range, MappingState::Live, MappingState::Deferred)?;
        Some((MappingHandle(first), count))
    }

    /// Marks deferred mappings, and lists, that touch each other as being unmapped. False, and nothing changed, where any of
    /// them is not what it was.
    pub(crate) fn begin_flush(&mut self, run: &[Mapped]) -> bool {
        for (marked, deferred) in run.iter().enumerate() {
            if !self.mark_deferred(*deferred, MappingState::Deferred, MappingState::Unmapping) {
                for deferred in &run[..marked] {
                    self.mark_deferred(*deferred, MappingState::Unmapping, MappingState::Deferred);
                }
                return false;
            }
        }
        true
    }

    #[inline(always)]
    fn mark_deferred(&mut self, deferred: Mapped, from: MappingState, to: MappingState) -> bool {
        let Mapped { range, record: handle } = deferred;
        let Some(record) = self.order.get_mut(handle.0) else { return false };
        if record.holder != Holder::Mapping {
            return self.mark_list(handle.0, range, from, to).is_some();
        }
        let marked = record.range == range && record.state == from && record.on_device;
        if marked {
            record.state = to;
        }
        marked
    }

    /// The device confirmed the UNMAP of such a run: its addresses are free. False, and nothing changed, where it is not so,
    /// or there is more to it.
    pub(crate) fn end_flush(&mut self, run: &[Mapped]) -> bool {
        if !run.iter().all(|deferred| self.is_flushed(*deferred)) {
            return false;
        }
        for Mapped { range, record } in run {
            let done = self.end_unmapped_plain(*record, *range) || self.end_unmapped_list(record.0, *range);
            debug_assert!(done, "it was to be unmapped just now");
        }
        true
    }

    #[inline(always)]
    fn is_flushed(&self, Mapped { range, record: handle }: Mapped) -> bool {
        let Some(record) = self.order.get(handle.0) else { return false };
        if record.state != MappingState::Unmapping || record.holds_memory() {
            return false;
        }
        match record.holder {
            Holder::Mapping => record.range == range && record.counted,
            _ => self.whole_list(handle.0, range).is_some(),
        }
    }

    /// The device confirmed the UNMAP of a list of exactly this range: its addresses are free. False, and nothing changed,
    /// where it is not so, or more is to be looked at.
    pub(super) fn end_unmapped_list(&mut self, first: Index, range: IovaRange) -> bool {
        let Some((last, count)) = self.whole_list(first, range) else { return false };
        // It is marked as all of them are.
        if self.order[first].state != MappingState::Unmapping {
            return false;
        }
        self.mappings -= count;
        self.order.merge_parts(first, last, count);
        let Self { order, magazines, .. } = self;
        let granules = order.granules(range);
        let record = &mut order[first];
        (record.holder, record.counted) = (Holder::Taken, false);
        if !magazines.keep(first, record, granules) {
            self.free(first);
        }
        true
    }
}

impl Parts<'_> {
    /// All of the addresses, and the record of the first.
    #[inline(always)]
    pub(crate) fn whole(&self) -> Mapped {
        Mapped { range: self.range, record: MappingHandle(self.first) }
    }

    /// Makes a mapping of each run, as long as there are addresses and records for it, and says which. How many, and what is
    /// left of the addresses, which is still taken.
    #[inline(always)]
    pub(crate) fn make(
        self,
        runs: impl Iterator<Item = Run>,
        mut each: impl FnMut(Mapped, Run),
    ) -> (usize, Option<Mapped>) {
        let mut runs = runs;
        let Self { space, making, first, following, most, range: all, rank, expected } = self;
        let order = &mut space.order;
        let (mut next, end) = (all.start(), all.last());
        // No range ends with the last address of all.
        let fits = |next: Iova, run: Run| {
            let range = IovaRange::new(next, Iova::new(next.get().wrapping_add(run.len).wrapping_sub(1)))?;
            (range.last() <= end).then_some((range, Iova::new(range.last().get() + 1)))
        };
        let run = if most > 0 { runs.next() } else { None };
        let Some((run, (range, behind))) = run.and_then(|run| Some((run, fits(next, run)?))) else {
            return (0, Some(Mapped { range: all, record: MappingHandle(first) }));
        };
        let mut vacant = order.vacant();
        let record = &mut order[first];
        record.range = range;
        record.begin_listed(Holder::Head, run.phys, making);
        // Each record that was in use before names the one that comes after it already.
        record.next = vacant;
        each(Mapped { range, record: MappingHandle(first) }, run);
        next = behind;
        // Counts the parts too, since each lies behind the one before it.
        let least = i32::from(rank) - (most - 1) as i32;
        let (mut behind_it, mut last) = (i32::from(rank), first);
        let mut fit = true;
        while behind_it > least
            && let Some(record) = order.get_mut(vacant)
            && let Some(run) = runs.next()
        {
            let Some((range, behind)) = fits(next, run) else {
                fit = false;
                break;
            };
            behind_it -= 1;
            record.range = range;
            record.begin_listed(Holder::Part, run.phys, making);
            (record.prev, record.rank) = (last, behind_it as i8);
            each(Mapped { range, record: MappingHandle(vacant) }, run);
            (last, vacant, next) = (vacant, record.next, behind);
        }
        let again = i32::from(rank) - behind_it;
        order.take_vacant(vacant, again as usize);
        // Once for each record.
        while vacant == NIL
            && fit
            && behind_it > least
            && let Some(run) = runs.next()
            && let Some((range, behind)) = fits(next, run)
            && let Some(index) = order.append_new(last)
        {
            behind_it -= 1;
            let record = &mut order[index];
            record.range = range;
            record.begin_listed(Holder::Part, run.phys, making);
            (record.prev, record.rank) = (last, behind_it as i8);
            each(Mapped { range, record: MappingHandle(index) }, run);
            (last, next) = (index, behind);
        }
        let count = 1 + (i32::from(rank) - behind_it) as usize;
        space.mappings += count;
        if expected {
            space.set_others(space.others - count);
        }
        let Some(range) = IovaRange::new(next, end) else {
            space.order.join(last, following);
            space.note_list(first, last, count);
            return (count, None);
        };
        if count > 1 {
            // What it was before may have left one there, and more of this list are to come.
            let second = space.order[first].next;
            space.order[second].gap = NO_NOTE;
        }
        let rest = space.order.append_rest(range, (last, following), behind_it as i8);
        debug_assert!(rest.is_some(), "there was room");
        (count, Some(Mapped { range, record: rest.map_or(MappingHandle::UNKNOWN, MappingHandle) }))
    }
}
