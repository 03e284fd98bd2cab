//! Random sequences of operations, over the driver and the model as each of the devices that it imitates.
//!
//! ```text
//!   op (proptest) ---> act: predict, do, judge ---> check: records, device, accesses against `reference`
//! ```
//! After every operation three accounts have to agree with a plain map of what should be: the driver's records, the
//! device's state, and what endpoints reach at both edges of every mapping and one byte beyond.
//!
//! `SEQUENCES=n` runs so many sequences for each device instead of a few, `SEED=n` repeats a run. A sequence that fails
//! is made as short as possible and kept in `proptest-regressions/sequences.txt`, from where all devices run it first.

mod act;
mod check;
mod op;
mod reference;
mod regressions;
mod world;

use std::cell::Cell;
use std::env;
use std::fmt::Write as _;
use std::io::Write as _;

use proptest::collection::vec;
use proptest::test_runner::{
    Config as Budget, FileFailurePersistence, RngSeed, TestCaseError, TestError, TestRunner,
};
use virtio_iommu_model::Config;

use op::Op;
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
    let wide = Config { page_size_mask: !0xffff, ..Config::default() };
    let narrow = Config { input_range: 0x10_0000..=0xffff_ffff, domain_range: 7..=7, ..Config::default() };
    [
        ("strict", Config::default()),
        ("qemu-7.2", Config::qemu_7_2()),
        ("qemu-10.0", Config::qemu_10()),
        ("qemu-11.1", Config::qemu_11_1()),
        ("cloud-hypervisor", Config::cloud_hypervisor()),
        ("crosvm", Config::crosvm()),
        ("64-kib-granule", wide),
        ("one-domain-from-1-mib", narrow),
    ]
}

/// Runs a sequence. Returns how many operations there was something to do for.
fn run(config: &Config, ops: &[Op]) -> Result<u64, String> {
    let mut world = World::new(config.clone())?;
    let mut done = 0;
    for (at, op) in ops.iter().enumerate() {
        match world.run(*op) {
            Ok(did) => done += u64::from(did),
            Err(error) => return Err(format!("operation {at}, {op:?}: {error}")),
        }
    }
    Ok(done)
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Says something although the test harness keeps the output of tests that pass to itself.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn nothing_differs(name: &str) {
    let (_, config) = devices().into_iter().find(|(device, _)| *device == name).expect("a device's name");
    let seed = number("SEED").unwrap_or(SEED);
    let cases = number("SEQUENCES").map_or(FEW, |cases| u32::try_from(cases).unwrap_or(u32::MAX));
    println!("{name}: SEED={seed}");
    let budget = Budget {
        cases,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(KEPT))),
        rng_seed: RngSeed::Fixed(seed),
        max_shrink_iters: 20_000,
        max_shrink_time: 20_000,
        ..Budget::default()
    };
    let (sequences, operations) = (Cell::new(0u64), Cell::new(0u64));
    let result = TestRunner::new(budget).run(&vec(op::op(), OPERATIONS), |ops| {
        let done = run(&config, &ops);
        if let Ok(done) = &done {
            sequences.set(sequences.get() + 1);
            operations.set(operations.get() + done);
        }
        done.map(|_| ()).map_err(TestCaseError::fail)
    });
    let (sequences, operations) = (sequences.get(), operations.get());
    match result {
        Ok(()) => say(&format!(
            "sequences: {name}: {sequences} sequences, {operations} operations, none differed (SEED={seed})"
        )),
        Err(TestError::Fail(why, ops)) => {
            let mut text = format!("{name}, SEED={seed}: {why}\n");
            for op in ops.iter().filter(|op| !matches!(op, Op::Nothing)) {
                let _ = writeln!(text, "    Op::{op:?},");
            }
            panic!("{text}");
        }
        Err(error) => panic!("{name}, SEED={seed}: {error}"),
    }
}

#[test]
fn on_a_strict_device() {
    nothing_differs("strict");
}

#[test]
fn on_qemu_7_2() {
    nothing_differs("qemu-7.2");
}

#[test]
fn on_qemu_10_0() {
    nothing_differs("qemu-10.0");
}

#[test]
fn on_qemu_11_1() {
    nothing_differs("qemu-11.1");
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
    nothing_differs("64-kib-granule");
}

#[test]
fn with_one_domain_and_addresses_from_1_mib() {
    nothing_differs("one-domain-from-1-mib");
}
