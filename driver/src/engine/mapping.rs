//! Records of mappings, with the boundaries that their MAP requests had.
//!
//! ```text
//!              MAP ok                begin unmap              UNMAP ok
//!   Mapping ------------> Live ---------------> Unmapping ---------------> gone, or Released
//!      |  \ MAP refused: Returned, gone            ^  | \ failed or unknown
//!      |  unknown                          Apart -'<-'  v   (RANGE for several: each by itself)
//!      '------------------------------------> Quarantined ---- answered, or reclaimed ----> gone, or Released
//! ```
//! When the domain dies with its last endpoint, live records stay: they are replayed (Live, Replaying, Live) when it
//! gets an endpoint again, or go without a request when they are unmapped.
//!
//! In a domain that defers unmapping a record is Deferred between Live and Unmapping, see [`super::deferred`].
//!
//! One that is in quarantine although its owner did not unmap it, since mapping it again went wrong, becomes live again
//! when it is known that the device does not have it.
//!
//! A record whose memory the driver holds does not go by itself: it is Released until the memory went back to its
//! owner. One whose MAP was refused is Returned until whoever sent that took it.

use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::dma::HeldMemory;
use crate::prot::Prot;
use alloc::vec::Vec;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MappingState {
    /// MAP was, or is about to be, sent.
    Mapping,
    /// The device confirmed the MAP.
    Live,
    /// Its owner unmapped it, and the domain's next flush will.
    Deferred,
    /// MAP was, or is about to be, sent again.
    Replaying,
    /// UNMAP was, or is about to be, sent.
    Unmapping,
    /// UNMAP for this and others was answered RANGE: whoever sent it unmaps each by itself.
    Apart,
    /// The device may still reach the memory, and nobody uses the mapping, or its owner cannot. `in_flight` while
    /// the device owes an answer about it.
    Quarantined { in_flight: bool },
    /// The device was reset, and an endpoint may still reach the memory by a number that the domain does not have any
    /// more: no UNMAP can be sent for it.
    Stranded,
    /// The device cannot reach the memory any more, which waits to go back to its owner.
    Released,
    /// The device refused the MAP. Address and memory wait for whoever sent it, and for nobody else: he rolls his
    /// list back, and what lies in it is to be his alone until then.
    Returned,
}

/// What a mapping allows, and what its maker calls it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Purpose {
    pub prot: Prot,
    /// For people who look for whoever forgot to unmap.
    pub tag: &'static str,
}

/// Names a list of mappings that are made together, and rolled back together: what lies at their addresses by then
/// may be another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListId(pub(super) u64);

pub(crate) struct Mapping {
    pub range: IovaRange,
    pub phys: PhysAddr,
    pub purpose: Purpose,
    /// What it was made with.
    pub list: ListId,
    pub state: MappingState,
    /// Whether the device may have it. False when the domain died since.
    pub on_device: bool,
    /// Whether its bytes are in the domain's count of mapped ones.
    pub counted: bool,
    /// Whether somebody counts on it, who will unmap it. Such a record does not go by itself, in quarantine neither.
    pub owned: bool,
    /// Memory that goes back to its owner when the device cannot reach it any more.
    pub held: Option<HeldMemory>,
}

impl Mapping {
    /// Whether the device may have it in a domain without endpoints, now or when it answers.
    pub(crate) fn is_in_doubt(&self) -> bool {
        match self.state {
            MappingState::Live | MappingState::Apart | MappingState::Deferred => self.on_device,
            MappingState::Mapping | MappingState::Replaying | MappingState::Unmapping => true,
            MappingState::Stranded => true,
            MappingState::Quarantined { in_flight } => in_flight || self.on_device,
            MappingState::Released | MappingState::Returned => false,
        }
    }

    /// Whether it is out of use until an answer, a detachment or a recovery tells what became of it.
    pub(crate) fn is_stuck(&self) -> bool {
        matches!(self.state, MappingState::Quarantined { .. } | MappingState::Stranded)
    }

    /// Whether it has to be mapped again, since the domain died.
    pub(crate) fn needs_replay(&self) -> bool {
        !self.on_device && self.state == MappingState::Live
    }
}

/// The records of a domain, ordered by address, in a list of fixed capacity.
///
/// # Invariants
/// Sorted by start; ranges never overlap (their addresses left the domain's allocator).
pub(crate) struct MappingTable {
    records: Vec<Mapping>,
}

