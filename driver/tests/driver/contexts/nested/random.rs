//! Random changes at three levels, against a look-up of single pages, with shadows merged and not.
//!
//! Each page of each endpoint's space is tried after each change: where all levels lead, and only there, an access arrives,
//! with what all of them allow; a fault is blamed on the level that does not let it pass. Memory that the root lets go of is
//! given back at once, and poisoned. Requests and doorbells of each change are counted.

use std::collections::BTreeMap;

use virtio_iommu::contexts::nested::{Level, Merging, Nest, NestError, SpaceId, Why};
use virtio_iommu::{DmaMemory, Iova, PhysAddr, Prot, Viommu};
use virtio_iommu_model::{AccessKind, Config, Request};

use crate::support::{EP, EP2, Machine, PAGE, RW, Rng, TestPlatform};

use super::super::range;

/// Pages of each level.
const PAGES: u64 = 12;

/// Mappings of a level: first page, pages, first page of the target (or the memory), what is allowed.
type Mapped = BTreeMap<u64, (u64, u64, Prot)>;

/// Where a page leads.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Leads {
    phys: PhysAddr,
    prot: Prot,
    /// The mappings that it passes through, by their first page: its own first.
    through: Vec<u64>,
}

struct World {
    machine: Machine,
    viommu: Viommu<TestPlatform>,
    nest: Nest<TestPlatform>,
    merging: Merging,
    levels: [SpaceId; 3],
    mapped: [Mapped; 3],
    /// The root's: blocks of their own.
    memory: BTreeMap<u64, DmaMemory>,
    /// What other mappings of the root lead to, in the same order, so that many adjoin.
    arena: DmaMemory,
    attached: [Option<usize>; 2],
    /// MAP requests so far.
    maps: usize,
}

impl World {
    fn new(merging: Merging) -> Self {
        let (machine, viommu) = Machine::live(Config::default());
        let mut nest = Nest::new(viommu.clone());
        nest.set_merging(merging);
        let root = nest.add_root();
        let one = nest.add_child(root).unwrap();
        let two = nest.add_child(one).unwrap();
        let arena = machine.memory((PAGES + 6) * PAGE);
        Self {
            machine,
            viommu,
            nest,
            merging,
            levels: [root, one, two],
            mapped: [Mapped::new(), Mapped::new(), Mapped::new()],
            memory: BTreeMap::new(),
            arena,
            attached: [None, None],
            maps: 0,
        }
    }

    fn step(&mut self, rng: &mut Rng) {
        let level = rng.below(3) as usize;
        let work = rng.below(32);
        let before = self.reached();
        self.machine.device().clear_log();
        let kicks = self.machine.device().counters().kicks[0];
        // Full above, and often anew below, so that there is much to compose.
        let mapping = [0..26, 0..26, 0..16][level].contains(&work);
        match work {
            _ if mapping => self.map(level, rng),
            0..31 => self.unmap(level, rng),
            _ => self.move_endpoint(rng),
        }
        let kicks = self.machine.device().counters().kicks[0] - kicks;
        self.count(&before, (work < 31).then_some(kicks));
    }

