//! What should be, in plain maps: who is in which domain, and what is mapped there for whom.
//!
//! ```text
//!   endpoint --- place ---> domain --- maps ---> first: (last, phys, flags, claimed, owner)
//! ```
//! A domain without endpoints is not there for the device. Once nothing bypasses, the driver knows that its mappings
//! went with it, and does not *claim* them any more: they are recorded, and are mapped again for the next endpoint.
//!
//! After the device misbehaved some things are not known, until the device answered all and the kernel settled things:
//! - a domain is *in doubt*: the device has some of the mappings on record, and none besides;
//! - an endpoint is *unsure*: in its place, or nowhere;
//! - a mapping is *leaving*: nobody uses it, and one day the driver lets it go, not before the device did.

use std::collections::{BTreeMap, BTreeSet};

use virtio_iommu_model::{AccessKind, Config, Endpoint, FaultStyle};

/// Who may unmap a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Raw,
    /// Who has the handle, of a list or of lent memory.
    Handle,
    Coherent,
    Bounce,
    /// Nobody but `reclaim`.
    Leaving,
}

/// Whose the mapped memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// Nobody's: it is not even there.
    Nowhere,
    /// The platform's, which gets it back.
    Platform,
    /// The test's, which gets it back.
    Lent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    pub(super) last: u64,
    pub(super) phys: u64,
    pub(super) flags: u32,
    /// Whether the driver takes the device to have it.
    pub(super) claimed: bool,
    /// Whether the device does not have it, and the driver cannot find that out.
    pub(super) is_lost: bool,
    pub(super) owner: Owner,
    pub(super) memory: Memory,
}

impl Mapped {
    pub(super) fn is_leaving(&self) -> bool {
        self.owner == Owner::Leaving
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Space {
    /// The number, as the driver says.
    pub(super) id: u32,
    /// Endpoints reach all of memory by its own addresses.
    pub(super) identity: bool,
    pub(super) endpoints: BTreeSet<usize>,
    pub(super) maps: BTreeMap<u64, Mapped>,
    /// What endpoints that are or were there reserve, in whole granules.
    pub(super) holes: Vec<(u64, u64)>,
    /// Addresses that are kept to fault.
    pub(super) faulting: Vec<(u64, u64)>,
    /// Whether more addresses may be out of use than the test can know.
    pub(super) leaky: bool,
    /// Handles: the test's own, and one for each view.
    pub(super) handles: usize,
    pub(super) in_doubt: bool,
    pub(super) gone: bool,
}

/// What an access should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    Memory(u64),
    Doorbell,
    Refused,
    /// One of these, `None` for a refusal: in doubt, or by the order of a tree that nobody can see (QEMU's page-edge
    /// bug between neighbours).
    OneOf([Option<u64>; 4]),
    /// Not said: the doorbell of an endpoint without a domain.
    Unsaid,
}

/// How a prediction went: whether anything changes is up to the caller.
pub(super) type Predicted = Result<(), &'static str>;

fn overlap((first, last): (u64, u64), other: (u64, u64)) -> bool {
    first <= other.1 && other.0 <= last
}

fn fits(first: u64, last: u64, len: u64) -> bool {
    last.checked_sub(first).is_some_and(|span| span >= len - 1)
}

impl Space {
    /// Everything that is not free, but holes.
    fn taken(&self) -> impl Iterator<Item = (u64, u64)> {
        let maps = self.maps.iter().map(|(first, map)| (*first, map.last));
        maps.chain(self.faulting.iter().copied())
    }

    pub(super) fn is_free(&self, range: (u64, u64)) -> bool {
        !self.taken().chain(self.holes.iter().copied()).any(|taken| overlap(taken, range))
    }

