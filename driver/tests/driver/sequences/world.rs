//! One machine, what the test holds of it, and the reference beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use virtio_iommu::{
    CoherentMemory, DmaMapping, Domain, EndpointId, Introduction, Iova, IovaRange, Leave, Options, PhysAddr,
    Viommu,
};
use virtio_iommu_model::{
    Config, Counters, Detach, Endpoint, Execute, Inject, Release, ReservedRegion, feature,
};

use super::check::same;
use super::op::is_harmless;
use super::reference::{Mapped, Memory, Owner, Reference, Space};
use crate::support::{Machine, TestPlatform};

/// What differed.
pub(super) type Failed = String;

pub(super) type View = virtio_iommu::Endpoint<TestPlatform>;

/// Records of each domain: few, so that they run out now and then.
pub(super) const MAPPINGS: usize = 24;
/// How often a wait polls at most.
const POLLS: u64 = 20;
const IDS: [u32; 4] = [8, 9, 0x100, 0x1_0008];
/// An endpoint's reserved region, where mappings go too: not whole granules.
const RESERVED: (u64, u64) = (0x5800, 0x67ff);

pub(super) struct OpenView {
    pub(super) endpoint: usize,
    pub(super) space: usize,
    /// Where its bounce pages are.
    pub(super) bounce: Option<u64>,
    pub(super) faulting: (u64, u64),
    pub(super) limit: u64,
    /// Buffers that its endpoint was lent.
    pub(super) shares: Vec<Shared>,
    pub(super) view: View,
}

pub(super) struct Shared {
    pub(super) iova: u64,
    pub(super) buffer: Vec<u8>,
    pub(super) direction: virtio_iommu::Direction,
}

/// What the device did wrong in this life of the driver.
#[derive(Default)]
pub(super) struct Trouble {
    /// What it was told to do, until it did.
    pub(super) pending: Option<Inject>,
    /// Requests that are never answered.
    pub(super) lost: u64,
    /// Late answers that the driver did not take in yet.
    pub(super) late: u64,
    /// Polls until a delayed answer comes; 0 without one.
    pub(super) delay: Arc<AtomicU8>,
}

pub(super) struct World {
    pub(super) machine: Machine,
    viommu: Option<Viommu<TestPlatform>>,
    pub(super) reference: Reference,
    /// Four places for domains that the test has a handle of.
    pub(super) slots: [Option<(usize, Domain<TestPlatform>)>; 4],
    pub(super) views: Vec<OpenView>,
    pub(super) coherent: Vec<(usize, CoherentMemory)>,
    pub(super) mappings: Vec<(usize, (u64, u64), DmaMapping)>,
    /// Fault records that the driver counted in this life.
    pub(super) faults: u64,
    pub(super) trouble: Trouble,
    /// What the device counted before this life of the driver.
    pub(super) before: Counters,
    /// Blocks of memory that the driver had when it was up.
    pub(super) blocks: usize,
    /// The bypass as this life of the driver found it.
    pub(super) found: bool,
}

impl World {
    pub(super) fn new(config: Config) -> Result<Self, Failed> {
        let machine = Machine::new(config.clone());
        let delay = Arc::new(AtomicU8::new(0));
        let left = Arc::clone(&delay);
        machine.on_relax(move |device, ram| {
            let polls = left.load(Ordering::Relaxed);
            if polls > 0 && device.inject.script.is_empty() {
                left.store(polls - 1, Ordering::Relaxed);
                if polls == 1 {
                    device.release(Release::Newest, ram);
                }
            }
        });
        let granule = config.granule().unwrap_or(1);
        let (base, top) = (*config.input_range.start(), *config.input_range.end());
        let [x86, x86_too, low, high] = IDS;
        let (mut low, mut high) = (Endpoint::new(low), Endpoint::new(high));
        low.reserved = vec![ReservedRegion::reserved(base + RESERVED.0, base + RESERVED.1)];
        // Where the driver maps first, unless it is told to stay below.
        high.reserved = vec![ReservedRegion::reserved(top - 3 * granule, top - granule - 1)];
        let endpoints = vec![Endpoint::x86(x86), Endpoint::x86(x86_too), low, high];
        let count = endpoints.len();
        let reference = Reference {
            config,
            granule,
            usable: (0, 0),
            endpoints,
            spaces: Vec::new(),
            place: vec![None; count],
            unsure: vec![false; count],
            unplugged: vec![true; count],
            closed: false,
            bypass: false,
            retired: 0,
        };
        let mut world = Self {
            machine,
            viommu: None,
            reference,
            slots: Default::default(),
            views: Vec::new(),
            coherent: Vec::new(),
            mappings: Vec::new(),
            faults: 0,
            trouble: Trouble { delay, ..Trouble::default() },
            before: Counters::default(),
            blocks: 0,
            found: false,
        };
        world.start()?;
        Ok(world)
    }

