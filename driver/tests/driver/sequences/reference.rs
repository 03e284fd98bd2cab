//! What should be, in plain maps: who is in which domain, and what is mapped there for whom.
//!
//! ```text
//!   endpoint --- place ---> domain --- maps ---> first: (last, phys, flags, on_device, owner)
//! ```
//! A domain is *dead* while it has no endpoint: its mappings are recorded by the driver, not on the device.

use std::collections::{BTreeMap, BTreeSet};

use virtio_iommu_model::{AccessKind, Config, Endpoint, FaultStyle};

/// Who may unmap a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Raw,
    List,
    Coherent,
    Bounce,
    /// Nobody but `reclaim`.
    Quarantine,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    pub(super) last: u64,
    pub(super) phys: u64,
    pub(super) flags: u32,
    pub(super) on_device: bool,
    pub(super) owner: Owner,
    /// Whether the driver keeps the memory, and gives it back in time.
    pub(super) held: bool,
}

impl Owner {
    pub(super) fn is_held(self) -> bool {
        matches!(self, Self::Coherent | Self::Bounce)
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Space {
    /// The number, as the driver says.
    pub(super) id: u32,
    pub(super) endpoints: BTreeSet<usize>,
    pub(super) maps: BTreeMap<u64, Mapped>,
    /// What endpoints that are or were there reserve, in whole granules.
    pub(super) holes: Vec<(u64, u64)>,
    /// Addresses that are kept to fault.
    pub(super) faulting: Vec<(u64, u64)>,
    /// Whether more addresses are out of use than the test can know.
    pub(super) leaky: bool,
    /// Handles: the test's own, and one for each view.
    pub(super) handles: usize,
    pub(super) gone: bool,
}

/// What an access should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    Memory(u64),
    Doorbell,
    Refused,
    /// One of two, by the order of a tree that nobody can see (QEMU's page-edge bug between neighbours).
    Either([Option<u64>; 2]),
    /// Not said: the doorbell of an endpoint without a domain.
    Unsaid,
}

pub(super) struct Reference {
    pub(super) config: Config,
    pub(super) granule: u64,
    pub(super) usable: (u64, u64),
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) spaces: Vec<Space>,
    pub(super) place: Vec<Option<usize>>,
}

/// How a prediction went: whether anything changes is up to the caller.
pub(super) type Predicted = Result<(), &'static str>;

fn overlap((first, last): (u64, u64), other: (u64, u64)) -> bool {
    first <= other.1 && other.0 <= last
}

impl Space {
    /// Everything that is not free.
    fn taken(&self) -> impl Iterator<Item = (u64, u64)> {
        let maps = self.maps.iter().map(|(first, map)| (*first, map.last));
        maps.chain(self.faulting.iter().copied())
    }

    pub(super) fn is_free(&self, range: (u64, u64)) -> bool {
        !self.taken().chain(self.holes.iter().copied()).any(|taken| overlap(taken, range))
    }

    /// Whether `len` bytes are free from `granule` up to `limit`.
    pub(super) fn has_room(&self, len: u64, usable: (u64, u64), granule: u64, limit: u64) -> bool {
        let lowest = usable.0.max(granule);
        let limit = usable.1.min(limit);
        let mut taken: Vec<_> = self.taken().chain(self.holes.iter().copied()).collect();
        taken.sort_unstable();
        let mut at = lowest;
        for (first, last) in taken {
            if first > at && fits(at, (first - 1).min(limit), len) {
                return true;
            }
            at = at.max(last.saturating_add(1));
        }
        fits(at, limit, len)
    }

    pub(super) fn mapping_at(&self, iova: u64) -> Option<(u64, &Mapped)> {
        let (first, map) = self.maps.range(..=iova).next_back()?;
        (iova <= map.last).then_some((*first, map))
    }

    /// Whether unmapping the range succeeds.
    pub(super) fn predict_unmap(&self, first: u64, last: u64) -> Predicted {
        let live = |map: &Mapped| map.owner != Owner::Quarantine;
        let start = self.maps.get(&first).filter(|map| live(map)).ok_or("NotMapped")?;
        let (mut end, mut all_live) = (start.last, true);
        while end < last {
            let next = end.checked_add(1).and_then(|next| self.maps.get(&next)).ok_or("NotWhole")?;
            all_live &= live(next);
            end = next.last;
        }
        if end != last {
            return Err("NotWhole");
        }
        if all_live { Ok(()) } else { Err("NotMapped") }
    }
}

