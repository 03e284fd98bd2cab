//! What most calls come to, in one step each: one mapping in one record, confirmed by the device at once.
//!
//! The same as `map` and `settle` do. Wherever anything is unusual nothing is done here, and they take over: they find
//! the words for what is wrong, and know the rare states.

use super::deferred::Deferral;
use super::domain::DomainRecord;
use super::mapping::{ListId, MappingHandle, Purpose};
use super::{DomainKey, Engine, Geometry, Op, Placement};
use crate::addr::IovaRange;
use crate::dma::HeldMemory;
use crate::exchange::{Mapped, Run};
use crate::options::DomainKind;
use crate::prot::Prot;
use crate::wire::request::Request;

impl DomainRecord {
    /// Whether [`check`](Self::check) has nothing against a mapping, wherever it goes.
    #[inline(always)]
    fn suits(&self, geometry: &Geometry, run: Run, prot: Prot) -> bool {
        let (phys, len, bits) = (run.phys.get(), run.len, prot.bits());
        let plain = (Prot::READ | Prot::WRITE).bits();
        (phys | len) & (geometry.granule - 1) == 0
            && len >= 2
            && len - 1 <= u64::MAX - phys
            && bits & !plain == 0
            && bits != 0
            && self.kind == DomainKind::Translated
            && self.attached > 0
            && !self.in_transition
            && !self.space.is_full()
    }
}

/// A request that was sent in one of the ways here: what became of the records, its slot, and whether the device wants
/// the doorbell.
pub(crate) type Sent<T> = (T, u16, bool);

impl Engine {
    /// Begins a mapping where `placement` allows, and hands the request for it to `send`.
    #[inline(always)]
    pub(crate) fn begin_one(
        &mut self,
        key: DomainKey,
        (list, placement): (ListId, Placement),
        run: Run,
        purpose: Purpose,
        held: &mut Option<HeldMemory>,
        send: impl FnOnce(&Request, Op) -> Option<(u16, bool)>,
    ) -> Option<Sent<Mapped>> {
        let geometry = &self.geometry;
        let domain = self.domains.get_mut(usize::from(key.index))?.as_mut()?;
        if domain.generation != key.generation || !domain.suits(geometry, run, purpose.prot) {
            return None;
        }
        let align = placement.align.max(geometry.granule);
        let id = domain.id;
        let made =
            domain.space.make(run, (align, placement.limit), (purpose, list), held, |range, record| {
                let request = Request::Map { domain: id, range, phys: run.phys, prot: purpose.prot };
                send(&request, Op::Map { domain: key, range, record })
            });
        let (mapped, (slot, wanted)) = made?;
        domain.stats.requests += 1;
        domain.stats.kicks += u64::from(wanted);
        Some((mapped, slot, wanted))
    }

    /// Begins the unmapping of one live mapping, which the handle may name, and hands the request for it to `send`.
    #[inline(always)]
    pub(crate) fn begin_unmap_one(
        &mut self,
        key: DomainKey,
        (range, record): (IovaRange, MappingHandle),
        send: impl FnOnce(&Request, Op) -> Option<(u16, bool)>,
    ) -> Option<Sent<MappingHandle>> {
        let domain = self.domain_mut(key)?;
        let id = domain.id;
        let (record, (slot, wanted)) = domain.space.begin_unmap((range, record), |record| {
            send(&Request::Unmap { domain: id, range }, Op::Unmap { domain: key, range, record })
        })?;
        domain.stats.requests += 1;
        domain.stats.kicks += u64::from(wanted);
        Some((record, slot, wanted))
    }

    /// The device confirmed a MAP that somebody waits for. False where there is more to it.
    #[inline(always)]
    pub(crate) fn mapped_one(&mut self, key: DomainKey, range: IovaRange, record: MappingHandle) -> bool {
        let Some(domain) = self.domain_mut(key).filter(|domain| domain.possible > 0) else { return false };
        if !domain.space.confirm(record, range) {
            return false;
        }
        let stats = &mut domain.stats;
        stats.maps += 1;
        stats.mapped_bytes += range.len_minus_one() + 1;
        stats.peak_bytes = stats.peak_bytes.max(stats.mapped_bytes);
        self.confirmed.maps += 1;
        true
    }

    /// The device confirmed an UNMAP that somebody waits for. With the memory that was held for the mapping. `None` where
    /// there is more to it.
    #[inline(always)]
    pub(crate) fn unmapped_one(
        &mut self,
        key: DomainKey,
        range: IovaRange,
        record: MappingHandle,
    ) -> Option<Option<HeldMemory>> {
        let domain = self.domain_mut(key)?;
        let held = domain.space.end_unmapped(record, range)?;
        domain.stats.unmaps += 1;
        domain.stats.mapped_bytes -= range.len_minus_one() + 1;
        self.confirmed.unmaps += 1;
        Some(held)
    }

    /// Defers the unmapping of one live mapping, which the handle may name. [`Deferral::Strict`] where nothing was done.
    #[inline(always)]
    pub(crate) fn defer_one(
        &mut self,
        key: DomainKey,
        (range, record): (IovaRange, MappingHandle),
        now_ns: Option<u64>,
    ) -> Deferral {
        let Some(domain) = self.domain_mut(key) else { return Deferral::Strict };
        let Some(list) = domain.deferred.as_mut().filter(|list| list.has_room()) else {
            return Deferral::Strict;
        };
        if !domain.space.defer(record, range) {
            return Deferral::Strict;
        }
        list.push(range, 1, now_ns)
    }
}
