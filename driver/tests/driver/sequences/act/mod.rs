//! Each operation: what the reference says will come of it, what came of it, and the comparison.
//!
//! Where the device misbehaved, or did before and was not asked since, there is no prediction: the outcome is believed,
//! and what must never be is compared all the same.

mod device;
mod domains;
mod maps;
mod views;

use std::fmt::Debug;

use virtio_iommu::{Domain, MapError, UnmapError};

use super::check::same;
use super::op::Op;
use super::reference::{Memory, Predicted};
use super::world::{Failed, MAPPINGS, World};
use crate::support::TestPlatform;

/// Where the memory lies that the test maps. It is not there: accesses end in [`super::check`].
const PHYS: u64 = 1 << 40;

/// What an operation did: `None` where there was nothing to do it to, else the mappings that it touched.
type Done = Result<Option<Vec<(u64, u64)>>, Failed>;

/// Mapped, or refused as predicted.
const NOTHING: Done = Ok(Some(Vec::new()));

/// One of many, by a number that knows not how many there are.
fn pick(count: usize, which: u8) -> Option<usize> {
    usize::from(which).checked_rem(count)
}

/// Whether it came as predicted; true if it succeeded.
fn judge<T: Debug, E: Debug>(result: &Result<T, E>, predicted: Predicted) -> Result<bool, Failed> {
    judge_in(result, "", predicted)
}

/// The same for an error inside of others, which are named by how they begin: `Map(`.
fn judge_in<T: Debug, E: Debug>(
    result: &Result<T, E>,
    around: &str,
    predicted: Predicted,
) -> Result<bool, Failed> {
    match (result, predicted) {
        (Ok(_), Ok(())) => Ok(true),
        (Err(error), Err(expected)) => {
            let error = format!("{error:?}");
            let good = error.strip_prefix(around).is_some_and(|error| error.starts_with(expected));
            if good { Ok(false) } else { Err(format!("came to {error}, expected {around}{expected}")) }
        }
        _ => Err(format!("came to {result:x?}, expected {predicted:?}")),
    }
}

impl World {
    /// Runs one operation and compares. Whether there was anything to do it to.
    pub(super) fn run(&mut self, op: Op) -> Result<bool, Failed> {
        let Some(touched) = self.act(op)? else { return Ok(false) };
        self.refresh_ids();
        self.end_trouble();
        self.compare(&touched)?;
        Ok(true)
    }

    /// A domain's number can change when it takes over an endpoint that cannot leave its own, and when the device
    /// refuses its first mapping.
    fn refresh_ids(&mut self) {
        let hit = self.was_hit();
        for at in 0..self.reference.spaces.len() {
            if let Some(id) = self.handle(at).map(|domain| domain.id().get()) {
                let spaces = &mut self.reference.spaces;
                let old = std::mem::replace(&mut spaces[at].id, id);
                self.reference.retired += usize::from(old != id && hit);
                // Of an endpoint that may have been there the test did not know that its domain was taken over: then the
                // two changed numbers.
                let other = (0..spaces.len()).find(|other| *other != at && spaces[*other].id == id);
                if let Some(other) = other.filter(|_| old != id) {
                    spaces[other].id = old;
                }
            }
        }
    }

    fn act(&mut self, op: Op) -> Done {
        match op {
            Op::Nothing => Ok(None),
            Op::Create { identity } => self.create(identity),
            Op::Drop { slot } => self.drop_handle(slot),
            Op::Attach { endpoint, slot } => self.attach(endpoint.into(), slot),
            Op::Detach { endpoint } => self.detach(endpoint.into()),
            Op::Move { endpoint, slot } => self.move_endpoint(endpoint.into(), slot),
            Op::Unplug { endpoint } => self.unplug(endpoint.into()),
            Op::Map { slot, pages, phys, prot, low } => self.map(slot, pages.into(), phys.into(), prot, low),
            Op::MapAt { slot, place, pages, phys, prot } => {
                self.map_at(slot, place, pages.into(), phys.into(), prot)
            }
            Op::MapIdentity { slot, place, pages } => self.map_identity(slot, place, pages.into()),
            Op::Unmap { slot, which, neighbours } => self.unmap(slot, which, neighbours),
            Op::UnmapOther { slot, which, skip, pages } => {
                self.unmap_other(slot, which, skip.into(), pages.into())
            }
            Op::Open { endpoint, slot, bounce, low } => self.open(endpoint.into(), slot, bounce.into(), low),
            Op::Close { view } => self.close(view),
            Op::Forget { view } => self.forget(view),
            Op::Scatter { view, segments, used, direction } => {
                self.scatter(view, &segments[..usize::from(used).clamp(1, 4)], direction)
            }
            Op::Adopt { view, pages, direction } => self.adopt(view, pages.into(), direction),
            Op::UnmapOne { which } => self.unmap_one(which),
            Op::Alloc { view, pages } => self.alloc(view, pages.into()),
            Op::Free { which } => self.free(which),
            Op::Share { view, len, direction } => self.share(view, len.into(), direction),
            Op::Unshare { which } => self.unshare(which),
            Op::Bypass { open } => self.set_bypass(open),
            Op::Poll => self.poll(),
            Op::Reclaim => self.reclaim(),
            Op::Restart { orderly, as_found } => self.restart(orderly, as_found).map(Some),
            Op::Misbehave { after, what } => Ok(self.misbehave(after.into(), what).then(Vec::new)),
            Op::Delay { polls } => Ok(self.delay(polls).then(Vec::new)),
            Op::Release(which) => self.release(which),
            Op::Settle { attach } => self.settle(attach),
        }
    }

