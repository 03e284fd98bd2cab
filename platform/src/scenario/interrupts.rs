//! Faults and answers of the IOMMU that come by interrupt, while the CPU sleeps.
//!
//! The CPU looks at nothing by itself: it sleeps, and polls the driver only when the handler of the interrupt says so.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::task::Wake;
use core::future::Future;
use core::pin::pin;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Context, Poll, Waker};

use virtio_iommu::{DmaDevice, Iova, Options, PhysAddr, Prot};

use super::attack::{LEN, OFFSET, granule};
use super::default::{close, text};
use super::setup::{self, Opened, find};
use super::tamper::{Arm, Tamper, Tampered};
use super::{give_up, show};
use crate::arch;
use crate::boot::BootInfo;
use crate::devices::edu::{self, Edu};
use crate::interrupts::sleep_until;
use crate::iommu::Iommu;
use crate::iommu::interrupt::Signal;
use crate::machine::Machine;
use crate::memory::dma::DmaPages;
use crate::pci::function::{BusMaster, LineInterrupt};
use crate::report::Report;
use crate::time;

const CHECKS: usize = 6;

/// How long to sleep for something that comes: twenty times of what `edu` takes.
const PATIENCE_NS: u64 = 2_000_000_000;
/// How long to sleep for something that does not come.
const QUIET_NS: u64 = 50_000_000;

/// What is never mapped.
const UNMAPPED: u64 = 0x7654_3000;

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS);
    let arm = Arm::default();
    let wrap = |transport| Tampered::boxed(transport, Tamper::HoldDoorbell, &arm);
    let (machine, iommu) = match setup::bring_up_wrapped(info, Options::default(), &wrap) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    show::iommu(&machine, &iommu);
    show::live(&iommu, &mut report);
    // Nobody answers the others' lines, which the IOMMU's may be shared with.
    for function in machine.pci.functions() {
        machine.pci.set_line_interrupt(function.address, LineInterrupt::Off);
    }
    let connected =
        arch::interrupts::init(&machine.firmware).and_then(|()| iommu.connect_interrupt(&machine));
    let (line, signal) = match connected {
        Ok(connected) => connected,
        Err(error) => give_up(report, "interrupts.line", error),
    };
    report.check("interrupts.line", true, line);

    let sleeper = Sleeper { iommu: &iommu, signal: &signal };
    report.check_result("interrupts.quiet", sleeper.quiet(), |told| *told);
    let opened = match open(&machine, &iommu) {
        Ok(opened) => opened,
        Err(error) => give_up(report, "interrupts.edu", error),
    };
    let (mut edu, opened) = opened;
    report.check_result("interrupts.fault", sleeper.fault(&mut edu, &opened), String::clone);
    report.check_result("interrupts.answer", sleeper.answer(&arm, &opened), String::clone);
    let closed = close(&iommu, opened.endpoint);
    report.check_result("interrupts.closed", closed, |()| "detached, its memory is back");
    report.value("interrupts", signal.taken(), "interrupts");
    show::totals(&iommu, &mut report);
    report.end()
}

fn open(machine: &Machine, iommu: &Iommu) -> Result<(Edu, Opened), String> {
    let function = find(machine, edu::VENDOR, edu::DEVICE, "edu device")?;
    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let edu = Edu::new(machine.map_bar(function, 0).map_err(text)?).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    Ok((edu, opened))
}

/// A CPU that sleeps, and polls when it is told to.
struct Sleeper<'a> {
    iommu: &'a Iommu,
    signal: &'a Signal,
}

impl Sleeper<'_> {
    /// Sleeps until `is_done`, which is asked after each poll; says how many there were.
    fn sleep(&self, mut is_done: impl FnMut() -> bool) -> Result<u64, String> {
        let deadline_ns = time::now_ns().ok_or("the machine has no clock")? + PATIENCE_NS;
        let mut polls = 0;
        loop {
            if !sleep_until(deadline_ns, || self.signal.take()) {
                return Err(format!("no interrupt within {} ms, after {polls}", PATIENCE_NS / 1_000_000));
            }
            self.iommu.viommu.poll();
            polls += 1;
            if is_done() {
                return Ok(polls);
            }
        }
    }

    /// Nothing comes where nothing happens, and the sleep ends in time.
    fn quiet(&self) -> Result<&'static str, String> {
        // What bring-up left.
        self.signal.take();
        self.iommu.viommu.poll();
        let before = self.signal.taken();
        let start = time::now_ns().ok_or("the machine has no clock")?;
        if sleep_until(start + QUIET_NS, || self.signal.take()) {
            return Err("an interrupt while nothing happened".into());
        }
        let slept = time::now_ns().unwrap_or(start) - start;
        if !(QUIET_NS..=PATIENCE_NS).contains(&slept) {
            return Err(format!("slept {slept} ns instead of {QUIET_NS} ns"));
        }
        match self.signal.taken() - before {
            0 => Ok("no interrupt while nothing happens"),
            count => Err(format!("{count} interrupts while nothing happened")),
        }
    }

    /// `edu` reaches for what is not mapped, some time after it was told to.
    fn fault(&self, edu: &mut Edu, opened: &Opened) -> Result<String, String> {
        let at = Iova::new(UNMAPPED + OFFSET);
        edu.start_copy_out(0, at.get(), LEN).map_err(text)?;
        let start = time::now_ns().unwrap_or(0);
        let mut first = None;
        let polls = self.sleep(|| {
            first = first.or_else(|| self.iommu.viommu.next_fault());
            first.is_some()
        })?;
        let waited_ms = time::now_ns().unwrap_or(0).saturating_sub(start) / 1_000_000;
        edu.wait().map_err(text)?;
        let fault = first.ok_or("no fault")?;
        if fault.endpoint != opened.id || fault.address != Some(at) {
            return Err(format!("a fault of something else: {fault}"));
        }
        while self.iommu.viommu.next_fault().is_some() {}
        Ok(format!("after {waited_ms} ms and {polls} polls: {fault}"))
    }

    /// A MAP whose answer the device has only after the CPU went on.
    fn answer(&self, arm: &Arm, opened: &Opened) -> Result<String, String> {
        let page = granule(self.iommu).map_err(text)?;
        let mapped = self.map_slowly(arm, opened, &page);
        if mapped.is_err() {
            // It may be mapped: nobody gets it any more.
            page.into_raw();
        }
        mapped
    }

    fn map_slowly(&self, arm: &Arm, opened: &Opened, page: &DmaPages) -> Result<String, String> {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut context = Context::from_waker(&waker);
        let (phys, limit) = (PhysAddr::new(page.phys()), opened.endpoint.limit());
        let len = self.iommu.viommu.granule();
        arm.arm();
        // SAFETY: `answer` keeps the page for good unless it was unmapped with success.
        let mut map = pin!(unsafe { opened.domain.map_async(phys, len, Prot::READ, limit) });
        let early = map.as_mut().poll(&mut context);
        let before = self.signal.taken();
        arm.release();
        if early.is_ready() {
            return Err("the answer was there before the doorbell rang".to_string());
        }
        let polls = self.sleep(|| woken.0.load(Ordering::Acquire))?;
        let Poll::Ready(result) = map.as_mut().poll(&mut context) else {
            return Err("woken, and the answer is not there".into());
        };
        let iova = result.map_err(text)?;
        // SAFETY: our own mapping.
        unsafe { opened.domain.unmap(iova, len) }.map_err(text)?;
        let interrupts = self.signal.taken() - before;
        Ok(format!("MAP at {iova} answered after the CPU went on: {interrupts} interrupts, {polls} polls"))
    }
}

/// Set by the waker.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}
