//! Random changes to tables of every format, against a plain list, by a walker without a cache and by one that keeps what it
//! found until it is told.
//!
//! After every change both walks have to say what the list says, at both edges of everything mapped and one byte beyond; but
//! in what is stale they may fault, and the cache may say what was there before. An invalidation drops from the cache what
//! the table said and nothing else: a range that was left out, too short, or leaf-only where tables went, shows as a wrong
//! translation, or as a walk through a page that was freed, and holds poison since.
//!
//! `SEQUENCES=n` runs so many sequences for each format, `SEED=n` begins another row of them. A sequence that fails is made
//! as short as possible, and printed.

use std::cell::RefCell;
use std::env;

use proptest::collection::vec;
use proptest::num::u64::ANY;
use proptest::test_runner::{Config as Budget, RngSeed, TestCaseError, TestRunner};
use virtio_iommu::contexts::table::{Invalidation, PageTable, StaleEntries, TableFormat, TableMapError};
use virtio_iommu::{Iova, Prot};
use virtio_iommu_model::walk::{Cache, Table, WalkFault};
use virtio_iommu_model::{AccessKind, OutOfMemoryRange};

use super::reference::{Reference, Run};
use super::{FORMATS, Tables, for_walker, map, range};

const OPERATIONS: usize = 60;

/// Takes random bits off a word.
struct Bits(u64);

impl Bits {
    fn below(&mut self, bound: u64) -> u64 {
        let value = self.0 % bound;
        self.0 /= bound;
        value
    }
}

struct World {
    memory: Tables,
    table: PageTable<Tables>,
    walker: Table,
    reference: Reference,
    cache: RefCell<Cache>,
    /// An invalidation that is under way.
    flight: Option<Invalidation>,
    /// Bytes of a page, and of a block of each level above.
    sizes: Vec<u64>,
}

impl World {
    fn new(format: TableFormat) -> Self {
        let memory = Tables::new();
        let table = memory.table(format);
        let granule = table.granule();
        let entries = granule / 8;
        let top = table.input_range().last().get();
        let sizes =
            (0..3).map(|level| granule * entries.pow(level)).filter(|size| *size <= top / 4).collect();
        let walker = for_walker(&table);
        Self {
            memory,
            table,
            walker,
            reference: Reference::default(),
            cache: RefCell::default(),
            flight: None,
            sizes,
        }
    }

    /// A range of pages around the edge of an entry of some level, near the start or the end of what is translated.
    fn pick(&self, bits: &mut Bits) -> (u64, u64) {
        let granule = self.sizes[0];
        let size = self.sizes[bits.below(self.sizes.len() as u64) as usize];
        let base = match bits.below(3) {
            0 => 0,
            1 => self.sizes[self.sizes.len() - 1],
            _ => self.table.input_range().last().get() + 1 - 4 * size,
        };
        let near = |bits: &mut Bits| match bits.below(4) {
            0 => granule * bits.below(4),
            _ => 0,
        };
        let end = self.table.input_range().last().get() + 1;
        let start = (base + size * bits.below(3) + near(bits)).min(end - granule);
        let len = match bits.below(4) {
            0 => granule * (1 + bits.below(3)),
            1 => size + near(bits),
            2 => 2 * size,
            _ => size,
        };
        (start, len.min(end - start))
    }

    fn run(&mut self, word: u64) -> Result<(), String> {
        let mut bits = Bits(word);
        match bits.below(10) {
            0..4 => self.map(&mut bits)?,
            4..7 => self.unmap(&mut bits)?,
            7 => self.begin(),
            8 => self.end(true),
            _ => self.end(false),
        }
        self.check()
    }

    fn map(&mut self, bits: &mut Bits) -> Result<(), String> {
        let (start, len) = self.pick(bits);
        let last = start + len - 1;
        // As far aligned as the addresses, or less; but not so much less that it takes millions of entries.
        let least = if len > 4 * self.sizes[1] { 1 } else { 0 };
        let size = self.sizes[least + bits.below((self.sizes.len() - least) as u64) as usize];
        let phys = 0x40_0000_0000 + size * bits.below(4) + start % size;
        let prot = if bits.below(2) == 0 { Prot::READ } else { Prot::READ | Prot::WRITE };
        let free = self.reference.is_free(start, last);
        let stale = self.is_stale(start, last);
        match map(&mut self.table, (start, phys, len), prot) {
            Ok(()) if free && !stale => self.reference.map(Run { start, last, phys, prot }),
            Err(TableMapError::Mapped { .. }) if !free => {}
            Err(TableMapError::Stale { .. }) if stale => {}
            other => {
                return Err(format!("map {start:#x}..={last:#x} (free {free}, stale {stale}): {other:?}"));
            }
        }
        Ok(())
    }

    fn unmap(&mut self, bits: &mut Bits) -> Result<(), String> {
        let (start, len) = self.pick(bits);
        let expected = self.reference.unmap(start, start + len - 1);
        let bytes = self.table.unmap(range(start, len)).map_err(|error| error.to_string())?;
        let mapped = self.table.mapped_bytes();
        if (bytes, mapped) != (expected, self.reference.bytes()) {
            return Err(format!("unmapped {bytes:#x} bytes of {expected:#x}, {mapped:#x} remain"));
        }
        Ok(())
    }

