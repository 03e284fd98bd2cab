//! Random changes at three levels, against a look-up of single pages.
//!
//! Each page of each endpoint's space is tried after each change: where all levels lead, and only there, an access arrives,
//! with what all of them allow. Memory that the root lets go of is given back at once, and poisoned.

use std::collections::BTreeMap;

use virtio_iommu::contexts::nested::{Nest, NestError, SpaceId};
use virtio_iommu::{DmaMemory, Iova, PhysAddr, Prot};
use virtio_iommu_model::{AccessKind, Config};

use crate::support::{EP, EP2, Machine, PAGE, RW, Rng, TestPlatform};

use super::super::range;

/// Pages of each level.
const PAGES: u64 = 12;

/// Mappings of a level: first page, pages, first page of the target (or the memory), what is allowed.
type Mapped = BTreeMap<u64, (u64, u64, Prot)>;

struct World {
    machine: Machine,
    nest: Nest<TestPlatform>,
    levels: [SpaceId; 3],
    mapped: [Mapped; 3],
    memory: BTreeMap<u64, DmaMemory>,
    attached: [Option<usize>; 2],
}

impl World {
    fn new() -> Self {
        let (machine, viommu) = Machine::live(Config::default());
        let mut nest = Nest::new(viommu);
        let root = nest.add_root();
        let one = nest.add_child(root).unwrap();
        let two = nest.add_child(one).unwrap();
        Self {
            machine,
            nest,
            levels: [root, one, two],
            mapped: [Mapped::new(), Mapped::new(), Mapped::new()],
            memory: BTreeMap::new(),
            attached: [None, None],
        }
    }

    fn step(&mut self, rng: &mut Rng) {
        let level = rng.below(3) as usize;
        match rng.below(8) {
            0..4 => self.map(level, rng),
            4..6 => self.unmap(level, rng),
            _ => self.move_endpoint(rng),
        }
    }

    fn map(&mut self, level: usize, rng: &mut Rng) {
        let (start, target) = (1 + rng.below(PAGES), 1 + rng.below(PAGES));
        let count = 1 + rng.below(4);
        let prot = [RW, Prot::READ, Prot::WRITE][rng.below(3) as usize];
        let free = self.mapped[level].iter().all(|(at, (n, ..))| start + count <= *at || at + n <= start);
        let iova = Iova::new(start * PAGE);
        let result = if level == 0 {
            let memory = self.machine.memory(count * PAGE);
            // SAFETY: the test's own memory, given back when it was unmapped with success.
            let result =
                unsafe { self.nest.map_memory(self.levels[0], iova, memory.phys, count * PAGE, prot) };
            match result {
                Ok(()) => drop(self.memory.insert(start, memory)),
                Err(_) => self.machine.give_back(memory),
            }
            result
        } else {
            self.nest.map(self.levels[level], iova, Iova::new(target * PAGE), count * PAGE, prot)
        };
        match result {
            Ok(()) if free => drop(self.mapped[level].insert(start, (count, target, prot))),
            Err(NestError::Mapped { .. }) if !free => {}
            other => panic!("{other:?}, free {free}"),
        }
    }

    fn unmap(&mut self, level: usize, rng: &mut Rng) {
        let which = rng.below(PAGES);
        let Some((start, (count, ..))) = self.mapped[level].range(which..).next() else { return };
        let (start, count) = (*start, *count);
        self.nest.unmap(self.levels[level], range(start * PAGE, count * PAGE)).unwrap();
        self.mapped[level].remove(&start);
        if level == 0 {
            self.machine.give_back(self.memory.remove(&start).unwrap());
        }
    }

    fn move_endpoint(&mut self, rng: &mut Rng) {
        let number = rng.below(2) as usize;
        let endpoint = [EP, EP2][number];
        if self.attached[number].take().is_some() {
            self.nest.detach(endpoint).unwrap();
        }
        if rng.below(4) > 0 {
            let level = rng.below(3) as usize;
            self.nest.attach(endpoint, self.levels[level]).unwrap();
            self.attached[number] = Some(level);
        }
    }

    /// Where a page of a level leads.
    fn lookup(&self, level: usize, page: u64) -> Option<(PhysAddr, Prot)> {
        let (start, (count, target, prot)) = self.mapped[level].range(..=page).next_back()?;
        let offset = page.checked_sub(*start).filter(|offset| offset < count)?;
        if level == 0 {
            return Some((self.memory[start].phys.checked_add(offset * PAGE)?, *prot));
        }
        let (phys, above) = self.lookup(level - 1, target + offset)?;
        Some((phys, *prot & above))
    }

    fn check(&self) {
        for (number, endpoint) in [EP, EP2].into_iter().enumerate() {
            for page in 0..PAGES + 5 {
                let expected = self.attached[number].and_then(|level| self.lookup(level, page));
                for (kind, needed) in [(AccessKind::Read, Prot::READ), (AccessKind::Write, Prot::WRITE)] {
                    let expected = expected.filter(|(_, prot)| prot.contains(needed));
                    let found = self.machine.device().translate(endpoint.get(), page * PAGE, kind).ok();
                    assert_eq!(
                        found,
                        expected.map(|(phys, _)| phys.get()),
                        "{endpoint:?}, page {page}, {kind:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn three_levels_say_what_a_look_up_of_single_pages_does() {
    let mut rng = Rng::new(0x4e57);
    for _ in 0..20 {
        let mut world = World::new();
        for _ in 0..120 {
            world.step(&mut rng);
            world.check();
        }
    }
}
