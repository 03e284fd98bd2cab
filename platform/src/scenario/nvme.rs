//! An NVMe disk behind the IOMMU: a device that is not virtio, and fetches its commands from memory by itself.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use virtio_iommu::{DmaDevice, Options};

use super::default::{close, text};
use super::give_up;
use super::setup::{self, Opened};
use super::show::{self, Worker};
use super::storage::{self, ATTACKS, Bench, Image, PARTS, Part, Work};
use crate::boot::BootInfo;
use crate::devices::dma::Dma;
use crate::devices::nvme::{self, Nvme};
use crate::devices::storage::{Buffer, Operation, Storage, StorageError, finish};
use crate::iommu::Iommu;
use crate::machine::Machine;
use crate::pci::function::{BusMaster, Function};
use crate::report::Report;

/// Checks beside those of the parts.
const CHECKS: usize = 5;

/// What makes the seed of its image from that of the machine: the letters of NVME.
const SEED: u64 = 0x4e56_4d45;

/// What a long read takes that has a list of pages.
const LISTED_BYTES: usize = 64 * 1024;

pub(super) fn run(info: &BootInfo) -> ! {
    let parts: Vec<Part> = PARTS.into_iter().chain(ATTACKS).collect();
    let mut report = Report::start(CHECKS + storage::checks(parts.len()));
    let (machine, iommu) = match setup::bring_up(info, Options::default(), |transport| transport) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    show::iommu(&machine, &iommu);
    report.check("iommu", true, format_args!("live at {}", iommu.address));
    let worker = match through(&machine, &iommu, info, &parts, &mut report) {
        Ok(worker) => worker,
        Err(error) => give_up(report, "nvme", error),
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
    let (work, image) = (Work::of(info)?, Image::of(info, SEED, "nvme.sha256")?);
    let function = find(machine)?;
    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let mut disk = open(machine, function, Dma::Through(&opened.endpoint))?;
    let limits = disk.limits();
    report.check(
        "nvme.attached",
        disk.queues() >= 2 && limits.depth >= 16,
        format_args!("{:?}, {} sectors, {} queues", opened.domain, limits.sectors, disk.queues()),
    );
    let mut bench = Bench::new(&mut disk, Some((iommu, &opened)), work, image);
    storage::check("nvme", &mut bench, parts, report);
    let listed = list_out_of_reach(iommu, &opened, &mut disk);
    report.check_result("nvme.attack.list", listed, |what| format!("a list out of reach: {what}"));
    let mut cancelled = Vec::new();
    disk.close(&mut cancelled).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    let Opened { id, domain, endpoint } = opened;
    report.check_result("nvme.closed", close(iommu, endpoint), |()| "detached, its memory is back");
    show::nothing_lost(iommu, id, report);
    Ok(Worker { id, address: function.address, name: "nvme", domain })
}

/// The first NVMe controller.
fn find(machine: &Machine) -> Result<&Function, String> {
    let mut functions = machine.pci.functions().iter();
    let found = functions.find(|function| function.class == nvme::CLASS);
    found.ok_or_else(|| {
        format!("no NVMe controller: the machine has no PCI function of class {}", nvme::CLASS)
    })
}

/// Starts the controller. It is off when it is let reach memory.
fn open<'a>(machine: &Machine, function: &Function, dma: Dma<'a>) -> Result<Nvme<'a>, String> {
    let registers = machine.map_bar(function, 0).map_err(text)?;
    let stopped = Nvme::reset(registers, registers.len_bytes() as u64, dma).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    stopped.start().map_err(text)
}

/// A read whose list of pages is where nothing is mapped: the command fails, the fault is the controller's, and the
/// memory of its first page is as it was.
fn list_out_of_reach(iommu: &Iommu, opened: &Opened, disk: &mut Nvme<'_>) -> Result<StorageError, String> {
    const UNTOUCHED: [u8; 4096] = [0xa5; 4096];
    let dma = Dma::Through(&opened.endpoint);
    let mut first = Buffer::premapped(dma, UNTOUCHED.len()).map_err(text)?;
    first.write(&UNTOUCHED);
    let Buffer::Premapped(memory) = &first else { return Err("premapped is premapped".into()) };
    let list = opened.endpoint.faulting_iova();
    let before = iommu.viommu.fault_count(opened.id);
    // SAFETY: the first page is `first`, which is freed after this is done; nothing is where the list should be.
    let submitted = unsafe { disk.submit_at(Operation::Read, (0, 0), LISTED_BYTES, [memory.iova(), list]) };
    submitted.map_err(text)?;
    let mut done = Vec::new();
    finish(disk, &mut done).map_err(text)?;
    iommu.viommu.poll();
    let faults = iommu.viommu.fault_count(opened.id) - before;
    let mut found = [0; UNTOUCHED.len()];
    first.read(&mut found);
    first.free(dma).map_err(text)?;
    if found != UNTOUCHED || faults == 0 {
        return Err(format!("{faults} faults, and the first page is untouched: {}", found == UNTOUCHED));
    }
    match done.pop().map(|done| done.result) {
        Some(Err(error @ StorageError::Refused { .. })) => Ok(error),
        other => Err(format!("the command must fail, and said {other:?}")),
    }
}
