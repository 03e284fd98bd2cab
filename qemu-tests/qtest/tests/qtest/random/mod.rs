//! The same random operations for QEMU and for the model.
//!
//! With the model imitating this version of QEMU nothing may differ: answers byte by byte, fault records,
//! memory. With the strict model exactly the differences in [`expected`] may, and each of them has to turn
//! up.

mod expected;
mod generate;
mod pair;
mod strict;

use std::env;
use std::time::Instant;

use qtest::Machine;

use self::generate::{Accesses, Generator};
use self::pair::Pair;
use crate::Case;
use crate::support::imitation;

pub(crate) const CASES: &[Case] = &[
    ("random/no_difference_from_the_imitation", no_difference_from_the_imitation),
    ("random/only_listed_differences_from_the_strict_model", strict::only_listed_differences),
];

/// Another seed than [`DEFAULT_SEED`], in decimal or with 0x.
const SEED: &str = "QTEST_SEED";
const DEFAULT_SEED: u64 = 0x5eed;
/// Another number of sequences.
const SEQUENCES: &str = "QTEST_SEQUENCES";

fn number(name: &str, default: u64) -> u64 {
    let Ok(text) = env::var(name) else { return default };
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.unwrap_or_else(|_| panic!("{name} is `{text}`, which is no number"))
}

fn no_difference_from_the_imitation(machine: &Machine) {
    let (seed, sequences) = (number(SEED, DEFAULT_SEED), number(SEQUENCES, 1_000));
    let name = imitation(machine.version()).1;
    let since = Instant::now();
    let mut pair = Pair::new(machine);
    let mut generator = Generator::new(seed, machine.version());
    for sequence in 0..sequences {
        for _ in 0..generator.rng.u32(20..140) {
            let op = generator.next(pair.device(), Accesses::With);
            if let Err(difference) = pair.apply(&op) {
                fail(&pair, seed, sequence, &difference);
            }
        }
        if let Err(difference) = pair.clean() {
            fail(&pair, seed, sequence, &difference);
        }
    }
    let [reached, refused, nowhere] = pair.accesses;
    println!(
        "QEMU {} and the model as {name}: seed {seed:#x}, {sequences} sequences, {} operations, among them \
         accesses: {reached} reached memory, {refused} refused, {nowhere} bypassed to nothing: no difference, {:.1} s",
        machine.version(),
        pair.operations,
        since.elapsed().as_secs_f64()
    );
}

fn fail(pair: &Pair<'_>, seed: u64, sequence: u64, difference: &str) -> ! {
    let history: Vec<&str> = pair.history.iter().map(String::as_str).collect();
    panic!(
        "{difference}\nseed {seed:#x}, sequence {sequence}; the last operations:\n  {}",
        history.join("\n  ")
    );
}
