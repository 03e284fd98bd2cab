//! What was unmapped, and waits for its domain's next flush.
//!
//! ```text
//!            unmap                begin flush             UNMAP ok
//!   Live -----------> Deferred ---------------> Unmapping ---------> gone, or Released
//!     ^ the same mapped |
//!     '-----------------'
//! ```
//! Addresses and memory of a deferred record are held back as those of a live one: the device still has it, and nobody
//! may get them before that confirmed the UNMAP. Only that somebody counts on it is over. When the domain dies,
//! deferred records go with it. How one comes back to life is in [`super::revive`].

use super::map::UnmapPlan;
use super::mapping::{MappingState, Record};
use super::revive::Places;
use super::{DomainKey, Engine, Op};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::error::{RequestError, UnmapError};
use crate::exchange::Mapped;
use crate::id::EndpointId;
use crate::options::DeferredBounds;
use crate::wire::request::Request;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem;
use core::sync::atomic::{AtomicUsize, Ordering};

/// The most ranges that a domain keeps for its flush.
const MAX_RANGES: usize = 1 << 16;

/// No time.
const NEVER: u64 = u64::MAX;

/// How many ranges at most are unmapped by one request, and looked at in one stretch under the lock.
pub(crate) const MERGED: usize = 256;

/// Ranges of deferred records of a domain, as they were unmapped: each of whole records that touch each other, with the
/// first of them.
///
/// # Invariants
/// `waiting` never grows beyond its capacity. `spare` is empty, and as large, unless a flush has it.
pub(crate) struct DeferredList {
    bounds: DeferredBounds,
    pub(super) waiting: Vec<Mapped>,
    /// Takes the place of `waiting` when a flush takes that.
    spare: Vec<Mapped>,
    /// Where in `waiting` they are, by the memory that they lead to.
    pub(super) places: Places,
    mappings: usize,
    bytes: u64,
    /// When a flush is due for the oldest of them, or for one that was there before it and was mapped again since.
    /// [`NEVER`] where there is none.
    due_ns: u64,
    due: FlushDue,
    /// A flush took ranges, and did not end yet.
    flushing: bool,
    /// A flush failed, or a recovery came before it, and what it was to unmap may be in quarantine still.
    failed: Option<RequestError>,
}

/// A time as one number: 0 where there is no clock, and else never.
#[inline(always)]
pub(crate) fn stamp(now_ns: Option<u64>) -> u64 {
    now_ns.map_or(0, |now_ns| now_ns | 1)
}

/// When a domain's flush is due, for all who hold the domain. A hint: whoever finds it past asks the engine. In units of
/// 1024 ns, rounded down, as much as fits.
#[derive(Clone, Debug)]
pub(crate) struct FlushDue(Arc<AtomicUsize>);

impl FlushDue {
    const NEVER: usize = usize::MAX;

    fn never() -> Self {
        Self(Arc::new(AtomicUsize::new(Self::NEVER)))
    }

    fn units(ns: u64) -> usize {
        usize::try_from(ns >> 10).unwrap_or(Self::NEVER).min(Self::NEVER - 1)
    }

    fn set(&self, due_ns: u64) {
        let units = if due_ns == NEVER { Self::NEVER } else { Self::units(due_ns) };
        self.0.store(units, Ordering::Relaxed);
    }

    /// Whether anything waits for a flush.
    #[inline]
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed) != Self::NEVER
    }

    /// Whether it may be past.
    #[inline]
    pub(crate) fn may_be_past(&self, now_ns: u64) -> bool {
        self.0.load(Ordering::Relaxed) <= Self::units(now_ns)
    }
}

/// What became of an unmapping that may be deferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deferral {
    /// It has to be done now: the domain is strict or dead, or there is nothing that could be unmapped.
    Strict,
    /// The list is full: it can be deferred after a flush.
    Full,
    Deferred,
    /// It is deferred, and a bound is reached.
    FlushDue,
}

impl DeferredList {
    /// Allocates all that it will ever need.
    pub(crate) fn new(bounds: DeferredBounds) -> Self {
        let capacity = bounds.mappings.clamp(1, MAX_RANGES);
        Self {
            bounds,
            waiting: Vec::with_capacity(capacity),
            spare: Vec::with_capacity(capacity),
            places: Places::new(),
            mappings: 0,
            bytes: 0,
            due_ns: NEVER,
            due: FlushDue::never(),
            flushing: false,
            failed: None,
        }
    }

    /// What is deferred: mappings, and their bytes.
    pub(crate) fn waiting(&self) -> (usize, u64) {
        (self.mappings, self.bytes)
    }

    pub(super) fn has_room(&self) -> bool {
        self.waiting.len() < self.waiting.capacity()
    }

    /// Adds deferred records, the first of which leads to this memory, at a time as [`stamp`] says it. There is room.
    #[inline(always)]
    pub(super) fn push(
        &mut self,
        deferred: Mapped,
        (mappings, phys): (usize, PhysAddr),
        now_ns: u64,
    ) -> Deferral {
        debug_assert!(self.has_room());
        let at = self.waiting.len();
        self.places.note(phys, at);
        self.waiting.push(deferred);
        self.mappings += mappings;
        // No two of them overlap, so that this does not wrap.
        self.bytes += deferred.range.len_of_mapping();
        if self.due_ns == NEVER {
            self.begin_age(now_ns);
        }
        if self.is_due(now_ns) { Deferral::FlushDue } else { Deferral::Deferred }
    }

