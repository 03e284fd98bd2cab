//! Boots one scenario on one machine and says what came of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::console;
use crate::device_tree;
use crate::disk::Disk;
use crate::firmware::{Listener, Speaker};
use crate::hot_plug::{self, HotPlug};
use crate::machine::{Gdb, Iommu, Machine};
use crate::process::{Ended, Process};
use crate::protocol::{Reason, Verdict};
use crate::qemu::Qemu;
use crate::server::{self, Peer, Server, Transfer};
use crate::trace::Counts;
use crate::vhost_user::IommuServer;
use crate::witness;

/// How long a boot may take, unless said otherwise.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// The scenario of a run that names none.
pub const DEFAULT_SCENARIO: &str = "default";
/// The scenarios that a kernel has only when it is built with its feature `contexts`.
pub const NEEDS_CONTEXTS: [&str; 3] = ["contexts", "nesting", "bench-contexts"];
/// The scenarios that leave on the disk what must be there.
const WRITES_DISK: [&str; 6] = [DEFAULT_SCENARIO, "devices", "bridge", "soak", "block", "block-direct"];
/// The scenarios that have an NVMe disk, and leave there what must be.
const WRITES_NVME: [&str; 4] = [DEFAULT_SCENARIO, "nvme", "devices", "soak"];
/// The scenario that has one, and leaves it as it is.
const STARTS_NVME: &str = "messages";
/// What makes the seed of the NVMe disk's image from that of the machine: the letters of NVME.
const NVME_SEED: u64 = 0x4e56_4d45;
/// The scenario that lasts as long as it is told to, the word that tells it, and how long it lasts without.
const SOAK: (&str, &str, u64) = ("soak", "soak.seconds=", 60);
/// The seed that is used unless another is asked for.
pub const DEFAULT_SEED: u64 = 0x5eed;

/// The kernel refuses more seconds.
const SOAK_MAX: u64 = 600;

/// Whether the machine has a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskDevice {
    /// With an image made from the seed.
    Present,
    /// The machine has none.
    Absent,
}

/// Whether QEMU's trace is written and held against what the guest claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Witness {
    /// It is.
    Trace,
    /// The guest's word is all there is: writing a trace takes longer than a long measurement.
    None,
}

/// A boot to be done.
#[derive(Clone, Debug)]
pub struct Boot {
    /// The machine. Its `disk`, `nvme`, `cmdline`, `device_tree`, `monitor`, `vhost_user` and, where there is none,
    /// `trace` are filled in here.
    pub machine: Machine,
    /// The program that serves the IOMMU, where that is [`Iommu::VhostUser`]: it is given the path of a socket.
    pub iommu_server: Option<PathBuf>,
    /// The scenario's name.
    pub scenario: String,
    /// What the disk and everything random in the guest are made from.
    pub seed: u64,
    /// Whether there is a disk.
    pub disk: DiskDevice,
    /// Whether there is an NVMe disk.
    pub nvme: DiskDevice,
    /// Whether there is a server for the guest.
    pub peer: Peer,
    /// Whether QEMU's trace is written and looked at.
    pub witness: Witness,
    /// More words for the kernel's command line.
    pub words: String,
    /// A directory for the images and the trace; it is made if it is not there.
    pub directory: PathBuf,
    /// When QEMU is killed; never if none. What a soak lasts is added.
    pub deadline: Option<Duration>,
}

/// What came of a boot.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Each line that the guest printed.
    pub lines: Vec<String>,
    /// Each line that its firmware printed before.
    pub firmware: Vec<String>,
    /// What the guest claims, and whether that is complete.
    pub verdict: Verdict,
    /// How QEMU ended.
    pub ended: Ended,
    /// What QEMU saw, if that was looked at.
    pub seen: Option<Counts>,
    /// What speaks against the guest's PASS: QEMU's trace and the disk image.
    pub objections: Vec<String>,
    /// What QEMU itself had to say.
    pub stderr: String,
    /// Time from the start of QEMU to its end.
    pub wall: Duration,
}

