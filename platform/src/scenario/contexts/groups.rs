//! Groups of page requests: an agent asks for several pages at once, too often, for too many, or too late.
//!
//! The process that the agent shares has a heap, of which no page is there before somebody asks.

use alloc::collections::BTreeMap;
use alloc::collections::btree_map::Entry;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use virtio_iommu::contexts::{PageAnswer, PageGroup, PageGroups, Pasid, Taken};
use virtio_iommu::{RequestError, Status};
use virtio_iommu_model::{AccessKind, PageRequest};

use super::access::{OFFSET, SECRET, SENT};
use super::space::{GuestPage, Kind, READ_WRITE, Space};
use super::{AGENT, PAGE, World, text};
use crate::guest::VirtualIommu;
use crate::report::Report;

/// Checks of [`run`].
pub(super) const CHECKS: usize = 4;

/// The process's heap.
const HEAP: u64 = 0x100_0000;
const HEAP_PAGES: u64 = 64;
/// The context whose heap it is.
const KIND: Kind = Kind::X86;
/// A PASID for a context that goes while the agent waits.
const SHORT_LIVED: u32 = 5;

/// The pages of the heap that somebody asked for.
type Heap = BTreeMap<u64, GuestPage>;

type Check = fn(&mut World, &VirtualIommu, &mut Heap) -> Result<String, String>;

/// Tries groups of more than one, duplicates, a flood, and an answer that comes too late.
pub(super) fn run(world: &mut World, device: VirtualIommu, report: &mut Report) {
    let mut heap = Heap::new();
    let checks: [(&str, Check); CHECKS] = [
        ("page-group.several", World::several),
        ("page-group.duplicate", World::duplicate),
        ("page-group.flood", World::flood),
        ("page-group.dead-context", World::dead_context),
    ];
    for (name, check) in checks {
        let done = check(world, &device, &mut heap);
        report.check_result(name, done, ToString::to_string);
    }
    if let Err(error) = world.end_heap(heap) {
        crate::println!("the heap stays: {error}");
    }
}

fn page(pasid: Option<u32>, address: u64, group: u16, last: bool) -> PageRequest {
    let (endpoint, kind) = (AGENT.get(), AccessKind::Write);
    PageRequest { endpoint, pasid, address: address + OFFSET, kind, group, last }
}

/// The agent asks for a page. Whether the device took it.
fn asks(device: &VirtualIommu, request: PageRequest) -> bool {
    device.with(|device, guest| device.request_page(guest, request)).is_ok()
}

impl World {
    /// Takes in what was asked for. The groups that are whole, and how many were refused, or are to come.
    fn heard(&self, groups: &mut PageGroups) -> (Vec<PageGroup>, usize) {
        let (mut whole, mut others) = (Vec::new(), 0);
        while let Some(fault) = self.next_fault() {
            match groups.take(&fault) {
                Taken::Complete(group) => whole.push(group),
                _ => others += 1,
            }
        }
        (whole, others)
    }

    /// Serves a group as a kernel would: each page of the heap is there after it, and one that is elsewhere refuses it all.
    fn serve(&mut self, group: &PageGroup, heap: &mut Heap) -> Result<PageAnswer, String> {
        let mut answer = PageAnswer::Success;
        for wanted in &group.pages {
            let iova = wanted.address.get() & !(PAGE - 1);
            if !(HEAP..HEAP + HEAP_PAGES * PAGE).contains(&iova) {
                answer = PageAnswer::Invalid;
            } else if let Entry::Vacant(absent) = heap.entry(iova) {
                let page = GuestPage::new(&self.guest)?;
                page.fill(SECRET);
                self.space(KIND)?.map(iova, page.address, READ_WRITE)?;
                absent.insert(page);
            }
        }
        self.driver.respond(group.id, answer).map_err(text)?;
        Ok(answer)
    }

    /// Codes of the answers that the agent got.
    fn answers(&self) -> Vec<u16> {
        self.agents.take_answers().iter().map(|answer| answer.code).collect()
    }

    /// Four pages that are asked for together: nothing happens before the last request, and one answer serves them all.
    fn several(&mut self, device: &VirtualIommu, heap: &mut Heap) -> Result<String, String> {
        let mut groups = PageGroups::new(4, 8);
        self.forget_faults();
        let iovas = [0, 1, 2, 3].map(|number| HEAP + 2 * number * PAGE);
        for iova in &iovas[..3] {
            asks(device, page(KIND.pasid(), *iova, 20, false));
        }
        let (whole, waiting) = self.heard(&mut groups);
        if !whole.is_empty() || waiting != 3 {
            return Err(format!("{} groups before the last request, {waiting} requests", whole.len()));
        }
        asks(device, page(KIND.pasid(), iovas[3], 20, true));
        let (whole, _) = self.heard(&mut groups);
        let [group] = &whole[..] else { return Err(format!("{} groups instead of one", whole.len())) };
        self.serve(group, heap)?;
        if self.answers() != [0] {
            return Err("the agent is not told once that it can go on".into());
        }
        for iova in iovas {
            self.write(AGENT, KIND.pasid(), iova)?;
            if !heap.get(&iova).is_some_and(|page| page.holds(SENT)) {
                return Err(format!("the write at {iova:#x} did not arrive"));
            }
        }
        self.no_fault()?;
        self.told
            .push(format!("{:<28} group of 4: served after its last, by one answer; 4 arrive", KIND.name()));
        Ok("4 pages by one answer, after the last request; all 4 writes arrive".into())
    }

