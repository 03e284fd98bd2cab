//! Composition of the mappings of several levels: down for shadows, up for what a change is seen as.

use super::SpaceId;
use super::mappings::Mappings;
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::prot::Prot;
use crate::wire::fault::FaultAccess;
use alloc::vec::Vec;

/// What becomes of pieces of one mapping that lead to memory that adjoins, and allow the same, although they pass through
/// different mappings above.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Merging {
    /// A shadow for each: an access that is allowed before and after a change never faults, unless the device refuses something.
    #[default]
    Never,
    /// One shadow for all: fewer requests, and larger pages for the hardware. When a space above unmaps what a part of it
    /// leads through, an UNMAP that cannot split takes the whole shadow, and when that is confirmed the rest is mapped
    /// again, in ascending order. Accesses to the rest fault in between, for as long as the device takes for that; and
    /// until [`Nest::mend`](super::Nest::mend) where the device refuses to map it.
    ///
    /// For guests whose memory never changes while their devices work, or whose devices can take it.
    Adjoining,
}

/// A space as composition sees it.
pub(super) struct View<'a> {
    pub mappings: &'a Mappings,
    pub parent: Option<SpaceId>,
}

type Look<'a, 'f> = &'f dyn Fn(SpaceId) -> Option<View<'a>>;

/// A part of a space that leads to memory in one piece, through one mapping of each level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub range: IovaRange,
    pub phys: PhysAddr,
    pub prot: Prot,
}

impl Piece {
    /// Both as one, where they could be one mapping.
    fn and(self, next: Self) -> Option<Self> {
        let len = self.range.len_bytes()?;
        let touches = self.range.start().checked_add(len) == Some(next.range.start())
            && self.phys.checked_add(len) == Some(next.phys);
        let range = IovaRange::new(self.range.start(), next.range.last());
        range.filter(|_| touches && self.prot == next.prot).map(|range| Self { range, ..self })
    }

    /// A part of it.
    pub(super) fn part(self, range: IovaRange) -> Option<Self> {
        let offset = range.start().get().checked_sub(self.range.start().get())?;
        Some(Self { range, phys: self.phys.checked_add(offset)?, ..self })
            .filter(|_| self.range.contains(range))
    }
}

/// Appends the pieces of a range of a space, in ascending order. No deeper than spaces are nested. Pieces of different
/// mappings of the space itself are never one.
pub(super) fn resolve(
    look: Look<'_, '_>,
    space: SpaceId,
    range: IovaRange,
    merging: Merging,
    pieces: &mut Vec<Piece>,
) {
    let Some(view) = look(space) else { return };
    for entry in view.mappings.overlapping(range) {
        let Some(part) = intersection(entry.range, range) else { continue };
        let offset = part.start().get() - entry.range.start().get();
        let Some(target) = shifted(part, entry.target + offset) else { continue };
        let Some(parent) = view.parent else {
            let phys = PhysAddr::new(target.start().get());
            pieces.push(Piece { range: part, phys, prot: entry.prot });
            continue;
        };
        let first = pieces.len();
        resolve(look, parent, target, merging, pieces);
        // What was found above is in addresses of the parent.
        let mut kept = first;
        for at in first..pieces.len() {
            let above = pieces[at];
            let back = above.range.start().get() - target.start().get() + part.start().get();
            let prot = both(entry.prot, above.prot);
            let Some(range) = shifted(above.range, back) else { continue };
            if !prot.intersects(Prot::READ | Prot::WRITE) {
                continue;
            }
            let piece = Piece { range, phys: above.phys, prot };
            let before = pieces[first..kept].last_mut().filter(|_| merging == Merging::Adjoining);
            match before.and_then(|before| Some((before.and(piece)?, before))) {
                Some((both, before)) => *before = both,
                None => {
                    pieces[kept] = piece;
                    kept += 1;
                }
            }
        }
        pieces.truncate(kept);
    }
}

/// What both levels allow. What one says are registers are.
fn both(one: Prot, other: Prot) -> Prot {
    let allowed = one & other & (Prot::READ | Prot::WRITE);
    allowed | (one | other) & Prot::MMIO
}

/// The ranges that ranges of a space are seen at from the last space of `path`, whose first is its child: in ascending order,
/// and those that touch as one.
pub(super) fn seen_from(look: Look<'_, '_>, path: &[SpaceId], ranges: &[IovaRange]) -> Vec<IovaRange> {
    let mut ranges = ranges.to_vec();
    for step in path {
        let Some(view) = look(*step) else { return Vec::new() };
        let mut seen = Vec::new();
        for entry in view.mappings.iter() {
            let Some(target) = IovaRange::new(Iova::new(entry.target), Iova::new(entry.target_last())) else {
                continue;
            };
            let parts = ranges.iter().filter_map(|range| intersection(target, *range));
            seen.extend(parts.filter_map(|part| {
                shifted(part, part.start().get() - entry.target + entry.range.start().get())
            }));
        }
        ranges = seen;
    }
    joined(ranges)
}

/// In ascending order, and those that touch or overlap as one.
fn joined(mut ranges: Vec<IovaRange>) -> Vec<IovaRange> {
    ranges.sort_unstable_by_key(|range| range.start());
    let mut joined: Vec<IovaRange> = Vec::new();
    for range in ranges {
        let touches = |last: &IovaRange| last.last().get().saturating_add(1) >= range.start().get();
        match joined.last_mut().filter(|last| touches(last)) {
            Some(last) => {
                *last = IovaRange::new(last.start(), last.last().max(range.last())).unwrap_or(*last)
            }
            None => joined.push(range),
        }
    }
    joined
}

fn intersection(one: IovaRange, other: IovaRange) -> Option<IovaRange> {
    IovaRange::new(one.start().max(other.start()), one.last().min(other.last()))
}

/// A range of the same length from another address.
fn shifted(range: IovaRange, start: u64) -> Option<IovaRange> {
    IovaRange::new(Iova::new(start), Iova::new(start.checked_add(range.len_minus_one())?))
}

/// What a fault means, level by level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedFault {
    /// Where the endpoint is attached, and the address there: what the space's owner is told.
    pub seen: Level,
    /// The level that is to blame, and the address there.
    pub blamed: Level,
    /// What is wrong there.
    pub why: Why,
    /// What was tried, where the device said.
    pub access: FaultAccess,
}

/// A space and an address in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// The space.
    pub space: SpaceId,
    /// The address.
    pub address: Iova,
}

/// What is wrong at a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Nothing is mapped.
    NotMapped,
    /// The mapping does not allow it.
    NotAllowed,
}

/// Follows an address from level to level until one does not let it pass.
pub(super) fn explain(
    look: Look<'_, '_>,
    space: SpaceId,
    address: Iova,
    access: FaultAccess,
) -> Option<NestedFault> {
    let seen = Level { space, address };
    let mut blamed = seen;
    // Bounded by the levels.
    loop {
        let fault = |why| Some(NestedFault { seen, blamed, why, access });
        let view = look(blamed.space)?;
        let Some(entry) = view.mappings.at(blamed.address) else { return fault(Why::NotMapped) };
        let lacks = |tried, needed| access.contains(tried) && !entry.prot.contains(needed);
        if lacks(FaultAccess::READ, Prot::READ) || lacks(FaultAccess::WRITE, Prot::WRITE) {
            return fault(Why::NotAllowed);
        }
        let offset = blamed.address.get() - entry.range.start().get();
        blamed = Level { space: view.parent?, address: Iova::new(entry.target + offset) };
    }
}