    fn begin(&mut self) {
        if self.flight.is_none() {
            self.flight = Some(self.table.begin_invalidation());
        }
    }

    /// The device answers the invalidation, or refuses it.
    fn end(&mut self, confirmed: bool) {
        let Some(flight) = self.flight.take() else { return };
        if !confirmed {
            return self.table.abandon(flight);
        }
        let mut cache = self.cache.borrow_mut();
        for stale in flight.ranges() {
            let leaf_only = stale.entries == StaleEntries::LeafOnly;
            cache.invalidate(stale.range.start().get(), stale.range.last().get(), leaf_only);
        }
        // SAFETY: the only cache there is has been told.
        unsafe { self.table.confirm(flight) };
    }

    fn is_stale(&self, start: u64, last: u64) -> bool {
        let flying = self.flight.iter().flat_map(Invalidation::ranges);
        let range = range(start, last - start + 1);
        self.table.stale().iter().chain(flying).any(|stale| stale.range.overlaps(range))
    }

    fn check(&self) -> Result<(), String> {
        let mut addresses = vec![0, self.table.input_range().last().get()];
        for run in &self.reference.runs {
            let edges = [run.start.wrapping_sub(1), run.start, run.last, run.last + 1];
            // Also inside, where blocks may have been split.
            let inside = self.sizes.iter().map(|size| run.start + (run.last - run.start) / 2 / size * size);
            addresses.extend(edges.into_iter().chain(inside));
        }
        let flying = self.flight.iter().flat_map(Invalidation::ranges);
        for stale in self.table.stale().iter().chain(flying) {
            addresses.extend([stale.range.start().get(), stale.range.last().get()]);
        }
        let input = self.table.input_range().last().get();
        for address in addresses.into_iter().filter(|address| *address <= input) {
            self.check_at(address).map_err(|text| format!("at {address:#x}: {text}"))?;
        }
        Ok(())
    }

    fn check_at(&self, address: u64) -> Result<(), String> {
        let expected = self.reference.lookup(address);
        let entry = self.table.lookup(Iova::new(address));
        let looked_up =
            entry.map(|entry| (entry.phys.get() + (address - entry.range.start().get()), entry.prot));
        if looked_up != expected {
            return Err(format!("the table says {looked_up:x?}, not {expected:x?}"));
        }
        let stale = self.is_stale(address, address);
        for kind in [AccessKind::Read, AccessKind::Write] {
            let allowed = |prot: Prot| match kind {
                AccessKind::Read => prot.contains(Prot::READ),
                AccessKind::Write => prot.contains(Prot::WRITE),
            };
            let good = |result: Result<u64, WalkFault>| match (result, expected) {
                (Ok(phys), Some((expected, prot))) => phys == expected && allowed(prot),
                (Err(WalkFault::Permission), Some((_, prot))) => !allowed(prot),
                (Err(WalkFault::NotPresent { .. }), expected) => expected.is_none() || stale,
                _ => false,
            };
            let mem = &self.memory.ram;
            let walked = self.walker.walk(mem, address, kind).map(|page| page.phys_of(address));
            if !good(walked) {
                return Err(format!("{kind:?} walked to {walked:x?}, not {expected:x?}"));
            }
            let cached = self.cache.borrow_mut().translate(&self.walker, mem, address, kind);
            let cached = cached.map(|page| page.phys_of(address));
            // What is stale may be what was there, but never what no table said.
            let torn = matches!(cached, Err(WalkFault::Reserved { .. } | WalkFault::Memory(_)));
            if torn || (!stale && !good(cached)) {
                return Err(format!("{kind:?} found {cached:x?} in the cache, not {expected:x?}"));
            }
        }
        Ok(())
    }

    /// All memory comes back.
    fn finish(mut self) -> Result<(), String> {
        self.end(true);
        self.begin();
        self.end(true);
        self.check()?;
        let pages = self.table.pages();
        if pages != self.memory.out() {
            return Err(format!("the table has {pages} pages, and {} are out", self.memory.out()));
        }
        // SAFETY: nobody walks it any more.
        unsafe { self.table.free() };
        let strays: Vec<OutOfMemoryRange> = self.memory.ram.take_strays();
        match (self.memory.out(), strays.is_empty()) {
            (0, true) => Ok(()),
            (out, _) => Err(format!("{out} pages did not come back, stray reads {strays:x?}")),
        }
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

#[test]
fn random_changes_are_what_a_walker_and_its_cache_see() {
    let seed = number("SEED", 0x7ab1e);
    let sequences = number("SEQUENCES", 20) as u32;
    println!("seed {seed:#x}, {sequences} sequences for each format");
    for format in FORMATS {
        let budget = Budget {
            cases: sequences,
            rng_seed: RngSeed::Fixed(seed),
            failure_persistence: None,
            ..Budget::default()
        };
        let outcome = TestRunner::new(budget).run(&vec(ANY, OPERATIONS), |words| {
            let mut world = World::new(format);
            for (at, word) in words.iter().enumerate() {
                let failed = |text| TestCaseError::fail(format!("operation {at}, {word:#x}: {text}"));
                world.run(*word).map_err(failed)?;
            }
            world.finish().map_err(TestCaseError::fail)
        });
        outcome.unwrap_or_else(|error| panic!("{format:?}, seed {seed:#x}: {error}"));
    }
}