impl MappingTable {
    /// Room for `capacity` records. Allocates.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { records: Vec::with_capacity(capacity) }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.records.capacity()
    }

    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.records.len() == self.records.capacity()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Moves into the larger list and returns the smaller, empty one, to be dropped outside of the lock.
    pub(crate) fn grow_into(&mut self, mut spare: Vec<Mapping>) -> Vec<Mapping> {
        if spare.capacity() > self.records.capacity() {
            spare.append(&mut self.records);
            core::mem::swap(&mut self.records, &mut spare);
        }
        spare
    }

    fn position(&self, start: Iova) -> Result<usize, usize> {
        self.records.binary_search_by_key(&start, |record| record.range.start())
    }

    /// Adds a record. The caller checked [`is_full`](Self::is_full), and took the range from the allocator.
    pub(crate) fn insert(&mut self, record: Mapping) {
        debug_assert!(!self.is_full());
        let (Ok(at) | Err(at)) = self.position(record.range.start());
        self.records.insert(at, record);
    }

    pub(crate) fn get(&self, start: Iova) -> Option<&Mapping> {
        self.position(start).ok().map(|at| &self.records[at])
    }

    pub(crate) fn get_mut(&mut self, start: Iova) -> Option<&mut Mapping> {
        self.position(start).ok().map(|at| &mut self.records[at])
    }

    pub(crate) fn remove(&mut self, start: Iova) -> Option<Mapping> {
        self.position(start).ok().map(|at| self.records.remove(at))
    }

    /// The record that contains `address`.
    pub(crate) fn containing(&self, address: Iova) -> Option<&Mapping> {
        let after = self.records.partition_point(|record| record.range.start() <= address);
        let record = self.records.get(after.checked_sub(1)?)?;
        (address <= record.range.last()).then_some(record)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.records.iter()
    }

    /// The records of `range`, if it is made of whole records that touch each other.
    pub(crate) fn whole(&mut self, range: IovaRange) -> Option<&mut [Mapping]> {
        let first = self.position(range.start()).ok()?;
        let mut at = first;
        loop {
            let record = self.records.get(at)?;
            if record.range.last() == range.last() {
                return Some(&mut self.records[first..=at]);
            }
            let next = self.records.get(at + 1)?;
            let touching = record.range.last().checked_add(1) == Some(next.range.start());
            if !touching || record.range.last() > range.last() {
                return None;
            }
            at += 1;
        }
    }

    /// Visits the records of `range` in order and removes those for which `keep` says no.
    pub(crate) fn retain_in(&mut self, range: IovaRange, mut keep: impl FnMut(&mut Mapping) -> bool) {
        self.records.retain_mut(|record| !range.contains(record.range) || keep(record));
    }

    /// Visits all records in order and removes those for which `keep` says no.
    pub(crate) fn retain_all(&mut self, keep: impl FnMut(&mut Mapping) -> bool) {
        self.records.retain_mut(keep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    fn table(ranges: &[IovaRange]) -> MappingTable {
        let mut table = MappingTable::new(8);
        for range in ranges {
            table.insert(Mapping {
                range: *range,
                phys: PhysAddr::new(0),
                purpose: Purpose { prot: Prot::READ, tag: "" },
                list: ListId(0),
                state: MappingState::Live,
                on_device: true,
                counted: false,
                owned: true,
                held: None,
            });
        }
        table
    }

    #[test]
    fn a_range_is_whole_only_on_boundaries_and_without_holes() {
        let mut table = table(&[range(0x1000, 0x1fff), range(0x2000, 0x3fff), range(0x5000, 0x5fff)]);
        assert_eq!(table.whole(range(0x1000, 0x3fff)).unwrap().len(), 2);
        assert_eq!(table.whole(range(0x2000, 0x3fff)).unwrap().len(), 1);
        for broken in [
            range(0x1000, 0x2fff),
            range(0x1800, 0x3fff),
            range(0x2000, 0x5fff),
            range(0x5000, 0x6fff),
            range(0x4000, 0x4fff),
        ] {
            assert!(table.whole(broken).is_none(), "{broken}");
        }
    }

    #[test]
    fn lookup_by_any_address() {
        let table = table(&[range(0x1000, 0x1fff), range(0x3000, 0x3fff)]);
        assert_eq!(table.containing(Iova::new(0x1fff)).unwrap().range, range(0x1000, 0x1fff));
        assert!(table.containing(Iova::new(0x2000)).is_none());
        assert!(table.containing(Iova::new(0xfff)).is_none());
    }
}
