//! An NVMe disk behind the IOMMU: a device that is not virtio, and fetches its commands from memory by itself.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use virtio_iommu::{DmaDevice, Iova, Options};

use super::default::{close, text};
use super::give_up;
use super::setup::{self, Opened};
use super::show::{self, Worker};
use super::storage::{self, ATTACKS, Bench, Figures, Image, PARTS, Part, Work};
use crate::boot::BootInfo;
use crate::devices::dma::Dma;
use crate::devices::nvme::{self, Nvme};
use crate::devices::storage::{Operation, Storage, StorageError, finish};
use crate::iommu::Iommu;
use crate::machine::Machine;
use crate::pci::function::{BusMaster, Function};
use crate::report::Report;

/// Checks beside those of the parts.
const CHECKS: usize = 6;

/// What makes the seed of its image from that of the machine: the letters of NVME.
pub(super) const SEED: u64 = 0x4e56_4d45;

/// The length of a read whose pages take a list.
const LISTED_BYTES: usize = 16 * 1024;
/// What a page holds that no read may change.
const UNTOUCHED: [u8; 4096] = [0xa5; 4096];

fn parts() -> Vec<Part> {
    PARTS.into_iter().chain(ATTACKS).collect()
}

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
    let function = find(machine)?;
    let (work, image) = (Work::of(info)?, Image::of(info, SEED, "nvme.sha256")?);
    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let mut disk = open(machine, function, Dma::Through(&opened.endpoint))?;
    let limits = disk.limits();
    report.check(
        "nvme.attached",
        disk.queues() >= 2 && limits.depth >= 16,
        format_args!("{:?}, {} sectors, {} queues", opened.domain, limits.sectors, disk.queues()),
    );
    let mut bench = Bench::new(&mut disk, Some((iommu, &opened)), work, image.clone());
    storage::check("nvme", &mut bench, parts, report);
    let listed = list_out_of_reach(iommu, &opened, &mut disk);
    report.check_result("nvme.attack.list", listed, |what| format!("a list out of reach: {what}"));
    disk.close(&mut Vec::new()).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    let Opened { id, domain, endpoint } = opened;
    report.check_result("nvme.closed", close(iommu, endpoint), |()| "detached, its memory is back");
    storage::check_again("nvme", || exercise(machine, iommu, work, image), report);
    show::nothing_lost(iommu, id, report);
    Ok(Worker { id, address: function.address, name: "nvme", domain })
}

/// Opens the disk in a domain of its own, does every part, and closes it.
pub(super) fn exercise(
    machine: &Machine,
    iommu: &Iommu,
    work: Work,
    image: Image,
) -> Result<Vec<Figures>, String> {
    let function = find(machine)?;
    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let mut disk = open(machine, function, Dma::Through(&opened.endpoint))?;
    let done = storage::exercise(&mut Bench::new(&mut disk, Some((iommu, &opened)), work, image), &parts());
    disk.close(&mut Vec::new()).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    close(iommu, opened.endpoint)?;
    done
}

/// The first NVMe controller.
pub(super) fn find(machine: &Machine) -> Result<&Function, String> {
    let mut functions = machine.pci.functions().iter();
    let found = functions.find(|function| function.class == nvme::CLASS);
    found.ok_or_else(|| {
        format!("no NVMe controller: the machine has no PCI function of class {}", nvme::CLASS)
    })
}

/// Starts the controller. It is off when it is let reach memory.
pub(super) fn open<'a>(machine: &Machine, function: &Function, dma: Dma<'a>) -> Result<Nvme<'a>, String> {
    let registers = machine.map_bar(function, 0).map_err(text)?;
    let stopped = Nvme::reset(registers, registers.len_bytes() as u64, dma).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    stopped.start().map_err(text)
}

/// A read whose list of pages is where nothing is mapped: the command fails, the fault is the controller's, and the
/// memory of its first page is as it was.
fn list_out_of_reach(iommu: &Iommu, opened: &Opened, disk: &mut Nvme<'_>) -> Result<StorageError, String> {
    let dma = Dma::Through(&opened.endpoint);
    let mut first = dma.alloc(UNTOUCHED.len()).map_err(text)?;
    first.copy_in(0, &UNTOUCHED);
    let pages = [first.iova(), opened.endpoint.faulting_iova()];
    let before = iommu.viommu.fault_count(opened.id);
    let answer = read_at(disk, pages);
    iommu.viommu.poll();
    let faults = iommu.viommu.fault_count(opened.id) - before;
    let mut found = [0; UNTOUCHED.len()];
    first.copy_out(0, &mut found);
    dma.free(first).map_err(text)?;
    let untouched = found == UNTOUCHED;
    match answer? {
        Err(error @ StorageError::Refused { .. }) if untouched && faults > 0 => Ok(error),
        answer => {
            Err(format!("the first page is untouched: {untouched}; {faults} faults; answer {answer:?}"))
        }
    }
}

/// A read to these pages, the second of which is a list of others.
fn read_at(disk: &mut Nvme<'_>, pages: [Iova; 2]) -> Result<Result<(), StorageError>, String> {
    // SAFETY: the first page is memory of the caller's that this may overwrite; nothing is where the list should be.
    unsafe { disk.submit_at(Operation::Read, (0, 0), LISTED_BYTES, pages) }.map_err(text)?;
    let mut done = Vec::new();
    finish(disk, &mut done).map_err(text)?;
    done.pop().map(|done| done.result).ok_or_else(|| "nothing is done".into())
}
