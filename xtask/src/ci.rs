//! `cargo xtask ci`: all that must pass before a change is merged. It is the whole of CI.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use qemu_tests::machine::Arch;

use crate::setup::SetupArguments;
use crate::setup::toolchain::{self, Toolchain};
use crate::test::{self, TestArguments, Tier, run_tier};
use crate::{command, conformance, fuzz, kernel, loom, progress, qtest};

/// How a step ended.
enum End {
    Passed,
    Failed,
    /// Not run, and why.
    Skipped(String),
}

/// Steps that ran, for the summary.
#[derive(Default)]
struct Steps(Vec<(&'static str, End, Duration)>);

impl Steps {
    fn step(&mut self, name: &'static str, step: impl FnOnce() -> Result<End>) {
        progress::heading(name);
        let started = Instant::now();
        let end = step().unwrap_or_else(|error| {
            progress::error(&format!("{error:#}"));
            End::Failed
        });
        self.0.push((name, end, started.elapsed()));
        progress::note(&format!("{name}: {}", progress::seconds(started.elapsed())));
    }

    /// A step that is one cargo command.
    fn cargo(&mut self, name: &'static str, arguments: &[&str]) {
        self.step(name, || command::run(&mut command::cargo(arguments)).map(|()| End::Passed));
    }
}

/// Runs every step, also after one failed, and returns success if all passed.
pub(crate) fn ci(arguments: &SetupArguments) -> Result<ExitCode> {
    let started = Instant::now();
    let mut steps = Steps::default();
    steps.cargo("format", &["fmt", "--all", "--check"]);
    steps.cargo(
        "lints",
        &["clippy", "--workspace", "--all-features", "--all-targets", "--", "-D", "warnings"],
    );
    steps.step("lints of the kernels", kernel_lints);
    steps.step("documentation", || {
        let mut doc = command::cargo(&["doc", "--workspace", "--all-features", "--no-deps"]);
        doc.env("RUSTDOCFLAGS", "-D warnings");
        command::run(&mut doc).map(|()| End::Passed)
    });
    steps.step("each feature of the driver alone", features);
    steps.step("the driver for 32 bits", small_target);
    let tests = TestArguments { setup: arguments.clone(), ..TestArguments::default() };
    steps.step("host tests", || test::host(&tests).map(|()| End::Passed));
    steps.step("tests in every interleaving", || loom::test(None).map(|()| End::Passed));
    steps.step("conformance table", || conformance::check().map(|()| End::Passed));
    steps.step("fuzz targets", || fuzz::smoke().map(|()| End::Passed));
    steps.step("qtest lints and tests", || {
        qtest::lints()?;
        run_tier(Tier::Qtest, &tests).map(|()| End::Passed)
    });
    steps.step("machine tests", || run_tier(Tier::Machine, &tests).map(|()| End::Passed));
    Ok(summary(&steps, started.elapsed()))
}

/// The kernels under clippy, each for its own target. Debian's compiler has no clippy that fits it.
fn kernel_lints() -> Result<End> {
    for arch in Arch::ALL {
        let toolchain = toolchain::ensure(arch)?;
        if toolchain == Toolchain::Debian {
            return Ok(End::Skipped("Debian's compiler is without clippy".to_owned()));
        }
        let mut lints = command::cargo(&["clippy", "--release", "--package", "platform", "--bin", "kernel"]);
        lints.args(["--target", arch.target(), "--target-dir"]).arg(kernel::directory(toolchain));
        command::run(lints.args(["--", "-D", "warnings"]))?;
    }
    Ok(End::Passed)
}

/// The driver without features and with each one alone.
fn features() -> Result<End> {
    let mut failed = Vec::new();
    for feature in ["", "virtio-drivers", "spin", "lock_api", "dma-api-0_10", "contexts", "bench"] {
        let lints = ["clippy", "--package", "virtio-iommu", "--no-default-features", "--features", feature];
        let mut check = command::cargo(&lints);
        check.args(["--", "-D", "warnings"]);
        if let Err(error) = command::run(&mut check) {
            progress::error(&format!("{error:#}"));
            failed.push(if feature.is_empty() { "no feature" } else { feature });
        }
    }
    if !failed.is_empty() {
        bail!("the driver does not build alone with: {}", failed.join(", "));
    }
    Ok(End::Passed)
}

/// A target of 32 bits, whose atomics have no more.
const SMALL_TARGET: &str = "riscv32imac-unknown-none-elf";

/// The driver, with all that it has, for a machine of 32 bits.
fn small_target() -> Result<End> {
    let toolchain = match toolchain::ensure_target(SMALL_TARGET) {
        Ok(toolchain) => toolchain,
        Err(error) => return Ok(End::Skipped(format!("no compiler for {SMALL_TARGET}: {error:#}"))),
    };
    let mut check = toolchain::cargo(toolchain, SMALL_TARGET);
    check.args(["check", "--package", "virtio-iommu", "--all-features", "--target", SMALL_TARGET]);
    check.arg("--target-dir").arg(kernel::directory(toolchain));
    command::run(&mut check).map(|()| End::Passed)
}

fn summary(steps: &Steps, total: Duration) -> ExitCode {
    progress::heading("summary");
    let mut code = ExitCode::SUCCESS;
    for (name, end, time) in &steps.0 {
        let word = match end {
            End::Passed => "passed".to_owned(),
            End::Skipped(reason) => format!("SKIPPED: {reason}"),
            End::Failed => {
                code = ExitCode::FAILURE;
                "FAILED".to_owned()
            }
        };
        eprintln!("  {:>8}  {name}: {word}", progress::seconds(*time));
    }
    if code == ExitCode::SUCCESS {
        progress::pass(&format!("in {}", progress::seconds(total)));
    } else {
        progress::fail(&format!("in {}", progress::seconds(total)));
    }
    code
}