    /// So many records of this range do not wait any more, which were taken out of `waiting`.
    #[inline(always)]
    pub(super) fn forget(&mut self, range: IovaRange, mappings: usize) {
        self.mappings -= mappings;
        self.bytes -= range.len_of_mapping();
    }

    #[inline(always)]
    fn is_due(&self, now_ns: u64) -> bool {
        self.mappings >= self.bounds.mappings || self.bytes >= self.bounds.bytes || self.is_old(now_ns)
    }

    /// Whether the oldest of them, if there is any, waits for too long.
    #[inline(always)]
    fn is_old(&self, now_ns: u64) -> bool {
        now_ns >= self.due_ns
    }

    /// When a flush is due for the oldest, to be looked at without the lock.
    pub(crate) fn due(&self) -> FlushDue {
        self.due.clone()
    }

    /// Something waits since now, and nothing did before.
    #[inline(never)]
    fn begin_age(&mut self, now_ns: u64) {
        // Later than it is where there is no clock.
        self.set_due(now_ns.saturating_add(self.bounds.age_ns).clamp(1, NEVER - 1));
    }

    fn set_due(&mut self, due_ns: u64) {
        self.due_ns = due_ns;
        self.due.set(due_ns);
    }

    fn take(&mut self) -> Vec<Mapped> {
        let spare = mem::take(&mut self.spare);
        let taken = mem::replace(&mut self.waiting, spare);
        (self.mappings, self.bytes) = (0, 0);
        self.set_due(NEVER);
        taken
    }

    /// What was deferred may never be unmapped, which a flush has to say as long as that is so.
    pub(super) fn fail(&mut self, why: RequestError) {
        self.failed = Some(why);
    }

    /// The records went with their domain.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        (self.mappings, self.bytes) = (0, 0);
        self.set_due(NEVER);
    }
}

impl Engine {
    /// Defers the unmapping of whole neighbouring live mappings, if their domain does that. Sends nothing.
    pub(crate) fn defer(&mut self, key: DomainKey, range: IovaRange, now_ns: Option<u64>) -> Deferral {
        let Some(domain) = self.domain_mut(key) else { return Deferral::Strict };
        let Some(list) = &mut domain.deferred else { return Deferral::Strict };
        let Some(first) = domain.space.whole(range) else { return Deferral::Strict };
        let is_live = |record: &Record| record.state == MappingState::Live && record.on_device;
        if !domain.space.iter_in(range).all(is_live) {
            return Deferral::Strict;
        }
        if !list.has_room() {
            return Deferral::Full;
        }
        let phys = domain.space.phys_of(first);
        let mut mappings = 0;
        domain.space.retain_in(range, Some(first), |record| {
            (record.state, record.owned) = (MappingState::Deferred, false);
            mappings += 1;
            true
        });
        list.push(Mapped { range, record: first }, (mappings, phys), stamp(now_ns))
    }

    /// Whether anything waits for a flush, or is being flushed.
    pub(crate) fn has_deferred(&self, key: DomainKey) -> bool {
        let list = self.domain(key).and_then(|domain| domain.deferred.as_ref());
        list.is_some_and(|list| list.flushing || !list.waiting.is_empty())
    }

    /// Whether a flush is under way.
    pub(crate) fn is_flushing(&self, key: DomainKey) -> bool {
        let list = self.domain(key).and_then(|domain| domain.deferred.as_ref());
        list.is_some_and(|list| list.flushing)
    }

    /// Whether something waits for longer than it should, and nobody flushes yet.
    pub(crate) fn is_flush_overdue(&self, key: DomainKey, now_ns: Option<u64>) -> bool {
        let list = self.domain(key).and_then(|domain| domain.deferred.as_ref());
        let old = |list: &DeferredList| list.is_old(stamp(now_ns));
        list.is_some_and(|list| !list.flushing && !list.waiting.is_empty() && old(list))
    }

    /// The same for whoever was [told](FlushDue) to look. Where all was mapped again meanwhile nobody is told any more.
    pub(crate) fn look_if_overdue(&mut self, key: DomainKey, now_ns: Option<u64>) -> bool {
        let list = self.domain_mut(key).and_then(|domain| domain.deferred.as_mut());
        if let Some(list) = list.filter(|list| list.waiting.is_empty()) {
            list.set_due(NEVER);
        }
        self.is_flush_overdue(key, now_ns)
    }

    /// The next domain after the one in place `after` that [is overdue](Self::is_flush_overdue), and its place.
    pub(crate) fn next_overdue(&self, after: Option<u32>, now_ns: Option<u64>) -> Option<(u32, DomainKey)> {
        self.domains.iter().enumerate().find_map(|(index, domain)| {
            let (index, domain) = (index as u32, domain.as_ref()?);
            (Some(index) > after && self.is_flush_overdue(domain.key, now_ns)).then_some((index, domain.key))
        })
    }

