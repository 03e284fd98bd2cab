//! Drivers and transports with a bug, on purpose: each must be caught at one named check.

use virtio_iommu::{EndpointId, Options, PhysAddr, Prot};

use super::setup::{self, Opened};
use super::tamper::{Arm, Tamper, Tampered};
use super::{give_up, show};
use crate::boot::BootInfo;
use crate::devices::edu::{self, Edu};
use crate::iommu::Iommu;
use crate::machine::Machine;
use crate::memory::dma::DmaPages;
use crate::memory::frames;
use crate::pci::function::BusMaster;
use crate::report::{Outcome, Report};

/// What the memory's next owner keeps there.
const OWNED: u8 = 0x11;
/// What `edu` writes.
const ATTACK: u8 = 0xee;
const PAGE: u64 = 4096;

/// Frees memory that is mapped, without unmapping it.
pub(super) fn leak(info: &BootInfo) -> ! {
    let report = Report::start(1);
    let (machine, iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "leak.iommu", error),
    };
    free_while_mapped(report, &machine, &iommu, "leak.freed-memory-untouched", |_, _| {})
}

/// Frees memory after UNMAP was sent, and before it was answered.
pub(super) fn early(info: &BootInfo) -> ! {
    let report = Report::start(1);
    let options = Options { timeout_ns: 50_000_000, ..Options::default() };
    let arm = Arm::default();
    let wrap = |transport| Tampered::boxed(transport, Tamper::HoldDoorbell, &arm);
    let (machine, iommu) = match setup::bring_up_wrapped(info, options, &wrap) {
        Ok(up) => up,
        Err(error) => give_up(report, "early.iommu", error),
    };
    free_while_mapped(report, &machine, &iommu, "early.freed-memory-untouched", |opened, iova| {
        arm.arm();
        // SAFETY: our own mapping.
        let result = unsafe { opened.domain.unmap(iova, PAGE) };
        // The bug: the error is not looked at.
        crate::println!("  unmap: {result:?}, and the memory is freed all the same");
    })
}

/// Believes a transport that turns failures into success.
pub(super) fn lie(info: &BootInfo) -> ! {
    let mut report = Report::start(1);
    let arm = Arm::default();
    let wrap = |transport| Tampered::boxed(transport, Tamper::Lie, &arm);
    let (machine, iommu) = match setup::bring_up_wrapped(info, Options::default(), &wrap) {
        Ok(up) => up,
        Err(error) => give_up(report, "lie.iommu", error),
    };
    show::iommu(&machine, &iommu);
    arm.arm();
    // The last function of the last device of bus 0, where the machine has nothing.
    let absent = EndpointId::pci(0, 0, 30, 7);
    let domain = match iommu.viommu.create_domain(Default::default()) {
        Ok(domain) => domain,
        Err(error) => give_up(report, "lie.domain", error),
    };
    let attached = iommu.viommu.attach(absent, &domain);
    report.check(
        "lie.refused-attach-is-reported",
        attached.is_err(),
        format_args!("attaching endpoint {absent}, which does not exist, gives {attached:?}"),
    );
    report.end()
}

/// Maps a page for `edu`, gives it to another owner after `unmap`, and lets `edu` write to it.
fn free_while_mapped(
    mut report: Report,
    machine: &Machine,
    iommu: &Iommu,
    check: &str,
    unmap: impl FnOnce(&Opened, virtio_iommu::Iova),
) -> ! {
    show::iommu(machine, iommu);
    let Some(function) = machine.pci.with_id(edu::VENDOR, edu::DEVICE).next() else {
        give_up(report, check, "no edu device; start QEMU with `-device edu`");
    };
    let opened = match setup::open(iommu, function, 0) {
        Ok(opened) => opened,
        Err(error) => give_up(report, check, error),
    };
    let registers = match machine.map_bar(function, 0) {
        Ok(registers) => registers,
        Err(error) => give_up(report, check, error),
    };
    let mut edu = match Edu::new(registers) {
        Ok(edu) => edu,
        Err(error) => give_up(report, check, error),
    };
    machine.pci.set_bus_master(function.address, BusMaster::On);

    let outcome = (|| {
        let mut page = DmaPages::allocate(1).map_err(|error| alloc::format!("{error}"))?;
        page.fill(ATTACK);
        let phys = page.into_raw();
        let limit = virtio_iommu::Iova::new(u64::MAX);
        // SAFETY: not kept, on purpose: the memory is freed while the mapping may still be there.
        let iova = unsafe { opened.domain.map(PhysAddr::new(phys), PAGE, Prot::READ | Prot::WRITE, limit) };
        let iova = iova.map_err(|error| alloc::format!("{error}"))?;
        edu.copy_in(iova.get(), 0, 64).map_err(|error| alloc::format!("{error}"))?;
        unmap(&opened, iova);
        // SAFETY: not sound, on purpose: this is the bug that the check must catch.
        unsafe { frames::free(phys) }.map_err(|error| alloc::format!("{error}"))?;
        let mut victim = reallocate(phys)?;
        victim.fill(OWNED);
        edu.copy_out(0, iova.get(), 64).map_err(|error| alloc::format!("{error}"))?;
        let untouched = victim.all_bytes_are(OWNED);
        Ok::<_, alloc::string::String>((phys, iova, untouched))
    })();
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    match outcome {
        Ok((phys, iova, untouched)) => report.check(
            check,
            untouched,
            format_args!(
                "memory at {phys:#x} {} written by edu through {iova} after it was freed",
                if untouched { "was not" } else { "was" }
            ),
        ),
        Err(error) => report.check(check, Outcome::Fail, error),
    };
    report.end()
}

/// Allocates until the frame at `phys` is the one that comes back.
fn reallocate(phys: u64) -> Result<DmaPages, alloc::string::String> {
    let mut others = alloc::vec::Vec::new();
    for _ in 0..4096 {
        let page = DmaPages::allocate(1).map_err(|error| alloc::format!("{error}"))?;
        if page.phys() == phys {
            return Ok(page);
        }
        others.push(page);
    }
    Err(alloc::format!("the frame at {phys:#x} was not given out again"))
}