impl Boot {
    /// The scenario on the machine, with the default seed, the disks that it needs, and the default deadline.
    #[must_use]
    pub fn new(machine: Machine, scenario: &str, directory: &Path) -> Self {
        let has_nvme = WRITES_NVME.contains(&scenario) || scenario == STARTS_NVME;
        Self {
            machine,
            iommu_server: None,
            scenario: scenario.to_owned(),
            seed: DEFAULT_SEED,
            disk: DiskDevice::Present,
            nvme: if has_nvme { DiskDevice::Present } else { DiskDevice::Absent },
            peer: Peer::Listening,
            witness: Witness::Trace,
            words: String::new(),
            directory: directory.to_owned(),
            deadline: Some(DEADLINE),
        }
    }

    /// Boots, hands each line of the guest to `observer` as it comes, and judges.
    ///
    /// # Errors
    ///
    /// When the boot could not be tried: a file that cannot be written, a QEMU that cannot be started. A guest that fails
    /// is not an error but an outcome.
    pub fn run(mut self, qemu: &Qemu, observer: &mut dyn FnMut(&str)) -> Result<Outcome> {
        fs::create_dir_all(&self.directory)
            .with_context(|| format!("cannot make {}", self.directory.display()))?;
        let disk = Disk::create(&self.directory.join("disk.img"), self.seed)?;
        let nvme = Disk::create(&self.directory.join("nvme.img"), self.seed ^ NVME_SEED)?;
        let trace = self.machine.trace.take().unwrap_or_else(|| self.directory.join("trace.log"));
        // An old trace must not speak for a QEMU that wrote none.
        if trace.exists() {
            fs::remove_file(&trace).with_context(|| format!("cannot replace {}", trace.display()))?;
        }
        self.machine.trace = (self.witness == Witness::Trace).then(|| trace.clone());
        self.machine.disk = (self.disk == DiskDevice::Present).then(|| disk.path.clone());
        self.machine.nvme = (self.nvme == DiskDevice::Present).then(|| nvme.path.clone());
        let console = self.directory.join("console.txt");
        // QEMU begins it anew; where it does not even start, nothing came out.
        fs::write(&console, "").with_context(|| format!("cannot write {}", console.display()))?;
        self.machine.console = Some(console.clone());
        let deadline = self.deadline.filter(|_| self.machine.gdb == Gdb::Off);
        let deadline = deadline.map(|deadline| deadline + self.soak_time());
        let server = Server::start(self.seed, self.peer, deadline)?;
        self.machine.cmdline = self.cmdline(&disk, &nvme, &server);
        if !self.machine.iommu.claims(self.machine.arch).is_empty() {
            self.machine.device_tree = Some(device_tree::describe(qemu, &self.machine, &self.directory)?);
        }

        let mut hot_plug = (self.scenario == hot_plug::SCENARIO).then(HotPlug::new);
        self.machine.monitor = hot_plug.as_ref().map(|hot_plug| hot_plug.path().to_owned());

        let iommu_server = self.serve_iommu(deadline)?;
        self.machine.vhost_user = iommu_server.as_ref().map(|server| server.socket().to_owned());

        let mut command = Command::new(&qemu.path);
        command.args(self.machine.arguments());
        let mut process = Process::start(&mut command)?;
        let (mut lines, mut firmware) = (Vec::new(), Vec::new());
        let mut listener = Listener::default();
        let mut objections = Vec::new();
        let ended = process.follow(deadline, &mut |line| match listener.line(line) {
            Speaker::Firmware => firmware.push(line.to_owned()),
            Speaker::Guest => {
                observer(line);
                lines.push(line.to_owned());
                if let Some(Err(error)) = hot_plug.as_mut().map(|hot_plug| hot_plug.answer(line)) {
                    objections.push(format!("{error:#}"));
                }
            }
        });
        let wall = process.elapsed();
        let stderr = process.into_stderr();

        let verdict = Verdict::read(lines.iter().map(String::as_str), self.machine.arch, ended);
        let mut outcome = Outcome { lines, firmware, verdict, ended, seen: None, objections, stderr, wall };
        let transfers = server.stop();
        if let Some(server) = iommu_server {
            let claimed = outcome.verdict.passed().then_some(outcome.verdict.values.as_slice());
            outcome.objections.extend(server.objections(claimed));
        }
        if outcome.verdict.passed() {
            self.cross_examine(&disk, &nvme, &trace, &transfers, &mut outcome);
            if let Err(error) = console::verify(&console, self.seed, &outcome.verdict.values) {
                outcome.objections.push(format!("{error:#}"));
            }
        }
        Ok(outcome)
    }

