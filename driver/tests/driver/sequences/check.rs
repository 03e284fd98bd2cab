//! The comparison: the driver's records, the model's state, and accesses, against the reference.

use std::cell::Cell;
use std::collections::BTreeSet;

use virtio_iommu::{EndpointId, Iova};
use virtio_iommu_model::{Access, AccessError, AccessKind, GuestMemory, OutOfMemoryRange};

use super::reference::{Expected, Mapped, Memory, Space};
use super::world::{Failed, World};
use crate::support::{self, Broken};

const KINDS: [AccessKind; 2] = [AccessKind::Read, AccessKind::Write];

/// Says that two things are not equal.
pub(super) fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<(), Failed> {
    if found == expected { Ok(()) } else { Err(format!("{what}: found {found:x?}, expected {expected:x?}")) }
}

/// Says that something is not so.
fn holds(good: bool, what: impl FnOnce() -> String) -> Result<(), Failed> {
    if good { Ok(()) } else { Err(what()) }
}

/// Memory that is everywhere, and keeps nothing but where it was met.
#[derive(Default)]
struct Everywhere(Cell<Option<u64>>);

impl GuestMemory for Everywhere {
    fn read(&self, addr: u64, _: &mut [u8]) -> Result<(), OutOfMemoryRange> {
        self.0.set(Some(addr));
        Ok(())
    }

    fn write(&mut self, addr: u64, _: &[u8]) -> Result<(), OutOfMemoryRange> {
        self.0.set(Some(addr));
        Ok(())
    }
}

/// The first and last byte of a mapping, and the bytes below and above.
fn edges(first: u64, last: u64) -> impl Iterator<Item = u64> {
    [first.checked_sub(1), Some(first), Some(last), last.checked_add(1)].into_iter().flatten()
}

impl World {
    /// Compares everything. `touched` are mappings that the last operation made or ended: there, endpoints also
    /// try to do what they should and should not be able to.
    pub(super) fn compare(&mut self, touched: &[(u64, u64)]) -> Result<(), Failed> {
        self.let_go()?;
        {
            let device = self.machine.device();
            holds(device.violations().len() == 0, || format!("broken: {:x?}", device.violations().next()))?;
            same("the device's end", device.crash(), None)?;
        }
        same("under the driver's lock", support::take_broken(), Broken::NONE)?;
        self.compare_records()?;
        self.compare_counts()?;
        self.compare_device()?;
        self.compare_translations(touched)?;
        for (first, last) in touched {
            for iova in edges(*first, *last) {
                self.compare_accesses(iova)?;
            }
        }
        Ok(())
    }

    /// The driver's records, of each domain that there is a handle to.
    fn compare_records(&self) -> Result<(), Failed> {
        for (at, space) in self.reference.spaces.iter().enumerate() {
            let Some(domain) = self.handle(at) else { continue };
            same("mappings on record", domain.mapping_count(), space.maps.len())?;
            for (first, map) in &space.maps {
                for iova in edges(*first, map.last) {
                    let found = domain.translate(Iova::new(iova)).map(|to| {
                        let (range, phys) = (to.range, to.phys.get());
                        (range.start().get(), range.last().get(), phys, to.prot.bits())
                    });
                    let expected = space.mapping_at(iova);
                    let expected = expected.map(|(first, map)| (first, map.last, map.phys, map.flags));
                    holds(found == expected, || {
                        format!("domain {at}, record at {iova:#x}: found {found:x?}, expected {expected:x?}")
                    })?;
                }
                holds(self.is_held(map), || {
                    format!("memory {:#x}, which is on record, went back", map.phys)
                })?;
            }
            if !space.in_doubt && !space.maps.values().any(Mapped::is_leaving) {
                let mapped = space.maps.iter().filter(|(_, map)| map.claimed);
                let bytes: u64 = mapped.map(|(first, map)| map.last - first + 1).sum();
                same("bytes that are mapped", domain.stats().mapped_bytes, bytes)?;
            }
        }
        Ok(())
    }

