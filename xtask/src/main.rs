//! Every developer and CI command: `cargo xtask run`, `test`, `bench`, `fuzz`, `setup` and `ci`.
//!
//! | module | what it holds |
//! |---|---|
//! | `run` | builds the kernel, boots one scenario, shows it, judges it |
//! | `test` | the tests, tier by tier |
//! | `bench` | counts what the driver's operations cost, and compares it |
//! | `loom` | the driver's tests in every interleaving |
//! | `machine` | the tier that boots kernels |
//! | `qtest` | the tier that has a package of its own |
//! | `fuzz` | the driver's fuzz targets, built and run |
//! | `ci` | everything that must pass before a change is merged |
//! | `conformance` | whether the table of requirements and the tests agree |
//! | `setup` | finds or installs the compiler for the kernel and QEMU |
//! | `kernel` | builds a kernel image; `image` makes a flat one of it |
//! | `vhost` | builds what serves an IOMMU over vhost-user |
//! | `backtrace` | names the addresses that a kernel prints when it panics |
//! | `paths`, `progress`, `command` | where things are, what the user sees, how programs are run |

mod backtrace;
mod bench;
mod ci;
mod command;
mod conformance;
mod examples;
mod fuzz;
mod image;
mod kernel;
mod loom;
mod machine;
mod paths;
mod progress;
mod qtest;
mod run;
mod setup;
mod test;
mod vhost;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Builds, runs and tests the virtio-iommu driver and the kernel that proves it.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a kernel in QEMU, show what it says, and exit 0 if it passed.
    Run(run::RunArguments),
    /// Run the tests: every tier, or one.
    Test(test::TestArguments),
    /// Count the instructions, requests and kicks of the driver's operations, beside Linux's.
    Bench(bench::BenchArguments),
    /// Run the driver's fuzz targets, and go on from what earlier runs found.
    Fuzz(fuzz::FuzzArguments),
    /// Find, or install, the compiler for the kernel and QEMU. `run` and `test` do this where something is missing.
    Setup(SetupCommand),
    /// Check formatting, lints, documentation and features, then run every test, and the fuzz targets shortly.
    Ci(setup::SetupArguments),
}

/// Arguments of `cargo xtask setup`.
#[derive(Args)]
struct SetupCommand {
    /// Architecture to set up for
    #[arg(long, value_enum, default_value_t)]
    arch: Arch,
    #[command(flatten)]
    setup: setup::SetupArguments,
}

/// An architecture that there is a kernel for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Arch {
    /// QEMU's q35
    #[default]
    #[value(name = "x86_64")]
    X86_64,
    /// QEMU's virt, with a GICv3
    Aarch64,
    /// QEMU's virt, with OpenSBI
    Riscv64,
}

impl From<Arch> for qemu_tests::machine::Arch {
    fn from(arch: Arch) -> Self {
        match arch {
            Arch::X86_64 => Self::X86_64,
            Arch::Aarch64 => Self::Aarch64,
            Arch::Riscv64 => Self::Riscv64,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match dispatch(&arguments.command) {
        Ok(code) => code,
        Err(error) => {
            progress::error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: &Command) -> Result<ExitCode> {
    qemu_tests::process::end_children_on_interrupt()?;
    match command {
        Command::Run(arguments) => run::run(arguments),
        Command::Test(arguments) => test::test(arguments),
        Command::Bench(arguments) => bench::bench(arguments),
        Command::Fuzz(arguments) => fuzz::fuzz(arguments),
        Command::Setup(arguments) => {
            setup::setup(arguments.arch.into(), &arguments.setup).map(|()| ExitCode::SUCCESS)
        }
        Command::Ci(arguments) => ci::ci(arguments),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_fits_together() {
        Arguments::command().debug_assert();
    }
}