    /// Holds the requests of a step against the pages that it brought, or took; and its doorbells, where it changed mappings.
    fn count(&mut self, before: &BTreeMap<(usize, u64), Leads>, kicks: Option<u64>) {
        let requests = self.machine.requests();
        let maps = requests.iter().filter(|request| matches!(request, Request::Map { .. })).count();
        let unmaps = requests.iter().filter(|request| matches!(request, Request::Unmap { .. })).count();
        let after = self.reached();
        let come: Vec<_> = after.iter().filter(|(at, _)| !before.contains_key(at)).collect();
        let gone: Vec<_> = before.iter().filter(|(at, _)| !after.contains_key(at)).collect();
        // How many runs of pages that go by one request.
        let runs = |pages: &[(&(usize, u64), &Leads)], one: &dyn Fn(&Leads, &Leads) -> bool| {
            let touch = |at: &(usize, u64), next: &(usize, u64)| (at.0, at.1 + 1) == *next;
            pages.chunk_by(|(at, page), (next, other)| touch(at, next) && one(page, other)).count()
        };
        let mapped_as_one = |page: &Leads, next: &Leads| {
            let same = match self.merging {
                Merging::Never => page.through == next.through,
                Merging::Adjoining => page.through[0] == next.through[0],
            };
            same && page.prot == next.prot && page.phys.checked_add(PAGE) == Some(next.phys)
        };
        let expected = runs(&come, &mapped_as_one);
        let touching = runs(&gone, &|_, _| true);
        match kicks {
            // A domain goes with its last endpoint, which takes no UNMAP.
            None => assert_eq!((maps, unmaps), (expected, 0)),
            Some(kicks) if gone.is_empty() => {
                assert_eq!((maps, unmaps, kicks), (expected, 0, u64::from(expected > 0)));
            }
            Some(kicks) if self.merging == Merging::Never => {
                assert_eq!((maps, unmaps, kicks), (0, touching, 1));
            }
            // Others go with them, and come back.
            Some(kicks) => {
                assert!(unmaps <= touching, "{unmaps} UNMAPs for {touching} runs of pages");
                assert_eq!(kicks, 1 + u64::from(maps > 0));
            }
        }
        self.maps += maps;
        assert!(!self.nest.is_lacking());
    }

    /// Where the pages of spaces with endpoints lead, as far as they do.
    fn reached(&self) -> BTreeMap<(usize, u64), Leads> {
        let levels = (0..3).filter(|level| self.attached.contains(&Some(*level)));
        let pages = levels.flat_map(|level| (0..PAGES + 6).map(move |page| (level, page)));
        pages.filter_map(|(level, page)| Some(((level, page), self.lookup(level, page)?))).collect()
    }

