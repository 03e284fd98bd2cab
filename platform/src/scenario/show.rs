//! What people read.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;
use core::slice;

use virtio_iommu::{Domain, EndpointId, ReservedKind, Stats, Unattached};

use super::work::Row;
use crate::iommu::{Iommu, KernelPlatform};
use crate::machine::Machine;
use crate::memory::frames::{self, Usage};
use crate::pci::PciAddress;
use crate::println;
use crate::report::Report;

/// What the IOMMU is and what is behind it.
pub(super) fn iommu(machine: &Machine, iommu: &Iommu) {
    let viommu = &iommu.viommu;
    println!();
    println!("virtio-iommu at {}, found by {}", iommu.place, iommu.source);
    println!("  features       {}", viommu.features());
    println!("  granule        {:#x} bytes", viommu.granule());
    println!("  input range    {}", viommu.input_range());
    let (first, last) = viommu.domain_range();
    println!("  domain range   {first:#x}..={last:#x}");
    println!(
        "  unattached     {}",
        match viommu.unattached() {
            Unattached::Blocked => "endpoints reach nothing (bypass is off)",
            Unattached::BlockedByDevice => "endpoints reach nothing (the device has no bypass)",
            Unattached::Bypasses => "endpoints reach all of memory",
        }
    );
    println!();
    println!("  endpoint  function      device     reserved regions");
    for member in &iommu.members {
        let id = machine.pci.at(member.address);
        let (vendor, device) = id.map_or((0, 0), |function| (function.vendor, function.device));
        let mut regions = String::new();
        for region in viommu.reserved_regions(member.id).iter().flat_map(|regions| regions.iter()) {
            let kind = match region.kind {
                ReservedKind::Msi => "MSI",
                ReservedKind::Reserved => "reserved",
            };
            // A string takes everything.
            let _ = write!(regions, "{kind} {}  ", region.range);
        }
        let id = member.id.get();
        println!("  {id:<#8x}  {}  {vendor:04x}:{device:04x}  {regions}", member.address);
    }
    println!();
}

/// A device at work: a row of the closing table.
#[derive(Clone)]
pub(super) struct Worker {
    pub id: EndpointId,
    pub address: PciAddress,
    pub name: &'static str,
    pub domain: Domain<KernelPlatform>,
}

/// What each endpoint did.
pub(super) fn table(iommu: &Iommu, rows: &[&Worker]) {
    println!();
    println!(
        "  endpoint  function      device      domain  peak bytes    maps  unmaps  requests   kicks  faults"
    );
    for Worker { id, address, name, domain } in rows {
        let stats = domain.stats();
        println!(
            "  {:<#8x}  {address}  {name:<10}  {:>6}  {:>10}  {:>6}  {:>6}  {:>8}  {:>6}  {:>6}",
            id.get(),
            domain.id().get(),
            stats.peak_bytes,
            stats.maps,
            stats.unmaps,
            stats.requests,
            stats.kicks,
            iommu.viommu.fault_count(*id),
        );
    }
    println!();
}

/// Reports that the IOMMU is up.
pub(super) fn live(iommu: &Iommu, report: &mut Report) {
    report.check(
        "iommu",
        true,
        format_args!("live at {}, {} functions behind it", iommu.place, iommu.members.len()),
    );
}

/// Checks that every device is closed and nothing of it is left: no mapping, no quarantine, no frames, and no faults on
/// the way. `before` is what was allocated before the first one was opened.
pub(super) fn nothing_left(iommu: &Iommu, before: Usage, report: &mut Report) {
    iommu.viommu.poll();
    let (stats, after) = (iommu.viommu.stats(), frames::usage());
    // Frames of page tables stay; they are never a run that can be freed.
    let runs = (before.live_runs, after.live_runs);
    let faults =
        stats.faults.delivered + stats.faults.limited + stats.faults.dropped + stats.faults.malformed;
    let unclear = stats.abandoned_requests + stats.stray_answers + stats.quarantined_mappings as u64;
    report.check(
        "nothing-left",
        runs.0 == runs.1 && unclear == 0 && faults == 0,
        format_args!(
            "{} runs of frames before and {} after, {} mappings in quarantine, {} requests unanswered, {} answers to \
             none, {faults} faults",
            runs.0, runs.1, stats.quarantined_mappings, stats.abandoned_requests, stats.stray_answers
        ),
    );
}

