//! Real I/O through the IOMMU, each device in its own domain; then attacks on it.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use fastrand::Rng;
use sha2::{Digest, Sha256};
use virtio_iommu::{DmaDevice, Endpoint, Options};

use super::attack::{self, Arena};
use super::setup::{self, Opened, find};
use super::show::{self, Worker, hex};
use super::work::{self, Bench};
use super::{give_up, scatter, word};
use crate::boot::BootInfo;
use crate::devices::edu::{self, BUFFER_BYTES, Edu};
use crate::devices::virtio::{BLOCK, Disk, DiskSlot, ENTROPY, Entropy, EntropySlot, VENDOR};
use crate::iommu::{Iommu, KernelPlatform};
use crate::machine::Machine;
use crate::pci::function::BusMaster;
use crate::report::Report;

/// Checks before the attacks, and after them.
const CHECKS: usize = 12 + WORKERS.len();

/// Devices that do their work, and are closed again, before the attacks: the name of the check, and rounds of work.
const WORKERS: [(&str, work::Open, u64); 2] = [("net", work::net::open, 1), ("nvme", work::nvme::open, 4)];

/// The disk's first half is given, and its second half is written to: sectors of 512 bytes.
pub(super) const DISK_HALF_BYTES: usize = 1 << 20;
pub(super) const WRITTEN_SECTOR: usize = DISK_HALF_BYTES / 512;
pub(super) const WRITTEN_BYTES: usize = 64 * 1024;
/// What makes the seed of the written half from that of the given one: the letters of WRIT.
pub(super) const WRITTEN_SEED: u64 = 0x5752_4954;

/// Several requests of the disk, with their headers and answers.
pub(super) const DISK_BOUNCE_BYTES: usize = 256 * 1024;
pub(super) const ENTROPY_BOUNCE_BYTES: usize = 16 * 1024;

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS + attack::CHECKS);
    let (machine, iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    show::iommu(&machine, &iommu);
    show::live(&iommu, &mut report);

    let disk = match disk(&machine, &iommu, info, &mut report) {
        Ok(worker) => worker,
        Err(error) => give_up(report, "disk", error),
    };
    let entropy = match entropy(&machine, &iommu, &mut report) {
        Ok(worker) => worker,
        Err(error) => give_up(report, "entropy", error),
    };
    let done = match workers(&machine, &iommu, info, &mut report) {
        Ok(done) => done,
        Err((name, error)) => give_up(report, name, error),
    };
    let (edu, opened) = match edu(&machine, &iommu, &disk, &mut report) {
        Ok(done) => done,
        Err(error) => give_up(report, "edu", error),
    };
    let closed = close(&iommu, opened.endpoint);
    report.check(
        "edu.closed",
        closed.is_ok(),
        closed.err().unwrap_or_else(|| "detached, its memory is back".into()),
    );

    let stats = iommu.viommu.stats();
    let lost = stats.faults.dropped + stats.faults.limited;
    let clean = stats.quarantined_mappings == 0 && stats.abandoned_requests == 0 && stats.stray_answers == 0;
    report.check(
        "nothing-lost",
        clean && lost == 0 && stats.faults.malformed == 0,
        format_args!(
            "{} mappings in quarantine, {} requests unanswered, {} faults delivered, {} dropped, {} malformed",
            stats.quarantined_mappings,
            stats.abandoned_requests,
            stats.faults.delivered,
            lost,
            stats.faults.malformed
        ),
    );
    let mut workers = vec![&disk, &entropy];
    workers.extend(&done);
    let others: Vec<_> = workers.iter().map(|worker| iommu.viommu.fault_count(worker.id)).collect();
    report.check(
        "only-edu-faults",
        others.iter().all(|faults| *faults == 0)
            && stats.faults.delivered == iommu.viommu.fault_count(edu.id),
        format_args!("{} faults are edu's, {others:?} the others'", iommu.viommu.fault_count(edu.id)),
    );
    workers.push(&edu);
    show::table(&iommu, &workers);
    show::totals(&iommu, &mut report);
    report.end()
}

/// Reads what the harness wrote, by its digest, and writes what the harness will look for.
fn disk(machine: &Machine, iommu: &Iommu, info: &BootInfo, report: &mut Report) -> Result<Worker, String> {
    let seed = info
        .command_line
        .number("seed")
        .map_err(text)?
        .ok_or_else(|| word(info, "seed").err().unwrap_or_default())?;
    let expected = word(info, "disk.sha256")?;
    let function = find(machine, VENDOR, BLOCK, "disk")?;
    let Opened { id, domain, endpoint } = setup::open(iommu, function, DISK_BOUNCE_BYTES).map_err(text)?;
    DiskSlot::fill(endpoint).map_err(|_| String::from("its slot is filled already"))?;
    let mut disk = Disk::new(machine, function).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    report.check("disk.attached", true, format_args!("{} sectors, {domain:?}", disk.sectors()));

    let mut given = vec![0; DISK_HALF_BYTES];
    disk.read(0, &mut given).map_err(text)?;
    let digest = hex(&Sha256::digest(&given));
    report.check("disk.read", digest == expected, format_args!("{} bytes, SHA-256 {digest}", given.len()));

    let mut written = vec![0; WRITTEN_BYTES];
    Rng::with_seed(seed ^ WRITTEN_SEED).fill(&mut written);
    disk.write(WRITTEN_SECTOR, &written).map_err(text)?;
    let mut back = vec![0; WRITTEN_BYTES];
    disk.read(WRITTEN_SECTOR, &mut back).map_err(text)?;
    report.check(
        "disk.written",
        back == written,
        format_args!("{WRITTEN_BYTES} bytes at sector {WRITTEN_SECTOR}, read back"),
    );
    // The driver lives as long as the kernel: it is asked no more, and may not be dropped under a live device.
    core::mem::forget(disk);
    Ok(Worker { id, address: function.address, name: "virtio-blk", domain })
}