    fn map(&mut self, level: usize, rng: &mut Rng) {
        let start = 1 + rng.below(PAGES);
        // Mostly the same addresses above, in small pieces, so that they adjoin.
        let target = if rng.below(8) == 0 { 1 + rng.below(PAGES) } else { start };
        let count = 1 + rng.below([2, 2, 6][level]);
        let prot = [Prot::READ, Prot::WRITE, RW][rng.below(12).min(2) as usize];
        let own_memory = rng.below(6) == 0;
        let free = self.mapped[level].iter().all(|(at, (n, ..))| start + count <= *at || at + n <= start);
        let iova = Iova::new(start * PAGE);
        let result = if level == 0 {
            let memory = own_memory.then(|| self.machine.memory(count * PAGE));
            let phys = memory.as_ref().map_or(self.in_arena(start), |memory| memory.phys);
            // SAFETY: the test's own memory, given back when it was unmapped with success; the arena never is.
            let result = unsafe { self.nest.map_memory(self.levels[0], iova, phys, count * PAGE, prot) };
            match (result, memory) {
                (Ok(()), Some(memory)) => drop(self.memory.insert(start, memory)),
                (Err(_), Some(memory)) => self.machine.give_back(memory),
                (_, None) => {}
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

    fn in_arena(&self, page: u64) -> PhysAddr {
        PhysAddr::new(self.arena.phys.get() + page * PAGE)
    }

    fn unmap(&mut self, level: usize, rng: &mut Rng) {
        let which = rng.below(PAGES);
        let Some((start, (count, ..))) = self.mapped[level].range(which..).next() else { return };
        let (start, count) = (*start, *count);
        self.nest.unmap(self.levels[level], range(start * PAGE, count * PAGE)).unwrap();
        self.mapped[level].remove(&start);
        let memory = if level == 0 { self.memory.remove(&start) } else { None };
        if let Some(memory) = memory {
            self.machine.give_back(memory);
        }
    }

    fn move_endpoint(&mut self, rng: &mut Rng) {
        let number = rng.below(2) as usize;
        let endpoint = [EP, EP2][number];
        if self.attached[number].take().is_some() {
            self.nest.detach(endpoint).unwrap();
        } else {
            let level = [0, 1, 2, 2][rng.below(4) as usize];
            self.nest.attach(endpoint, self.levels[level]).unwrap();
            self.attached[number] = Some(level);
        }
    }

    /// Where a page of a level leads, if anything may be done there.
    fn lookup(&self, level: usize, page: u64) -> Option<Leads> {
        let (start, (count, target, prot)) = self.mapped[level].range(..=page).next_back()?;
        let offset = page.checked_sub(*start).filter(|offset| offset < count)?;
        if level == 0 {
            let first = self.memory.get(start).map_or(self.in_arena(*start), |memory| memory.phys);
            let phys = first.checked_add(offset * PAGE)?;
            return Some(Leads { phys, prot: *prot, through: vec![*start] });
        }
        let above = self.lookup(level - 1, target + offset)?;
        let through = [vec![*start], above.through].concat();
        Some(Leads { prot: *prot & above.prot, through, ..above }).filter(|leads| leads.prot.intersects(RW))
    }

    /// Which level does not let an access pass: the page there, and why.
    fn blame(&self, mut level: usize, mut page: u64, needed: Prot) -> Option<(usize, u64, Why)> {
        loop {
            let entry = self.mapped[level].range(..=page).next_back();
            let entry = entry.filter(|(start, (count, ..))| page - *start < *count);
            let Some((start, (_, target, prot))) = entry else { return Some((level, page, Why::NotMapped)) };
            if !prot.contains(needed) {
                return Some((level, page, Why::NotAllowed));
            }
            (level, page) = (level.checked_sub(1)?, target + page - start);
        }
    }

    fn check(&self) {
        for (number, endpoint) in [EP, EP2].into_iter().enumerate() {
            for page in 0..PAGES + 6 {
                let expected = self.attached[number].and_then(|level| self.lookup(level, page));
                for (kind, needed) in [(AccessKind::Read, Prot::READ), (AccessKind::Write, Prot::WRITE)] {
                    let expected = expected.as_ref().filter(|leads| leads.prot.contains(needed));
                    let found = self.machine.device().translate(endpoint.get(), page * PAGE, kind).ok();
                    assert_eq!(
                        found,
                        expected.map(|leads| leads.phys.get()),
                        "{endpoint:?}, page {page}, {kind:?}"
                    );
                }
            }
        }
    }

    /// Writes to any page, and asks whose fault it is where that does not arrive.
    fn try_one(&self, rng: &mut Rng) {
        let (number, page) = (rng.below(2) as usize, rng.below(PAGES + 6));
        let Some(level) = self.attached[number] else { return };
        let address = page * PAGE + 8;
        let arrived = self.machine.dma_write([EP, EP2][number], address, &[1]).is_ok();
        let blame = self.blame(level, page, Prot::WRITE);
        assert_eq!(arrived, blame.is_none(), "page {page} of level {level}");
        let Some((blamed, page, why)) = blame else { return };
        self.viommu.poll();
        let fault = self.viommu.next_fault().unwrap();
        let nested = self.nest.explain(&fault).unwrap();
        let at = |level: usize, address| Level { space: self.levels[level], address: Iova::new(address) };
        assert_eq!((nested.seen, nested.blamed), (at(level, address), at(blamed, page * PAGE + 8)));
        assert_eq!(nested.why, why);
    }
}

/// The MAP requests that all took.
fn run(merging: Merging) -> usize {
    let mut rng = Rng::new(0x4e57);
    let mut maps = 0;
    for _ in 0..20 {
        let mut world = World::new(merging);
        world.move_endpoint(&mut rng);
        for _ in 0..200 {
            world.step(&mut rng);
            world.check();
            world.try_one(&mut rng);
        }
        maps += world.maps;
    }
    maps
}

#[test]
fn three_levels_say_what_a_look_up_of_single_pages_does() {
    let (apart, merged) = (run(Merging::Never), run(Merging::Adjoining));
    println!("{apart} MAP requests without merging, {merged} with it");
    assert!(merged < apart, "{merged} of {apart}");
}
