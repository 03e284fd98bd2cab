//! Two IOMMUs in one machine, each with an `edu` behind it.
//!
//! Each knows its own endpoints alone, the same IOVA leads to different memory behind each, and what is blocked is reported
//! by the one that blocked it.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use virtio_iommu::{Iova, Options, PhysAddr, Prot};

use super::attack::{Arena, LEN, OFFSET, SECRET, granule};
use super::default::{close, text};
use super::setup::{self, Opened};
use super::{give_up, show};
use crate::boot::BootInfo;
use crate::devices::edu::{self, Edu};
use crate::iommu::Iommu;
use crate::machine::Machine;
use crate::memory::dma::DmaPages;
use crate::pci::function::{BusMaster, Function};
use crate::report::Report;

/// How many there are.
const COUNT: usize = 2;
const NAMES: [&str; COUNT] = ["first", "second"];
/// That they are there and have nothing in common; three for each.
const CHECKS: usize = 2 + 3 * COUNT;

/// What both `edu` devices use, for different memory.
const SHARED_IOVA: u64 = 0x1234_0000;

/// One IOMMU, with the `edu` behind it.
struct Side<'m> {
    iommu: Iommu,
    function: &'m Function,
    opened: Opened,
    edu: Edu,
}

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS);
    let (machine, iommus) = match setup::bring_up_all(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommus", error),
    };
    let iommus: [Iommu; COUNT] = match iommus.try_into() {
        Ok(iommus) => iommus,
        Err(others) => {
            give_up(report, "iommus", format_args!("there are {} instead of {COUNT}", others.len()))
        }
    };
    iommus.iter().for_each(|iommu| show::iommu(&machine, iommu));
    let [first, second] = &iommus;
    report.check("iommus", true, format_args!("live at {} and {}", first.place, second.place));
    let both =
        first.members.iter().find(|one| second.members.iter().any(|other| one.address == other.address));
    report.check(
        "iommus.apart",
        both.is_none(),
        match both {
            Some(member) => format!("{} is behind both", member.address),
            None => format!("{} and {} functions", first.members.len(), second.members.len()),
        },
    );
    let sides = iommus.map(|iommu| open(&machine, iommu));
    let mut sides = match sides {
        [Ok(first), Ok(second)] => [first, second],
        [Err(error), _] | [_, Err(error)] => give_up(report, "edu", error),
    };
    for (index, name) in NAMES.into_iter().enumerate() {
        let foreign = refuses_foreign(&sides[index], &sides[1 - index]);
        report.check_result(&format!("{name}.foreign"), foreign, ToString::to_string);
        let (one, other) = sides.split_at_mut(1);
        let (own, other) = if index == 0 { (&mut one[0], &other[0]) } else { (&mut other[0], &one[0]) };
        report.check_result(&format!("{name}.same-address"), same_address(own, other), |told| *told);
    }
    let mut iommus = Vec::new();
    for (side, name) in sides.into_iter().zip(NAMES) {
        machine.pci.set_bus_master(side.function.address, BusMaster::Off);
        let closed = close(&side.iommu, side.opened.endpoint);
        report.check_result(&format!("{name}.closed"), closed, |()| "detached, its memory is back");
        iommus.push(side.iommu);
    }
    show::totals_of(&iommus, &mut report);
    report.end()
}

/// Opens the `edu` behind an IOMMU.
fn open(machine: &Machine, iommu: Iommu) -> Result<Side<'_>, String> {
    let mut edus = machine.pci.with_id(edu::VENDOR, edu::DEVICE);
    let behind = edus.find(|function| iommu.endpoint(function).is_some());
    let function = behind.ok_or_else(|| format!("no edu device is behind the IOMMU at {}", iommu.place))?;
    let opened = setup::open(&iommu, function, 0).map_err(text)?;
    let edu = Edu::new(machine.map_bar(function, 0).map_err(text)?).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    Ok(Side { iommu, function, opened, edu })
}

/// The other one's endpoint cannot be attached here.
fn refuses_foreign(own: &Side<'_>, other: &Side<'_>) -> Result<String, String> {
    let foreign = other.opened.id;
    match own.iommu.viommu.attach(foreign, &own.opened.domain) {
        Err(error) => Ok(format!("attaching the other's endpoint {foreign}: {error}")),
        Ok(_) => Err(format!("the other's endpoint {foreign} is attached here")),
    }
}

/// Both map a page of their own at the same address. This one reaches its own, and once that is unmapped nothing; and the
/// fault is told by its own IOMMU.
fn same_address(own: &mut Side<'_>, other: &Side<'_>) -> Result<&'static str, String> {
    let mut pages = [granule(&own.iommu).map_err(text)?, granule(&other.iommu).map_err(text)?];
    pages.iter_mut().for_each(|page| page.fill(SECRET));
    let [page, others_page] = &mut pages;
    let done = try_same_address(own, other, page, others_page);
    if done.is_err() {
        // They may still be mapped: nobody gets them any more.
        pages.into_iter().for_each(|page| {
            page.into_raw();
        });
    }
    done
}

fn try_same_address(
    own: &mut Side<'_>,
    other: &Side<'_>,
    page: &mut DmaPages,
    others_page: &mut DmaPages,
) -> Result<&'static str, String> {
    let iova = Iova::new(SHARED_IOVA);
    let at = SHARED_IOVA + OFFSET;
    let (domain, others_domain) = (&own.opened.domain, &other.opened.domain);
    let (len, others_len) = (own.iommu.viommu.granule(), other.iommu.viommu.granule());
    let both = Prot::READ | Prot::WRITE;
    // SAFETY: the pages are the caller's, who keeps them for good unless both were unmapped with success.
    unsafe {
        domain.map_at(iova, PhysAddr::new(page.phys()), len, both).map_err(text)?;
        others_domain.map_at(iova, PhysAddr::new(others_page.phys()), others_len, both).map_err(text)?;
    }
    let mut arena =
        Arena { iommu: &own.iommu, edu: &mut own.edu, attacker: &own.opened, other: others_domain };
    arena.write_allowed(at, page)?;
    if !others_page.all_bytes_are(SECRET) {
        return Err("the other's memory changed".into());
    }
    page.fill(SECRET);
    // SAFETY: our own mapping.
    unsafe { domain.unmap(iova, len) }.map_err(text)?;
    arena.drain_faults();
    arena.edu.copy_out(0, at, LEN).map_err(text)?;
    if !page.all_bytes_are(SECRET) || !others_page.all_bytes_are(SECRET) {
        return Err("memory changed after it was unmapped".into());
    }
    arena.expect_fault(at)?;
    other.iommu.viommu.poll();
    if let Some(fault) = other.iommu.viommu.next_fault() {
        return Err(format!("the other IOMMU tells of a fault: {fault}"));
    }
    // SAFETY: our own mapping.
    unsafe { others_domain.unmap(iova, others_len) }.map_err(text)?;
    Ok("its own memory alone, then nothing; its own IOMMU tells of it, and the other does not")
}
