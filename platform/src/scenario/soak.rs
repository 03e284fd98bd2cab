//! All devices at once for a while, and a domain that comes and goes beside them; then nothing must be left.
//!
//! There are no threads in this kernel: one loop gives each worker a step in turn. While the disk answers, and `edu` takes
//! its tenth of a second, frames of the network and random bytes are on their way.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use virtio_iommu::Options;

use super::work::{self, Bench, DEVICES, Open, Row, Work};
use super::{give_up, setup, show};
use crate::boot::BootInfo;
use crate::memory::frames;
use crate::report::Report;
use crate::time::{self, Deadline};

/// Checks around those of the workers.
const CHECKS: usize = 2;
/// How long it lasts unless `soak.seconds=` says otherwise, and at most: the harness reads all of QEMU's trace, which grows
/// by some two megabytes in each.
const SECONDS: u64 = 60;
const MAX_SECONDS: u64 = 600;

/// What works beside the devices.
const DOMAINS: (&str, Open) = ("domains", work::domains::open);

type Named<'b> = (&'static str, Box<dyn Work + 'b>);

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS + DEVICES.len() + 1);
    let (machine, iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    let prepared = Bench::new(&machine, &iommu, info).and_then(|bench| Ok((bench, seconds(info)?)));
    let (bench, seconds) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => give_up(report, "iommu", error),
    };
    show::live(&iommu, &mut report);

    let before = frames::usage();
    let rows = match soak(&bench, seconds) {
        Ok(rows) => rows,
        Err((name, error)) => give_up(report, name, error),
    };
    for (name, row) in &rows {
        report.check(name, row.done.rounds > 0, row);
    }
    show::nothing_left(&iommu, before, &mut report);
    show::figures(&rows, &mut report);
    show::totals(&iommu, &mut report);
    report.end()
}

fn seconds(info: &BootInfo) -> Result<u64, String> {
    let seconds = info.command_line.number("soak.seconds").map_err(|error| format!("{error}"))?;
    match seconds.unwrap_or(SECONDS) {
        seconds @ 1..=MAX_SECONDS => Ok(seconds),
        seconds => Err(format!("soak.seconds={seconds} is not in 1..={MAX_SECONDS}")),
    }
}

/// Opens all workers, lets them work side by side, lets each finish its round, and closes them. An error comes with the
/// name of whose it is.
fn soak(bench: &Bench<'_>, seconds: u64) -> Result<Vec<(&'static str, Row)>, (&'static str, String)> {
    let opens = DEVICES.map(|(name, open, _)| (name, open)).into_iter().chain([DOMAINS]);
    let opened = opens.map(|(name, open)| Ok((name, open(bench).map_err(|error| (name, error))?)));
    let mut workers = opened.collect::<Result<Vec<Named<'_>>, _>>()?;

    let start_ns = time::now_ns();
    let mut deadline = Deadline::after_ns(seconds * 1_000_000_000);
    while !deadline.expired() {
        for (name, work) in &mut workers {
            work.step().map_err(|error| (*name, error))?;
        }
    }
    let spent_ns = time::now_ns().zip(start_ns).map_or(0, |(now, start)| now - start);
    let mut rows = Vec::new();
    for (name, mut work) in workers {
        let more_ns = work::go_on(&mut *work, 1).map_err(|error| (name, error))?;
        let row = work::close(work, bench, spent_ns + more_ns).map_err(|error| (name, error))?;
        rows.push((name, row));
    }
    Ok(rows)
}