    /// The slots that have a domain, counted through.
    fn slot(&self, slot: u8) -> Option<usize> {
        let full = || (0..self.slots.len()).filter(|slot| self.slots[*slot].is_some());
        pick(full().count(), slot).and_then(|which| full().nth(which))
    }

    /// The domain in a slot.
    fn at(&self, slot: u8) -> Option<usize> {
        self.slot(slot).and_then(|slot| self.slots[slot].as_ref()).map(|(at, _)| *at)
    }

    fn domain(&self, slot: u8) -> &Domain<TestPlatform> {
        let held = self.slot(slot).and_then(|slot| self.slots[slot].as_ref());
        held.map(|(_, domain)| domain).expect("the slot was looked at")
    }

    fn ranges_of(&self, at: usize) -> Vec<(u64, u64)> {
        self.reference.spaces[at].maps.iter().map(|(first, map)| (*first, map.last)).collect()
    }

    /// What is touched when an endpoint comes or goes: its domain's mappings, of which a few will do.
    fn some_of(&self, at: Option<usize>) -> Vec<(u64, u64)> {
        at.map_or(Vec::new(), |at| self.ranges_of(at).into_iter().take(2).collect())
    }

    /// Low addresses are few, so that they run out.
    fn limit(&self, low: bool) -> u64 {
        let usable = self.reference.usable;
        if low { usable.0 + 24 * self.reference.granule - 1 } else { usable.1 }
    }

    /// A domain of which the test does not know all that is taken may lack room.
    fn tolerate<T: Debug, E: Debug>(
        &self,
        at: usize,
        result: &Result<T, E>,
        why: &[&'static str],
        predicted: Predicted,
    ) -> Predicted {
        let (Err(error), true) = (result, self.reference.spaces[at].leaky) else { return predicted };
        let error = format!("{error:?}");
        why.iter().find(|why| error.contains(**why)).map_or(predicted, |why| Err(why))
    }

    /// What mapping in so many parts comes to, wherever it goes.
    fn predict_parts(&self, at: usize, parts: usize) -> Predicted {
        let space = &self.reference.spaces[at];
        if space.identity {
            return Err("IdentityDomain");
        }
        if space.endpoints.is_empty() {
            return Err("NoEndpoint");
        }
        if space.maps.len() + parts > MAPPINGS { Err("NoRecord") } else { Ok(()) }
    }

    fn predict_room(&self, at: usize, len: u64, limit: u64) -> Predicted {
        let (space, reference) = (&self.reference.spaces[at], &self.reference);
        if space.identity {
            return Err("IdentityDomain");
        }
        let room = space.has_room(len, reference.usable, reference.granule, limit);
        if room { Ok(()) } else { Err("IovaExhausted") }
    }

    /// Takes note of what a failed mapping may have left. Only misbehaviour leaves anything.
    fn not_mapped(&mut self, at: usize, error: MapError, memory: Memory) -> Result<(), Failed> {
        let MapError::Quarantined { range, .. } = error else { return Ok(()) };
        same("quarantine without misbehaviour", self.reference.spaces[at].in_doubt, true)?;
        self.learn(at, range, memory)
    }

    /// Compares what unmapping whole mappings that somebody used came to, and takes note.
    fn ended(&mut self, at: usize, (first, last): (u64, u64), result: Result<(), UnmapError>) -> Done {
        if self.is_sure(at) {
            judge(&result, self.reference.spaces[at].predict_unmap(first, last))?;
        }
        match result {
            Ok(()) => self.unmapped(at, first, last).map(Some),
            Err(UnmapError::Request { .. }) => Ok(Some(self.leaving(at, first, last))),
            // In doubt too: what was mapped, and was not unmapped, is there.
            Err(error) => Err(format!("unmapping came to {error:?}")),
        }
    }
}
