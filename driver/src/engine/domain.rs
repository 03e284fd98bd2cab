//! Records of domains.

use super::deferred::DeferredList;
use super::space::Space;
use super::{DomainKey, Geometry};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::error::MapError;
use crate::id::DomainId;
use crate::options::DomainKind;
use crate::prot::Prot;

/// What a domain did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainStats {
    /// MAP requests that the device confirmed.
    pub maps: u64,
    /// UNMAP requests that the device confirmed.
    pub unmaps: u64,
    /// All requests that were sent for the domain, its attachments included.
    pub requests: u64,
    /// Doorbells that were due for them.
    pub kicks: u64,
    /// Bytes that are mapped now. What is in quarantine is counted there.
    pub mapped_bytes: u64,
    /// The most bytes that were mapped at a time.
    pub peak_bytes: u64,
    /// Mappings that were unmapped, and wait for a flush.
    pub deferred_mappings: u64,
    /// The bytes of those mappings.
    pub deferred_bytes: u64,
}

/// What a domain did, as it is counted.
#[derive(Default)]
pub(crate) struct Counts {
    pub maps: u64,
    pub unmaps: u64,
    pub requests: u64,
    pub kicks: u64,
    peak_bytes: u64,
    /// How many bytes fewer than the most are mapped. Where it passes 0 there are more than ever.
    below_peak: u64,
}

impl Counts {
    /// The device confirmed so many MAPs, of so many bytes in all.
    #[inline(always)]
    pub(super) fn mapped(&mut self, maps: u64, bytes: u64) {
        self.maps += maps;
        let above;
        (self.below_peak, above) = self.below_peak.overflowing_sub(bytes);
        if above {
            self.rise();
        }
    }

    /// There are more than ever: by what is missing below zero.
    #[cold]
    fn rise(&mut self) {
        self.peak_bytes += self.below_peak.wrapping_neg();
        self.below_peak = 0;
    }

    /// The device confirmed so many UNMAPs, of so many bytes in all.
    #[inline(always)]
    pub(super) fn unmapped(&mut self, unmaps: u64, bytes: u64) {
        self.unmaps += unmaps;
        self.below_peak += bytes;
    }

    fn mapped_bytes(&self) -> u64 {
        self.peak_bytes - self.below_peak
    }
}

pub(crate) struct DomainRecord {
    /// Set, as the number is, when it gets its place.
    pub key: DomainKey,
    pub id: DomainId,
    pub kind: DomainKind,
    /// [`key`](Self::key) as long as it takes mappings, so that one look says both.
    pub mappable: DomainKey,
    /// Endpoints whose ATTACH was confirmed.
    attached: u32,
    /// Endpoints that may be attached: those, and the ones under way or of unknown outcome.
    pub possible: u32,
    pub space: Space,
    /// What waits for a flush, where unmapping is deferred.
    pub deferred: Option<DeferredList>,
    pub counts: Counts,
    /// The domain is getting another number, or its mappings again: nothing new is mapped meanwhile.
    in_transition: bool,
    /// Its endpoints are coming back after a reset, so that it is worth waiting for.
    pub reviving: bool,
    /// The embedder let go of the domain: its record goes as soon as nothing depends on it.
    pub orphaned: bool,
    #[cfg(feature = "contexts")]
    pub contexts: super::ContextRecords,
}

impl DomainRecord {
    /// A record that has no place and no number yet.
    pub(super) fn new(space: Space, kind: DomainKind, deferred: Option<DeferredList>) -> Self {
        Self {
            key: DomainKey::NONE,
            mappable: DomainKey::NONE,
            id: DomainId::new(u32::MAX),
            kind,
            attached: 0,
            possible: 0,
            space,
            deferred,
            counts: Counts::default(),
            in_transition: false,
            reviving: false,
            orphaned: false,
            #[cfg(feature = "contexts")]
            contexts: super::ContextRecords::new(),
        }
    }

    /// What it did so far.
    pub(crate) fn stats(&self) -> DomainStats {
        let (mappings, deferred_bytes) = self.deferred.as_ref().map_or((0, 0), DeferredList::waiting);
        let Counts { maps, unmaps, requests, kicks, peak_bytes, .. } = self.counts;
        DomainStats {
            maps,
            unmaps,
            requests,
            kicks,
            mapped_bytes: self.counts.mapped_bytes(),
            peak_bytes,
            deferred_mappings: mappings as u64,
            deferred_bytes,
        }
    }

    pub(crate) fn attached(&self) -> u32 {
        self.attached
    }