/// What each device moved, how fast, and what that took of the IOMMU. The seconds are those of all its work, making and
/// checking the bytes included.
pub(super) fn figures(rows: &[(&str, Row)], report: &mut Report) {
    println!();
    println!(
        "  device      endpoint  domain  rounds   to device  from device  seconds     MB/s    maps  unmaps  requests   kicks"
    );
    for (_, Row { worker, done, spent_ns, .. }) in rows {
        let stats = worker.domain.stats();
        let moved = done.to_device + done.from_device;
        // Bytes in a microsecond are megabytes in a second.
        let hundredths = (u128::from(moved) * 100_000).checked_div(u128::from(*spent_ns)).unwrap_or(0);
        println!(
            "  {:<10}  {:<#8x}  {:>6}  {:>6}  {:>10}  {:>11}  {:>3}.{:03}  {:>4}.{:02}  {:>6}  {:>6}  {:>8}  {:>6}",
            worker.name,
            worker.id.get(),
            worker.domain.id().get(),
            done.rounds,
            done.to_device,
            done.from_device,
            spent_ns / 1_000_000_000,
            spent_ns / 1_000_000 % 1000,
            hundredths / 100,
            hundredths % 100,
            stats.maps,
            stats.unmaps,
            stats.requests,
            stats.kicks,
        );
    }
    println!();
    for (name, row) in rows {
        report.value(&format!("{name}.rounds"), row.done.rounds, "rounds");
    }
}

/// What the IOMMU was asked in all, which the host compares with what QEMU saw.
pub(super) fn totals(iommu: &Iommu, report: &mut Report) {
    totals_of(slice::from_ref(iommu), report);
}

/// The same of several, taken together.
pub(super) fn totals_of(iommus: &[Iommu], report: &mut Report) {
    let stats: Vec<Stats> = iommus.iter().map(|iommu| iommu.viommu.stats()).collect();
    totals_of_stats(&stats, report);
}

/// The same of drivers that may be no kernel's.
pub(super) fn totals_of_stats(all: &[Stats], report: &mut Report) {
    let sum = |of: fn(&Stats) -> u64| all.iter().map(of).sum::<u64>();
    report.value("attach", sum(|stats| stats.attaches), "requests");
    report.value("detach", sum(|stats| stats.detaches), "requests");
    report.value("map", sum(|stats| stats.maps), "requests");
    report.value("unmap", sum(|stats| stats.unmaps), "requests");
    report.value("requests", sum(|stats| stats.requests), "requests");
    report.value("kicks", sum(|stats| stats.kicks), "kicks");
    report.value("faults", sum(|stats| stats.faults.delivered), "records");
}

/// Checks that no request was lost, and that every fault is this endpoint's. Of records, which come in floods, some are
/// beyond the limit.
pub(super) fn nothing_lost(iommu: &Iommu, id: EndpointId, report: &mut Report) {
    let stats = iommu.viommu.stats();
    let clean = stats.quarantined_mappings == 0 && stats.abandoned_requests == 0 && stats.stray_answers == 0;
    let own = iommu.viommu.fault_count(id);
    let all = stats.faults.delivered;
    report.check(
        "nothing-lost",
        clean && stats.faults.malformed == 0 && own == all,
        format_args!(
            "{} mappings in quarantine, {} requests unanswered; {own} of {all} faults are the endpoint's, \
             {} not kept",
            stats.quarantined_mappings,
            stats.abandoned_requests,
            stats.faults.limited + stats.faults.dropped
        ),
    );
}

/// Bytes in lower-case hex.
pub(super) fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        // A string takes everything.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
