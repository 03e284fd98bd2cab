//! What people read.

use alloc::string::String;
use core::fmt::Write;

use virtio_iommu::{Domain, EndpointId, ReservedKind, Unattached};

use crate::iommu::{Iommu, KernelPlatform};
use crate::machine::Machine;
use crate::pci::PciAddress;
use crate::println;
use crate::report::Report;

/// What the IOMMU is and what is behind it.
pub(super) fn iommu(machine: &Machine, iommu: &Iommu) {
    let viommu = &iommu.viommu;
    println!();
    println!("virtio-iommu at {}, found by VIOT", iommu.address);
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

/// What the IOMMU was asked in all, which the host compares with what QEMU saw.
pub(super) fn totals(iommu: &Iommu, report: &mut Report) {
    let stats = iommu.viommu.stats();
    report.value("attach", stats.attaches, "requests");
    report.value("detach", stats.detaches, "requests");
    report.value("map", stats.maps, "requests");
    report.value("unmap", stats.unmaps, "requests");
    report.value("requests", stats.requests, "requests");
    report.value("kicks", stats.kicks, "kicks");
    report.value("faults", stats.faults.delivered, "records");
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
            "{} mappings in quarantine, {} requests unanswered; {own} of {all} faults are the disk's, \
             {} not kept",
            stats.quarantined_mappings,
            stats.abandoned_requests,
            stats.faults.limited + stats.faults.dropped
        ),
    );
}
