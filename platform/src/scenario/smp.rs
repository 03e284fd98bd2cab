//! Mapping from several CPUs at once, in one domain and in several, while `edu` floods the IOMMU with faults.
//!
//! Every CPU maps pages of its own, sees that the driver knows them by its own physical addresses, and unmaps them. The first
//! one has `edu` reach for what is not mapped beside that, again and again, and takes its faults in.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Mutex;
use virtio_iommu::{
    DeferredBounds, DmaDevice, Domain, DomainOptions, EndpointId, Iova, Options, PhysAddr, Prot, UnmapPolicy,
    Viommu,
};

use super::attack::PAGE;
use super::default::{close, text};
use super::setup::{self, Opened, find};
use super::{give_up, show};
use crate::boot::BootInfo;
use crate::cpus::Team;
use crate::devices::edu::{self, BUFFER_BYTES, Edu};
use crate::iommu::{Iommu, KernelPlatform};
use crate::machine::Machine;
use crate::memory::dma::DmaPages;
use crate::memory::frames;
use crate::pci::PciAddress;
use crate::pci::function::{BusMaster, Function};
use crate::report::Report;

/// The CPUs, and the most domains that they map in.
const CPUS: usize = 4;
/// That the IOMMU and the CPUs are there; each round; memory, faults, requests, and the end.
const CHECKS: usize = 2 + ROUNDS.len() + 4;

/// How often each CPU maps and unmaps in a round, and how much at once.
const TURNS: usize = 200;
const PAGES: usize = 4;
/// How long a round may take, on a slow machine with one CPU behind all of these.
const ROUND_TIMEOUT_NS: u64 = 60_000_000_000;
/// How many times `edu` reaches for what is not mapped in a round, at least.
const ATTACKS: u64 = 2;
/// What it reaches for. Nobody maps there.
const UNMAPPED: u64 = 0x7654_3000;

/// Who shares a domain, and how it unmaps.
struct Round {
    name: &'static str,
    domains: usize,
    policy: fn() -> UnmapPolicy,
}

const ROUNDS: [Round; 4] = [
    Round { name: "smp.one-domain.strict", domains: 1, policy: || UnmapPolicy::Strict },
    Round { name: "smp.several-domains.strict", domains: CPUS, policy: || UnmapPolicy::Strict },
    Round { name: "smp.one-domain.deferred", domains: 1, policy: deferred },
    Round { name: "smp.several-domains.deferred", domains: CPUS, policy: deferred },
];

fn deferred() -> UnmapPolicy {
    UnmapPolicy::Deferred(DeferredBounds::default())
}

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS);
    let (machine, iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    show::iommu(&machine, &iommu);
    show::live(&iommu, &mut report);
    let mut team = match Team::start(&machine.firmware, CPUS) {
        Ok(team) => team,
        Err(error) => give_up(report, "smp.cpus", error),
    };
    report.check("smp.cpus", true, format_args!("{} at work", team.count()));
    let (attacker, endpoint) = match open_attacker(&machine, &iommu) {
        Ok(opened) => opened,
        Err(error) => give_up(report, "smp.edu", error),
    };
    let others = others(&machine, &iommu, attacker.address);
    let before = frames::usage().live_runs;
    for round in &ROUNDS {
        let done = round.run(&iommu, &others, &attacker, &mut team);
        report.check_result(round.name, done, String::clone);
    }
    let ended = attacker.end();
    report.check_result("smp.faults", ended, String::clone);
    machine.pci.set_bus_master(attacker.address, BusMaster::Off);
    iommu.viommu.poll();
    let after = frames::usage().live_runs;
    report.check(
        "smp.memory",
        before == after,
        format_args!("{before} runs of frames before, {after} after"),
    );
    show::nothing_lost(&iommu, attacker.id, &mut report);
    report.check_result("smp.closed", close(&iommu, endpoint.endpoint), |()| "edu is detached");
    show::totals(&iommu, &mut report);
    report.end()
}

/// Functions that nobody drives, to have domains for.
fn others<'m>(machine: &'m Machine, iommu: &Iommu, edu: PciAddress) -> Vec<&'m Function> {
    let functions = machine.pci.functions().iter();
    let usable = functions.filter(|function| !function.is_bridge() && function.address != edu);
    usable.filter(|function| iommu.endpoint(function).is_some()).take(CPUS).collect()
}

impl Round {
    fn run(
        &self,
        iommu: &Iommu,
        others: &[&Function],
        attacker: &Arc<Attacker>,
        team: &mut Team,
    ) -> Result<String, String> {
        if others.len() < self.domains {
            return Err(format!(
                "{} functions are behind the IOMMU, {} are needed",
                others.len(),
                self.domains
            ));
        }
        let mut opened: Vec<Opened> = Vec::new();
        for function in &others[..self.domains] {
            let options = DomainOptions { unmap: (self.policy)(), ..DomainOptions::default() };
            opened.push(setup::open_in(iommu, function, 0, options).map_err(text)?);
        }
        let limit = opened.iter().map(|opened| opened.endpoint.limit()).min();
        let work = Arc::new(Mappers {
            domains: opened.iter().map(|opened| opened.domain.clone()).collect(),
            limit: limit.ok_or("no domain")?,
            mapped: AtomicU64::new(0),
            failure: Mutex::new(None),
            attacker: Arc::clone(attacker),
            attacks_at_first: attacker.attacks(),
        });
        let shared = Arc::clone(&work);
        let run = team.run(Arc::new(move |index| shared.work(index)), ROUND_TIMEOUT_NS);
        let mapped = work.mapped.load(Ordering::Relaxed);
        run.map_err(|error| format!("{error}, after {mapped} mappings"))?;
        if let Some(failure) = work.failure.lock().take() {
            return Err(failure);
        }
        for Opened { endpoint, .. } in opened {
            close(iommu, endpoint)?;
        }
        let expected = (CPUS * TURNS * PAGES) as u64;
        let told = format!(
            "{mapped} mappings by {CPUS} CPUs in {} domains, while edu attacked {} times",
            self.domains,
            attacker.attacks() - work.attacks_at_first
        );
        if mapped == expected { Ok(told) } else { Err(format!("{told}; {expected} were to be made")) }
    }
}

