//! A virtio disk by the kernel's own driver, behind the IOMMU and without one.

use alloc::string::String;
use alloc::vec::Vec;

use virtio_iommu::Options;

use super::default::{close, text};
use super::give_up;
use super::setup::{self, Opened, find};
use super::show::{self, Worker};
use super::storage::{self, ATTACKS, Bench, Figures, Image, PARTS, Part, Work};
use crate::boot::BootInfo;
use crate::devices::block::Block;
use crate::devices::dma::Dma;
use crate::devices::virtio::{BLOCK, VENDOR};
use crate::iommu::{self, Iommu};
use crate::machine::Machine;
use crate::pci::function::{BusMaster, Function};
use crate::report::Report;

/// Checks beside those of the parts.
const CHECKS: usize = 5;
const DIRECT_CHECKS: usize = 2;

/// The parts of a disk behind an IOMMU.
fn parts() -> Vec<Part> {
    PARTS.into_iter().chain(ATTACKS).collect()
}

/// Behind the IOMMU.
pub(super) fn run(info: &BootInfo) -> ! {
    let parts = parts();
    let mut report = Report::start(CHECKS + storage::checks(parts.len()));
    let (machine, iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    show::iommu(&machine, &iommu);
    report.check("iommu", true, format_args!("live at {}", iommu.place));
    let worker = match through(&machine, &iommu, info, &parts, &mut report) {
        Ok(worker) => worker,
        Err(error) => give_up(report, "block", error),
    };
    show::table(&iommu, &[&worker]);
    show::totals(&iommu, &mut report);
    report.end()
}

fn through(
    machine: &Machine,
    iommu: &Iommu,
    info: &BootInfo,
    parts: &[Part],
    report: &mut Report,
) -> Result<Worker, String> {
    let (work, image) = (Work::of(info)?, Image::of(info, 0, "disk.sha256")?);
    let function = find(machine, VENDOR, BLOCK, "disk")?;
    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let mut disk = open(machine, function, Dma::Through(&opened.endpoint))?;
    report.check("block.attached", true, format_args!("{:?}, {disk:?}", opened.domain));
    let mut bench = Bench::new(&mut disk, Some((iommu, &opened)), work, image.clone());
    storage::check("block", &mut bench, parts, report);
    disk.close(&mut Vec::new()).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    let Opened { id, domain, endpoint } = opened;
    report.check_result("block.closed", close(iommu, endpoint), |()| "detached, its memory is back");
    storage::check_again("block", || exercise(machine, iommu, work, image), report);
    show::nothing_lost(iommu, id, report);
    Ok(Worker { id, address: function.address, name: "virtio-blk", domain })
}

/// Opens the disk in a domain of its own, does every part, and closes it.
pub(super) fn exercise(
    machine: &Machine,
    iommu: &Iommu,
    work: Work,
    image: Image,
) -> Result<Vec<Figures>, String> {
    let function = find(machine, VENDOR, BLOCK, "disk")?;
    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let mut disk = open(machine, function, Dma::Through(&opened.endpoint))?;
    let done = storage::exercise(&mut Bench::new(&mut disk, Some((iommu, &opened)), work, image), &parts());
    disk.close(&mut Vec::new()).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    close(iommu, opened.endpoint)?;
    done
}

/// By physical addresses, on a machine without an IOMMU.
pub(super) fn direct(info: &BootInfo) -> ! {
    let mut report = Report::start(DIRECT_CHECKS + storage::checks(PARTS.len()));
    if let Err(error) = without(info, &mut report) {
        give_up(report, "block", error);
    }
    report.end()
}

fn without(info: &BootInfo, report: &mut Report) -> Result<(), String> {
    let (work, image) = (Work::of(info)?, Image::of(info, 0, "disk.sha256")?);
    let machine = Machine::discover(info).map_err(text)?;
    machine.pci.quiesce_all();
    let function = find(&machine, VENDOR, BLOCK, "disk")?;
    let mut disk = open(&machine, function, Dma::Direct)?;
    report.check("block.opened", true, format_args!("{disk:?}"));
    storage::check("block", &mut Bench::new(&mut disk, None, work, image), &PARTS, report);
    report.check_result("block.closed", disk.close(&mut Vec::new()), |()| "reset, its memory is back");
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    Ok(())
}

/// Starts the disk, and lets it reach memory.
pub(super) fn open<'a>(machine: &Machine, function: &Function, dma: Dma<'a>) -> Result<Block<'a>, String> {
    let transport = iommu::transport(machine, function).map_err(text)?;
    let disk = Block::new(transport, dma).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    Ok(disk)
}
