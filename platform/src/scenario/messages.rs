//! Endpoints that interrupt by messages, and the IOMMU in their way: `edu` by MSI, an NVMe disk by MSI-X.
//!
//! A message is a write to the interrupt controller's doorbell, and goes by the same translation as every other one. Where
//! the IOMMU says that the doorbell lies in a window for messages it is not translated; else the doorbell has to be mapped.
//! Anywhere else a message is blocked, and nobody is interrupted.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use virtio_iommu::{DmaDevice, MsiDoorbell, Options, PhysAddr};

use super::default::{close, text};
use super::setup::{self, Opened, find};
use super::{give_up, nvme, show};
use crate::arch::interrupts as controller;
use crate::boot::BootInfo;
use crate::devices::dma::Dma;
use crate::devices::edu;
use crate::interrupts::{connect_message, sleep_until};
use crate::iommu::Iommu;
use crate::machine::Machine;
use crate::mmio::Mmio;
use crate::pci::function::{BusMaster, Function};
use crate::pci::message::{Message, MessageTable, disable_msi, enable_msi};
use crate::report::Report;
use crate::time;

const CHECKS: usize = 7;

/// How often `edu` interrupts.
const TIMES: u32 = 3;
/// How long a message may take, and how long one is waited for that must not come.
const ARRIVAL_NS: u64 = 2_000_000_000;
const ABSENCE_NS: u64 = 20_000_000;
/// The event of `edu` that interrupts. Not the first one, so that what the device writes is not zero.
const EDU_EVENT: u16 = 3;

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS);
    let (machine, iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    show::iommu(&machine, &iommu);
    show::live(&iommu, &mut report);
    if let Err(error) = controller::init(&machine.firmware) {
        give_up(report, "controller", error);
    }
    if let Err(error) = by_edu(&machine, &iommu, &mut report) {
        give_up(report, "edu", error);
    }
    let by_nvme = by_nvme(&machine, &iommu);
    report.check_result("nvme.interrupts", by_nvme, String::clone);
    let stats = iommu.viommu.stats();
    report.check(
        "nothing-lost",
        stats.quarantined_mappings == 0 && stats.abandoned_requests == 0,
        format_args!(
            "{} mappings in quarantine, {} requests unanswered",
            stats.quarantined_mappings, stats.abandoned_requests
        ),
    );
    show::totals(&iommu, &mut report);
    report.end()
}

/// A function's event, connected: how often it came, and the message, whose doorbell the endpoint may write to.
struct Connected {
    count: Arc<AtomicU32>,
    message: Message,
    doorbell: MsiDoorbell,
}

impl Connected {
    fn new(
        machine: &Machine,
        function: &Function,
        opened: &Opened,
        event: u16,
        handle: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, String> {
        let count = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&count);
        let handle = move || {
            handle();
            counted.fetch_add(1, Ordering::Relaxed);
        };
        let (segment, requester) = (function.address.segment(), machine.pci.requester(function.address));
        let physical = connect_message(segment, requester, event, handle).map_err(text)?;
        // SAFETY: the controller's doorbell, in a frame of registers that holds nothing else that can be written.
        let doorbell = unsafe { opened.endpoint.map_msi(PhysAddr::new(physical.address)) }.map_err(text)?;
        let message = Message { address: doorbell.iova().get(), ..physical };
        Ok(Self { count, message, doorbell })
    }

    fn count(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }

    /// Sleeps until it came as often, or too long.
    fn came(&self, times: u32, within_ns: u64) -> bool {
        let deadline = time::now_ns().unwrap_or(0).saturating_add(within_ns);
        sleep_until(deadline, || self.count() >= times)
    }
}

fn by_edu(machine: &Machine, iommu: &Iommu, report: &mut Report) -> Result<(), String> {
    let function = find(machine, edu::VENDOR, edu::DEVICE, "edu device")?;
    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let registers = machine.map_bar(function, 0).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    let acknowledge = move || {
        edu::acknowledge(&registers);
    };
    let connected = Connected::new(machine, function, &opened, EDU_EVENT, acknowledge)?;
    let Message { address, data } = connected.message;
    let way = if connected.doorbell.is_mapped() { "mapped" } else { "in a window" };
    report.check("edu.connected", true, format_args!("writes {data:#x} to {address:#x}, {way}"));

    let arrived = interrupts(machine, function, &registers, &connected);
    report.check_result("edu.interrupts", arrived, |count| format!("{count} of {TIMES} arrived"));
    let strayed = blocked(machine, iommu, function, &opened, &registers, &connected);
    report.check_result("edu.blocked", strayed, ToString::to_string);

    disable_msi(&machine.pci, function.address).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    opened.endpoint.unmap_msi(connected.doorbell).map_err(text)?;
    report.check_result("edu.closed", close(iommu, opened.endpoint), |()| "detached, its memory is back");
    Ok(())
}

/// Each interrupt that `edu` is asked for arrives.
fn interrupts(
    machine: &Machine,
    function: &Function,
    registers: &Mmio,
    connected: &Connected,
) -> Result<u32, String> {
    enable_msi(&machine.pci, function.address, connected.message).map_err(text)?;
    for times in 1..=TIMES {
        edu::interrupt(registers, times);
        if !connected.came(times, ARRIVAL_NS) {
            return Err(format!("{} of {times} arrived", connected.count()));
        }
    }
    // One that came twice comes now.
    connected.came(TIMES + 1, ABSENCE_NS);
    match connected.count() {
        TIMES => Ok(TIMES),
        more => Err(format!("{more} arrived of {TIMES}")),
    }
}

/// The same message to an address that is not mapped interrupts nobody, and is reported.
fn blocked(
    machine: &Machine,
    iommu: &Iommu,
    function: &Function,
    opened: &Opened,
    registers: &Mmio,
    connected: &Connected,
) -> Result<String, String> {
    let address = opened.endpoint.faulting_iova().get();
    enable_msi(&machine.pci, function.address, Message { address, ..connected.message }).map_err(text)?;
    let before = connected.count();
    edu::interrupt(registers, 1);
    let came = connected.came(before + 1, ABSENCE_NS);
    edu::acknowledge(registers);
    iommu.viommu.poll();
    match iommu.viommu.next_fault() {
        _ if came => Err(format!("a message to {address:#x} interrupts")),
        Some(fault) if fault.endpoint == opened.id => Ok(format!("{fault}")),
        Some(fault) => Err(format!("a fault that nobody caused: {fault}")),
        None => Err("blocked, but no fault was reported".into()),
    }
}

/// A controller that is started interrupts for its answers to commands, by the first entry of its table. Several that come
/// while the CPU takes no interrupts are one.
fn by_nvme(machine: &Machine, iommu: &Iommu) -> Result<String, String> {
    let function = nvme::find(machine)?;
    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let connected = Connected::new(machine, function, &opened, 0, || {})?;
    let table = MessageTable::enable(machine, function).map_err(text)?;
    table.set(0, connected.message).map_err(text)?;
    let disk = nvme::open(machine, function, Dma::Through(&opened.endpoint))?;
    let came = connected.came(1, ARRIVAL_NS);
    disk.close(&mut Vec::new()).map_err(text)?;
    let entries = table.entry_count();
    table.disable(machine).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    opened.endpoint.unmap_msi(connected.doorbell).map_err(text)?;
    close(iommu, opened.endpoint)?;
    if came {
        Ok(format!("{} came by the first of {entries} entries", connected.count.load(Ordering::Relaxed)))
    } else {
        Err("none came".into())
    }
}
