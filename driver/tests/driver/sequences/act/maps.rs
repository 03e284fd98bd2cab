//! The raw layer: mappings at addresses.

use virtio_iommu::{Iova, MapError, PhysAddr, Prot, UnmapError};

use super::super::check::same;
use super::super::op::Place;
use super::super::reference::{Memory, Owner, Predicted};
use super::super::world::World;
use super::{Done, NOTHING, PHYS, judge, pick};

/// Why a domain of which not all is known may have no room.
const NO_ROOM: &[&str] = &["InUse", "IovaExhausted"];

impl World {
    fn predict_prot(&self, prot: u8) -> Predicted {
        if prot & 3 == 0 {
            return Err("NoPermission");
        }
        let mmio = self.reference.config.offers(virtio_iommu_model::feature::MMIO);
        if prot & 4 != 0 && !mmio { Err("NoMmioFlag") } else { Ok(()) }
    }

    pub(super) fn map(&mut self, slot: u8, pages: u64, phys: u64, prot: u8, low: bool) -> Done {
        let Some(at) = self.at(slot) else { return Ok(None) };
        let granule = self.reference.granule;
        let (len, phys, limit) = (pages * granule, PHYS + phys * granule, self.limit(low));
        let flags = Prot::from_bits_retain(prot.into());
        // SAFETY: nobody's memory.
        let mapped = unsafe { self.domain(slot).map(PhysAddr::new(phys), len, flags, Iova::new(limit)) };
        if self.is_sure(at) {
            let predicted = if self.reference.spaces[at].identity { Ok(()) } else { self.predict_prot(prot) };
            let predicted = predicted.and_then(|()| self.predict_parts(at, 1));
            let predicted = predicted.and_then(|()| self.predict_room(at, len, limit));
            judge(&mapped, self.tolerate(at, &mapped, NO_ROOM, predicted))?;
        }
        match mapped {
            Ok(iova) => {
                self.check_placed(at, iova, len, limit)?;
                let whose = (Owner::Raw, Memory::Nowhere);
                Ok(Some(vec![self.mapped(at, (iova.get(), len), phys, prot.into(), whose)]))
            }
            Err(error) => self.not_mapped(at, error, Memory::Nowhere).and(NOTHING),
        }
    }

    /// Where a place is.
    fn address(&self, place: Place) -> u64 {
        let (granule, usable) = (self.reference.granule, self.reference.usable);
        match place {
            Place::Low(granules) => usable.0 + u64::from(granules) * granule,
            Place::Msi(granules) => 0xfee0_0000 + u64::from(granules) * granule - 8 * granule,
            Place::High(granules) => usable.1 + 1 - u64::from(granules) * granule,
            Place::Odd(granules) => usable.0 + u64::from(granules) * granule + 1,
        }
    }

    /// What mapping at an address comes to.
    fn predict_at(&self, at: usize, first: u64, len: u64, prot: u8) -> Predicted {
        let (space, usable) = (&self.reference.spaces[at], self.reference.usable);
        if space.identity {
            return Err("IdentityDomain");
        }
        let last = first.checked_add(len.max(1) - 1).filter(|last| *last <= usable.1);
        match last {
            _ if len < 2 => Err("Empty"),
            _ if (first | len) & (self.reference.granule - 1) != 0 => Err("Misaligned"),
            None => Err("OutsideInputRange"),
            Some(last) => self
                .predict_prot(prot)
                .and_then(|()| self.predict_parts(at, 1))
                .and_then(|()| if space.is_free((first, last)) { Ok(()) } else { Err("InUse") }),
        }
    }

    pub(super) fn map_at(&mut self, slot: u8, place: Place, pages: u64, phys: u64, prot: u8) -> Done {
        let Some(at) = self.at(slot) else { return Ok(None) };
        let granule = self.reference.granule;
        let (first, len, phys) = (self.address(place), pages * granule, PHYS + phys * granule);
        let flags = Prot::from_bits_retain(prot.into());
        // SAFETY: nobody's memory.
        let mapped = unsafe { self.domain(slot).map_at(Iova::new(first), PhysAddr::new(phys), len, flags) };
        if self.is_sure(at) {
            let predicted = self.predict_at(at, first, len, prot);
            judge(&mapped, self.tolerate(at, &mapped, NO_ROOM, predicted))?;
        }
        match mapped {
            Ok(()) => {
                let range = (first, first + (len - 1));
                self.make_room(at, range)?;
                same("free addresses", self.reference.spaces[at].is_free(range), true)?;
                self.mapped(at, (first, len), phys, prot.into(), (Owner::Raw, Memory::Nowhere));
                Ok(Some(vec![range]))
            }
            Err(error) => {
                self.not_mapped(at, error, Memory::Nowhere)?;
                Ok(Some(vec![(first, first.saturating_add(len - 1))]))
            }
        }
    }

