//! What most calls come to, in one step each: one mapping in one record, confirmed by the device at once.
//!
//! The same as `map` and `settle` do. Wherever anything is unusual nothing is done here, and they take over: they find
//! the words for what is wrong, and know the rare states.

use super::deferred::Deferral;
use super::domain::DomainRecord;
use super::mapping::{ListId, MappingHandle, Purpose};
use super::space::{Parts, Space};
use super::{DomainKey, Engine, Op, Placement, Spot};
use crate::addr::IovaRange;
use crate::dma::HeldMemory;
use crate::exchange::{Mapped, Run};
use crate::id::DomainId;
use crate::prot::Prot;

/// Confirmed requests that are counted together, and the bytes that they mapped or unmapped.
pub(crate) struct Sum {
    pub count: u64,
    pub bytes: u64,
}

impl Engine {
    /// Begins a mapping of whole granules for reading, writing or both, where `spot` says, as far as that is
    /// [quick](super::space::Space::make). The request for it is then sent in any case.
    #[inline(always)]
    pub(crate) fn begin_one(
        &mut self,
        key: DomainKey,
        (run, spot): (Run, Spot),
        (purpose, list): (Purpose, ListId),
        held: &mut Option<HeldMemory>,
    ) -> Option<(&mut DomainRecord, Mapped)> {
        debug_assert!(purpose.prot.is_plain() && run.is_whole(self.geometry.granule));
        let domain = self.mappable(key)?;
        let mapped = domain.space.make(run, spot, (purpose, list), held)?;
        Some((domain, mapped))
    }

    /// The domain, where it takes mappings of whole granules for this. Making one fails where it is
    /// full.
    #[inline(always)]
    pub(crate) fn usual_domain(&mut self, key: DomainKey, prot: Prot) -> Option<&mut DomainRecord> {
        self.mappable(key).filter(|_| prot.is_plain())
    }

    /// The domain, where [`DomainRecord::check`] has nothing against a mapping of whole granules for reading, writing or both
    /// but that it may be full.
    #[inline(always)]
    pub(super) fn mappable(&mut self, key: DomainKey) -> Option<&mut DomainRecord> {
        let domain = self.domains.get_mut(key.place())?.as_deref_mut()?;
        (domain.mappable == key).then_some(domain)
    }

    /// Begins to map a list for reading, writing or both at addresses that were taken for it, in so many parts at most. With the
    /// number that its requests carry.
    #[inline(always)]
    pub(crate) fn begin_parts(
        &mut self,
        key: DomainKey,
        rest: Mapped,
        (purpose, list): (Purpose, ListId),
        most: usize,
    ) -> Option<(DomainId, Parts<'_>)> {
        let domain = self.usual_domain(key, purpose.prot)?;
        Some((domain.id, domain.space.begin_parts(rest, (purpose, list), most)?))
    }

    /// The same at addresses that are taken for it: so many bytes, where this allows, in so many parts at most, and so many of
    /// them at most now.
    #[inline(always)]
    pub(crate) fn begin_list_of(
        &mut self,
        key: DomainKey,
        wanted: (u64, Placement),
        (purpose, list): (Purpose, ListId),
        most: (usize, usize),
    ) -> Option<(DomainId, Parts<'_>)> {
        let domain = self.usual_domain(key, purpose.prot)?;
        Some((domain.id, domain.space.begin_list(wanted, (purpose, list), most)?))
    }

    /// So many parts at addresses that were taken for a list are still to be made.
    pub(crate) fn expect_parts(&mut self, key: DomainKey, count: usize) {
        if let Some(domain) = self.domain_mut(key) {
            domain.space.expect_parts(count);
        }
    }

    /// The device confirmed all MAPs of a list, for which somebody waits. False, and nothing done, where there is more to it.
    #[inline(always)]
    pub(crate) fn mapped_list(&mut self, key: DomainKey, Mapped { range, record }: Mapped) -> bool {
        let Some(domain) = self.domain_mut(key).filter(|domain| domain.possible > 0) else { return false };
        let Some(count) = domain.space.confirm_list(record, range) else { return false };
        domain.counts.mapped(count as u64, range.len_of_mapping());
        true
    }

    /// Begins the unmapping of live mappings that touch each other, the first of which the handle may name. The request for
    /// it is then sent in any case.
    #[inline(always)]
    pub(crate) fn begin_unmap_one(
        &mut self,
        key: DomainKey,
        range: IovaRange,
        record: MappingHandle,
    ) -> Option<(&mut DomainRecord, MappingHandle)> {
        let domain = self.domain_mut(key)?;
        let record = domain.space.begin_unmap(range, record)?;
        Some((domain, record))
    }

    /// The device confirmed a MAP that somebody waits for. False where there is more to it.
    #[inline(always)]
    pub(crate) fn mapped_one(
        &mut self,
        key: DomainKey,
        (range, len): (IovaRange, u64),
        record: MappingHandle,
    ) -> bool {
        let Some(domain) = self.mappable(key) else { return false };
        if !domain.space.confirm(record, range) {
            return false;
        }
        domain.counts.mapped(1, len);
        true
    }

