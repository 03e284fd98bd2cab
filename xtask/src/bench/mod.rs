//! `cargo xtask bench`: what the driver's operations cost, beside what they cost in Linux.
//!
//! The kernel runs five times, always with `-icount`, where each instruction takes a nanosecond of the guest's time and
//! everything else none, so that its counter counts instructions: its `bench` scenario; the disk's part of that on a
//! machine without an IOMMU, so that the difference is what an IOMMU adds; and `bench` shortly with QEMU's trace, which
//! says what the device was asked. The rows of contexts and nesting come from another kernel, which has them, in two runs
//! of the same kinds. With `--profile` one of the kernels runs under a debugger instead.

mod chart;
mod draft;
mod figures;
mod gdb;
mod profile;
mod symbols;
mod table;
mod targets;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use qemu_tests::bench as measured;
use qemu_tests::bench::ICOUNT;
use qemu_tests::boot::{Boot, Outcome, Witness};
use qemu_tests::machine::{Arch, Iommu, Machine};
use qemu_tests::qemu::Qemu;

use self::draft::Draft;
use self::figures::Runs;
use crate::kernel::{Features, Kernel};
use crate::setup::SetupArguments;

use crate::{backtrace, kernel, paths, progress, setup};

/// Arguments of `cargo xtask bench`.
#[derive(Args)]
pub(crate) struct BenchArguments {
    /// Show which functions execute how many instructions of this row instead
    #[arg(long, value_name = "ROW", conflicts_with_all = ["json", "svg"])]
    profile: Option<String>,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw them into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    setup: SetupArguments,
}

const MEMORY_MIB: u32 = 1024;
/// Most of the time goes into the live mappings.
const LIMIT: Duration = Duration::from_secs(1800);

/// What the runs share.
struct Setting {
    qemu: Qemu,
    kernel: Kernel,
    scenario: &'static str,
    directory: PathBuf,
}

/// What measures with a kernel of these features.
fn scenario(features: Features) -> &'static str {
    match features {
        Features::Standard => measured::SCENARIO,
        Features::Contexts => measured::CONTEXTS,
    }
}