    /// Starts what serves the IOMMU, where the machine's is served.
    fn serve_iommu(&self, deadline: Option<Duration>) -> Result<Option<IommuServer>> {
        if self.machine.iommu != Iommu::VhostUser {
            return Ok(None);
        }
        let program = self.iommu_server.as_ref().context("nothing serves the IOMMU")?;
        IommuServer::start(program, deadline).map(Some)
    }

    /// How long the guest is asked to go on for.
    fn soak_time(&self) -> Duration {
        let (scenario, word, default) = SOAK;
        let told = self.words.split_whitespace().rev().find_map(|given| given.strip_prefix(word));
        // What is no number the guest refuses by itself.
        let seconds = told.map_or(default, |seconds| seconds.parse().unwrap_or(0));
        Duration::from_secs(if self.scenario == scenario { seconds.min(SOAK_MAX) } else { 0 })
    }

    fn cmdline(&self, disk: &Disk, nvme: &Disk, server: &Server) -> String {
        let mut line = format!(
            "scenario={} seed={:#x} disk.sha256={} net.port={} net.sha256={}",
            self.scenario, self.seed, disk.sha256, server.port, server.sha256
        );
        if self.nvme == DiskDevice::Present {
            line.push_str(&format!(" nvme.sha256={}", nvme.sha256));
        }
        let told = self.machine.iommu.words(self.machine.arch);
        for words in [told, &self.words].into_iter().filter(|words| !words.is_empty()) {
            line.push(' ');
            line.push_str(words);
        }
        line
    }

    /// Holds a PASS against what QEMU saw, against what came over the network, and against the disks.
    fn cross_examine(
        &self,
        disk: &Disk,
        nvme: &Disk,
        trace: &Path,
        transfers: &[Transfer],
        outcome: &mut Outcome,
    ) {
        if self.machine.iommu.count() > 0 && self.witness == Witness::Trace {
            match Counts::read(trace, self.machine.iommu.count()) {
                Ok(seen) => {
                    outcome.objections.extend(witness::differences(&outcome.verdict.values, &seen));
                    outcome.seen = Some(seen);
                }
                Err(error) => outcome.objections.push(format!("{error:#}")),
            }
        }
        outcome.objections.extend(server::differences(&outcome.verdict.values, transfers));
        let disks = [(disk, self.disk, &WRITES_DISK[..]), (nvme, self.nvme, &WRITES_NVME[..])];
        for (disk, device, written_by) in disks {
            if device == DiskDevice::Present
                && written_by.contains(&self.scenario.as_str())
                && let Err(error) = disk.verify()
            {
                outcome.objections.push(format!("{error:#}"));
            }
        }
    }
}

impl Outcome {
    /// Whether the guest passed, and nothing speaks against it.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.verdict.passed() && self.objections.is_empty()
    }

    /// All that is wrong, one sentence each, the most telling first.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        // Where QEMU refused to run, its own words say more than the guest's silence.
        let refusal = self.stderr.lines().map(str::trim).find(|line| !line.is_empty());
        if let (Some(words), true) = (refusal, self.lines.is_empty() && self.ended == Ended::Exit(1)) {
            return vec![format!("QEMU did not start the guest: {words}")];
        }
        // After a panic it is plain that the protocol is not complete.
        if let Some(panic @ Reason::Panicked(_)) = self.verdict.reasons.first() {
            return vec![panic.to_string()];
        }
        // A check that failed says why; that the guest then stopped and said FAIL adds nothing.
        let failed = |reason: &&Reason| matches!(reason, Reason::FailedCheck { .. });
        let orderly = |reason: &&Reason| !matches!(reason, Reason::CheckCount { .. } | Reason::EndFail);
        let checks_failed = self.verdict.reasons.iter().any(|reason| failed(&reason));
        let telling = self.verdict.reasons.iter().filter(|reason| !checks_failed || orderly(reason));
        let mut problems: Vec<String> = telling.map(Reason::to_string).collect();
        problems.extend(self.objections.iter().cloned());
        problems
    }

    /// All that is wrong in one line; empty if it passed.
    #[must_use]
    pub fn summary(&self) -> String {
        self.problems().join("; ")
    }
}