    /// What the driver counts, and what the device does.
    fn compare_counts(&self) -> Result<(), Failed> {
        let stats = self.viommu().stats();
        let spaces = &self.reference.spaces;
        let leaving =
            spaces.iter().flat_map(|space| space.maps.values()).filter(|map| map.is_leaving()).count();
        let in_doubt = spaces.iter().any(|space| space.in_doubt);
        let found = stats.quarantined_mappings;
        holds(found == leaving || (in_doubt && found < leaving), || {
            format!("{found} mappings in quarantine, {leaving} leaving")
        })?;
        let device = self.machine.device();
        let owed = device.held() as u64 + self.trouble.lost;
        let abandoned = stats.abandoned_requests;
        holds((owed..=owed + self.trouble.late).contains(&abandoned), || {
            format!("{abandoned} requests given up, the device owes {owed}, {} came late", self.trouble.late)
        })?;
        same("answers to nothing", stats.stray_answers, 0)?;
        let (now, before) = (device.counters(), self.before);
        let kinds = |count: &virtio_iommu_model::Counters| {
            count.attach + count.detach + count.map + count.unmap + count.probe + count.other
        };
        if device.held() == 0 {
            same("requests", stats.requests, kinds(&now) - kinds(&before))?;
        }
        same("doorbells", stats.kicks, now.kicks[0] - before.kicks[0])
    }

    /// The device's domains, their mappings, and who is in them. Memory of the driver that is mapped is alive.
    fn compare_device(&self) -> Result<(), Failed> {
        let device = self.machine.device();
        for (endpoint, place) in self.reference.place.iter().enumerate() {
            let id = self.reference.endpoints[endpoint].id;
            let expected = place.map(|at| self.reference.spaces[at].id);
            let found = device.domain_of(id);
            let good = found == expected || (self.reference.unsure[endpoint] && found.is_none());
            holds(good, || format!("domain of endpoint {endpoint}: found {found:?}, expected {expected:?}"))?;
        }
        let here = |space: &&Space| !space.endpoints.is_empty();
        let all: BTreeSet<u32> = device.domains().collect();
        for space in self.reference.spaces.iter().filter(here) {
            let sure = space.endpoints.iter().any(|endpoint| !self.reference.unsure[*endpoint]);
            let there = all.contains(&space.id);
            holds(there || !sure, || format!("the device has no domain {}", space.id))?;
            if there {
                same("an identity domain", device.is_bypass_domain(space.id), space.identity)?;
            }
            let mut mapped = device.mappings(space.id).peekable();
            for (first, map) in space.maps.iter().filter(|(_, map)| map.claimed || space.in_doubt) {
                let this = (*first, map.last, map.phys, map.flags);
                let next = mapped.next_if(|found| {
                    (found.virt_first, found.virt_last, found.phys_first, found.flags) == this
                });
                holds(next.is_some() || space.in_doubt, || {
                    format!(
                        "domain {}: the device does not have {this:x?}, but {:x?}",
                        space.id,
                        mapped.peek()
                    )
                })?;
                let held = next.is_none() || self.is_held(map);
                holds(held, || format!("memory {:#x}, which is mapped, went back", map.phys))?;
            }
            let more = mapped.next();
            holds(more.is_none(), || format!("domain {}: the device has {more:x?}", space.id))?;
        }
        let ids: BTreeSet<u32> = self.reference.spaces.iter().filter(here).map(|space| space.id).collect();
        holds(all.is_subset(&ids), || format!("the device has domains {all:?}, expected {ids:?}"))
    }

