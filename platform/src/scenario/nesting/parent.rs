//! What the parent decides: the memory that this kernel gives to its guest, and takes away again while the guest has it
//! mapped.

use alloc::format;
use alloc::string::{String, ToString};

use virtio_iommu::contexts::nested::{Merging, NestError, Why};
use virtio_iommu::{Iova, PhysAddr, Prot};

use super::access::{Blame, Way};
use super::page::GuestPage;
use super::{LOAN, READ_WRITE, ROM, TRIED, World, granule_pages, text};
use crate::memory::dma::DmaPages;
use crate::report::Report;
use crate::scenario::tamper::Arm;

/// Checks of [`run`].
pub(super) const CHECKS: usize = 8;

/// Tries all of it.
pub(super) fn run(world: &mut World, arm: &Arm, report: &mut Report) {
    let done = world.read_only();
    report.check_result("parent.read-only.write", done, ToString::to_string);
    for way in Way::ALL {
        let done = world.taken_away(way);
        report.check_result(&format!("parent.unmapped.{}", way.name()), done, ToString::to_string);
    }
    let done = world.not_yet_there();
    report.check_result("parent.mapped-later", done, ToString::to_string);
    let done = world.replaced();
    report.check_result("parent.replaced", done, ToString::to_string);
    let done = world.in_part();
    report.check_result("parent.in-part", done, ToString::to_string);
    let done = world.merged();
    report.check_result("parent.merged", done, ToString::to_string);
    let done = world.unconfirmed(arm);
    report.check_result("parent.confirmed-last", done, ToString::to_string);
}

/// Memory that is the guest's for a while. It is freed once it was taken back, and else never.
struct Lent {
    pages: Option<DmaPages>,
    at: u64,
}

impl Lent {
    /// Gives a granule to the guest.
    fn new(world: &World, at: u64, prot: Prot) -> Result<Self, String> {
        let pages = granule_pages(world.granule)?;
        let (iova, phys, len) = (Iova::new(at), PhysAddr::new(pages.phys()), world.granule);
        let memory = world.nested.memory();
        // From here on it is not freed unless `take_back` has it.
        let lent = Self { pages: Some(pages), at };
        // SAFETY: the pages are the guest's alone until `take_back` unmapped them with success; else they are never freed.
        unsafe { world.nested.with_nest(|nest| nest.map_memory(memory, iova, phys, len, prot)) }
            .map_err(text)?;
        Ok(lent)
    }

    fn pages(&mut self) -> Result<&mut DmaPages, String> {
        self.pages.as_mut().ok_or_else(|| "the memory was taken back".into())
    }

    /// Takes it from the guest, whatever has it mapped.
    fn take_back(&mut self, world: &World) -> Result<DmaPages, NestError> {
        let memory = world.nested.memory();
        let range = world.range(self.at).map_err(|_| NestError::Empty)?;
        world.nested.with_nest(|nest| nest.unmap(memory, range))?;
        self.pages.take().ok_or(NestError::Empty)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(pages) = self.pages.take() {
            // The guest may still have it.
            pages.into_raw();
        }
    }
}

impl World {
    fn blame_memory(&self, address: u64, why: Why) -> Blame {
        Blame { space: self.nested.memory(), address, why }
    }

    /// The guest maps for both directions what it may only read.
    fn read_only(&mut self) -> Result<String, String> {
        let mut rom = Lent::new(self, ROM, Prot::READ)?;
        self.map(TRIED, ROM, READ_WRITE)?;
        self.allowed("parent allows reads", Way::Read, TRIED, rom.pages()?)?;
        let blame = self.blame_memory(ROM, Why::NotAllowed);
        let blocked = self.blocked("parent allows reads", Way::Write, TRIED, rom.pages()?, blame)?;
        self.unmap(TRIED)?;
        rom.take_back(self).map_err(text)?;
        Ok(blocked)
    }

