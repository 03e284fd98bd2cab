//! Mapping again what waits for a flush: it becomes live, and nothing is sent.
//!
//! The device has the mapping still, and whoever asks for the same memory with the same rights gets what he asks for. He
//! takes no risk that he would not take with a mapping of his own: up to now the device could reach the memory, and from
//! now on it may. Nobody else is concerned, since neither addresses nor memory went to anybody.
//!
//! What does not come back:
//! - records that hold memory: it goes to its owner after the flush, and nobody maps it before;
//! - what a flush took, or is in quarantine: only what waits in the list is looked at, in state Deferred;
//! - mappings of other lengths, rights or parts, or at addresses that do not suit the new caller.

use super::deferred::DeferredList;
use super::mapping::Purpose;
use super::space::Space;
use super::{DomainKey, Engine, Reach, Tag};
use crate::addr::{IovaRange, PhysAddr};
use crate::dma::PhysSegment;
use crate::exchange::{Mapped, Run};
use crate::prot::Prot;
use alloc::boxed::Box;

/// A buffer that is to be mapped as one that waits, with the whole granules around it. What is looked at last comes by
/// reference, so that it need not be at hand before.
#[derive(Clone, Copy)]
pub(crate) struct Wish<'a> {
    pub buffer: PhysSegment,
    pub prot: Prot,
    pub tag: Tag,
    pub reach: &'a Reach,
}

/// How many places are remembered, a power of two: a few times what waits by default.
const PLACES: usize = 1024;

/// Where in a list of deferred ranges each is, by the memory that it leads to. A hint: one address may displace
/// another, and who looks has to see whether the range there is what he wants.
pub(super) struct Places(Box<[u16; PLACES]>);

impl Places {
    /// Allocates all that it will ever need.
    pub(super) fn new() -> Self {
        Self(Box::new([0; PLACES]))
    }

    #[inline(always)]
    fn bucket(phys: PhysAddr) -> usize {
        // The upper bits of a product depend on all of the address's, of which the lower ones are 0.
        (phys.get().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - PLACES.ilog2())) as usize
    }

    #[inline(always)]
    pub(super) fn note(&mut self, phys: PhysAddr, at: usize) {
        // Lists are no longer than a `u16` can say.
        self.0[Self::bucket(phys)] = at as u16;
    }

    #[inline(always)]
    fn find(&self, phys: PhysAddr) -> usize {
        self.0[Self::bucket(phys)].into()
    }
}

impl DeferredList {
    /// What may lead to this address of memory, and where it waits.
    #[inline(always)]
    fn find(&self, phys: PhysAddr) -> Option<(usize, Mapped)> {
        let at = self.places.find(phys);
        self.waiting.get(at).map(|deferred| (at, *deferred))
    }

    /// Takes out what waits at a place: so many records of this range, which are live again.
    #[inline(always)]
    fn take_back(&mut self, at: usize, (range, mappings): (IovaRange, usize), space: &Space) {
        if at + 1 == self.waiting.len() {
            self.waiting.truncate(at);
        } else {
            self.take_back_between(at, space);
        }
        self.forget(range, mappings);
    }

    #[cold]
    fn take_back_between(&mut self, at: usize, space: &Space) {
        self.waiting.swap_remove(at);
        if let Some(moved) = self.waiting.get(at) {
            self.places.note(space.phys_of(moved.record), at);
        }
    }
}

impl Engine {
    /// What waits in a domain that takes mappings now.
    #[inline(always)]
    fn revivable(&mut self, key: DomainKey) -> Option<(&mut Space, &mut DeferredList)> {
        let domain = self.mappable(key)?;
        Some((&mut domain.space, domain.deferred.as_mut()?))
    }

    /// Makes the mapping of a buffer live again, if it waits for a flush. Sends nothing.
    #[inline(always)]
    pub(crate) fn revive_one(&mut self, key: DomainKey, wish: Wish<'_>) -> Option<Mapped> {
        let mask = self.geometry.granule - 1;
        let (space, list) = self.revivable(key)?;
        let first = PhysAddr::new(wish.buffer.phys.get() & !mask);
        let (at, deferred) = list.find(first)?;
        let range = space.revive(deferred.record, (first, mask), wish)?;
        list.take_back(at, (range, 1), space);
        Some(Mapped { range, record: deferred.record })
    }

    /// The same for a list of so many bytes in all.
    #[inline]
    pub(crate) fn revive_list(
        &mut self,
        key: DomainKey,
        (reach, len): (&Reach, u64),
        runs: impl Iterator<Item = Run> + Clone,
        purpose: Purpose,
    ) -> Option<Mapped> {
        let (space, list) = self.revivable(key)?;
        let first = runs.clone().next()?;
        let (at, deferred) = list.find(first.phys)?;
        let count = match reach.suits(deferred.range, len) {
            true => space.revive_list(deferred, runs, purpose)?,
            false => return None,
        };
        list.take_back(at, (deferred.range, count), space);
        Some(deferred)
    }
}