    /// One page asked for again and again, also by two groups at once, gets one page of memory.
    fn duplicate(&mut self, device: &VirtualIommu, heap: &mut Heap) -> Result<String, String> {
        let mut groups = PageGroups::new(4, 8);
        let (before, iova) = (heap.len(), HEAP + 9 * PAGE);
        for (group, last) in [(21, false), (21, false), (22, true), (21, true)] {
            asks(device, page(KIND.pasid(), iova, group, last));
        }
        let (whole, _) = self.heard(&mut groups);
        for group in &whole {
            self.serve(group, heap)?;
            let again = self.driver.respond(group.id, PageAnswer::Success);
            if again != Err(RequestError::Refused(Status::NoEnt)) {
                return Err(format!("a second answer gives {again:?}"));
            }
        }
        let asked: Vec<_> = whole.iter().map(|group| group.pages.len()).collect();
        if asked != [1, 3] || heap.len() != before + 1 || self.answers() != [0, 0] {
            return Err(format!("groups of {asked:?} requests, {} pages", heap.len() - before));
        }
        self.write(AGENT, KIND.pasid(), iova)?;
        self.told.push(format!("{:<28} 4 requests for one page, 2 groups: one page, 2 answers", KIND.name()));
        Ok("4 requests of 2 groups for one page: mapped once, answered twice, a third answer is refused"
            .into())
    }

    /// A thousand groups whose last request does not come: device and driver keep a few, and forget none of these.
    fn flood(&mut self, device: &VirtualIommu, heap: &mut Heap) -> Result<String, String> {
        let (room, numbers) = (8, 100..1100);
        let mut groups = PageGroups::new(room, 4);
        let kept: Vec<u16> =
            numbers.filter(|group| asks(device, page(KIND.pasid(), HEAP, *group, false))).collect();
        self.heard(&mut groups);
        if kept.is_empty() || kept.len() >= 1000 || groups.waiting() != room.min(kept.len()) {
            return Err(format!("the device kept {}, the driver {}", kept.len(), groups.waiting()));
        }
        // Neither takes more; what is kept ends with its last request.
        for group in &kept {
            asks(device, page(KIND.pasid(), HEAP + PAGE, *group, true));
        }
        let (whole, _) = self.heard(&mut groups);
        for group in &whole {
            self.serve(group, heap)?;
        }
        let answered = self.answers().len();
        if (whole.len(), answered, groups.waiting()) != (kept.len(), kept.len(), 0) {
            return Err(format!("{} of {} groups answered", answered, kept.len()));
        }
        self.write(AGENT, KIND.pasid(), HEAP + PAGE)?;
        self.told.push(format!(
            "{:<28} flood of 1000 groups: device keeps {}, driver {room}; all answered",
            KIND.name(),
            kept.len()
        ));
        Ok(format!(
            "of 1000 groups the device kept {}, the driver {room}; each of them was answered",
            kept.len()
        ))
    }

    /// The context goes while the agent waits: the device tells the agent, and takes no answer any more.
    fn dead_context(&mut self, device: &VirtualIommu, _heap: &mut Heap) -> Result<String, String> {
        let pasid = Pasid::new(SHORT_LIVED).ok_or("no PASID")?;
        let context = self.contexts.add_mapped(pasid).map_err(text)?;
        let mut groups = PageGroups::new(4, 4);
        asks(device, page(Some(SHORT_LIVED), HEAP, 30, true));
        let (whole, _) = self.heard(&mut groups);
        let [group] = &whole[..] else { return Err(format!("{} groups instead of one", whole.len())) };
        context.remove().map_err(|(_, error)| text(error))?;
        let late = self.driver.respond(group.id, PageAnswer::Success);
        if late != Err(RequestError::Refused(Status::NoEnt)) || self.answers() != [1] {
            return Err(format!("the late answer gives {late:?}"));
        }
        self.told
            .push(format!("PASID {SHORT_LIVED:<22} context gone while the agent waits: told, and blocked"));
        let blocked = self.blocked(AGENT, Some(SHORT_LIVED), HEAP)?;
        Ok(format!("the agent is told that it is invalid, the driver's answer is refused; {blocked}"))
    }

    fn space(&mut self, kind: Kind) -> Result<&mut Space, String> {
        self.spaces.iter_mut().find(|space| space.kind == kind).ok_or_else(|| "no such context".into())
    }

    fn end_heap(&mut self, heap: Heap) -> Result<(), String> {
        for (iova, page) in heap {
            self.space(KIND)?.unmap(iova)?;
            self.guest.free(page.address, 1);
        }
        Ok(())
    }
}