    /// Whether `len` bytes are free from `granule` up to `limit`.
    pub(super) fn has_room(&self, len: u64, usable: (u64, u64), granule: u64, limit: u64) -> bool {
        let limit = usable.1.min(limit);
        let mut taken: Vec<_> = self.taken().chain(self.holes.iter().copied()).collect();
        taken.sort_unstable();
        let mut at = usable.0.max(granule);
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

    /// Whether unmapping the range finds whole mappings that somebody uses.
    pub(super) fn predict_whole(&self, first: u64, last: u64) -> Predicted {
        let start = self.maps.get(&first).filter(|map| !map.is_leaving()).ok_or("NotMapped")?;
        let (mut end, mut all_used) = (start.last, true);
        while end < last {
            let next = end.checked_add(1).and_then(|next| self.maps.get(&next)).ok_or("NotWhole")?;
            all_used &= !next.is_leaving();
            end = next.last;
        }
        if end != last {
            return Err("NotWhole");
        }
        if all_used { Ok(()) } else { Err("NotMapped") }
    }

    /// Whether unmapping whole mappings succeeds: not where the device lost what the driver claims.
    pub(super) fn predict_unmap(&self, first: u64, last: u64) -> Predicted {
        let claimed = self.maps.range(first..=last).any(|(_, map)| map.claimed);
        let lost = self.maps.range(first..=last).any(|(_, map)| map.is_lost);
        if lost || (claimed && self.endpoints.is_empty()) { Err("Request") } else { Ok(()) }
    }

    fn has_claims(&self) -> bool {
        self.maps.values().any(|map| map.claimed)
    }
}

pub(super) struct Reference {
    pub(super) config: Config,
    pub(super) granule: u64,
    pub(super) usable: (u64, u64),
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) spaces: Vec<Space>,
    pub(super) place: Vec<Option<usize>>,
    pub(super) unsure: Vec<bool>,
    /// Endpoints that were unplugged.
    pub(super) unplugged: Vec<bool>,
    /// Whether the driver knows that endpoints without a domain reach nothing.
    pub(super) closed: bool,
    /// Whether they reach everything.
    pub(super) bypass: bool,
    /// Numbers that the driver does not use any more, since the device refused a first mapping.
    pub(super) retired: usize,
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

    /// Takes what an endpoint reserves out of a domain for good. False where something is there.
    pub(super) fn reserve(&mut self, endpoint: usize, to: usize) -> bool {
        for region in self.regions(endpoint) {
            let space = &mut self.spaces[to];
            if space.taken().any(|taken| overlap(taken, region)) {
                return false;
            }
            if !space.holes.contains(&region) {
                space.holes.push(region);
            }
        }
        true
    }

    /// Whether attaching succeeds. What the endpoint reserves is taken out of the domain even if it does not.
    pub(super) fn predict_attach(&mut self, endpoint: usize, to: usize) -> Predicted {
        // It is probed again first, and the device does not know it.
        if self.unplugged[endpoint] {
            return Err("Request");
        }
        let deserted = match self.place[endpoint] {
            None => None,
            Some(at) if at == to => return Ok(()),
            Some(at) if self.spaces[at].handles == 0 && self.spaces[at].maps.is_empty() => Some(at),
            Some(_) => return Err("Busy"),
        };
        if self.spaces[to].endpoints.is_empty() && self.spaces[to].has_claims() {
            return Err("DeadDomain");
        }
        if !self.reserve(endpoint, to) {
            return Err("ReservedInUse");
        }
        let alone =
            deserted.is_none_or(|at| self.spaces[at].endpoints.len() == 1 && !self.spaces[at].identity);
        let space = &self.spaces[to];
        let empty = space.endpoints.is_empty() && space.maps.is_empty() && !space.identity;
        if deserted.is_some() && !(alone && empty) {
            return Err("Parked");
        }
        Ok(())
    }

    /// Takes note that an endpoint is in a domain now. What the domain had before it died is mapped again.
    pub(super) fn join(&mut self, endpoint: usize, to: usize) {
        match self.place[endpoint].filter(|from| *from != to) {
            // It did not leave: its new domain took the place of the old one, and its number.
            Some(from) if !self.unsure[endpoint] => {
                let ids = (self.spaces[to].id, self.spaces[from].id);
                (self.spaces[from].id, self.spaces[to].id) = ids;
                self.leave(endpoint);
            }
            Some(_) => self.leave(endpoint),
            None => {}
        }
        self.unsure[endpoint] = false;
        self.place[endpoint] = Some(to);
        let space = &mut self.spaces[to];
        space.endpoints.insert(endpoint);
        for map in space.maps.values_mut().filter(|map| !map.is_leaving()) {
            map.claimed = true;
        }
    }