    /// The device confirmed an UNMAP that somebody waits for, of one mapping that holds no memory. False where there is more
    /// to it.
    #[inline(always)]
    pub(crate) fn unmapped_one(&mut self, key: DomainKey, range: IovaRange, record: MappingHandle) -> bool {
        let Some(domain) = self.domain_mut(key) else { return false };
        if !domain.space.end_unmapped_plain(record, range) {
            return false;
        }
        domain.counts.unmapped(1, range.len_of_mapping());
        true
    }

    /// The same of one that holds memory, which is returned. `None` where there is more to it.
    pub(crate) fn unmapped_held(
        &mut self,
        key: DomainKey,
        range: IovaRange,
        record: MappingHandle,
    ) -> Option<HeldMemory> {
        let domain = self.domain_mut(key)?;
        let held = domain.space.end_unmapped_held(record, range)?;
        domain.counts.unmapped(1, range.len_of_mapping());
        Some(held)
    }

    /// Takes note of a MAP that the device confirmed, or of an UNMAP of whole mappings that hold no memory. False, and nothing
    /// done, where it is another request, or there is more to it.
    pub(crate) fn confirmed(&mut self, op: &Op) -> bool {
        match *op {
            Op::Map { domain, range, record } => {
                let Some(domain) = self.domain_mut(domain).filter(|domain| domain.possible > 0) else {
                    return false;
                };
                let done = domain.space.confirm_part(record, range);
                if done {
                    domain.counts.mapped(1, range.len_of_mapping());
                }
                done
            }
            Op::Unmap { domain, range, record } => {
                self.unmapped_one(domain, range, record) || self.unmapped_run(domain, range, record)
            }
            _ => false,
        }
    }

    /// The addresses of a domain where a confirmed MAP or UNMAP changes no more than its records.
    #[inline(always)]
    pub(crate) fn space_of_living(&mut self, key: DomainKey) -> Option<&mut Space> {
        let domain = self.domain_mut(key).filter(|domain| domain.possible > 0)?;
        Some(&mut domain.space)
    }

    /// The addresses of a domain.
    pub(crate) fn space_of(&self, key: DomainKey) -> Option<&Space> {
        self.domain(key).map(|domain| &domain.space)
    }

    /// Counts MAPs that the device confirmed.
    #[inline]
    pub(crate) fn count_mapped(&mut self, key: DomainKey, Sum { count, bytes }: Sum) {
        if let Some(domain) = self.domain_mut(key) {
            domain.counts.mapped(count, bytes);
        }
    }

    /// Counts UNMAPs that the device confirmed.
    #[inline]
    pub(crate) fn count_unmapped(&mut self, key: DomainKey, Sum { count, bytes }: Sum) {
        if let Some(domain) = self.domain_mut(key) {
            domain.counts.unmapped(count, bytes);
        }
    }

    /// The device confirmed an UNMAP of whole mappings that were made together and hold no memory. False where there is more
    /// to it.
    #[inline(never)]
    pub(crate) fn unmapped_run(&mut self, key: DomainKey, range: IovaRange, record: MappingHandle) -> bool {
        let Some(domain) = self.domain_mut(key) else { return false };
        if !domain.space.end_unmapped_run(record, range) {
            return false;
        }
        domain.counts.unmapped(1, range.len_of_mapping());
        true
    }

    /// The device confirmed the UNMAP of a run of deferred mappings. False, and nothing done, where there is more to it.
    #[inline]
    pub(crate) fn flushed(&mut self, key: DomainKey, range: IovaRange, run: &[Mapped]) -> bool {
        let Some(domain) = self.domain_mut(key).filter(|domain| domain.possible > 0) else { return false };
        let covers = |first: &Mapped, last: &Mapped| {
            first.range.start() == range.start() && last.range.last() == range.last()
        };
        let covered = run.first().zip(run.last()).is_some_and(|(first, last)| covers(first, last));
        if !covered || !domain.space.end_flush(run) {
            return false;
        }
        domain.counts.unmapped(1, range.len_of_mapping());
        true
    }

    /// Defers the unmapping of one live mapping, which the handle may name, or of a list, at a time as [`stamp`](super::stamp) says
    /// it. [`Deferral::Strict`] where nothing was done.
    #[inline(always)]
    pub(crate) fn defer_one(
        &mut self,
        key: DomainKey,
        (range, record): (IovaRange, MappingHandle),
        now_ns: u64,
    ) -> Deferral {
        let Some(domain) = self.domain_mut(key) else { return Deferral::Strict };
        let Some(list) = domain.deferred.as_mut().filter(|list| list.has_room()) else {
            return Deferral::Strict;
        };
        match domain.space.defer(record, range) {
            Some((record, mappings)) => list.push(Mapped { range, record }, mappings, now_ns),
            None => Deferral::Strict,
        }
    }
}
