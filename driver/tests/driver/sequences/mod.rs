//! Random sequences of operations, over the driver and the model as each of the devices that it imitates.
//!
//! ```text
//!   word (proptest) -> op ---> act: predict, do, judge ---> check: records, device, accesses against `reference`
//! ```
//! After every operation three accounts have to agree with a plain map of what should be: the driver's records, the
//! device's state, and what endpoints reach at both edges of every mapping and one byte beyond. Every other sequence
//! has a device that misbehaves, and that is asked for what it owes in the end.
//!
//! To see that they notice, the driver was broken, one thing at a time, and had to fail: addresses free before the UNMAP
//! is confirmed, mappings of a dead domain not mapped again, or still taken for mapped; a lost UNMAP, ATTACH or DETACH
//! taken for done; quarantine that ends with the deadline, or is reclaimed while an answer is owed; memory given back after
//! an outcome that is not known; a short answer taken for success; reserved regions, mapping boundaries, the open bypass
//! or used domain numbers ignored; a failed list not rolled back; pages of an earlier buffer not zeroed.
//!
//! `SEQUENCES=n` runs so many sequences for each device instead of a few, `SEED=n` repeats a run or begins another. A
//! sequence that fails is made as short as possible and kept in `proptest-regressions/sequences.txt`, from where all
//! devices run it first; what was found is written out in `regressions`.

mod act;
mod check;
mod op;
mod reference;
mod regressions;
mod words;
mod world;

use std::cell::Cell;
use std::env;
use std::fmt::Write as _;
use std::io::Write as _;

use proptest::test_runner::{
    Config as Budget, FileFailurePersistence, RngSeed, TestCaseError, TestError, TestRunner,
};
use virtio_iommu_model::{Config, feature};

use op::Op;
use words::Words;
use world::World;

/// Operations of a sequence.
const OPERATIONS: usize = 200;
/// What a run without `SEED` begins with, so that it says the same each time.
const SEED: u64 = 0x5eed;
/// Sequences for each device where the environment does not say.
const FEW: u32 = 20;
const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/sequences.txt");

/// Every device, by a name to print.
fn devices() -> [(&'static str, Config); 8] {
    let strict = Config::default();
    // Nothing tells what an endpoint without a domain reaches.
    let features = strict.features & !feature::BYPASS_CONFIG;
    let wide = Config { page_size_mask: !0xffff, features, ..Config::default() };
    let narrow = Config { input_range: 0x10_0000..=0xffff_ffff, domain_range: 7..=7, ..Config::default() };
    [
        ("a strict device", strict),
        ("QEMU 7.2", Config::qemu_7_2()),
        ("QEMU 10.0", Config::qemu_10()),
        ("QEMU 11.1", Config::qemu_11_1()),
        ("cloud-hypervisor", Config::cloud_hypervisor()),
        ("crosvm", Config::crosvm()),
        ("a device with 64 KiB granules and no bypass", wide),
        ("a device with one domain and addresses from 1 MiB", narrow),
    ]
}

/// Operations that had something to do, by what they are about.
#[derive(Clone, Copy, Default)]
struct Count {
    sequences: u64,
    operations: u64,
    attach: u64,
    map: u64,
    unmap: u64,
    misbehaviour: u64,
}

impl Count {
    fn add(&mut self, op: &Op) {
        self.operations += 1;
        match op {
            Op::Attach { .. } | Op::Move { .. } | Op::Open { .. } => self.attach += 1,
            Op::Map { .. } | Op::MapAt { .. } | Op::MapIdentity { .. } => self.map += 1,
            Op::Scatter { .. } | Op::Adopt { .. } | Op::Alloc { .. } => self.map += 1,
            Op::Unmap { .. } | Op::UnmapOne { .. } | Op::Free { .. } => self.unmap += 1,
            Op::Misbehave { .. } | Op::Delay { .. } => self.misbehaviour += 1,
            _ => {}
        }
    }
}

/// The operations of a sequence. At its end the device answers everything.
fn decode(words: &[u64], misbehaves: bool) -> impl Iterator<Item = Op> {
    let ops = words.iter().map(|word| Op::decode(*word));
    ops.filter(move |op| misbehaves || !op.is_trouble()).chain([Op::Settle { attach: false }])
}

/// Runs a sequence.
fn run(config: &Config, ops: impl Iterator<Item = Op>, count: &mut Count) -> Result<(), String> {
    let mut world = World::new(config.clone())?;
    for (at, op) in ops.enumerate() {
        match world.run(op) {
            Ok(true) => count.add(&op),
            Ok(false) => {}
            Err(error) => return Err(format!("operation {at}, {op:?}: {error}")),
        }
    }
    count.sequences += 1;
    Ok(())
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Says something although the test harness keeps the output of tests that pass to itself.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn nothing_differs(name: &str) {
    let which = devices().iter().position(|(device, _)| *device == name).expect("a device's name");
    let config = devices()[which].1.clone();
    let seed = number("SEED").unwrap_or(SEED);
    let cases = number("SEQUENCES").map_or(FEW, |cases| u32::try_from(cases).unwrap_or(u32::MAX));
    println!("{name}: SEED={seed}");
    let budget = Budget {
        cases,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(KEPT))),
        // Each device gets sequences of its own.
        rng_seed: RngSeed::Fixed(seed.wrapping_add((which as u64) << 48)),
        max_shrink_iters: 40_000,
        max_shrink_time: 20_000,
        ..Budget::default()
    };
    let total = Cell::new(Count::default());
    let result = TestRunner::new(budget).run(&Words, |(words, misbehaves)| {
        let mut count = total.get();
        run(&config, decode(&words, misbehaves), &mut count).map_err(TestCaseError::fail)?;
        total.set(count);
        Ok(())
    });
    let Count { sequences, operations, attach, map, unmap, misbehaviour } = total.get();
    match result {
        Ok(()) => say(&format!(
            "sequences as {name}: seed {seed:#x}, {sequences} sequences, {operations} operations ({attach} attach, \
             {map} map, {unmap} unmap, {misbehaviour} misbehaviour): none differed"
        )),
        Err(TestError::Fail(why, (words, misbehaves))) => {
            let mut text = format!("{name}, SEED={seed}: {why}\n");
            for op in decode(&words, misbehaves).filter(|op| !matches!(op, Op::Nothing)) {
                let _ = writeln!(text, "    Op::{op:?},");
            }
            panic!("{text}");
        }
        Err(error) => panic!("{name}, SEED={seed}: {error}"),
    }
}

#[test]
fn on_a_strict_device() {
    nothing_differs("a strict device");
}

#[test]
fn on_qemu_7_2() {
    nothing_differs("QEMU 7.2");
}

#[test]
fn on_qemu_10_0() {
    nothing_differs("QEMU 10.0");
}

#[test]
fn on_qemu_11_1() {
    nothing_differs("QEMU 11.1");
}

#[test]
fn on_cloud_hypervisor() {
    nothing_differs("cloud-hypervisor");
}

#[test]
fn on_crosvm() {
    nothing_differs("crosvm");
}

#[test]
fn with_a_granule_of_64_kib() {
    nothing_differs("a device with 64 KiB granules and no bypass");
}

#[test]
fn with_one_domain_and_addresses_from_1_mib() {
    nothing_differs("a device with one domain and addresses from 1 MiB");
}