    /// Maps memory at its own addresses, around what is reserved. A stretch that fails leaves those before it.
    pub(super) fn map_identity(&mut self, slot: u8, place: Place, pages: u64) -> Done {
        // Where it maps depends on what is reserved.
        let known = |at: &usize| !self.reference.spaces[*at].leaky;
        let Some(at) = self.at(slot).filter(known) else { return Ok(None) };
        let (first, len) = (self.address(place), pages * self.reference.granule);
        // SAFETY: nobody's memory: there is no DMA but the test's.
        let mapped = unsafe { self.domain(slot).map_identity(PhysAddr::new(first), len, Prot::READ) };
        let sure = self.is_sure(at);
        let last = len.checked_sub(1).and_then(|more| first.checked_add(more));
        let stretches = last.map_or(Vec::new(), |last| self.stretches(at, first, last));
        let mut predicted = if last.is_some() { Ok(()) } else { Err("PhysicalWraps") };
        let mut touched = Vec::new();
        for (first, last) in stretches {
            let len = last - first + 1;
            if mapped.is_ok() {
                self.make_room(at, (first, last))?;
            }
            predicted = self.tolerate(at, &mapped, NO_ROOM, self.predict_at(at, first, len, 1));
            if predicted.is_err() || (mapped.is_err() && !self.is_new(at, first, last, &mapped)) {
                break;
            }
            touched.push(self.mapped(at, (first, len), first, 1, (Owner::Raw, Memory::Nowhere)));
        }
        if sure {
            judge(&mapped, predicted)?;
        }
        if let Err(error) = mapped {
            self.not_mapped(at, error, Memory::Nowhere)?;
        }
        Ok(Some(touched))
    }

    /// Whether the driver says that it mapped a stretch before it came to what failed.
    fn is_new(&self, at: usize, first: u64, last: u64, failed: &Result<(), MapError>) -> bool {
        let failed = match failed {
            Err(MapError::Request { range, .. } | MapError::Quarantined { range, .. }) => range.start().get(),
            _ => u64::MAX,
        };
        let found = self.handle(at).and_then(|domain| domain.translate(Iova::new(first)));
        first < failed && found.is_some_and(|found| found.range.last().get() == last)
    }

    /// What is not reserved of a range.
    fn stretches(&self, at: usize, first: u64, last: u64) -> Vec<(u64, u64)> {
        let mut holes = self.reference.spaces[at].holes.clone();
        holes.sort_unstable();
        let (mut next, mut found) = (Some(first), Vec::new());
        for (hole, end) in holes.into_iter().filter(|(hole, end)| *hole <= last && first <= *end) {
            found.extend(next.filter(|next| *next < hole).map(|next| (next, hole - 1)));
            next = next.max(end.checked_add(1));
        }
        found.extend(next.filter(|next| *next <= last).map(|next| (next, last)));
        found
    }

    pub(super) fn unmap(&mut self, slot: u8, which: u8, neighbours: u8) -> Done {
        let Some(at) = self.at(slot) else { return Ok(None) };
        let maps = &self.reference.spaces[at].maps;
        let raw: Vec<u64> =
            maps.iter().filter(|(_, map)| map.owner == Owner::Raw).map(|(first, _)| *first).collect();
        let Some(first) = pick(raw.len(), which).map(|which| raw[which]) else { return Ok(None) };
        let mut last = maps[&first].last;
        for _ in 0..neighbours {
            let next = last.checked_add(1).and_then(|next| maps.get(&next));
            let Some(next) = next.filter(|next| next.owner == Owner::Raw) else { break };
            last = next.last;
        }
        // SAFETY: the test made the mappings.
        let unmapped = unsafe { self.domain(slot).unmap(Iova::new(first), last - first + 1) };
        self.ended(at, (first, last), unmapped)
    }

    /// Tries to unmap what is not made of whole mappings, most of the time.
    pub(super) fn unmap_other(&mut self, slot: u8, which: u8, skip: u64, pages: u64) -> Done {
        let Some(at) = self.at(slot) else { return Ok(None) };
        let (granule, space) = (self.reference.granule, &self.reference.spaces[at]);
        let firsts: Vec<u64> = space.maps.keys().copied().collect();
        let Some(which) = pick(firsts.len(), which) else { return Ok(None) };
        let Some(first) = firsts[which].checked_add(skip * granule) else { return Ok(None) };
        let len = pages * granule;
        let predicted = match first.checked_add(len.max(1) - 1) {
            Some(last) if len > 0 => space.predict_whole(first, last),
            _ => Err("NotMapped"),
        };
        if predicted.is_ok() {
            return Ok(None);
        }
        // SAFETY: nothing is unmapped.
        let unmapped = unsafe { self.domain(slot).unmap(Iova::new(first), len) };
        match unmapped {
            // What was not mapped again for certain is not said to be there.
            Err(UnmapError::NotMapped(_)) if !self.is_sure(at) => {}
            _ => _ = judge(&unmapped, predicted)?,
        }
        NOTHING
    }
}