/// Measures, or shows one row's profile.
pub(crate) fn bench(arguments: &BenchArguments) -> Result<ExitCode> {
    let arch = Arch::X86_64;
    let qemu = setup::qemu_for_bench(arch, &arguments.setup)?;
    let setting = |features, directory: &str| -> Result<Setting> {
        let kernel = kernel::build(arch, features)?;
        let directory = paths::target().join(directory);
        Ok(Setting { qemu: qemu.clone(), kernel, scenario: scenario(features), directory })
    };
    if let Some(row) = &arguments.profile {
        let features = if targets::is_of_the_draft(row) { Features::Contexts } else { Features::Standard };
        return profile(&setting(features, "bench")?, row);
    }
    let draft = setting(Features::Contexts, "bench-contexts")?;
    let setting = setting(Features::Standard, "bench")?;
    let timed = setting.time()?;
    let direct = setting.direct()?;
    let (counted, trace) = setting.count(measured::COUNT_CPUS)?;
    let draft = draft.measure()?;
    let runs = Runs {
        timed: measured::timed(&timed.verdict.values),
        direct: measured::timed(&direct.verdict.values),
        asked: measured::asked(&counted.verdict.values, &trace)?,
        values: timed.verdict.values,
        checks: timed.verdict.checks,
        draft,
    };
    let figures = figures::figures(&runs);
    let version = qemu.version.to_string();
    if let Some(path) = &arguments.json {
        let text = format!("{:#}\n", figures::json(&figures, &version, arch.name()));
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &arguments.svg {
        let drawing = chart::svg(&figures, &version);
        fs::write(path, drawing).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{} on QEMU {version}, {ICOUNT}, {MEMORY_MIB} MiB, one CPU\n", arch.name());
    println!("{}", table::table(&figures));
    Ok(ExitCode::SUCCESS)
}

impl Setting {
    fn boot(&self, scenario: &str, words: &str) -> Boot {
        let mut machine = Machine::new(Arch::X86_64, self.kernel.image.clone());
        machine.memory_mib = MEMORY_MIB;
        machine.extra = ICOUNT.split(' ').map(Into::into).collect();
        let mut boot = Boot::new(machine, scenario, &self.directory);
        boot.words = words.to_owned();
        boot.witness = Witness::None;
        boot.deadline = Some(LIMIT);
        boot
    }

    /// The run that counts instructions.
    fn time(&self) -> Result<Outcome> {
        progress::note(&format!("counting instructions on QEMU {}", self.qemu.version));
        self.run(self.boot(self.scenario, "bench=time"))
    }

    /// Both runs of contexts and nesting.
    fn measure(&self) -> Result<Draft> {
        let timed = self.time()?.verdict;
        let (counted, trace) = self.count(1)?;
        Ok(Draft {
            timed: measured::timed(&timed.values),
            asked: measured::asked(&counted.verdict.values, &trace)?,
            values: timed.values,
            checks: timed.checks,
        })
    }

    /// The run that counts those of the disk's requests where there is no IOMMU.
    fn direct(&self) -> Result<Outcome> {
        let mut boot = self.boot(measured::DIRECT, "bench=time");
        boot.machine.iommu = Iommu::Off;
        progress::note("counting those of the disk's requests without an IOMMU");
        self.run(boot)
    }

    /// The run that counts requests and kicks, and its trace.
    fn count(&self, cpus: u32) -> Result<(Outcome, PathBuf)> {
        let mut boot = self.boot(self.scenario, measured::COUNT);
        let trace = self.directory.join("trace.log");
        boot.witness = Witness::Trace;
        boot.machine.cpus = cpus;
        let events = measured::EVENTS.iter().flat_map(|event| ["-trace", event]);
        boot.machine.extra.extend(events.map(Into::into));
        progress::note("counting requests and kicks in QEMU's trace");
        Ok((self.run(boot)?, trace))
    }

    /// Boots, and says of each row that it is done.
    fn run(&self, boot: Boot) -> Result<Outcome> {
        let started = Instant::now();
        let outcome = boot.run(&self.qemu, &mut |line| {
            if let Some(check) = line.strip_prefix("@@ check ") {
                progress::note(&format!("  {:>7}  {check}", progress::seconds(started.elapsed())));
            }
        })?;
        self.judge(outcome)
    }

    /// What the guest stated, if it passed.
    fn judge(&self, outcome: Outcome) -> Result<Outcome> {
        if outcome.passed() {
            return Ok(outcome);
        }
        for line in backtrace::explain(&outcome.lines, &self.kernel.elf) {
            println!("{line}");
        }
        bail!("the kernel did not finish: {}", outcome.summary())
    }
}

fn profile(setting: &Setting, row: &str) -> Result<ExitCode> {
    let symbols = symbols::Symbols::read(&setting.kernel.elf)?;
    // In a temporary directory: the path of a socket is short.
    let socket = std::env::temp_dir().join(format!("xtask-bench-{}.sock", std::process::id()));
    let socket = Socket(socket);
    let mut boot = setting.boot(setting.scenario, &format!("bench=profile only={row}"));
    let device = format!("socket,id=gdb,server=on,wait=off,path={}", socket.0.display());
    boot.machine.extra.extend(["-S", "-gdb", "chardev:gdb", "-chardev", &device].map(Into::into));
    progress::note(&format!("stepping through {row} on QEMU {}", setting.qemu.version));
    let (outcome, recorded) = thread::scope(|scope| {
        let recording = scope.spawn(|| profile::record(&socket.0, &symbols));
        let outcome = boot.run(&setting.qemu, &mut |_| {});
        (outcome, recording.join())
    });
    setting.judge(outcome?)?;
    let stretches = recorded.map_err(|_| anyhow!("the debugger's thread panicked"))??;
    for stretch in &stretches {
        println!("{}", profile::describe(stretch, &symbols)?);
    }
    Ok(ExitCode::SUCCESS)
}

/// The path of a socket, which goes away with it.
struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        // QEMU may have removed it, or never made it.
        let _ = fs::remove_file(&self.0);
    }
}