    /// The parent unmaps while the child has it mapped. When that is confirmed the memory is another's.
    fn taken_away(&mut self, way: Way) -> Result<String, String> {
        let mut lent = Lent::new(self, LOAN, READ_WRITE)?;
        self.map(TRIED, LOAN, READ_WRITE)?;
        self.allowed("before parent unmaps", way, TRIED, lent.pages()?)?;
        let mut pages = lent.take_back(self).map_err(text)?;
        let blame = self.blame_memory(LOAN, Why::NotMapped);
        let blocked = self.blocked("parent unmapped it", way, TRIED, &mut pages, blame)?;
        self.unmap(TRIED)?;
        Ok(blocked)
    }

    /// The guest maps what it does not have; it works from the moment when it has it.
    fn not_yet_there(&mut self) -> Result<String, String> {
        self.map(TRIED, LOAN, READ_WRITE)?;
        let mut nowhere = granule_pages(self.granule)?;
        let blame = self.blame_memory(LOAN, Why::NotMapped);
        let blocked = self.blocked("parent has nothing yet", Way::Write, TRIED, &mut nowhere, blame)?;
        let mut lent = Lent::new(self, LOAN, READ_WRITE)?;
        self.allowed("parent mapped it", Way::Write, TRIED, lent.pages()?)?;
        lent.take_back(self).map_err(text)?;
        self.unmap(TRIED)?;
        Ok(format!("{blocked}; then it is lent, and works"))
    }

    /// Other memory takes the place of what the guest has, and the guest's driver does nothing.
    fn replaced(&mut self) -> Result<String, String> {
        let mut lent = Lent::new(self, LOAN, READ_WRITE)?;
        self.map(TRIED, LOAN, READ_WRITE)?;
        self.allowed("the first memory", Way::Write, TRIED, lent.pages()?)?;
        let mut old = lent.take_back(self).map_err(text)?;
        old.fill(0);
        let mut lent = Lent::new(self, LOAN, READ_WRITE)?;
        self.allowed("the second memory", Way::Write, TRIED, lent.pages()?)?;
        if !old.all_bytes_are(0) {
            return Err("the first memory changed".into());
        }
        let new = lent.take_back(self).map_err(text)?;
        self.unmap(TRIED)?;
        Ok(format!("from {:#x} to {:#x}, and only that changed", old.phys(), new.phys()))
    }

    /// One mapping of the guest's leads to two pieces of its memory. One goes, and the other stays within reach.
    fn in_part(&mut self) -> Result<String, String> {
        let granule = self.granule;
        let mut first = Lent::new(self, LOAN, READ_WRITE)?;
        let mut second = Lent::new(self, LOAN + granule, READ_WRITE)?;
        let made = self.map_two()?;
        // Both shadows go by one request, and come back.
        self.unmap_two()?;
        self.map_two()?;
        self.allowed("second of two pieces", Way::Write, TRIED + granule, second.pages()?)?;
        let mut gone = second.take_back(self).map_err(text)?;
        let blame = self.blame_memory(LOAN + granule, Why::NotMapped);
        let blocked = self.blocked("parent unmapped piece", Way::Write, TRIED + granule, &mut gone, blame)?;
        self.allowed("the other piece", Way::Write, TRIED, first.pages()?)?;
        self.unmap_two()?;
        first.take_back(self).map_err(text)?;
        match made {
            (2, 1) => Ok(format!("2 shadows of one mapping, 1 doorbell; {blocked}; the other half works")),
            other => Err(format!("one mapping over two of the parent's: shadows, doorbells {other:?}")),
        }
    }

    /// The guest's driver maps two granules by one request. How many shadows that makes, and by how many doorbells.
    fn map_two(&self) -> Result<(usize, u64), String> {
        let count = || (self.shadows(), self.nested.outer().stats().kicks);
        let before = count();
        let (iova, target) = (Iova::new(TRIED), PhysAddr::new(LOAN));
        // SAFETY: what is behind it stays, or is taken back through all levels.
        unsafe { self.domain.map_at(iova, target, 2 * self.granule, READ_WRITE) }.map_err(text)?;
        let after = count();
        Ok((after.0 - before.0, after.1 - before.1))
    }

