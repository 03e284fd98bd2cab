//! Three nested spaces over the same device: an access reaches no more than the spaces say, and all of it unless something
//! failed.

use virtio_iommu::contexts::nested::{Nest, NestError, SpaceId};
use virtio_iommu::{EndpointId, Iova, IovaRange, PhysAddr, Prot, Viommu};
use virtio_iommu_model::AccessKind;

use super::op::Nested;
use crate::kernel::Kernel;
use crate::session::ENDPOINTS;
use crate::trace;
use crate::truthful::world::Truthful;

const PAGE: u64 = 4096;
/// Pages of each space in which mappings begin.
const PAGES: u64 = 6;
/// Pages that are tried: those of the longest mapping from the last of them on, too.
const TRIED: u64 = PAGES + 3;
const LEVELS: usize = 3;
/// The endpoints that are attached to them.
const MEMBERS: [EndpointId; 2] = [ENDPOINTS[2], ENDPOINTS[3]];

/// Where an endpoint is, as the nest said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    At(usize),
    Unsure,
}

/// The spaces, and who is where.
pub struct Spaces {
    nest: Nest<Kernel<Truthful>>,
    levels: [SpaceId; LEVELS],
    places: [Place; MEMBERS.len()],
    /// Whether nothing failed since the shadows of all were made.
    sure: bool,
}

impl Spaces {
    /// Three spaces without mappings, each in the one before.
    pub fn new(viommu: Viommu<Kernel<Truthful>>) -> Option<Self> {
        let mut nest = Nest::new(viommu);
        let root = nest.add_root();
        let middle = nest.add_child(root).ok()?;
        let levels = [root, middle, nest.add_child(middle).ok()?];
        Some(Self { nest, levels, places: [Place::Nowhere; MEMBERS.len()], sure: true })
    }

    /// Does one operation. `fresh` is memory that nothing else has, as far as anybody tells the device.
    pub fn run(&mut self, op: Nested, fresh: u64) {
        match op {
            Nested::Map { level, page, target, pages, write } => {
                let level = usize::from(level) % LEVELS;
                let target = if level == 0 { fresh } else { PAGE * (u64::from(target) % TRIED) };
                self.map(level, u64::from(page) % PAGES, target, 1 + u64::from(pages) % 4, write);
            }
            Nested::Unmap { level, page, pages } => {
                let (page, pages) = (u64::from(page) % PAGES, 1 + u64::from(pages) % TRIED);
                let Some(range) = IovaRange::from_len(Iova::new(PAGE * page), PAGE * pages) else { return };
                let done = self.nest.unmap(self.levels[usize::from(level) % LEVELS], range);
                self.note(done);
            }
            Nested::Attach { endpoint, level } => {
                let (at, level) = (usize::from(endpoint) % MEMBERS.len(), usize::from(level) % LEVELS);
                self.attach(at, level);
            }
            Nested::Detach { endpoint } => {
                let at = usize::from(endpoint) % MEMBERS.len();
                let done = self.nest.detach(MEMBERS[at]);
                self.places[at] = match done {
                    Ok(()) => Place::Nowhere,
                    Err(NestError::NotAttached { .. }) => self.places[at],
                    Err(_) => Place::Unsure,
                };
                self.note(done);
            }
        }
    }

    fn map(&mut self, level: usize, page: u64, target: u64, pages: u64, write: bool) {
        let (space, iova, len) = (self.levels[level], Iova::new(PAGE * page), PAGE * pages);
        let prot = if write { Prot::READ | Prot::WRITE } else { Prot::READ };
        let done = if level == 0 {
            // SAFETY: no access is made, so that the memory need not exist.
            unsafe { self.nest.map_memory(space, iova, PhysAddr::new(target), len, prot) }
        } else {
            self.nest.map(space, iova, Iova::new(target), len, prot)
        };
        self.note(done);
    }

    /// An endpoint that is elsewhere is detached first, as who uses it has to.
    fn attach(&mut self, at: usize, level: usize) {
        if self.nest.space_of(MEMBERS[at]).is_some_and(|space| space != self.levels[level]) {
            return;
        }
        let done = self.nest.attach(MEMBERS[at], self.levels[level]);
        self.places[at] = if done.is_ok() { Place::At(level) } else { Place::Unsure };
        self.note(done);
    }

    fn note(&mut self, done: Result<(), NestError>) {
        trace("    ", &done);
        let failed = matches!(
            done,
            Err(NestError::Shadow { .. }
                | NestError::Stuck { .. }
                | NestError::Attach(_)
                | NestError::Detach(_))
        );
        self.sure &= !failed;
        // Where nobody is attached there are no shadows that could be missing.
        let empty = self.places.iter().all(|place| *place == Place::Nowhere);
        self.sure |= empty && self.levels.iter().all(|level| self.nest.shadows(*level) == 0);
    }

    /// Where an address of a space leads, by its mappings and those above.
    fn lookup(&self, level: usize, address: u64) -> Option<(u64, Prot)> {
        let mut mappings = self.nest.mappings(self.levels[level]).ok()?;
        let (range, target, prot) =
            mappings.find(|(range, ..)| (range.start().get()..=range.last().get()).contains(&address))?;
        let target = target + (address - range.start().get());
        if level == 0 {
            return Some((target, prot));
        }
        let (phys, above) = self.lookup(level - 1, target)?;
        Some((phys, prot & above))
    }

    /// Tries every page of every endpoint.
    ///
    /// # Panics
    /// When one is reached that must not be, or is not that must.
    pub fn check(&self, world: &Truthful) {
        for (place, endpoint) in self.places.iter().zip(MEMBERS) {
            for page in 0..TRIED {
                for (kind, needed) in [(AccessKind::Read, Prot::READ), (AccessKind::Write, Prot::WRITE)] {
                    self.check_page(world, *place, endpoint, PAGE * page, (kind, needed));
                }
            }
        }
    }

    fn check_page(
        &self,
        world: &Truthful,
        place: Place,
        endpoint: EndpointId,
        address: u64,
        (kind, needed): (AccessKind, Prot),
    ) {
        let by_level = |level| {
            self.lookup(level, address).filter(|(_, prot)| prot.contains(needed)).map(|(phys, _)| phys)
        };
        let found = world.reached(endpoint, None, address, kind);
        let fits = match (place, found) {
            (Place::Nowhere, found) => found.is_none(),
            (Place::At(level), None) => by_level(level).is_none() || !self.sure,
            (Place::At(level), found) => found == by_level(level),
            (Place::Unsure, found) => found.is_none() || (0..LEVELS).any(|level| by_level(level) == found),
        };
        assert!(
            fits,
            "{endpoint} {place:?} at {address:#x}, {kind:?}: reaches {found:x?}, sure {}",
            self.sure
        );
    }
}
