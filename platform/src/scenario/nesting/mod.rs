//! A virtio-iommu on a virtio-iommu: a guest's driver maps for the machine's `edu`, whose accesses pass through what the guest
//! maps and through what memory this kernel gives to the guest.
//!
//! ```text
//!   edu -- address --> the guest's domain -- guest's address --> the guest's memory -- address --> memory
//!                      (child)                                   (parent)
//! ```
//! Each attack comes after an access by the same address that is allowed. Proof is memory that did not change, a buffer of
//! `edu` that did not learn anything, *and* a fault that the guest's driver is told in the guest's own addresses, while the
//! kernel knows which level is to blame.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::mem;

use virtio_iommu::contexts::nested::{SpaceId, Why};
use virtio_iommu::{Domain, DomainOptions, EndpointId, Iova, IovaRange, Options, PhysAddr, Prot, Viommu};

use super::default::text;
use super::tamper::{Arm, Tamper, Tampered};
use super::{give_up, setup, show};
use crate::boot::BootInfo;
use crate::devices::edu::{self, Edu};
use crate::guest::{Guest, NestedIommu};
use crate::iommu::Iommu;
use crate::machine::Machine;
use crate::memory::dma::DmaPages;
use crate::memory::frames::FRAME_BYTES;
use crate::pci::function::{BusMaster, Function};
use crate::println;
use crate::report::Report;

mod access;
mod page;
mod parent;
mod picture;

use access::{Blame, Way};
use page::GuestPage;
use picture::Row;

/// The kernel's answer to a request that is withheld comes after this long.
const TIMEOUT_NS: u64 = 100_000_000;

/// Where the guest finds its memory.
const GUEST_BASE: u64 = 0x4000_0000;
/// How much it is, in granules.
const GUEST_GRANULES: usize = 256;
/// Where it finds memory that it may only read.
const ROM: u64 = 0x5000_0000;
/// Where this kernel gives it memory for a while.
const LOAN: u64 = 0x6000_0000;
/// Where `edu` finds a page that the guest uses to look into it.
const SCRATCH: u64 = 0x1000_0000;
/// Where `edu` finds what is tried.
const TRIED: u64 = 0x1800_0000;

const READ_WRITE: Prot = Prot::READ.union(Prot::WRITE);

/// That all is up; what [`World`] tries; what is left.
const CHECKS: usize = 3 + World::OWN_CHECKS + parent::CHECKS + 2;

/// The guest, and what is behind its IOMMU.
struct World {
    guest: Guest,
    nested: NestedIommu,
    /// The guest's driver.
    driver: Viommu<Guest>,
    /// The guest's domain.
    domain: Domain<Guest>,
    /// The space that it is.
    child: SpaceId,
    edu: Edu,
    id: EndpointId,
    granule: u64,
    scratch: GuestPage,
    /// What was tried, for the picture.
    rows: Vec<Row>,
}

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS);
    let arm = Arm::default();
    let wrap = |transport| Tampered::boxed(transport, Tamper::HoldDoorbell, &arm);
    let options = Options { timeout_ns: TIMEOUT_NS, ..Options::default() };
    let (machine, iommu) = match setup::bring_up_wrapped(info, options, &wrap) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    show::iommu(&machine, &iommu);
    show::live(&iommu, &mut report);
    let (mut world, function) = match World::new(&machine, &iommu, &mut report) {
        Ok(made) => made,
        Err(error) => give_up(report, "guest", error),
    };
    println!();
    println!("edu reaches for memory through two levels:");
    world.try_child(&mut report);
    parent::run(&mut world, &arm, &mut report);
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    picture::draw(&world, &iommu);
    let closed = world.close();
    report.check_result(
        "guest.closed",
        closed,
        |()| "detached by its driver: its domain and all shadows are gone",
    );
    show::nothing_lost(&iommu, world.id, &mut report);
    show::totals(&iommu, &mut report);
    report.end()
}

impl World {
    /// Checks of [`try_child`](Self::try_child).
    const OWN_CHECKS: usize = 8;

