//! `cargo xtask test`: the tests, from the fast tier to the slow one.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::setup::SetupArguments;
use crate::{Arch, command, examples, loom, machine, progress, qtest};

/// Arguments of `cargo xtask test`.
#[derive(Args, Default)]
pub(crate) struct TestArguments {
    /// Run only tests whose name holds this
    #[arg(long, value_name = "TEXT")]
    pub(crate) filter: Option<String>,
    /// Run the machine tier for this architecture only
    #[arg(long, value_enum)]
    pub(crate) arch: Option<Arch>,
    /// Run only this tier
    #[arg(long, value_enum)]
    pub(crate) tier: Option<Tier>,
    #[command(flatten)]
    pub(crate) setup: SetupArguments,
}

/// A group of tests that need the same things.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// What runs on the host alone
    Host,
    /// The driver in a host process, QEMU's own device
    Qtest,
    /// Kernel images booted in QEMU
    Machine,
}

/// Runs the tiers and returns success if every test passed.
pub(crate) fn test(arguments: &TestArguments) -> Result<ExitCode> {
    let mut failed = Vec::new();
    for tier in [Tier::Host, Tier::Qtest, Tier::Machine] {
        if arguments.tier.is_none_or(|wanted| wanted == tier)
            && let Err(error) = run_tier(tier, arguments)
        {
            progress::error(&format!("{error:#}"));
            failed.push(tier);
        }
    }
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs one tier.
///
/// # Errors
///
/// When something it needs is missing, or a test fails.
pub(crate) fn run_tier(tier: Tier, arguments: &TestArguments) -> Result<()> {
    let started = Instant::now();
    match tier {
        Tier::Host => {
            host(arguments)?;
            interleavings(arguments)?;
        }
        Tier::Qtest => qtest::test(arguments)?,
        Tier::Machine => machine::test(arguments)?,
    }
    progress::note(&format!("{tier:?} tier passed in {}", progress::seconds(started.elapsed())));
    Ok(())
}

/// The part of the host tier that is built as usual.
///
/// # Errors
///
/// When a test fails.
pub(crate) fn host(arguments: &TestArguments) -> Result<()> {
    progress::heading("host tests");
    let mut tests = command::cargo(&["test", "--workspace", "--all-features"]);
    // Here, without optimization, few sequences do.
    tests.env("QEMU_TESTS_TIER", "host").env_remove("SEQUENCES");
    tests.args(arguments.filter.as_slice());
    command::run(&mut tests)?;
    if arguments.filter.as_ref().is_none_or(|filter| filter.starts_with("sequences")) {
        sequences()?;
    }
    if arguments.filter.as_ref().is_none_or(|filter| filter.starts_with("examples")) {
        examples::run()?;
    }
    Ok(())
}

/// How many run for each device, unless the environment says otherwise.
const SEQUENCES_OF_EACH: &str = "10000";

/// The random sequences once more, many of them, and fast. They say themselves how many there were for each device.
fn sequences() -> Result<()> {
    progress::heading("random sequences");
    let mut tests = command::cargo(&["test", "--profile", "sequences", "--package", "virtio-iommu"]);
    tests.args(["--test", "driver", "sequences::"]);
    if std::env::var_os("SEQUENCES").is_some() {
        // They take as long as they take.
        return command::run_within(&mut tests, None);
    }
    command::run(tests.env("SEQUENCES", SEQUENCES_OF_EACH))
}

/// The part of the host tier that has a build of its own. With a filter only where that names it, since building it
/// takes longer than most that is filtered for.
fn interleavings(arguments: &TestArguments) -> Result<()> {
    match arguments.filter.as_deref() {
        Some(filter) if !filter.contains("loom") => Ok(()),
        filter => loom::test(filter),
    }
}
