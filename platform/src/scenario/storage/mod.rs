//! What is done with a disk, whatever drives it, and how many requests of the IOMMU that takes.
//!
//! The disk is the image that the host made: its first half is given by a seed, and what is written to its second half
//! the host checks afterwards.

mod attack;
mod bench;
mod parts;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

pub(super) use bench::Bench;

use super::default::text;
use super::word;
use crate::boot::BootInfo;
use crate::devices::storage::finish;
use crate::memory::frames::{self, FRAME_BYTES};
use crate::println;
use crate::report::Report;

/// A page of data.
const PAGE: usize = FRAME_BYTES as usize;

/// How many short requests are made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    /// Each mapped and unmapped for itself.
    pub mapped: u64,
    /// From memory that is mapped once.
    pub pooled: u64,
}

impl Work {
    /// What the command line says, as `mapped=` and `pooled=`; 64 of each where it does not.
    pub(super) fn of(info: &BootInfo) -> Result<Self, String> {
        let number = |key| info.command_line.number(key).map(|number| number.unwrap_or(64)).map_err(text);
        Ok(Self { mapped: number("mapped")?, pooled: number("pooled")? })
    }
}

/// The image on a disk.
#[derive(Clone, Debug)]
pub(super) struct Image {
    /// What it was made from.
    seed: u64,
    /// The digest of its first half.
    sha256: String,
}

impl Image {
    /// The image of the command line's seed, changed by `change`, and with the digest that is there as `key`.
    pub(super) fn of(info: &BootInfo, change: u64, key: &str) -> Result<Self, String> {
        let seed = info.command_line.number("seed").map_err(text)?;
        let seed = seed.ok_or_else(|| word(info, "seed").err().unwrap_or_default())?;
        Ok(Self { seed: seed ^ change, sha256: word(info, key)?.into() })
    }
}

/// What a part of the work took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Figures {
    pub name: &'static str,
    /// Requests of the disk, and bytes that they moved.
    pub requests: u64,
    pub bytes: u64,
    /// The most that were in flight at a time.
    pub in_flight: u64,
    /// What the IOMMU was asked meanwhile.
    pub maps: u64,
    pub unmaps: u64,
    pub kicks: u64,
}

/// A part of the work.
pub(super) type Part = (&'static str, fn(&mut Bench<'_>) -> Result<Figures, String>);

/// What every disk does.
pub(super) const PARTS: [Part; 6] = [
    ("read", |bench| bench.read_all()),
    ("written", |bench| bench.write()),
    ("mapped", |bench| bench.mapped()),
    ("batched", |bench| bench.batched()),
    ("pooled", |bench| bench.pooled()),
    ("out-of-range", |bench| bench.out_of_range()),
];

/// What a disk behind an IOMMU does too.
pub(super) const ATTACKS: [Part; 2] =
    [("attack.write", attack::write_to_memory), ("attack.read", attack::read_from_memory)];

/// Does every part, and gives the figures of each. Requests may be in flight after an error.
pub(super) fn exercise(bench: &mut Bench<'_>, parts: &[Part]) -> Result<Vec<Figures>, String> {
    let done = parts.iter().map(|(name, part)| part(bench).map_err(|error| format!("{name}: {error}")));
    done.collect()
}

/// Checks that a disk that was closed works like a new one, and that it leaves no frame behind.
pub(super) fn check_again(
    disk: &str,
    exercise: impl FnOnce() -> Result<Vec<Figures>, String>,
    report: &mut Report,
) {
    let before = frames::usage();
    let again = exercise().and_then(|figures| {
        let after = frames::usage();
        let requests: u64 = figures.iter().map(|figures| figures.requests).sum();
        if after == before {
            Ok(format!("{requests} requests after it was closed and opened; no frame is lost"))
        } else {
            Err(format!("frames in use: {} before, {} after", before.used, after.used))
        }
    });
    report.check_result(&format!("{disk}.again"), again, String::clone);
}

/// Does every part as a check each, `disk` being the first word of its name, and shows the figures.
pub(super) fn check(disk: &str, bench: &mut Bench<'_>, parts: &[Part], report: &mut Report) {
    let mut all = Vec::new();
    for (name, part) in parts {
        let mut result = part(bench);
        if result.is_err() {
            // What the next part finds done must be its own.
            result = finish(bench.storage, &mut Vec::new()).map_err(text).and(result);
        }
        let detail = |figures: &Figures| {
            format!(
                "{} requests of {} bytes in all, {} in flight; {} MAPs, {} UNMAPs, {} kicks",
                figures.requests,
                figures.bytes,
                figures.in_flight,
                figures.maps,
                figures.unmaps,
                figures.kicks
            )
        };
        all.extend(report.check_result(&format!("{disk}.{name}"), result, detail));
    }
    let strays = bench.storage.strays();
    report.check(
        &format!("{disk}.no-strays"),
        strays == Default::default(),
        format_args!("{} completions of nothing, {} by a wrong queue", strays.unknown_id, strays.wrong_queue),
    );
    table(&all);
}

/// The checks that [`check`] makes of parts.
pub(super) const fn checks(parts: usize) -> usize {
    parts + 1
}

fn table(all: &[Figures]) {
    println!();
    println!("  part          requests       bytes  in flight    maps  unmaps   kicks");
    for Figures { name, requests, bytes, in_flight, maps, unmaps, kicks } in all {
        println!(
            "  {name:<12}  {requests:>8}  {bytes:>10}  {in_flight:>9}  {maps:>6}  {unmaps:>6}  {kicks:>6}"
        );
    }
    println!();
}