    /// Makes the guest, starts its driver, and has that attach `edu`. Makes two checks.
    fn new<'m>(
        machine: &'m Machine,
        iommu: &Iommu,
        report: &mut Report,
    ) -> Result<(Self, &'m Function), String> {
        let function = setup::find(machine, edu::VENDOR, edu::DEVICE, "edu device")?;
        let id = iommu.endpoint(function).ok_or("the IOMMU does not know the edu device")?;
        let granule = iommu.viommu.granule();
        let frames = (granule / FRAME_BYTES).max(1) as usize;
        let guest = Guest::new(GUEST_BASE, GUEST_GRANULES * frames, frames).map_err(text)?;
        // It lives as long as the kernel: what its devices reach is never given back.
        mem::forget(guest.clone());
        let nested = NestedIommu::new(&iommu.viommu, guest.clone(), &[id]);
        let memory = nested.memory();
        let (base, phys, len) = (Iova::new(GUEST_BASE), PhysAddr::new(guest.phys()), guest.len_bytes());
        // SAFETY: the guest's pages, which are never freed, by the line above; who has them expects devices to write there.
        unsafe { nested.with_nest(|nest| nest.map_memory(memory, base, phys, len, READ_WRITE)) }
            .map_err(text)?;

        let staged =
            Viommu::start(nested.device().clone(), guest.clone(), Options::default()).map_err(text)?;
        staged.introduce(id).map_err(text)?;
        let driver = staged.go_live().map_err(text)?;
        report.check(
            "guest",
            driver.granule() == granule,
            format_args!(
                "{len} bytes at {GUEST_BASE:#x}, which are at {phys} here; its virtio-iommu is live, granule {:#x}, as here: {}",
                driver.granule(),
                driver.features()
            ),
        );
        let domain = driver.create_domain(DomainOptions::default()).map_err(text)?;
        driver.attach(id, &domain).map_err(text)?;
        let child = nested.space(domain.id().get()).ok_or("the guest's domain is no space")?;
        let scratch = GuestPage::new(&guest, granule)?;
        let edu = Edu::new(machine.map_bar(function, 0).map_err(text)?).map_err(text)?;
        let world =
            Self { guest, nested, driver, domain, child, edu, id, granule, scratch, rows: Vec::new() };
        world.map(SCRATCH, world.scratch.address(), READ_WRITE)?;
        machine.pci.set_bus_master(function.address, BusMaster::On);
        report.check(
            "guest.edu",
            world.shadows() == 1,
            format_args!(
                "attached by the guest's driver to its {:?}, {} shadow",
                world.domain,
                world.shadows()
            ),
        );
        Ok((world, function))
    }

    /// The guest's driver maps a granule.
    fn map(&self, iova: u64, target: u64, prot: Prot) -> Result<(), String> {
        // SAFETY: the target is memory that the guest keeps for this, or that it does not have.
        unsafe { self.domain.map_at(Iova::new(iova), PhysAddr::new(target), self.granule, prot) }
            .map_err(text)
    }

    /// The guest's driver unmaps a granule.
    fn unmap(&self, iova: u64) -> Result<(), String> {
        // SAFETY: `map` mapped it, and what is behind it stays.
        unsafe { self.domain.unmap(Iova::new(iova), self.granule) }.map_err(text)
    }

    fn shadows(&self) -> usize {
        self.nested.with_nest(|nest| nest.shadows(self.child))
    }

    fn range(&self, start: u64) -> Result<IovaRange, String> {
        IovaRange::from_len(Iova::new(start), self.granule).ok_or_else(|| "no range".into())
    }

    /// What the guest's own domain decides.
    fn try_child(&mut self, report: &mut Report) {
        for way in Way::ALL {
            let done = self.reach(way);
            report.check_result(&format!("child.mapped.{}", way.name()), done, ToString::to_string);
        }
        for way in Way::ALL {
            let done = self.unmapped(way);
            report.check_result(&format!("child.unmapped.{}", way.name()), done, ToString::to_string);
        }
        for way in Way::ALL {
            let done = self.other_direction(way);
            report.check_result(&format!("child.other-direction.{}", way.name()), done, ToString::to_string);
        }
        // What the guest, and this kernel, know the memory by is nothing to the device.
        for (name, offset) in
            [("guest-address", 0), ("machine-address", self.guest.phys().wrapping_sub(GUEST_BASE))]
        {
            let done = self.by_address(offset);
            report.check_result(&format!("child.{name}.write"), done, ToString::to_string);
        }
    }

    /// Bytes arrive where both levels lead.
    fn reach(&mut self, way: Way) -> Result<String, String> {
        let mut page = GuestPage::new(&self.guest, self.granule)?;
        self.map(TRIED, page.address(), READ_WRITE)?;
        self.allowed("mapped by both", way, TRIED, &mut page)?;
        self.unmap(TRIED)?;
        Ok(format!("{} at {TRIED:#x} arrives at {:#x} of the guest", way.name(), page.address()))
    }

    /// The guest unmapped it a moment ago.
    fn unmapped(&mut self, way: Way) -> Result<String, String> {
        let mut page = GuestPage::new(&self.guest, self.granule)?;
        self.map(TRIED, page.address(), READ_WRITE)?;
        self.allowed("before child unmaps", way, TRIED, &mut page)?;
        self.unmap(TRIED)?;
        let blame = Blame { space: self.child, address: TRIED, why: Why::NotMapped };
        self.blocked("child unmapped it", way, TRIED, &mut page, blame)
    }

    /// The guest maps it for the other direction only.
    fn other_direction(&mut self, way: Way) -> Result<String, String> {
        let mut page = GuestPage::new(&self.guest, self.granule)?;
        self.map(TRIED, page.address(), way.other().prot())?;
        self.allowed("other direction", way.other(), TRIED, &mut page)?;
        let blame = Blame { space: self.child, address: TRIED, why: Why::NotAllowed };
        let blocked = self.blocked("not this direction", way, TRIED, &mut page, blame)?;
        self.unmap(TRIED)?;
        Ok(blocked)
    }

    /// An address that is the memory's, plus an offset, and mapped nowhere. The control is the same memory, mapped there.
    fn by_address(&mut self, offset: u64) -> Result<String, String> {
        let mut page = GuestPage::new(&self.guest, self.granule)?;
        let iova = page.address().wrapping_add(offset);
        self.map(iova, page.address(), READ_WRITE)?;
        self.allowed("mapped at its address", Way::Write, iova, &mut page)?;
        self.unmap(iova)?;
        let blame = Blame { space: self.child, address: iova, why: Why::NotMapped };
        self.blocked("by its address", Way::Write, iova, &mut page, blame)
    }

    /// The guest's driver lets `edu` go.
    fn close(&mut self) -> Result<(), String> {
        self.unmap(SCRATCH)?;
        self.driver.detach(self.id).map_err(text)?;
        let domain = self.domain.id().get();
        match (self.nested.space(domain), self.shadows()) {
            (None, 0) => Ok(()),
            (space, shadows) => Err(format!("{space:?} is left of it, with {shadows} shadows")),
        }
    }
}

/// Frames for a granule, to its alignment.
fn granule_pages(granule: u64) -> Result<DmaPages, String> {
    let frames = (granule / FRAME_BYTES).max(1) as usize;
    DmaPages::allocate_aligned(frames, frames).map_err(text)
}