    fn unmap_two(&self) -> Result<(), String> {
        // SAFETY: `map_two` mapped it.
        unsafe { self.domain.unmap(Iova::new(TRIED), 2 * self.granule) }.map_err(text)
    }

    /// The same where both pieces adjoin and shadows may be merged: there is one, of which half goes.
    fn merged(&mut self) -> Result<String, String> {
        let granule = self.granule;
        let mut first = GuestPage::new(&self.guest, granule)?;
        let mut second = GuestPage::new(&self.guest, granule)?;
        if second.address() != first.address() + granule {
            return Err("the guest's memory is in pieces".into());
        }
        let phys = self.guest.phys() + (first.address() - self.guest.base());
        let memory = self.nested.memory();
        for offset in [0, granule] {
            let (iova, phys) = (Iova::new(LOAN + offset), PhysAddr::new(phys + offset));
            // SAFETY: the guest's pages, which are never freed, at a second address.
            unsafe { self.nested.with_nest(|nest| nest.map_memory(memory, iova, phys, granule, READ_WRITE)) }
                .map_err(text)?;
        }
        self.nested.with_nest(|nest| nest.set_merging(Merging::Adjoining));
        let made = self.map_two()?;
        self.allowed("first half of one shadow", Way::Write, TRIED, &mut first)?;
        self.allowed("second half of it", Way::Write, TRIED + granule, &mut second)?;
        let half = self.range(LOAN + granule)?;
        self.nested.with_nest(|nest| nest.unmap(memory, half)).map_err(text)?;
        let blame = self.blame_memory(LOAN + granule, Why::NotMapped);
        let blocked =
            self.blocked("parent unmapped half", Way::Write, TRIED + granule, &mut second, blame)?;
        self.allowed("the half that is left", Way::Write, TRIED, &mut first)?;
        self.unmap_two()?;
        let half = self.range(LOAN)?;
        self.nested
            .with_nest(|nest| {
                nest.set_merging(Merging::Never);
                nest.unmap(memory, half)
            })
            .map_err(text)?;
        match made {
            (1, 1) => {
                Ok(format!("1 shadow over two of the parent's mappings; {blocked}; the other half works"))
            }
            other => Err(format!("two adjoining mappings of the parent's: shadows, doorbells {other:?}")),
        }
    }

    /// The device does not hear of the UNMAP for a while. `edu` reaches the memory all that time, and all that time
    /// it is not given back. When it is, `edu` does not.
    fn unconfirmed(&mut self, arm: &Arm) -> Result<String, String> {
        let mut lent = Lent::new(self, LOAN, READ_WRITE)?;
        self.map(TRIED, LOAN, READ_WRITE)?;
        self.allowed("before parent unmaps", Way::Write, TRIED, lent.pages()?)?;
        arm.arm();
        let early = lent.take_back(self);
        let reached = self.allowed("UNMAP is withheld", Way::Write, TRIED, lent.pages()?);
        arm.release();
        // The driver takes the late answer in.
        self.forget_faults();
        let stuck = match early {
            Err(error @ NestError::Stuck { .. }) => error.to_string(),
            Err(error) => return Err(format!("an UNMAP without an answer: {error}")),
            Ok(pages) => {
                pages.into_raw();
                return Err("the memory came back before the device knew of it".into());
            }
        };
        reached?;
        let mut pages = lent.take_back(self).map_err(text)?;
        let blame = self.blame_memory(LOAN, Why::NotMapped);
        let blocked = self.blocked("UNMAP is confirmed", Way::Write, TRIED, &mut pages, blame)?;
        self.unmap(TRIED)?;
        Ok(format!("UNMAP withheld: {stuck}, and edu still writes there; then {blocked}"))
    }
}
