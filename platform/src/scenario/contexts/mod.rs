//! Contexts by PASID: a guest's driver and an agent that does DMA, on a device of the draft that is software.
//!
//! No VMM offers the draft, so that the device is the model, and the agent one of its endpoints. Its accesses are real ones:
//! the model walks tables that the driver wrote into the guest's memory, keeps what it found in an IOTLB, and copies bytes
//! of that memory. Each format of tables has a context, whatever the CPU is: no CPU walks them.
//!
//! With `device=bus` the model is not in this kernel but in a process beside the VMM, which has it on PCI as a
//! vhost-user device. The driver meets it there as any other, and the same is checked.
//!
//! ```text
//!   agent --- domain --+-- no PASID   the default context, MAP and UNMAP
//!                      +-- PASID 1    a table of the guest's, x86-64
//!                      +-- PASID 2    a table of the guest's, Sv39
//!                      +-- PASID 3    a table of the guest's, VMSAv8-64
//!                      '-- PASID 4    MAP and UNMAP with a PASID
//!   other agent --- domain --- table of context descriptors: linear, or in two levels
//! ```

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use virtio_iommu::contexts::{Contexts, ContextsOptions};
use virtio_iommu::{EndpointId, FaultLimit, Features, Iova, IovaRange, Options, Stats, Viommu};

use super::default::text;
use super::{give_up, setup, show};
use crate::boot::BootInfo;
use crate::guest::Guest;
use crate::machine::Machine;
use crate::println;
use crate::report::Report;

mod access;
mod agents;
mod descriptors;
mod groups;
mod pages;
mod picture;
mod place;
mod space;

use agents::Agents;
use place::Place;
use space::{Kind, Space};

/// The agent, and another one in a domain of its own.
const AGENT: EndpointId = EndpointId::new(8);
const OTHER_AGENT: EndpointId = EndpointId::new(9);
const AGENTS: [EndpointId; 2] = [AGENT, OTHER_AGENT];

const PAGE: u64 = 4096;
/// Where the guest finds its memory, and how much it is.
const GUEST_BASE: u64 = 0x4000_0000;
const GUEST_PAGES: usize = 512;
/// What every context maps, each to a page of its own.
const SHARED: u64 = 0x40_0000;
/// What every context maps for reads.
const READ_ONLY: u64 = 0x60_0000;
/// The first of the pages that one context each maps.
const OWN: u64 = 0x80_0000;
/// A PASID without a context.
const NO_CONTEXT: u32 = 9;

/// Checks of each context.
const CHECKS_EACH: usize = 4;
/// The machine's IOMMU, and the rest.
const CHECKS: usize = 1 + CHECKS_OF_GUEST;
/// That all is up; contexts; an absent one; stale tables; page requests; another domain; descriptors; a reset; the end.
const CHECKS_OF_GUEST: usize = 2
    + CHECKS_EACH * Kind::ALL.len()
    + 1
    + Kind::OWNED.len()
    + pages::CHECKS
    + groups::CHECKS
    + 1
    + descriptors::CHECKS
    + 1
    + 2;

/// The guest, its IOMMU, and the contexts of the agent's domain.
struct World {
    guest: Guest,
    agents: Agents,
    driver: Viommu<Guest>,
    contexts: Contexts<Guest>,
    spaces: Vec<Space>,
    /// Pages of the guest's that were taken before the first context was added.
    taken_before: usize,
    /// What came of stale tables and of page requests, for the picture.
    told: Vec<String>,
}

pub(super) fn run(info: &BootInfo) -> ! {
    match info.command_line.get("device") {
        None => beside_the_machine(info, Report::start(CHECKS)),
        // Agents on a bus ask for one page at a time.
        Some("bus") => on_bus(info, Report::start(CHECKS - groups::CHECKS)),
        Some(other) => {
            give_up(Report::start(CHECKS), "device", format_args!("device={other}; there is: device=bus"))
        }
    }
}

