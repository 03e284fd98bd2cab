//! One machine, what the test holds of it, and the reference beside it.

use virtio_iommu::{
    CoherentMemory, DmaMapping, Domain, EndpointId, Introduction, Iova, Leave, Options, Viommu,
};
use virtio_iommu_model::{Config, Detach, Endpoint, ReservedRegion};

use super::check::same;
use super::reference::{Mapped, Owner, Reference, Space};
use crate::support::{Machine, TestPlatform};

/// What differed.
pub(super) type Failed = String;

pub(super) type View = virtio_iommu::Endpoint<TestPlatform>;

/// Records of each domain: few, so that they run out now and then.
pub(super) const MAPPINGS: usize = 24;
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
    pub(super) view: View,
}

pub(super) struct World {
    pub(super) machine: Machine,
    viommu: Option<Viommu<TestPlatform>>,
    pub(super) reference: Reference,
    /// Four places for domains that the test has a handle of.
    pub(super) slots: [Option<(usize, Domain<TestPlatform>)>; 4],
    pub(super) views: Vec<OpenView>,
    pub(super) coherent: Vec<(usize, CoherentMemory)>,
    pub(super) lists: Vec<(usize, (u64, u64), DmaMapping)>,
    /// Fault records that the device delivered in earlier lives, and that the driver counted in this one.
    pub(super) faults: (u64, u64),
}

impl World {
    pub(super) fn new(config: Config) -> Result<Self, Failed> {
        let machine = Machine::new(config.clone());
        let granule = config.granule().unwrap_or(1);
        let base = *config.input_range.start();
        let [x86, x86_too, with_region, plain] = IDS;
        let mut with_region = Endpoint::new(with_region);
        with_region.reserved = vec![ReservedRegion::reserved(base + RESERVED.0, base + RESERVED.1)];
        let endpoints = vec![Endpoint::x86(x86), Endpoint::x86(x86_too), with_region, Endpoint::new(plain)];
        for endpoint in &endpoints {
            machine.device().add_endpoint(endpoint.clone());
        }
        let reference = Reference {
            config,
            granule,
            usable: (0, 0),
            endpoints,
            spaces: Vec::new(),
            place: vec![None; IDS.len()],
        };
        let mut world = Self {
            machine,
            viommu: None,
            reference,
            slots: Default::default(),
            views: Vec::new(),
            coherent: Vec::new(),
            lists: Vec::new(),
            faults: (0, 0),
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

    /// A handle of a domain, if the test has any.
    pub(super) fn handle(&self, at: usize) -> Option<&Domain<TestPlatform>> {
        let own = self.slots.iter().flatten().find(|(space, _)| *space == at).map(|(_, domain)| domain);
        own.or_else(|| self.views.iter().find(|view| view.space == at).map(|view| view.view.domain()))
    }

    /// Brings the driver up on the device as it is.
    fn start(&mut self) -> Result<(), Failed> {
        let options = Options { queue_size: 16, max_endpoints: 8, max_domains: 16, ..Machine::options() };
        let staged = self.machine.start_with(options).map_err(|error| format!("start: {error}"))?;
        let can_detach = self.can_detach();
        let expected = if can_detach { Introduction::Known } else { Introduction::CannotDetach };
        for endpoint in 0..IDS.len() {
            same("introduction", staged.introduce(self.id(endpoint)), Ok(expected))?;
        }
        let viommu = staged.go_live().map_err(|error| format!("go_live: {error}"))?;
        let range = viommu.input_range();
        let reference = &mut self.reference;
        reference.usable = (range.start().get(), range.last().get());
        same("granule", viommu.granule(), reference.granule)?;
        reference.spaces.clear();
        for (endpoint, place) in reference.place.iter_mut().enumerate() {
            // Where it cannot be detached, it is in an empty domain that nobody holds.
            *place = (!can_detach).then_some(endpoint);
            if !can_detach {
                let id = self.machine.device().domain_of(IDS[endpoint]).ok_or("not parked")?;
                let endpoints = [endpoint].into();
                reference.spaces.push(Space { id, endpoints, ..Space::default() });
            }
        }
        self.faults = (self.machine.device().counters().events, 0);
        self.viommu = Some(viommu);
        Ok(())
    }

    /// Drops every handle and starts the driver again. Returns what was mapped before.
    pub(super) fn restart(&mut self, orderly: bool) -> Result<Vec<(u64, u64)>, Failed> {
        let spaces = self.reference.spaces.iter();
        let before = spaces.flat_map(|space| &space.maps).map(|(first, map)| (*first, map.last)).collect();
        if orderly {
            // SAFETY: the endpoints do nothing but what the test has them do.
            let shut = unsafe { self.viommu().shutdown(Leave::Blocked) };
            let attached = self.reference.place.iter().any(Option::is_some);
            same("shutdown", shut.is_ok(), self.can_detach() || !attached)?;
        }
        self.coherent.clear();
        self.lists.clear();
        self.views.clear();
        self.slots = Default::default();
        self.viommu = None;
        if self.reference.config.quirks.single_life {
            self.machine.device().system_reset();
        }
        self.start()?;
        Ok(before)
    }

    /// Records a mapping that was made.
    pub(super) fn mapped(
        &mut self,
        at: usize,
        first: u64,
        len: u64,
        phys: u64,
        flags: u32,
        owner: Owner,
    ) -> (u64, u64) {
        let last = first + (len - 1);
        let map = Mapped { last, phys, flags, on_device: true, owner, held: owner.is_held() };
        self.reference.spaces[at].maps.insert(first, map);
        (first, last)
    }

    /// Records that mappings are gone.
    pub(super) fn unmapped(&mut self, at: usize, first: u64, last: u64) -> Vec<(u64, u64)> {
        let maps = &mut self.reference.spaces[at].maps;
        let gone: Vec<_> = maps.range(first..=last).map(|(first, map)| (*first, map.last)).collect();
        maps.retain(|start, _| *start < first || *start > last);
        gone
    }

    /// Takes note that a handle of a domain went.
    pub(super) fn released(&mut self, at: usize) {
        self.reference.spaces[at].handles -= 1;
        self.reference.settle(at);
    }

    /// A new mapping's address has to be free, aligned, and where it may be.
    pub(super) fn check_placed(&self, at: usize, iova: Iova, len: u64, limit: u64) -> Result<(), Failed> {
        let reference = &self.reference;
        let first = iova.get();
        let last = first.checked_add(len - 1).ok_or("a mapping that wraps")?;
        let good = first.is_multiple_of(reference.granule)
            && first >= reference.usable.0.max(reference.granule)
            && last <= reference.usable.1.min(limit)
            && reference.spaces[at].is_free((first, last));
        if good { Ok(()) } else { Err(format!("a mapping of {len:#x} bytes was put at {first:#x}")) }
    }
}
