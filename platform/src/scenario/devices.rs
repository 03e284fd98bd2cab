//! Every device by itself, in a domain of its own: opened, put to work, closed; with figures.

use alloc::vec::Vec;

use virtio_iommu::Options;

use super::work::{self, Bench, DEVICES};
use super::{give_up, setup, show};
use crate::boot::BootInfo;
use crate::memory::frames;
use crate::report::Report;

/// Checks around those of the devices.
const CHECKS: usize = 2;

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS + DEVICES.len());
    let (machine, iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    let bench = match Bench::new(&machine, &iommu, info) {
        Ok(bench) => bench,
        Err(error) => give_up(report, "iommu", error),
    };
    show::live(&iommu, &mut report);

    let before = frames::usage();
    let mut rows = Vec::new();
    for (name, open, rounds) in DEVICES {
        match work::run(&bench, open, rounds) {
            Ok(row) => {
                report.check(name, true, &row);
                rows.push((name, row));
            }
            Err(error) => give_up(report, name, error),
        }
    }
    show::nothing_left(&iommu, before, &mut report);
    show::figures(&rows, &mut report);
    show::totals(&iommu, &mut report);
    report.end()
}
