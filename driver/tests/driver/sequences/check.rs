//! The comparison: the driver's records, the model's state, and accesses, against the reference.

use std::cell::Cell;
use std::collections::BTreeSet;

use virtio_iommu::{EndpointId, Iova};
use virtio_iommu_model::{Access, AccessError, AccessKind, GuestMemory, OutOfMemoryRange};

use super::reference::{Expected, Mapped, Owner};
use super::world::{Failed, World};
use crate::support::{self, Broken};

const KINDS: [AccessKind; 2] = [AccessKind::Read, AccessKind::Write];

/// Says that two things are not equal.
pub(super) fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<(), Failed> {
    if found == expected { Ok(()) } else { Err(format!("{what}: found {found:x?}, expected {expected:x?}")) }
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
        same("rules that the driver broke", self.machine.take_violations(), Vec::new())?;
        same("the device's end", self.machine.device().crash(), None)?;
        same("under the driver's lock", support::take_broken(), Broken::NONE)?;
        self.compare_records()?;
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
                    same(&format!("domain {at}, record at {iova:#x}"), found, expected)?;
                }
            }
        }
        let quarantined = |map: &&Mapped| map.owner == Owner::Quarantine;
        let maps = self.reference.spaces.iter().flat_map(|space| space.maps.values());
        let expected = maps.filter(quarantined).count();
        same("quarantine", self.viommu().stats().quarantined_mappings, expected)
    }

    /// The device's domains, their mappings, and who is in them. Memory of the driver that is mapped is alive.
    fn compare_device(&self) -> Result<(), Failed> {
        let device = self.machine.device();
        for (endpoint, place) in self.reference.place.iter().enumerate() {
            let id = self.reference.endpoints[endpoint].id;
            let expected = place.map(|at| self.reference.spaces[at].id);
            same(&format!("domain of endpoint {endpoint}"), device.domain_of(id), expected)?;
        }
        let alive = || self.reference.spaces.iter().filter(|space| !space.endpoints.is_empty());
        let ids: BTreeSet<u32> = alive().map(|space| space.id).collect();
        same("domains of the device", device.domains().collect(), ids)?;
        for space in alive() {
            let found: Vec<_> = device
                .mappings(space.id)
                .map(|map| (map.virt_first, map.virt_last, map.phys_first, map.flags))
                .collect();
            let expected = space.maps.iter().filter(|(_, map)| map.on_device);
            let expected = expected.map(|(first, map)| (*first, map.last, map.phys, map.flags)).collect();
            same(&format!("mappings of domain {}", space.id), found, expected)?;
            let held = space.maps.values().filter(|map| map.on_device && map.held);
            for map in held {
                let alive = self.machine.is_live(virtio_iommu::PhysAddr::new(map.phys));
                same(&format!("memory {:#x}, which is mapped, is alive", map.phys), alive, true)?;
            }
        }
        Ok(())
    }

    /// What each endpoint reaches at the edges of every mapping there is or was just now, its own or not.
    fn compare_translations(&self, touched: &[(u64, u64)]) -> Result<(), Failed> {
        let maps = self.reference.spaces.iter().flat_map(|space| &space.maps);
        let all = maps.map(|(first, map)| (*first, map.last)).chain(touched.iter().copied());
        let all: BTreeSet<u64> = all.flat_map(|(first, last)| edges(first, last)).collect();
        let device = self.machine.device();
        for iova in all {
            for (endpoint, state) in self.reference.endpoints.iter().enumerate() {
                for kind in KINDS {
                    let found = device.translate(state.id, iova, kind).ok();
                    let expected = self.reference.expected(endpoint, iova, kind);
                    if !agrees(found, iova, expected) {
                        return Err(format!(
                            "endpoint {endpoint}, {kind:?} at {iova:#x}: found {found:x?}, expected {expected:x?}"
                        ));
                    }
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
                    Expected::Memory(_) | Expected::Doorbell => self.reach(endpoint, iova, kind),
                    Expected::Refused => self.try_access(endpoint, iova, kind),
                    Expected::Either(_) | Expected::Unsaid => continue,
                };
                found
                    .map_err(|found| format!("endpoint {endpoint}, {kind:?} access of {iova:#x}: {found}"))?;
            }
        }
        Ok(())
    }

    /// An access that has to arrive.
    fn reach(&self, endpoint: usize, iova: u64, kind: AccessKind) -> Result<(), Failed> {
        let (mut memory, mut byte) = (Everywhere::default(), [0]);
        let access = match kind {
            AccessKind::Read => Access::Read(&mut byte),
            AccessKind::Write => Access::Write(&[1]),
        };
        let id = self.reference.endpoints[endpoint].id;
        let mut device = self.machine.device();
        same("the access", device.access(&mut memory, id, iova, access), Ok(()))?;
        let rung = device.take_doorbells().iter().any(|bell| (bell.endpoint, bell.address) == (id, iova));
        let expected = match self.reference.expected(endpoint, iova, kind) {
            Expected::Memory(phys) => (Some(phys), false),
            _ => (None, true),
        };
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
}

fn agrees(found: Option<u64>, iova: u64, expected: Expected) -> bool {
    match expected {
        Expected::Memory(phys) => found == Some(phys),
        Expected::Doorbell => found == Some(iova),
        Expected::Refused => found.is_none(),
        Expected::Either(choices) => choices.contains(&found),
        Expected::Unsaid => true,
    }
}
