//! A device that comes and goes while the IOMMU is live.
//!
//! The kernel asks the host to plug an `edu` into an empty slot. It gets bus numbers and addresses, is attached, reaches what
//! is mapped and nothing else, and is given back: bus mastering off, closed, forgotten, and only then the slot is turned
//! off. All of that twice, since the second time the IOMMU has known the endpoint already.

use alloc::format;
use alloc::string::String;

use virtio_iommu::{EndpointId, Introduction, Iova, Options, PhysAddr, Prot};

use super::attack::{Arena, LEN, OFFSET, PAGE, SECRET};
use super::default::{close, text};
use super::setup::{self, Opened};
use super::{give_up, show};
use crate::boot::BootInfo;
use crate::devices::edu::{self, Edu};
use crate::iommu::{Iommu, Member};
use crate::machine::Machine;
use crate::memory::dma::DmaPages;
use crate::pci::PciAddress;
use crate::pci::function::BusMaster;
use crate::pci::slot::{Power, Slot};
use crate::report::Report;
use crate::time::{self, Deadline};

const ROUNDS: usize = 2;
const CHECKS: usize = 1 + 4 * ROUNDS;

/// How long the host may take to plug a device in, or to ask for it.
const HOST_NS: u64 = 10_000_000_000;
/// How often to look.
const LOOK_NS: u64 = 1_000_000;
/// What the device uses for its memory.
const MAPPED: u64 = 0x1234_5000;

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS);
    let (mut machine, mut iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "slot", error),
    };
    let slots =
        machine.pci.functions().iter().filter_map(|function| Slot::of(machine.pci.config(), function));
    let Some(slot) = { slots }.find(|slot| !slot.is_occupied(machine.pci.config())) else {
        give_up(report, "slot", "there is no empty slot");
    };
    show::iommu(&machine, &iommu);
    report.check("slot", true, format_args!("port {} is empty", slot.port));
    for round in ["first", "second"] {
        if let Err((check, error)) = visit(info, &mut machine, &mut iommu, slot, round, &mut report) {
            give_up(report, &format!("{round}.{check}"), error);
        }
    }
    show::totals(&iommu, &mut report);
    report.end()
}

/// One visit of a device. An error names the check that it belongs to.
fn visit(
    info: &BootInfo,
    machine: &mut Machine,
    iommu: &mut Iommu,
    slot: Slot,
    round: &str,
    report: &mut Report,
) -> Result<(), (&'static str, String)> {
    report.ask("plug");
    let id = welcome(info, machine, iommu, slot).map_err(|error| ("plugged", error))?;
    let device = PciAddress::new(slot.port.segment(), slot.bus, 0, 0);
    report.check(&format!("{round}.plugged"), true, format_args!("{device} is endpoint {id}"));

    let (mut edu, opened) = open(machine, iommu, device).map_err(|error| ("reaches", error))?;
    let (reaches, blocked) = use_it(iommu, &mut edu, &opened);
    report.check_result(&format!("{round}.reaches"), reaches, |told| *told);
    report.check_result(&format!("{round}.blocked"), blocked, String::clone);

    report.ask("unplug");
    machine.pci.set_bus_master(device, BusMaster::Off);
    drop(edu);
    let left = close(iommu, opened.endpoint)
        .and_then(|()| farewell(info, machine, iommu, slot, id))
        .map(|()| "closed, forgotten, and gone");
    report.check_result(&format!("{round}.unplugged"), left, |told| *told);
    Ok(())
}