    /// Takes what waits, for the one flush that a domain has at a time. Nothing where nothing waits.
    pub(crate) fn begin_flush(&mut self, key: DomainKey) -> Vec<Mapped> {
        let list = self.domain_mut(key).and_then(|domain| domain.deferred.as_mut());
        let Some(list) = list.filter(|list| !list.waiting.is_empty()) else { return Vec::new() };
        debug_assert!(!list.flushing);
        list.flushing = true;
        list.take()
    }

    /// Begins the UNMAP of the first of these ranges, which are sorted, and of those that touch it. Also says how many
    /// of them that took, which is at least one: a range that is not deferred any more is passed over.
    pub(crate) fn begin_flush_of(&mut self, key: DomainKey, ranges: &[Mapped]) -> (usize, Option<UnmapPlan>) {
        let Some((count, merged)) = first_run(ranges) else { return (0, None) };
        if let Some(domain) = self.domain_mut(key)
            && domain.space.begin_flush(&ranges[..count])
        {
            let request = Request::Unmap { domain: domain.id, range: merged };
            let op = Op::Unmap { domain: key, range: merged, record: ranges[0].record };
            return (count, Some(UnmapPlan::Send(request, op)));
        }
        let deferred = MappingState::Deferred;
        if let Ok(plan) = self.begin_unmap_of(key, merged, deferred) {
            return (count, Some(plan));
        }
        // One of them is not what it was: each by itself.
        (1, self.begin_unmap_of(key, ranges[0].range, deferred).ok())
    }

    /// Puts ranges that a flush does not get to into quarantine, as a strict unmapping that fails does.
    pub(crate) fn give_up_deferred(&mut self, key: DomainKey, ranges: &[Mapped]) {
        let Some(domain) = self.domain_mut(key) else { return };
        for deferred in ranges {
            domain.space.retain_in(deferred.range, None, |record| {
                if record.state == MappingState::Deferred {
                    record.state = MappingState::Quarantined;
                }
                true
            });
        }
    }

    /// Ends a flush, and takes the list back that it took. What comes back is to be dropped outside of the lock.
    pub(crate) fn end_flush(
        &mut self,
        key: DomainKey,
        mut taken: Vec<Mapped>,
        failed: Option<RequestError>,
    ) -> Vec<Mapped> {
        let list = self.domain_mut(key).and_then(|domain| domain.deferred.as_mut());
        let Some(list) = list else { return taken };
        taken.clear();
        list.flushing = false;
        list.failed = failed.or(list.failed);
        mem::replace(&mut list.spare, taken)
    }

    /// The first range that waits, for the words of an error.
    pub(crate) fn first_deferred(&self, key: DomainKey) -> Option<IovaRange> {
        self.domain(key)?.deferred.as_ref()?.waiting.first().map(|deferred| deferred.range)
    }

    /// The first mapping in `range` behind `after` that is in quarantine, and that an UNMAP can be tried for.
    pub(crate) fn next_given_up(
        &self,
        key: DomainKey,
        range: IovaRange,
        after: Option<IovaRange>,
    ) -> Option<IovaRange> {
        let given_up = |record: &&Record| {
            record.state == MappingState::Quarantined
                && after.is_none_or(|after| record.range.start() > after.last())
        };
        self.domain(key)?.space.iter_in(range).find(given_up).map(|record| record.range)
    }

    /// Whether a flush failed, and something is in quarantine since. Walks the records then.
    pub(crate) fn flush_result(&mut self, key: DomainKey) -> Result<(), UnmapError> {
        let Some(domain) = self.domain_mut(key) else { return Ok(()) };
        let Some(list) = &mut domain.deferred else { return Ok(()) };
        let Some(error) = list.failed else { return Ok(()) };
        // What is being unmapped once more, too: the device may refuse again.
        let doubtful = |record: &&Record| {
            !record.owned && (record.is_stuck() || record.state == MappingState::Unmapping)
        };
        match domain.space.iter_from(Iova::new(0)).find(doubtful) {
            Some(record) => Err(UnmapError::Request { range: record.range, error }),
            None => {
                list.failed = None;
                Ok(())
            }
        }
    }

    /// Whether the endpoint is in a domain that has to be flushed before it leaves: where the bypass is not known to be
    /// closed, what is deferred does not go with the domain.
    pub(crate) fn flush_before_leaving(&self, endpoint: EndpointId) -> Option<DomainKey> {
        let key = self.endpoint(endpoint)?.domain()?;
        (!self.bypass_closed && self.has_deferred(key)).then_some(key)
    }
}

/// The first of sorted ranges with those that touch it: how many, and all of them.
pub(crate) fn first_run(ranges: &[Mapped]) -> Option<(usize, IovaRange)> {
    let first = ranges.first()?.range;
    let (mut count, mut last) = (1, first.last());
    for next in ranges.iter().take(MERGED).skip(1) {
        if last.checked_add(1) != Some(next.range.start()) {
            break;
        }
        (count, last) = (count + 1, next.range.last());
    }
    Some((count, IovaRange::new(first.start(), last)?))
}
