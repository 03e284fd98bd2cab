//! Devices at work, each in a domain of its own: a step at a time, so that one loop can serve many.
//!
//! A worker is opened with its device, does rounds of work that it checks by itself, and is closed again, after which
//! nothing of it is left. One device more is a module here, and a line in [`DEVICES`].

pub(super) mod disk;
pub(super) mod domains;
mod edu;
mod entropy;
pub(super) mod net;
pub(super) mod nvme;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use core::cell::OnceCell;
use core::fmt;

use virtio_iommu::{DomainOptions, Endpoint, Translation};

use super::default::text;
use super::setup::{self, Opened};
use super::show::Worker;
use super::word;
use crate::boot::BootInfo;
use crate::iommu::{Iommu, KernelPlatform};
use crate::machine::Machine;
use crate::pci::function::Function;
use crate::time::{self, Deadline};

/// How a worker is opened.
pub(super) type Open = for<'b> fn(&'b Bench<'_>) -> Result<Box<dyn Work + 'b>, String>;

/// Every device: the name of its check, how it is opened, and how many rounds show that it works.
pub(super) const DEVICES: [(&str, Open, u64); 5] = [
    ("disk", disk::open, 4),
    ("net", net::open, 1),
    ("entropy", entropy::open, 256),
    ("edu", edu::open, 2),
    ("nvme", nvme::open, 4),
];

/// Mappings that are named where a closed device left some.
const NAMED: usize = 8;

/// How long the rounds of one device may take.
const TIMEOUT_NS: u64 = 40_000_000_000;

/// What workers are made on.
pub(super) struct Bench<'m> {
    pub machine: &'m Machine,
    pub iommu: &'m Iommu,
    pub info: &'m BootInfo,
    /// What everything random is made from.
    pub seed: u64,
    /// What domains are made with.
    domains: DomainOptions,
    /// The endpoint of the NVMe disk, whose driver borrows it.
    nvme: OnceCell<Endpoint<KernelPlatform>>,
}

impl<'m> Bench<'m> {
    /// Takes the seed and the domains' policy from the command line.
    pub(super) fn new(machine: &'m Machine, iommu: &'m Iommu, info: &'m BootInfo) -> Result<Self, String> {
        let seed = info.command_line.number("seed").map_err(text)?;
        let seed = seed.ok_or_else(|| word(info, "seed").err().unwrap_or_default())?;
        Ok(Self { machine, iommu, info, seed, domains: setup::domain_options(info)?, nvme: OnceCell::new() })
    }

    /// The first function with these numbers, which `name` names for people.
    fn find(&self, vendor: u16, device: u16, name: &str) -> Result<&'m Function, String> {
        setup::find(self.machine, vendor, device, name)
    }

    /// Opens a function in a new domain, whose mappings go by the name `tag`. Its bus mastering stays off.
    pub(super) fn open(
        &self,
        function: &Function,
        bounce_bytes: usize,
        tag: &'static str,
    ) -> Result<Opened, String> {
        let opened = setup::open_in(self.iommu, function, bounce_bytes, self.domains).map_err(text)?;
        Ok(Opened { endpoint: opened.endpoint.tagged(tag), ..opened })
    }
}

/// What a worker did so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Done {
    /// Rounds that were finished, with everything checked.
    pub rounds: u64,
    /// Bytes that the device read, of data.
    pub to_device: u64,
    /// Bytes that it wrote.
    pub from_device: u64,
}

/// A worker.
pub(super) trait Work {
    /// Who it is.
    fn worker(&self) -> &Worker;

    /// What it did so far.
    fn done(&self) -> Done;

    /// What it saw, for people.
    fn detail(&self) -> String;

    /// Goes on by a little. Waits for nothing that takes longer than a request of a disk.
    ///
    /// # Errors
    ///
    /// What went wrong, or that the device does not go on. The worker cannot be used any more.
    fn step(&mut self) -> Result<(), String>;

    /// Ends the device, and gives back everything that was taken for it.
    ///
    /// # Errors
    ///
    /// What is left.
    fn close(self: Box<Self>, bench: &Bench<'_>) -> Result<(), String>;
}

/// What became of a worker: a row of the table.
pub(super) struct Row {
    pub worker: Worker,
    pub done: Done,
    pub detail: String,
    pub spent_ns: u64,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { worker, done: Done { rounds, to_device, from_device }, detail, .. } = self;
        write!(f, "{detail}; {:?}, rounds {rounds}, bytes out {to_device}, in {from_device}", worker.domain)
    }
}

/// Steps until `rounds` more rounds are done, and says how long that took.
pub(super) fn go_on(work: &mut (dyn Work + '_), rounds: u64) -> Result<u64, String> {
    let start_ns = time::now_ns();
    let wanted = work.done().rounds + rounds;
    let mut deadline = Deadline::after_ns(TIMEOUT_NS);
    while work.done().rounds < wanted {
        if deadline.expired() {
            return Err(format!("no end of its work after {} s", TIMEOUT_NS / 1_000_000_000));
        }
        work.step()?;
    }
    Ok(time::now_ns().zip(start_ns).map_or(0, |(now, start)| now - start))
}

/// Closes a worker and looks whether its domain is empty.
pub(super) fn close(work: Box<dyn Work + '_>, bench: &Bench<'_>, spent_ns: u64) -> Result<Row, String> {
    let (worker, done, detail) = (work.worker().clone(), work.done(), work.detail());
    work.close(bench)?;
    match worker.domain.mapping_count() {
        0 => Ok(Row { worker, done, detail, spent_ns }),
        left => {
            let named = worker.domain.mappings().take(NAMED);
            let named: String = named.map(|mapping| describe(&mapping)).collect();
            Err(format!("closed, and {left} mappings are left in its domain:{named}"))
        }
    }
}

fn describe(mapping: &Translation) -> String {
    let Translation { range, phys, status, tag, .. } = mapping;
    format!(" [`{tag}` {range} to {phys}, {status:?}]")
}

/// Opens a device, lets it do its rounds, and closes it.
pub(super) fn run(bench: &Bench<'_>, open: Open, rounds: u64) -> Result<Row, String> {
    let mut work = open(bench)?;
    let spent_ns = go_on(&mut *work, rounds)?;
    close(work, bench, spent_ns)
}
