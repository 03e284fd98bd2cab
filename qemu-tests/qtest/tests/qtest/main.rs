//! The driver and raw requests against QEMU's own virtio-iommu.
//!
//! `cargo xtask test --tier qtest` finds a QEMU and names it in the environment. Without it every case is
//! reported as ignored, with the reason.

mod driver;
mod random;
mod raw;
mod recovery;
mod restart;
mod rings;
mod support;

use std::env;
use std::path::Path;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};
use qemu_tests::process;
use qemu_tests::qemu::Qemu;
use qtest::Machine;

/// The QEMU for x86_64, as for the machine tests.
const QEMU: &str = "QEMU_TESTS_QEMU_X86_64";

/// A case: its name, and what it does on a machine of its own.
type Case = (&'static str, fn(&Machine));

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    arguments.test_threads = arguments.test_threads.or(Some(processors));
    if let Err(error) = process::end_children_on_interrupt() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let qemu = qemu();
    if !arguments.list {
        match &qemu {
            Ok(qemu) => println!("\nQEMU {} at {}", qemu.version, qemu.path.display()),
            Err(reason) => eprintln!("\nNOT RUN: {reason}"),
        }
    }
    let cases = [driver::CASES, rings::CASES, restart::CASES, recovery::CASES, raw::CASES, random::CASES];
    let trials = cases.into_iter().flatten().map(|case| trial(*case, qemu.clone())).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial((name, run): Case, qemu: Result<Qemu, String>) -> Trial {
    Trial::ignorable_test(format!("qtest/{name}"), move || match &qemu {
        Ok(qemu) => {
            run(&Machine::start(qemu).map_err(|error| format!("{error:#}"))?);
            Ok(Completion::Completed)
        }
        Err(reason) => Ok(Completion::ignored_with(reason)),
    })
}

/// What the environment names, or why nothing can run.
fn qemu() -> Result<Qemu, String> {
    let path = env::var_os(QEMU).ok_or_else(|| {
        format!("{QEMU} is not set; `cargo xtask test --tier qtest` sets it and runs these tests")
    })?;
    Qemu::probe_recent(Path::new(&path)).map_err(|error| format!("{QEMU}: {error:#}"))
}