    /// What each endpoint reaches at the edges of every mapping there is or was just now, its own or not.
    fn compare_translations(&self, touched: &[(u64, u64)]) -> Result<(), Failed> {
        let maps = self.reference.spaces.iter().flat_map(|space| &space.maps);
        let all = maps.map(|(first, map)| (*first, map.last)).chain(touched.iter().copied());
        let mut all: Vec<u64> = all.flat_map(|(first, last)| edges(first, last)).collect();
        all.sort_unstable();
        all.dedup();
        let device = self.machine.device();
        for (endpoint, state) in self.reference.endpoints.iter().enumerate() {
            for iova in &all {
                for kind in KINDS {
                    let found = device.translate(state.id, *iova, kind).ok();
                    let expected = self.reference.expected(endpoint, *iova, kind);
                    holds(agrees(found, *iova, expected), || {
                        format!(
                            "endpoint {endpoint}, {kind:?} at {iova:#x}: found {found:x?}, expected {expected:x?}"
                        )
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Each endpoint reads and writes a byte.
    fn compare_accesses(&mut self, iova: u64) -> Result<(), Failed> {
        for endpoint in 0..self.reference.endpoints.len() {
            for kind in KINDS {
                let found = match self.reference.expected(endpoint, iova, kind) {
                    Expected::Memory(phys) => self.reach(endpoint, iova, kind, (Some(phys), false)),
                    Expected::Doorbell => self.reach(endpoint, iova, kind, (None, true)),
                    Expected::Refused => self.try_access(endpoint, iova, kind),
                    Expected::OneOf(_) | Expected::Unsaid => continue,
                };
                found
                    .map_err(|found| format!("endpoint {endpoint}, {kind:?} access of {iova:#x}: {found}"))?;
            }
        }
        Ok(())
    }

    /// An access that has to arrive: where in memory, or as a doorbell.
    fn reach(
        &self,
        endpoint: usize,
        iova: u64,
        kind: AccessKind,
        expected: (Option<u64>, bool),
    ) -> Result<(), Failed> {
        let (mut memory, mut byte) = (Everywhere::default(), [0]);
        let access = match kind {
            AccessKind::Read => Access::Read(&mut byte),
            AccessKind::Write => Access::Write(&[1]),
        };
        let id = self.reference.endpoints[endpoint].id;
        let mut device = self.machine.device();
        same("the access", device.access(&mut memory, id, iova, access), Ok(()))?;
        let rung = device.take_doorbells().iter().any(|bell| (bell.endpoint, bell.address) == (id, iova));
        same("memory and doorbell", (memory.0.get(), rung), expected)
    }

    /// An access that must not arrive, over the machine's own memory, so that the fault is reported.
    fn try_access(&self, endpoint: usize, iova: u64, kind: AccessKind) -> Result<(), Failed> {
        let id = EndpointId::new(self.reference.endpoints[endpoint].id);
        let result = match kind {
            AccessKind::Read => self.machine.dma_read(id, iova, 1).map(|_| ()),
            AccessKind::Write => self.machine.dma_write(id, iova, &[1]),
        };
        match result {
            Err(AccessError::Fault(fault)) => same("the fault's endpoint", fault.endpoint, id.get()),
            other => Err(format!("not refused: {other:x?}")),
        }
    }

    /// The driver has the platform's memory that is on record, and its queues, and none besides.
    pub(super) fn compare_memory(&self) -> Result<(), Failed> {
        if self.reference.spaces.iter().any(|space| space.in_doubt) {
            return Ok(());
        }
        let maps = self.reference.spaces.iter().flat_map(|space| space.maps.values());
        let held = maps.filter(|map| map.memory == Memory::Platform).count();
        same("blocks of memory that the driver has", self.machine.outstanding() - self.blocks, held)
    }
}

fn agrees(found: Option<u64>, iova: u64, expected: Expected) -> bool {
    match expected {
        Expected::Memory(phys) => found == Some(phys),
        Expected::Doorbell => found == Some(iova),
        Expected::Refused => found.is_none(),
        Expected::OneOf(choices) => choices.contains(&found),
        Expected::Unsaid => true,
    }
}
