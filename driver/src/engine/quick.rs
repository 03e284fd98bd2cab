//! What most calls come to, in one step each: one mapping in one record, confirmed by the device at once.
//!
//! The same as `map` and `settle` do. Wherever anything is unusual nothing is done here, and they take over: they find
//! the words for what is wrong, and know the rare states.

use super::domain::DomainRecord;
use super::mapping::{ListId, MappingHandle, Purpose};
use super::{DomainKey, Engine, Geometry, Op, Placement};
use crate::addr::{Iova, IovaRange};
use crate::dma::HeldMemory;
use crate::exchange::Run;
use crate::options::DomainKind;
use crate::prot::Prot;
use crate::wire::request::Request;

/// A mapping whose request was sent.
#[derive(Clone, Copy)]
pub(crate) struct Begun {
    pub range: IovaRange,
    pub record: MappingHandle,
}

impl DomainRecord {
    /// Whether [`check`](Self::check) has nothing against a mapping, wherever it goes.
    #[inline]
    fn suits(&self, geometry: &Geometry, run: Run, prot: Prot) -> bool {
        let (phys, len, bits) = (run.phys.get(), run.len, prot.bits());
        let plain = (Prot::READ | Prot::WRITE).bits();
        (phys | len) & (geometry.granule - 1) == 0
            && len >= 2
            && len - 1 <= u64::MAX - phys
            && bits & !plain == 0
            && bits & plain != 0
            && self.kind == DomainKind::Translated
            && self.attached > 0
            && !self.in_transition
            && !self.space.is_full()
    }
}

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
        send: impl FnOnce(&Request, Op),
    ) -> Option<Begun> {
        let geometry = &self.geometry;
        let domain = self.domains.get_mut(usize::from(key.index))?.as_mut()?;
        if domain.generation != key.generation || !domain.suits(geometry, run, purpose.prot) {
            return None;
        }
        let (align, lowest) = (placement.align.max(geometry.granule), Iova::new(geometry.granule));
        let bounds = (lowest, placement.limit);
        let (record, range) = domain.space.make(run, (align, bounds), (purpose, list), held)?;
        domain.stats.requests += 1;
        let request = Request::Map { domain: domain.id, range, phys: run.phys, prot: purpose.prot };
        let op = Op::Map { domain: key, range, record };
        send(&request, op);
        Some(Begun { range, record })
    }

    /// Begins the unmapping of one live mapping, and hands the request for it to `send`.
    #[inline(always)]
    pub(crate) fn begin_unmap_one(
        &mut self,
        key: DomainKey,
        range: IovaRange,
        send: impl FnOnce(&Request, Op),
    ) -> Option<MappingHandle> {
        let domain = self.domain_mut(key)?;
        let record = domain.space.begin_unmap(range)?;
        domain.stats.requests += 1;
        let request = Request::Unmap { domain: domain.id, range };
        let op = Op::Unmap { domain: key, range, record };
        send(&request, op);
        Some(record)
    }

    /// The device confirmed a MAP that somebody waits for. False where there is more to it.
    #[inline]
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
    #[inline]
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
}