fn fits(first: u64, last: u64, len: u64) -> bool {
    last.checked_sub(first).is_some_and(|span| span >= len - 1)
}

impl Reference {
    /// An endpoint's regions in whole granules, as far as they can be mapped at all.
    fn regions(&self, endpoint: usize) -> Vec<(u64, u64)> {
        let mask = self.granule - 1;
        let regions = self.endpoints[endpoint].reserved.iter();
        let rounded = regions.map(|region| (region.first & !mask, region.last | mask));
        let cut = rounded.map(|(first, last)| (first.max(self.usable.0), last.min(self.usable.1)));
        cut.filter(|(first, last)| first <= last).collect()
    }

    /// Whether attaching succeeds. What the endpoint reserves is taken out of the domain even if it does not.
    pub(super) fn predict_attach(&mut self, endpoint: usize, to: usize) -> Predicted {
        let deserted = match self.place[endpoint] {
            None => None,
            Some(at) if at == to => return Ok(()),
            Some(at) if self.spaces[at].handles == 0 && self.spaces[at].maps.is_empty() => Some(at),
            Some(_) => return Err("Busy"),
        };
        for region in self.regions(endpoint) {
            let space = &mut self.spaces[to];
            if space.taken().any(|taken| overlap(taken, region)) {
                return Err("ReservedInUse");
            }
            space.holes.push(region);
        }
        let alone = deserted.is_none_or(|at| self.spaces[at].endpoints.len() == 1);
        let empty = self.spaces[to].endpoints.is_empty() && self.spaces[to].maps.is_empty();
        let fits = deserted.is_none() || (alone && empty);
        if fits { Ok(()) } else { Err("Parked") }
    }

    /// Takes note that an endpoint is in a domain now. What the domain had before it died is mapped again.
    pub(super) fn join(&mut self, endpoint: usize, to: usize) {
        if self.place[endpoint] == Some(to) {
            return;
        }
        self.leave(endpoint);
        self.place[endpoint] = Some(to);
        let space = &mut self.spaces[to];
        space.endpoints.insert(endpoint);
        for map in space.maps.values_mut().filter(|map| map.owner != Owner::Quarantine) {
            map.on_device = true;
        }
    }

    /// Takes note that an endpoint is in no domain now.
    pub(super) fn leave(&mut self, endpoint: usize) {
        let Some(from) = self.place[endpoint].take() else { return };
        let space = &mut self.spaces[from];
        space.endpoints.remove(&endpoint);
        if space.endpoints.is_empty() {
            space.maps.retain(|_, map| map.owner != Owner::Quarantine);
            for map in space.maps.values_mut() {
                map.on_device = false;
            }
        }
        self.settle(from);
    }

    /// A domain that nobody holds and that has no endpoint is no more.
    pub(super) fn settle(&mut self, at: usize) {
        let space = &mut self.spaces[at];
        if space.handles == 0 && space.endpoints.is_empty() {
            space.maps.clear();
            space.gone = true;
        }
    }

    /// What an access of an endpoint should do.
    pub(super) fn expected(&self, endpoint: usize, iova: u64, kind: AccessKind) -> Expected {
        let quirks = &self.config.quirks;
        let mut regions = self.endpoints[endpoint].reserved.iter();
        let region = regions.find(|region| (region.first..=region.last).contains(&iova));
        let Some(place) = self.place[endpoint] else {
            let doorbell = region.is_some_and(|region| region.is_msi()) && quirks.faults == FaultStyle::Qemu;
            return if doorbell { Expected::Unsaid } else { Expected::Refused };
        };
        if let Some(region) = region {
            let doorbell = region.is_msi() && kind == AccessKind::Write;
            return if doorbell { Expected::Doorbell } else { Expected::Refused };
        }
        let through = |byte: u64| {
            let (first, map) = self.spaces[place].mapping_at(byte).filter(|(_, map)| map.on_device)?;
            let needed = if kind == AccessKind::Read { 1 } else { 2 };
            let permitted = quirks.permissions_ignored || map.flags & needed != 0;
            Some((first, permitted.then(|| iova.wrapping_sub(first).wrapping_add(map.phys))))
        };
        let here = through(iova);
        let above = iova.checked_add(1).filter(|_| quirks.granule_translation).and_then(through);
        match (here, above) {
            (Some(here), Some(above)) if here.0 != above.0 => Expected::Either([here.1, above.1]),
            (Some((_, to)), _) | (None, Some((_, to))) => to.map_or(Expected::Refused, Expected::Memory),
            (None, None) => Expected::Refused,
        }
    }
}