    pub(super) fn viommu(&self) -> &Viommu<TestPlatform> {
        self.viommu.as_ref().expect("there is a driver between restarts")
    }

    pub(super) fn id(&self, endpoint: usize) -> EndpointId {
        EndpointId::new(self.reference.endpoints[endpoint].id)
    }

    pub(super) fn can_detach(&self) -> bool {
        self.reference.config.quirks.detach != Detach::Unsupported
    }

    pub(super) fn has_bypass(&self) -> bool {
        self.reference.config.offers(feature::BYPASS_CONFIG)
    }

    /// A handle of a domain, if the test has any.
    pub(super) fn handle(&self, at: usize) -> Option<&Domain<TestPlatform>> {
        let own = self.slots.iter().flatten().find(|(space, _)| *space == at).map(|(_, domain)| domain);
        own.or_else(|| self.view_of(at).map(|view| view.domain()))
    }

    /// A view of a domain, whichever endpoint's.
    pub(super) fn view_of(&self, at: usize) -> Option<&View> {
        self.views.iter().find(|view| view.space == at).map(|view| &view.view)
    }

    /// Brings the driver up on the device as it is.
    fn start(&mut self) -> Result<(), Failed> {
        let reference = &mut self.reference;
        {
            let mut device = self.machine.device();
            for (endpoint, unplugged) in reference.endpoints.iter().zip(&mut reference.unplugged) {
                if std::mem::take(unplugged) {
                    device.add_endpoint(endpoint.clone());
                }
            }
            self.before = device.counters();
            device.inject.script.clear();
            let mut bypass = [0];
            device.read_config(36, &mut bypass);
            self.found = bypass[0] == 1;
        }
        self.trouble.delay.store(0, Ordering::Relaxed);
        self.trouble = Trouble { delay: Arc::clone(&self.trouble.delay), ..Trouble::default() };
        let options = Options {
            queue_size: 16,
            max_endpoints: 8,
            max_domains: 16,
            max_polls: POLLS,
            ..Machine::options()
        };
        let had = self.machine.outstanding();
        let staged = self.machine.start_with(options).map_err(|error| format!("start: {error}"))?;
        let can_detach = self.can_detach();
        let expected = if can_detach { Introduction::Known } else { Introduction::CannotDetach };
        for endpoint in 0..IDS.len() {
            same("introduction", staged.introduce(self.id(endpoint)), Ok(expected))?;
        }
        let viommu = staged.go_live().map_err(|error| format!("go_live: {error}"))?;
        self.blocks = self.machine.outstanding();
        same("blocks of memory for the queues", self.blocks - had, 2)?;
        let range = viommu.input_range();
        let has_bypass = self.has_bypass();
        let reference = &mut self.reference;
        reference.usable = (range.start().get(), range.last().get());
        (reference.closed, reference.bypass, reference.retired) = (has_bypass, false, 0);
        same("granule", viommu.granule(), reference.granule)?;
        reference.spaces.clear();
        for (endpoint, id) in IDS.into_iter().enumerate() {
            // Where it cannot be detached, it is in an empty domain that nobody holds.
            (reference.place[endpoint], reference.unsure[endpoint]) =
                ((!can_detach).then_some(endpoint), false);
            if !can_detach {
                let id = self.machine.device().domain_of(id).ok_or("not parked")?;
                let endpoints = [endpoint].into();
                reference.spaces.push(Space { id, endpoints, ..Space::default() });
            }
        }
        self.faults = 0;
        self.viommu = Some(viommu);
        Ok(())
    }