/// What the CPUs of a round share.
struct Mappers {
    domains: Vec<Domain<KernelPlatform>>,
    limit: Iova,
    mapped: AtomicU64,
    /// The first thing that went wrong.
    failure: Mutex<Option<String>>,
    attacker: Arc<Attacker>,
    attacks_at_first: u64,
}

impl Mappers {
    /// What each CPU does.
    fn work(&self, index: usize) {
        if let Err(error) = self.try_work(index) {
            self.failure.lock().get_or_insert(format!("CPU {index}: {error}"));
        }
    }

    fn try_work(&self, index: usize) -> Result<(), String> {
        let domain = &self.domains[index % self.domains.len()];
        let mut pages = Vec::new();
        for _ in 0..PAGES {
            pages.push(DmaPages::allocate(1).map_err(text)?);
        }
        let done = self.map_in_turns(index, domain, &pages).and_then(|()| domain.flush().map_err(text));
        if done.is_err() {
            // They may still be mapped: nobody gets them any more.
            pages.into_iter().for_each(|page| {
                page.into_raw();
            });
        }
        done
    }

    fn map_in_turns(
        &self,
        index: usize,
        domain: &Domain<KernelPlatform>,
        pages: &[DmaPages],
    ) -> Result<(), String> {
        for _ in 0..TURNS {
            self.turn(domain, pages)?;
            if index == 0 {
                self.attacker.step()?;
            }
        }
        // The others go on meanwhile; a device that is stuck ends the run by the host's deadline.
        while index == 0 && self.attacker.attacks() < self.attacks_at_first + ATTACKS {
            self.turn(domain, &[])?;
            self.attacker.step()?;
        }
        Ok(())
    }

    /// Maps each page, sees that its address is nobody else's, and unmaps them.
    fn turn(&self, domain: &Domain<KernelPlatform>, pages: &[DmaPages]) -> Result<(), String> {
        let mut mapped = Vec::with_capacity(pages.len());
        for page in pages {
            let phys = PhysAddr::new(page.phys());
            // SAFETY: `try_work` keeps the pages for good unless they were unmapped and flushed with success.
            let iova =
                unsafe { domain.map(phys, PAGE, Prot::READ | Prot::WRITE, self.limit) }.map_err(text)?;
            mapped.push((iova, phys));
        }
        for (iova, phys) in &mapped {
            match domain.translate(*iova) {
                Some(translation) if translation.phys == *phys => {}
                other => return Err(format!("{iova} should lead to {phys}, and is {other:?}")),
            }
        }
        for (iova, _) in &mapped {
            // SAFETY: our own mappings, made just now.
            unsafe { domain.unmap(*iova, PAGE) }.map_err(text)?;
        }
        self.mapped.fetch_add(mapped.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// `edu`, which reaches for what is not mapped.
struct Attacker {
    id: EndpointId,
    address: PciAddress,
    viommu: Viommu<KernelPlatform>,
    edu: Mutex<Edu>,
    attacks: AtomicU64,
    faults: AtomicU64,
}

fn open_attacker(machine: &Machine, iommu: &Iommu) -> Result<(Arc<Attacker>, Opened), String> {
    let function = find(machine, edu::VENDOR, edu::DEVICE, "edu device")?;
    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let edu = Edu::new(machine.map_bar(function, 0).map_err(text)?).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    let attacker = Attacker {
        id: opened.id,
        address: function.address,
        viommu: iommu.viommu.clone(),
        edu: Mutex::new(edu),
        attacks: AtomicU64::new(0),
        faults: AtomicU64::new(0),
    };
    Ok((Arc::new(attacker), opened))
}

impl Attacker {
    /// How many attacks were begun.
    fn attacks(&self) -> u64 {
        self.attacks.load(Ordering::Relaxed)
    }

    /// Begins the next attack once the last one is over, and takes faults in.
    fn step(&self) -> Result<(), String> {
        let mut edu = self.edu.lock();
        if edu.is_idle() {
            // Each four bytes make a record.
            edu.start_copy_out(0, UNMAPPED, BUFFER_BYTES).map_err(text)?;
            self.attacks.fetch_add(1, Ordering::Relaxed);
        }
        drop(edu);
        self.take_faults()
    }

    fn take_faults(&self) -> Result<(), String> {
        self.viommu.poll();
        while let Some(fault) = self.viommu.next_fault() {
            let at = fault.address.map_or(0, Iova::get);
            if fault.endpoint != self.id || !(UNMAPPED..UNMAPPED + PAGE).contains(&at) {
                return Err(format!("a fault of somebody else: {fault}"));
            }
            self.faults.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Waits for the last attack, and says what came of all.
    fn end(&self) -> Result<String, String> {
        self.edu.lock().wait().map_err(text)?;
        self.take_faults()?;
        let (attacks, faults) = (self.attacks(), self.faults.load(Ordering::Relaxed));
        let limited = self.viommu.stats().faults.limited;
        match faults {
            0 => Err(format!("{attacks} attacks, and no fault").to_string()),
            _ => Ok(format!("{attacks} attacks, {faults} faults delivered and {limited} beyond the limit")),
        }
    }
}