    pub(crate) fn set_attached(&mut self, attached: u32) {
        self.attached = attached;
        self.update_mappable();
    }

    /// An endpoint's ATTACH was confirmed, while nothing else is under way.
    #[inline(always)]
    pub(super) fn join(&mut self) {
        debug_assert!(!self.in_transition);
        self.attached += 1;
        if self.kind == DomainKind::Translated {
            self.mappable = self.key;
        }
    }

    /// DETACH of an endpoint is about to be sent.
    #[inline(always)]
    pub(super) fn leave(&mut self) {
        self.attached -= 1;
        if self.attached == 0 {
            self.mappable = DomainKey::NONE;
        }
    }

    pub(crate) fn is_in_transition(&self) -> bool {
        self.in_transition
    }

    pub(crate) fn set_in_transition(&mut self, in_transition: bool) {
        self.in_transition = in_transition;
        self.update_mappable();
    }

    fn update_mappable(&mut self) {
        let takes = self.kind == DomainKind::Translated && self.attached > 0 && !self.in_transition;
        self.mappable = if takes { self.key } else { DomainKey::NONE };
    }

    /// Whether nothing is mapped in it, and it has no contexts.
    #[inline(always)]
    pub(crate) fn is_empty(&self) -> bool {
        #[cfg(feature = "contexts")]
        if self.has_contexts() {
            return false;
        }
        self.space.is_empty()
    }

    /// Whether the device may have something of it although no endpoint is known to be in it.
    pub(crate) fn is_in_doubt(&self) -> bool {
        #[cfg(feature = "contexts")]
        if self.has_contexts_there() {
            return true;
        }
        self.space.is_in_doubt()
    }

    /// Whether nothing on the device's side or in the quarantine depends on the record.
    pub(crate) fn is_idle(&self) -> bool {
        self.possible == 0 && self.is_empty()
    }

    /// Whether nobody holds the domain, and nothing is mapped in it.
    pub(crate) fn is_deserted(&self) -> bool {
        self.orphaned && self.is_empty()
    }

    /// Refuses what must never be sent (I5).
    pub(crate) fn check(
        &self,
        geometry: &Geometry,
        range: (Iova, u64),
        phys: PhysAddr,
        prot: Prot,
    ) -> Result<IovaRange, MapError> {
        let (start, len) = range;
        if self.kind == DomainKind::Identity {
            return Err(MapError::IdentityDomain);
        }
        #[cfg(feature = "contexts")]
        if matches!(self.kind, DomainKind::Contexts(_)) {
            return Err(MapError::NoDefaultContext);
        }
        let granule = geometry.granule;
        // A MAP's end must lie above its start: one byte cannot be said.
        if len < 2 {
            return Err(MapError::Empty);
        }
        for value in [start.get(), len, phys.get()] {
            if value & (granule - 1) != 0 {
                return Err(MapError::Misaligned { value, granule });
            }
        }
        if phys.checked_add(len - 1).is_none() {
            return Err(MapError::PhysicalWraps { phys, len });
        }
        let usable = geometry.usable;
        let range = IovaRange::from_len(start, len).filter(|range| usable.contains(*range));
        let range = range.ok_or(MapError::OutsideInputRange { start, len, usable })?;
        if !Prot::all().contains(prot) {
            return Err(MapError::UnknownFlags(prot.bits()));
        }
        if !prot.intersects(Prot::READ | Prot::WRITE) {
            return Err(MapError::NoPermission);
        }
        if prot.contains(Prot::MMIO) && !geometry.mmio_flag {
            return Err(MapError::NoMmioFlag);
        }
        if (self.attached == 0 && !self.reviving) || self.in_transition {
            return Err(MapError::NoEndpoint);
        }
        if self.space.is_full() {
            return Err(MapError::NoRecord { capacity: self.space.capacity() });
        }
        Ok(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails when what goes below the most, or beyond it, is not in the count of either.
    #[test]
    fn the_most_bytes_are_those_that_were_mapped_at_a_time() {
        let mut counts = Counts::default();
        let mut seen = |maps, unmaps| {
            counts.mapped(1, maps);
            counts.unmapped(1, unmaps);
            (counts.mapped_bytes(), counts.peak_bytes)
        };
        assert_eq!(seen(0x3000, 0), (0x3000, 0x3000));
        assert_eq!(seen(0x1000, 0x2000), (0x2000, 0x4000));
        assert_eq!(seen(0x2000, 0), (0x4000, 0x4000), "as many as there ever were");
        assert_eq!(seen(0x5000, 0x9000), (0, 0x9000));
    }
}