/// The device is in this kernel, and the machine's own IOMMU keeps the machine's devices from its guest's memory, as
/// from all other.
fn beside_the_machine(info: &BootInfo, mut report: Report) -> ! {
    let (machine, iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    show::iommu(&machine, &iommu);
    show::live(&iommu, &mut report);
    if let Err((name, error)) =
        Place::in_software().map_err(draft).and_then(|place| try_all(place, &mut report))
    {
        give_up(report, name, error);
    }
    show::totals(&iommu, &mut report);
    report.end()
}

/// The device is the machine's, which says nothing of what is behind it: the agents are no functions of PCI.
fn on_bus(info: &BootInfo, mut report: Report) -> ! {
    let machine = match Machine::discover(info) {
        Ok(machine) => machine,
        Err(error) => give_up(report, "device", error),
    };
    let (place, address) = match Place::on_bus(&machine) {
        Ok(found) => found,
        Err(error) => give_up(report, "device", error),
    };
    report.check("device", true, format_args!("a virtio-iommu at {address}, with agents behind it"));
    match try_all(place, &mut report) {
        Ok(stats) => show::totals_of_stats(&[stats], &mut report),
        Err((name, error)) => give_up(report, name, error),
    }
    report.end()
}

/// What becomes of an error before the first check of the draft.
fn draft(error: String) -> (&'static str, String) {
    ("draft", error)
}

/// All but the machine. Makes [`CHECKS_OF_GUEST`] checks, on a bus without those of groups, and gives what the driver asked of the device, or says which
/// of them cannot be made.
fn try_all(place: Place, report: &mut Report) -> Result<Stats, (&'static str, String)> {
    let mut world = World::new(place, report).map_err(draft)?;
    picture::contexts(&world);
    println!();
    println!("an agent reaches for memory through each context:");
    picture::matrix(&world);
    world.try_each(report);
    pages::run(&mut world, report);
    match world.agents.software().cloned() {
        Some(device) => groups::run(&mut world, device, report),
        None => world.told.push("agents on a bus ask for one page at a time: no groups of several".into()),
    }
    let blocked = world.anonymous_blocked();
    report.check_result("anonymous.none", blocked, ToString::to_string);
    picture::told(&world);
    descriptors::run(&mut world, report).map_err(|error| ("descriptors", error))?;
    let reset = world.after_reset();
    report.check_result("contexts.reset", reset, ToString::to_string);
    let lost = world.nothing_lost();
    let driver = world.driver.clone();
    let removed = world.remove();
    report.check_result("contexts.removed", removed, ToString::to_string);
    report.check_result("nothing-lost", lost, ToString::to_string);
    Ok(driver.stats())
}

impl World {
    /// Makes the guest, starts its driver, and adds the contexts. Makes two checks.
    fn new(place: Place, report: &mut Report) -> Result<Self, String> {
        let Place { transport, guest, agents } = place;
        // Room for what a flood of page requests leaves.
        let fault_limit = FaultLimit { records: 4096, ..FaultLimit::default() };
        let options = Options { accept_contexts: true, fault_limit, ..Options::default() };
        let staged = Viommu::start(transport, guest.clone(), options).map_err(text)?;
        for agent in AGENTS {
            staged.introduce(agent).map_err(text)?;
        }
        let driver = staged.go_live().map_err(text)?;
        let support = driver.context_support(AGENT).map_err(text)?;
        report.check(
            "draft",
            driver.features().contains(Features::CONTEXTS) && support.vtd && support.arm && support.riscv,
            format_args!("negotiated; {support:?}"),
        );
        let options = ContextsOptions { anonymous: None, ..ContextsOptions::default() };
        let contexts = driver.create_contexts(options).map_err(text)?;
        driver.attach(AGENT, contexts.domain()).map_err(text)?;
        let taken_before = guest.pages_taken();
        let mut spaces = Vec::new();
        for (at, kind) in Kind::ALL.into_iter().enumerate() {
            let mut space = Space::add(kind, &contexts, &driver, &guest)?;
            space.map_all(at)?;
            spaces.push(space);
        }
        report.check(
            "contexts",
            spaces.len() == Kind::ALL.len(),
            format_args!("{} of {:?}, each with the address {SHARED:#x}", spaces.len(), contexts.domain()),
        );
        Ok(Self { guest, agents, driver, contexts, spaces, taken_before, told: Vec::new() })
    }

    /// What each context lets through, and what it keeps away.
    fn try_each(&mut self, report: &mut Report) {
        for at in 0..self.spaces.len() {
            let name = self.spaces[at].kind.word();
            let done = self.own_memory(at);
            report.check_result(&format!("{name}.mapped"), done, ToString::to_string);
            let done = self.only_its_own(at);
            report.check_result(&format!("{name}.others"), done, ToString::to_string);
            let done = self.read_only(at);
            report.check_result(&format!("{name}.read-only"), done, ToString::to_string);
            if self.spaces[at].kind.is_owned() {
                let done = self.stale(at);
                report.check_result(&format!("{name}.stale"), done, ToString::to_string);
            }
        }
        for at in 0..self.spaces.len() {
            let done = self.unmapped(at);
            report.check_result(
                &format!("{}.unmapped", self.spaces[at].kind.word()),
                done,
                ToString::to_string,
            );
        }
        let blocked = self.blocked(AGENT, Some(NO_CONTEXT), SHARED);
        report.check_result("no-context", blocked, ToString::to_string);
    }

    /// The address that all contexts have leads to this one's page, and no other changes.
    fn own_memory(&self, at: usize) -> Result<String, String> {
        self.spaces.iter().for_each(|space| space.page.fill(access::SECRET));
        let Space { kind, page, .. } = &self.spaces[at];
        self.write(AGENT, kind.pasid(), SHARED)?;
        self.read(AGENT, kind.pasid(), SHARED)?;
        for (other, space) in self.spaces.iter().enumerate() {
            let expected = if other == at { page.holds(access::SENT) } else { space.page.is_whole() };
            if !expected {
                return Err(format!(
                    "{}: the page of {} is not as it should be",
                    kind.name(),
                    space.kind.name()
                ));
            }
        }
        self.no_fault()?;
        Ok(format!("{SHARED:#x} arrives at {:#x}, its own page", page.address))
    }

    /// Each other context has a page here that this one has not.
    fn only_its_own(&self, at: usize) -> Result<String, String> {
        let pasid = self.spaces[at].kind.pasid();
        let mut blocked = 0;
        for (other, space) in self.spaces.iter().enumerate().filter(|(other, _)| *other != at) {
            let iova = OWN + other as u64 * PAGE;
            // The control is by the context that has it.
            self.write(AGENT, space.kind.pasid(), iova)?;
            space.own.fill(access::SECRET);
            self.blocked(AGENT, pasid, iova)?;
            if !space.own.is_whole() {
                return Err(format!("the page of {} changed", space.kind.name()));
            }
            blocked += 1;
        }
        Ok(format!("{blocked} pages that other contexts have, blocked and reported with its PASID"))
    }

    fn read_only(&self, at: usize) -> Result<String, String> {
        let Space { kind, page, .. } = &self.spaces[at];
        page.put(access::SENT);
        self.read(AGENT, kind.pasid(), READ_ONLY)?;
        page.fill(access::SECRET);
        let blocked = self.blocked(AGENT, kind.pasid(), READ_ONLY)?;
        if page.is_whole() { Ok(format!("reads; {blocked}")) } else { Err("memory changed".into()) }
    }

    /// A page is out of the table, and the device is not told: the agent still reaches it. Then it is told.
    fn stale(&mut self, at: usize) -> Result<String, String> {
        let kind = self.spaces[at].kind;
        self.write(AGENT, kind.pasid(), SHARED)?;
        let range = page_range(SHARED)?;
        self.spaces[at].owned()?.unmap_later(range).map_err(text)?;
        self.spaces[at].page.fill(access::SECRET);
        self.write(AGENT, kind.pasid(), SHARED).map_err(|error| format!("it should be stale: {error}"))?;
        if !self.spaces[at].page.holds(access::SENT) {
            return Err("stale, and yet nothing arrived".into());
        }
        self.spaces[at].owned()?.invalidate().map_err(text)?;
        self.spaces[at].page.fill(access::SECRET);
        let blocked = self.blocked(AGENT, kind.pasid(), SHARED)?;
        if !self.spaces[at].page.is_whole() {
            return Err("memory changed after INVALIDATE".into());
        }
        self.told.push(format!("{:<28} table changed: still arrives; INVALIDATE: blocked", kind.name()));
        self.spaces[at].map_shared()?;
        self.write(AGENT, kind.pasid(), SHARED)?;
        Ok(format!("without INVALIDATE it arrives; with it, {blocked}"))
    }

    /// What one context unmaps the others keep.
    fn unmapped(&mut self, at: usize) -> Result<String, String> {
        let kind = self.spaces[at].kind;
        self.write(AGENT, kind.pasid(), SHARED)?;
        self.spaces[at].unmap(SHARED)?;
        self.spaces[at].page.fill(access::SECRET);
        let blocked = self.blocked(AGENT, kind.pasid(), SHARED)?;
        if !self.spaces[at].page.is_whole() {
            return Err("memory changed".into());
        }
        for other in self.spaces.iter().filter(|other| other.kind != kind) {
            self.write(AGENT, other.kind.pasid(), SHARED)?;
        }
        self.spaces[at].map_shared()?;
        Ok(format!("{blocked}; the others reach theirs"))
    }

    /// A domain without a default context: what has no PASID is blocked, and what has one is not.
    fn anonymous_blocked(&mut self) -> Result<String, String> {
        let contexts = self.driver.create_contexts(ContextsOptions::default()).map_err(text)?;
        self.driver.attach(OTHER_AGENT, contexts.domain()).map_err(text)?;
        let kind = Kind::Mapped;
        let mut space = Space::add(kind, &contexts, &self.driver, &self.guest)?;
        space.map(SHARED, space.page.address, space::READ_WRITE)?;
        self.write(OTHER_AGENT, kind.pasid(), SHARED)?;
        space.page.fill(access::SECRET);
        let blocked = self.blocked(OTHER_AGENT, None, SHARED)?;
        self.blocked(OTHER_AGENT, None, space.page.address)?;
        if !space.page.is_whole() {
            return Err("memory changed".into());
        }
        self.told.push(format!("{:<28} domain without a default context: blocked", "no PASID"));
        space.remove()?;
        self.driver.detach(OTHER_AGENT).map_err(text)?;
        Ok(format!("{} arrives; without one, {blocked}", kind.name()))
    }

    /// Has the device fail, where it can be told to, and brings it back by a reset.
    fn reset(&self) -> Result<(), String> {
        if let Some(device) = self.agents.software() {
            device.with(|device, _| device.fail());
        }
        // SAFETY: the agents do DMA only when this scenario says so.
        let recovered = unsafe { self.driver.recover() }.map_err(text)?;
        match recovered.lost.first() {
            None => Ok(()),
            Some((agent, error)) => Err(format!("agent {agent} did not come back: {error}")),
        }
    }

    /// The device forgets all contexts, and is told of each again: every access ends as before.
    fn after_reset(&self) -> Result<String, String> {
        let before = picture::all_tried(self);
        self.reset()?;
        if picture::all_tried(self) != before {
            return Err("a context is not what it was".into());
        }
        for (at, space) in self.spaces.iter().enumerate() {
            self.own_memory(at).map_err(|error| format!("{}: {error}", space.kind.name()))?;
        }
        Ok(format!("the device was reset, and told again; {} accesses end as before", before.len()))
    }

    /// Removes the contexts. The tables' pages are free again.
    fn remove(mut self) -> Result<String, String> {
        for space in core::mem::take(&mut self.spaces) {
            let kind = space.kind;
            self.write(AGENT, kind.pasid(), SHARED)?;
            space.remove()?;
            self.blocked(AGENT, kind.pasid(), SHARED)?;
        }
        self.driver.detach(AGENT).map_err(text)?;
        match self.guest.pages_taken() {
            taken if taken == self.taken_before => Ok("out of reach, and their memory is back".into()),
            taken => Err(format!("{taken} pages are taken, and {} were before", self.taken_before)),
        }
    }

    fn nothing_lost(&self) -> Result<String, String> {
        let stats = self.driver.stats();
        let broken = self.agents.violations();
        let unclear = stats.abandoned_requests + stats.stray_answers + stats.quarantined_mappings as u64;
        let detail = format!(
            "{} requests by {} kicks, {unclear} unclear, {} faults delivered, {} lost, {broken} rules broken",
            stats.requests,
            stats.kicks,
            stats.faults.delivered,
            stats.faults.dropped + stats.faults.limited + stats.faults.malformed
        );
        if unclear == 0 && broken == 0 { Ok(detail) } else { Err(detail) }
    }
}

fn page_range(start: u64) -> Result<IovaRange, String> {
    IovaRange::from_len(Iova::new(start), PAGE).ok_or_else(|| "no range".into())
}

#[cfg(test)]
mod tests;