    /// Drops every handle and starts the driver again. Returns what was mapped before.
    pub(super) fn restart(&mut self, orderly: bool, as_found: bool) -> Result<Vec<(u64, u64)>, Failed> {
        let spaces = self.reference.spaces.iter();
        let before = spaces.flat_map(|space| &space.maps).map(|(first, map)| (*first, map.last)).collect();
        if orderly {
            let leave = if as_found { Leave::AsFound } else { Leave::Blocked };
            // SAFETY: the endpoints do nothing but what the test has them do.
            let shut = unsafe { self.viommu().shutdown(leave) };
            let hit = self.was_hit() || self.reference.unsure.contains(&true);
            let stuck = self.reference.place.iter().any(Option::is_some) && !self.can_detach();
            if !hit {
                same("shutdown", shut.is_ok(), !stuck)?;
            }
            if !hit && !stuck {
                let expected = as_found && self.found;
                for endpoint in &self.reference.endpoints {
                    let bypasses = self.machine.device().bypasses(endpoint.id);
                    same("an endpoint reaches everything after the shutdown", bypasses, expected)?;
                }
            }
        }
        self.coherent.clear();
        self.mappings.clear();
        self.views.clear();
        self.slots = Default::default();
        self.viommu = None;
        if self.reference.config.quirks.single_life {
            self.machine.device().system_reset();
        }
        self.start()?;
        Ok(before)
    }

    /// Whether the device misbehaved in this operation, in a way that shows.
    pub(super) fn was_hit(&self) -> bool {
        self.trouble.pending.is_some_and(|what| !is_harmless(what)) && self.script_is_done()
    }

    pub(super) fn script_is_done(&self) -> bool {
        self.machine.device().inject.script.is_empty()
    }

    /// Takes note of what the device did wrong in the operation that ends here.
    pub(super) fn end_trouble(&mut self) {
        if self.script_is_done() {
            let what = self.trouble.pending.take();
            self.trouble.lost += u64::from(matches!(what, Some(Inject::Drop(_))));
        }
    }

    /// Whether a domain, and what was just done to it, is known for certain. It is in doubt from now on if the device
    /// misbehaved.
    pub(super) fn is_sure(&mut self, at: usize) -> bool {
        let hit = self.was_hit();
        let space = &mut self.reference.spaces[at];
        space.in_doubt |= hit;
        !space.in_doubt
    }

    /// Records a mapping that was made.
    pub(super) fn mapped(
        &mut self,
        at: usize,
        (first, len): (u64, u64),
        phys: u64,
        flags: u32,
        (owner, memory): (Owner, Memory),
    ) -> (u64, u64) {
        let last = first + (len - 1);
        let map = Mapped { last, phys, flags, claimed: true, is_lost: false, owner, memory };
        self.reference.spaces[at].maps.insert(first, map);
        (first, last)
    }

    /// Records what a mapping left that failed in a way that says nothing: as the driver has it, which is compared with
    /// the device.
    pub(super) fn learn(&mut self, at: usize, range: IovaRange, memory: Memory) -> Result<(), Failed> {
        let (mut next, last, granule) = (range.start().get(), range.last().get(), self.reference.granule);
        while next <= last {
            let found = self.handle(at).and_then(|domain| domain.translate(Iova::new(next)));
            let Some(found) = found else {
                next += granule;
                continue;
            };
            let (first, end) = (found.range.start().get(), found.range.last().get());
            self.make_room(at, (first, end))?;
            let free = self.reference.spaces[at].is_free((first, end));
            same(
                "what failed is in the addresses that it was for",
                (first, end <= last, free),
                (next, true, true),
            )?;
            let (phys, flags) = (found.phys.get(), found.prot.bits());
            self.mapped(at, (first, end - first + 1), phys, flags, (Owner::Leaving, memory));
            next = end + 1;
        }
        Ok(())
    }

    /// Records that mappings are gone. Their memory has to be back.
    pub(super) fn unmapped(&mut self, at: usize, first: u64, last: u64) -> Result<Vec<(u64, u64)>, Failed> {
        let maps = &mut self.reference.spaces[at].maps;
        let gone: Vec<_> = maps.range(first..=last).map(|(first, map)| (*first, *map)).collect();
        maps.retain(|start, _| *start < first || *start > last);
        for (first, map) in &gone {
            same(&format!("memory of what was mapped at {first:#x} is back"), self.is_back(map), true)?;
        }
        Ok(gone.into_iter().map(|(first, map)| (first, map.last)).collect())
    }

