//! What the driver's operations cost, in instructions, and in what the device is asked.
//!
//! ```text
//! bench=time       instructions, by the time-stamp counter; exact only under QEMU's `-icount shift=0`
//! bench=count      stretches are marked at port 0x80 for whoever reads QEMU's trace
//! bench=profile    one operation is marked for a debugger
//! operations=N  warm-up=N  live=N (the most live mappings)  only=ROW
//! ```
//! The kernel judges no figure. A check fails only where an operation does.

mod disk;
#[cfg(feature = "contexts")]
mod draft;
mod meter;
mod rows;
mod smp;

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Display;

use virtio_iommu::{DomainOptions, Options};

use self::disk::DIRECT_ROWS;
use self::meter::Meter;
use self::rows::{End, ROWS, Rig, Row};
use super::{give_up, setup};
use crate::boot::BootInfo;
use crate::devices::edu;
use crate::devices::virtio::{ENTROPY, VENDOR};
use crate::machine::Machine;
use crate::println;
use crate::report::Report;

/// On a machine with an IOMMU.
pub(super) fn run(info: &BootInfo) -> ! {
    let (rig, report) = measure(info, &ROWS, rig);
    end(&rig, report)
}

/// Contexts and nesting, on models of the device, and on the machine's IOMMU below them.
#[cfg(feature = "contexts")]
pub(super) fn contexts(info: &BootInfo) -> ! {
    let (rig, report) = measure(info, &draft::ROWS, rig);
    end(&rig, report)
}

/// States what the machine's IOMMU was asked, and ends.
fn end(rig: &Rig, mut report: Report) -> ! {
    let stats = rig.iommu.viommu.stats();
    report.value("attach", stats.attaches, "requests");
    report.value("detach", stats.detaches, "requests");
    report.value("map", stats.maps, "requests");
    report.value("unmap", stats.unmaps + rig.raw_requests, "requests");
    report.value("kicks", stats.kicks, "kicks");
    println!();
    report.end()
}

/// On one without: what a disk's requests cost there is what those behind an IOMMU are compared with.
pub(super) fn direct(info: &BootInfo) -> ! {
    let machine = |info: &BootInfo| {
        let machine = Machine::discover(info).map_err(text)?;
        machine.pci.quiesce_all();
        Ok(machine)
    };
    let (_, report) = measure(info, &DIRECT_ROWS, machine);
    println!();
    report.end()
}

/// Measures the rows that the command line wants, on what `rig` makes.
fn measure<R>(
    info: &BootInfo,
    rows: &[Row<R>],
    rig: impl FnOnce(&BootInfo) -> Result<R, String>,
) -> (R, Report) {
    let only = info.command_line.get("only");
    let chosen = || rows.iter().filter(|row| only.is_none_or(|only| row.name == only));
    let report = Report::start(chosen().count().max(1));
    if chosen().next().is_none() {
        let names: Vec<_> = rows.iter().map(|row| row.name).collect();
        let only = only.unwrap_or_default();
        give_up(report, "bench", format_args!("there is no row `{only}`; there are: {}", names.join(" ")));
    }
    let mut rig = match rig(info) {
        Ok(rig) => rig,
        Err(error) => give_up(report, "bench", error),
    };
    let mut meter = match Meter::new(info, report) {
        Ok(meter) => meter,
        Err((failed, error)) => give_up(failed, "bench", error),
    };
    meter.report.value("overhead", meter.overhead(), "instructions");
    for row in chosen() {
        match (row.run)(&mut rig, &mut meter) {
            Ok(End::Measured) => meter.report.check(row.name, true, "measured"),
            Ok(End::NotMeasured(why)) => {
                meter.report.check(row.name, true, format_args!("not measured: {why}"))
            }
            Err(error) => meter.report.check(row.name, false, error),
        };
    }
    (rig, meter.report)
}

/// The IOMMU with one endpoint at work, `edu`, and one that is in no domain, the entropy source. Neither does any DMA.
fn rig(info: &BootInfo) -> Result<Rig, String> {
    let live = info.command_line.number("live").map_err(text)?.unwrap_or(1_000_000);
    let (machine, iommu) = setup::bring_up(info, Options::default()).map_err(text)?;
    let find = |vendor, device, name: &str| {
        let function = machine.pci.with_id(vendor, device).next();
        function.ok_or_else(|| alloc::format!("the machine has no {name}"))
    };
    let opened = setup::open(&iommu, find(edu::VENDOR, edu::DEVICE, "edu device")?, 0).map_err(text)?;
    let idle = iommu.endpoint(find(VENDOR, ENTROPY, "entropy source")?);
    let idle = idle.ok_or_else(|| String::from("the IOMMU does not know the entropy source"))?;
    let empty = iommu.viommu.create_domain(DomainOptions::default()).map_err(text)?;
    Ok(Rig {
        machine,
        iommu,
        opened,
        idle,
        empty,
        raw_requests: 0,
        live_limit: live,
        live: 0,
        can_fill: true,
        heap_before: None,
    })
}

fn text<E: Display>(error: E) -> String {
    error.to_string()
}