    /// Takes note that an endpoint may be in a domain, or nowhere.
    pub(super) fn doubt(&mut self, endpoint: usize, at: usize) {
        self.spaces[at].in_doubt = true;
        self.leave(endpoint);
        (self.place[endpoint], self.unsure[endpoint]) = (Some(at), true);
        self.spaces[at].endpoints.insert(endpoint);
    }

    /// Takes note that an endpoint is in no domain now.
    pub(super) fn leave(&mut self, endpoint: usize) {
        self.unsure[endpoint] = false;
        let Some(from) = self.place[endpoint].take() else { return };
        self.spaces[from].endpoints.remove(&endpoint);
        self.settle(from);
    }

    /// Takes note that a domain is no more, of which that was not known.
    pub(super) fn forget(&mut self, at: usize) {
        for endpoint in std::mem::take(&mut self.spaces[at].endpoints) {
            (self.place[endpoint], self.unsure[endpoint]) = (None, false);
        }
        let space = &mut self.spaces[at];
        space.maps.clear();
        (space.gone, space.in_doubt) = (true, false);
    }

    /// Draws the consequences of a domain losing its last endpoint, its last handle, or what might bypass it.
    pub(super) fn settle(&mut self, at: usize) {
        let (closed, space) = (self.closed, &mut self.spaces[at]);
        if !space.endpoints.is_empty() || space.in_doubt {
            return;
        }
        if closed {
            space.maps.retain(|_, map| !map.is_leaving() && space.handles > 0);
            space.maps.values_mut().for_each(|map| map.claimed = false);
        }
        space.gone |= space.handles == 0 && space.maps.is_empty();
    }

    /// What an access of an endpoint should do.
    pub(super) fn expected(&self, endpoint: usize, iova: u64, kind: AccessKind) -> Expected {
        let quirks = &self.config.quirks;
        let nowhere = if self.bypass { Expected::Memory(iova) } else { Expected::Refused };
        if self.unplugged[endpoint] {
            return nowhere;
        }
        let mut regions = self.endpoints[endpoint].reserved.iter();
        let region = regions.find(|region| (region.first..=region.last).contains(&iova));
        let Some(place) = self.place[endpoint] else {
            let doorbell = region.is_some_and(|region| region.is_msi()) && kind == AccessKind::Write;
            return match doorbell {
                true if self.bypass => Expected::Doorbell,
                true if quirks.faults == FaultStyle::Qemu => Expected::Unsaid,
                _ => nowhere,
            };
        };
        let space = &self.spaces[place];
        let unsure = self.unsure[endpoint];
        if let Some(region) = region {
            let doorbell = region.is_msi() && kind == AccessKind::Write;
            return match doorbell {
                _ if unsure => Expected::Unsaid,
                true => Expected::Doorbell,
                false if space.identity => Expected::Memory(iova),
                false => Expected::Refused,
            };
        }
        let other = Some(iova).filter(|_| unsure && self.bypass);
        if space.identity {
            return if unsure {
                Expected::OneOf([None, Some(iova), None, None])
            } else {
                Expected::Memory(iova)
            };
        }
        let through = |byte: u64| {
            let (first, map) = space.mapping_at(byte).filter(|(_, map)| map.claimed || space.in_doubt)?;
            let needed = if kind == AccessKind::Read { 1 } else { 2 };
            let permitted = quirks.permissions_ignored || map.flags & needed != 0;
            Some((first, permitted.then(|| iova.wrapping_sub(first).wrapping_add(map.phys))))
        };
        let here = through(iova);
        let above = iova.checked_add(1).filter(|_| quirks.granule_translation).and_then(through);
        let to = |found: Option<(u64, Option<u64>)>| found.and_then(|(_, to)| to);
        if unsure || space.in_doubt {
            return Expected::OneOf([None, other, to(here), to(above)]);
        }
        match (here, above) {
            (Some(here), Some(above)) if here.0 != above.0 => {
                Expected::OneOf([here.1, above.1, here.1, above.1])
            }
            (Some((_, to)), _) | (None, Some((_, to))) => to.map_or(Expected::Refused, Expected::Memory),
            (None, None) => Expected::Refused,
        }
    }
}
