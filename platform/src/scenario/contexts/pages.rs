//! Page requests: an agent touches what is not mapped yet, waits, and goes on when the driver answered.

use alloc::format;
use alloc::string::{String, ToString};

use super::access::{LEN, OFFSET, SECRET, SENT};
use super::agents::{Answered, Stopped};
use super::space::{GuestPage, Kind, READ_WRITE};
use super::{AGENT, PAGE, World, text};
use crate::report::Report;
use virtio_iommu::contexts::{PageAnswer, PageGroup, PageGroups, Taken};

/// Checks of [`run`].
pub(super) const CHECKS: usize = Kind::OWNED.len() + 1;

/// What a process has, and what it has not.
const HEAP: u64 = 0xa0_0000;
const NOWHERE: u64 = 0xc0_0000;

/// Requests for a page in each table: one is filled, one is refused.
pub(super) fn run(world: &mut World, report: &mut Report) {
    for (group, kind) in Kind::OWNED.into_iter().enumerate() {
        let done = world.filled(kind, group as u16);
        report.check_result(&format!("{}.page-request", kind.word()), done, ToString::to_string);
    }
    let done = world.refused();
    report.check_result("page-request.refused", done, ToString::to_string);
}

impl World {
    /// The page is mapped when it is asked for, and the access is tried again.
    fn filled(&mut self, kind: Kind, number: u16) -> Result<String, String> {
        let page = GuestPage::new(&self.guest)?;
        page.fill(SECRET);
        let group = self.ask(kind, HEAP, number)?;
        let space = self.spaces.iter_mut().find(|space| space.kind == kind).ok_or("no such context")?;
        for wanted in &group.pages {
            space.map(wanted.address.get() & !(PAGE - 1), page.address, READ_WRITE)?;
        }
        self.answer(&group, PageAnswer::Success, 0)?;
        self.touch(kind, HEAP, number).map_err(|error| format!("after the answer: {error:?}"))?;
        if !page.holds(SENT) {
            return Err("the access did not arrive".into());
        }
        self.told.push(format!("{:<28} page request: mapped, answered, the access arrives", kind.name()));
        let space = self.spaces.iter_mut().find(|space| space.kind == kind).ok_or("no such context")?;
        space.unmap(HEAP)?;
        self.guest.free(page.address, 1);
        Ok(format!("asked for {HEAP:#x}, mapped, answered, and the write arrived at {:#x}", page.address))
    }

    /// A page that the process does not have.
    fn refused(&mut self) -> Result<String, String> {
        let kind = Kind::X86;
        let group = self.ask(kind, NOWHERE, 7)?;
        self.answer(&group, PageAnswer::Invalid, 1)?;
        let again = self.blocked(AGENT, kind.pasid(), NOWHERE)?;
        // Answered once is answered.
        if self.driver.respond(group.id, PageAnswer::Success).is_ok() {
            return Err("a second answer was taken".into());
        }
        self.told.push(format!("{:<28} page request: refused, the access ends", kind.name()));
        Ok(format!("answered invalid; {again}; a second answer is refused"))
    }

    /// An access that waits for a page where none is.
    fn touch(&self, kind: Kind, iova: u64, group: u16) -> Result<(), Stopped> {
        self.agents.touch(AGENT, kind.pasid(), iova + OFFSET, &[SENT; LEN], group)
    }

    /// Has the agent ask, and the driver hear of it.
    fn ask(&self, kind: Kind, iova: u64, number: u16) -> Result<PageGroup, String> {
        self.forget_faults();
        match self.touch(kind, iova, number) {
            Err(Stopped::Waiting) => {}
            other => return Err(format!("{other:?} instead of a page request")),
        }
        let fault = self.next_fault().ok_or("the driver is told nothing")?;
        match PageGroups::new(4, 4).take(&fault) {
            Taken::Complete(group) if group.id.pasid.map(|pasid| pasid.get()) == kind.pasid() => Ok(group),
            other => Err(format!("{other:?} instead of a whole group")),
        }
    }

    fn answer(&self, group: &PageGroup, answer: PageAnswer, code: u16) -> Result<(), String> {
        self.driver.respond(group.id, answer).map_err(text)?;
        let answers = self.agents.take_answers();
        if answers == [Answered { group: group.id.group, code }] {
            Ok(())
        } else {
            Err(format!("the agent is answered {answers:?}"))
        }
    }
}