    /// Whether the owner has the memory again, as far as the driver gives it back.
    fn is_back(&self, map: &Mapped) -> bool {
        let phys = PhysAddr::new(map.phys);
        match map.memory {
            Memory::Nowhere => true,
            Memory::Platform => !self.machine.is_live(phys),
            Memory::Lent => self.machine.is_lent_back(phys),
        }
    }

    /// Whether the driver still has the memory, as far as it takes it.
    pub(super) fn is_held(&self, map: &Mapped) -> bool {
        map.memory == Memory::Nowhere || self.machine.is_live(PhysAddr::new(map.phys))
    }

    /// Records that nobody uses these mappings any more, and the driver could not unmap them.
    pub(super) fn leaving(&mut self, at: usize, first: u64, last: u64) -> Vec<(u64, u64)> {
        let maps = self.reference.spaces[at].maps.range_mut(first..=last);
        maps.map(|(first, map)| {
            map.owner = Owner::Leaving;
            (*first, map.last)
        })
        .collect()
    }

    /// Takes note of what the driver let go of that was leaving.
    pub(super) fn let_go(&mut self) -> Result<(), Failed> {
        for at in 0..self.reference.spaces.len() {
            let space = &self.reference.spaces[at];
            if !space.in_doubt {
                continue;
            }
            let Some(domain) = self.handle(at) else { continue };
            let leaving = space.maps.iter().filter(|(_, map)| map.is_leaving());
            let on_record = |first: u64| domain.translate(Iova::new(first)).is_some();
            let gone: Vec<_> =
                leaving.filter(|(first, _)| !on_record(**first)).map(|(first, _)| *first).collect();
            for first in gone {
                self.unmapped(at, first, first)?;
            }
        }
        Ok(())
    }

    /// Takes note of what the driver let go of in the course of an operation, when a late answer came: its addresses are
    /// in use again.
    pub(super) fn make_room(&mut self, at: usize, (first, last): (u64, u64)) -> Result<(), Failed> {
        let space = &self.reference.spaces[at];
        if !space.in_doubt || self.trouble.late == 0 {
            return Ok(());
        }
        let meets = |start: u64, map: &Mapped| map.is_leaving() && start <= last && first <= map.last;
        let gone: Vec<u64> =
            space.maps.iter().filter(|(start, map)| meets(**start, map)).map(|(start, _)| *start).collect();
        gone.into_iter().try_for_each(|start| self.unmapped(at, start, start).map(|_| ()))
    }

    /// Takes note that a handle of a domain went.
    pub(super) fn released(&mut self, at: usize) {
        self.reference.spaces[at].handles -= 1;
        if self.reference.spaces[at].handles == 0 {
            self.reference.settle(at);
        }
    }

    /// A new mapping's address has to be free, aligned, and where it may be.
    pub(super) fn check_placed(&mut self, at: usize, iova: Iova, len: u64, limit: u64) -> Result<(), Failed> {
        let first = iova.get();
        let last = first.checked_add(len - 1).ok_or("a mapping that wraps")?;
        self.make_room(at, (first, last))?;
        let reference = &self.reference;
        let good = first.is_multiple_of(reference.granule)
            && first >= reference.usable.0.max(reference.granule)
            && last <= reference.usable.1.min(limit)
            && reference.spaces[at].is_free((first, last));
        if good { Ok(()) } else { Err(format!("a mapping of {len:#x} bytes was put at {first:#x}")) }
    }

    /// The device is told to misbehave, once: one thing at a time, and so that requests always find a slot.
    pub(super) fn misbehave(&mut self, after: usize, what: Inject) -> bool {
        let owned = self.machine.device().held() as u64 + self.trouble.lost + self.trouble.late;
        let keeps = matches!(what, Inject::Hold(_) | Inject::Drop(_));
        if self.trouble.pending.is_some() || (keeps && owned >= 4) {
            return false;
        }
        self.trouble.pending = Some(what);
        let mut device = self.machine.device();
        device.inject.pass(after);
        device.inject.push(what);
        true
    }

    /// The next request is answered while the driver waits for it.
    pub(super) fn delay(&mut self, polls: u8) -> bool {
        if self.trouble.pending.is_some() {
            return false;
        }
        // Harmless: it is as if the device were slow.
        self.trouble.pending = Some(Inject::Pass);
        self.trouble.delay.store(polls, Ordering::Relaxed);
        self.machine.inject([Inject::Hold(Execute::Now)]);
        true
    }
}
