//! Boots the kernel's scenarios and asserts how each ends.
//!
//! `cargo xtask test` builds the kernel, finds a QEMU, and names both in the environment. Without them every case is
//! reported as ignored, with the reason; with `QEMU_TESTS_TIER=host` there is nothing here to run.

mod cases;
mod counts;
mod expect;
mod growth;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use qemu_tests::boot::{Boot, DiskDevice};
use qemu_tests::machine::{Arch, Machine};
use qemu_tests::process;
use qemu_tests::qemu::Qemu;

use crate::cases::Case;

/// The kernel image for x86_64.
const KERNEL: &str = "QEMU_TESTS_KERNEL_X86_64";
/// The QEMU for x86_64.
const QEMU: &str = "QEMU_TESTS_QEMU_X86_64";
/// `host` leaves all of these cases out.
const TIER: &str = "QEMU_TESTS_TIER";

/// What the cases need from outside.
#[derive(Clone)]
struct Setting {
    kernel: PathBuf,
    qemu: Qemu,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    if env::var_os(TIER).is_some_and(|tier| tier == "host") {
        println!("machine tests are left out of the host tier; `cargo xtask test --tier machine` runs them");
        return ExitCode::SUCCESS;
    }
    // Each machine is a busy process; more of them than processors only makes deadlines pass.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    arguments.test_threads = arguments.test_threads.or(Some(processors));
    if let Err(error) = process::end_children_on_interrupt() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let setting = setting();
    if let Err(reason) = &setting
        && !arguments.list
    {
        eprintln!("\nNOT RUN: {reason}\n");
    }
    let cases = cases::all().into_iter().map(|case| {
        let name = case.name;
        trial(name, setting.clone(), move |setting| run(&case, setting))
    });
    let growths = growth::all().into_iter().map(|growth| {
        let name = growth.name;
        trial(name, setting.clone(), move |setting| growth.run(setting))
    });
    libtest_mimic::run(&arguments, cases.chain(growths).collect()).exit_code()
}

fn trial(
    name: &str,
    setting: Result<Setting, String>,
    run: impl FnOnce(&Setting) -> Result<(), Failed> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match &setting {
        Ok(setting) => run(setting).map(|()| Completion::Completed),
        Err(reason) => Ok(Completion::ignored_with(reason)),
    })
}

/// What the environment names, or why nothing can run.
fn setting() -> Result<Setting, String> {
    let variable = |name| {
        env::var_os(name).map(PathBuf::from).ok_or_else(|| {
            format!("{name} is not set; `cargo xtask test --tier machine` sets it and runs these tests")
        })
    };
    let kernel = variable(KERNEL)?;
    if !kernel.is_file() {
        return Err(format!("{KERNEL} names {}, which is not there", kernel.display()));
    }
    let qemu = Qemu::probe_recent(&variable(QEMU)?).map_err(|error| format!("{QEMU}: {error:#}"))?;
    Ok(Setting { kernel, qemu })
}

fn run(case: &Case, setting: &Setting) -> Result<(), Failed> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(case.name);
    let mut machine = Machine::new(Arch::X86_64, setting.kernel.clone());
    machine.iommu = case.iommu;
    machine.extra = case.extra.split_whitespace().map(Into::into).collect();
    let mut boot = Boot::new(machine, case.scenario, &directory);
    boot.words = case.words.to_owned();
    boot.disk = case.disk;
    if case.disk == DiskDevice::Absent {
        boot.nvme = DiskDevice::Absent;
    }
    boot.peer = case.peer;
    boot.deadline = Some(case.deadline);
    let outcome = boot.run(&setting.qemu, &mut |_| {}).map_err(|error| format!("{error:#}"))?;
    let log = directory.join("serial.log");
    // The verdict stands without the log.
    let _ = fs::write(&log, outcome.lines.join("\n") + "\n");
    case.expect.check(&outcome, &directory.join("trace.log")).map_err(|complaint| {
        let last = outcome.lines.len().saturating_sub(25);
        let tail = outcome.lines[last..].join("\n    ");
        let stderr = outcome.stderr.trim();
        format!(
            "{complaint}\n  verdict: {}\n  the last lines of {}:\n    {tail}\n  QEMU's own: {stderr}",
            if outcome.passed() { "passed".to_owned() } else { outcome.summary() },
            log.display(),
        )
        .into()
    })
}