fn entropy(machine: &Machine, iommu: &Iommu, report: &mut Report) -> Result<Worker, String> {
    let function = find(machine, VENDOR, ENTROPY, "entropy source")?;
    let Opened { id, domain, endpoint } = setup::open(iommu, function, ENTROPY_BOUNCE_BYTES).map_err(text)?;
    EntropySlot::fill(endpoint).map_err(|_| String::from("its slot is filled already"))?;
    let mut source = Entropy::new(machine, function).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    report.check("entropy.attached", true, format_args!("{domain:?}"));
    let (mut first, mut second) = ([0; 64], [0; 64]);
    let lens = (source.read(&mut first).map_err(text)?, source.read(&mut second).map_err(text)?);
    let random = lens == (64, 64) && first != second && first != [0; 64] && second != [0; 64];
    report.check("entropy.read", random, format_args!("{lens:?} bytes, beginning {}", hex(&first[..8])));
    core::mem::forget(source);
    Ok(Worker { id, address: function.address, name: "virtio-rng", domain })
}

/// Puts the network card and the NVMe disk to work, each in a domain of its own, and closes them again.
fn workers(
    machine: &Machine,
    iommu: &Iommu,
    info: &BootInfo,
    report: &mut Report,
) -> Result<Vec<Worker>, (&'static str, String)> {
    let bench = Bench::new(machine, iommu, info).map_err(|error| ("net", error))?;
    let mut done = Vec::new();
    for (name, open, rounds) in WORKERS {
        let row = work::run(&bench, open, rounds).map_err(|error| (name, error))?;
        report.check(name, true, &row);
        // The server compares.
        report.value(&format!("{name}.rounds"), row.done.rounds, "rounds");
        done.push(row.worker);
    }
    Ok(done)
}

/// Copies out and in, then attacks.
fn edu(
    machine: &Machine,
    iommu: &Iommu,
    other: &Worker,
    report: &mut Report,
) -> Result<(Worker, Opened), String> {
    let function = find(machine, edu::VENDOR, edu::DEVICE, "edu device")?;
    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let registers = machine.map_bar(function, 0).map_err(text)?;
    let mut edu = Edu::new(registers).map_err(text)?;
    edu.check_liveness(0x1234_5678).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    report.check("edu.attached", true, format_args!("{:?}", opened.domain));

    let copied = copy_through(&opened.endpoint, &mut edu);
    report.check(
        "edu.copy",
        copied.is_ok(),
        copied.err().unwrap_or_else(|| format!("{BUFFER_BYTES} bytes out and in, every byte checked")),
    );
    report.check_result("edu.scatter", scatter::run(iommu, &opened, &mut edu), String::clone);
    attack::run(Arena { iommu, edu: &mut edu, attacker: &opened, other: &other.domain }, report);
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    let worker =
        Worker { id: opened.id, address: function.address, name: "edu", domain: opened.domain.clone() };
    Ok((worker, opened))
}

/// Memory to `edu`, `edu` to other memory, and compares.
pub(super) fn copy_through(device: &dyn DmaDevice, edu: &mut Edu) -> Result<(), String> {
    let from = device.alloc_coherent(BUFFER_BYTES).map_err(text)?;
    let to = device.alloc_coherent(BUFFER_BYTES).map_err(text)?;
    let pattern = |index: usize| (index * 7 + index / 256) as u8;
    for index in 0..BUFFER_BYTES {
        // SAFETY: inside the memory, and the device is idle.
        unsafe { from.ptr().add(index).write_volatile(pattern(index)) };
    }
    edu.copy_in(from.iova().get(), 0, BUFFER_BYTES).map_err(text)?;
    edu.copy_out(0, to.iova().get(), BUFFER_BYTES).map_err(text)?;
    // SAFETY: inside the memory, and the device is idle.
    let arrived = |index| unsafe { to.ptr().add(index).read_volatile() };
    let wrong = (0..BUFFER_BYTES).find(|index| arrived(*index) != pattern(*index));
    device.free_coherent(from).map_err(text)?;
    device.free_coherent(to).map_err(text)?;
    match wrong {
        None => Ok(()),
        Some(index) => Err(format!("byte {index:#x} did not arrive")),
    }
}

pub(super) fn close(iommu: &Iommu, endpoint: Endpoint<KernelPlatform>) -> Result<(), String> {
    let domain = endpoint.domain().clone();
    endpoint.close().map_err(text)?;
    iommu.viommu.poll();
    match domain.mapping_count() {
        0 => Ok(()),
        count => Err(format!("{count} mappings are left")),
    }
}

pub(super) fn text(error: impl core::fmt::Display) -> String {
    format!("{error}")
}