/// Waits for the device, gives it addresses, and finds out what the IOMMU calls it.
fn welcome(
    info: &BootInfo,
    machine: &mut Machine,
    iommu: &mut Iommu,
    slot: Slot,
) -> Result<EndpointId, String> {
    await_until(|| slot.is_occupied(machine.pci.config()), "no device came")?;
    slot.forget_events(machine.pci.config());
    slot.set_power(machine.pci.config(), Power::On);
    let device = PciAddress::new(slot.port.segment(), slot.bus, 0, 0);
    let failed = machine.look_again(info, slot.bus).map_err(text)?;
    if let Some(error) = failed.first() {
        return Err(text(error));
    }
    let found = machine.pci.at(device).ok_or_else(|| format!("there is no function at {device}"))?;
    if (found.vendor, found.device) != (edu::VENDOR, edu::DEVICE) {
        return Err(format!("{device} is {:04x}:{:04x}, which is no edu", found.vendor, found.device));
    }
    let behind = setup::find_again(info, machine).map_err(text)?;
    let own = behind.iter().find(|topology| topology.place == iommu.place);
    let (address, id) = own
        .and_then(|topology| topology.behind.iter().find(|(address, _)| *address == device))
        .ok_or_else(|| format!("{device} is behind no IOMMU"))?;
    // Attaching it introduces it.
    iommu.members.push(Member { address: *address, id: *id, introduction: Introduction::Known });
    Ok(*id)
}

fn open(machine: &Machine, iommu: &Iommu, device: PciAddress) -> Result<(Edu, Opened), String> {
    let function = machine.pci.at(device).ok_or("the device is gone")?;
    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let edu = Edu::new(machine.map_bar(function, 0).map_err(text)?).map_err(text)?;
    machine.pci.set_bus_master(device, BusMaster::On);
    Ok((edu, opened))
}

/// The device writes to memory that is mapped, and to the same address when it is mapped no more.
fn use_it(
    iommu: &Iommu,
    edu: &mut Edu,
    opened: &Opened,
) -> (Result<&'static str, String>, Result<String, String>) {
    let mut page = match DmaPages::allocate(1) {
        Ok(page) => page,
        Err(error) => return (Err(text(error)), Err("not tried".into())),
    };
    page.fill(SECRET);
    let (iova, at) = (Iova::new(MAPPED), MAPPED + OFFSET);
    let domain = &opened.domain;
    // SAFETY: the page is ours, and is given back only when it was unmapped with success.
    let mapped = unsafe { domain.map_at(iova, PhysAddr::new(page.phys()), PAGE, Prot::READ | Prot::WRITE) };
    if let Err(error) = mapped {
        page.into_raw();
        return (Err(text(error)), Err("not tried".into()));
    }
    let mut arena = Arena { iommu, edu, attacker: opened, other: domain };
    let reaches = arena.write_allowed(at, &mut page).map(|()| "what is mapped is written");
    // SAFETY: our own mapping.
    if let Err(error) = unsafe { domain.unmap(iova, PAGE) } {
        page.into_raw();
        return (reaches, Err(text(error)));
    }
    page.fill(SECRET);
    arena.drain_faults();
    let blocked = arena.edu.copy_out(0, at, LEN).map_err(text).and_then(|()| {
        if !page.all_bytes_are(SECRET) {
            return Err("memory changed after it was unmapped".into());
        }
        arena.expect_fault(at).map(|(fault, records)| format!("{records} records, first: {fault}"))
    });
    (reaches, blocked)
}

/// Gives the device back when the button is pressed.
fn farewell(
    info: &BootInfo,
    machine: &mut Machine,
    iommu: &mut Iommu,
    slot: Slot,
    id: EndpointId,
) -> Result<(), String> {
    iommu.viommu.forget(id).map_err(text)?;
    iommu.members.retain(|member| member.id != id);
    await_until(|| slot.is_button_pressed(machine.pci.config()), "nobody pressed the button")?;
    slot.forget_events(machine.pci.config());
    slot.set_power(machine.pci.config(), Power::Off);
    await_until(|| !slot.is_occupied(machine.pci.config()), "the device stayed")?;
    machine.look_again(info, slot.bus).map_err(text)?;
    let device = PciAddress::new(slot.port.segment(), slot.bus, 0, 0);
    match machine.pci.at(device) {
        None => Ok(()),
        Some(_) => Err(format!("{device} still answers")),
    }
}

fn await_until(mut is_done: impl FnMut() -> bool, otherwise: &str) -> Result<(), String> {
    let mut deadline = Deadline::after_ns(HOST_NS);
    while !is_done() {
        if deadline.expired() {
            return Err(format!("{otherwise} within {} s", HOST_NS / 1_000_000_000));
        }
        // QEMU needs its lock for the device, which a look at the slot takes too.
        time::busy_wait_ns(LOOK_NS);
    }
    Ok(())
}
