//! The `qtest` tier: the driver in a host process against QEMU's own device.
//!
//! Its package is no member of the workspace, so that what covers the workspace leaves it out: it is
//! formatted, linted and built by commands of its own, into a directory of its own.

use std::path::{self, Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use qemu_tests::machine::{Arch, Iommu};

use crate::test::TestArguments;
use crate::{command, paths, progress, setup};

const MANIFEST: &str = "qemu-tests/qtest/Cargo.toml";

/// Checks formatting and lints of the package.
///
/// # Errors
///
/// When there is something to mend.
pub(crate) fn lints() -> Result<()> {
    command::run(&mut command::cargo(&["fmt", "--manifest-path", MANIFEST, "--check"]))?;
    command::run(cargo("clippy").args(["--all-targets", "--", "-D", "warnings"]))
}

/// Runs the tests on the QEMU that is there.
///
/// # Errors
///
/// When no QEMU can be had, or a test fails.
pub(crate) fn test(arguments: &TestArguments) -> Result<()> {
    progress::heading("qtest tests");
    let qemu = setup::qemu(Arch::X86_64, Iommu::Pci, &arguments.setup)?;
    progress::note(&format!("QEMU {} at {}", qemu.version, qemu.path.display()));
    let mut tests = cargo("test");
    tests.env("QEMU_TESTS_QEMU_X86_64", absolute(&qemu.path)).args(arguments.filter.as_slice());
    command::run(&mut tests)
}

fn cargo(command: &str) -> Command {
    let mut cargo = command::cargo(&[command, "--manifest-path", MANIFEST, "--target-dir"]);
    cargo.arg(paths::target().join("qtest"));
    cargo
}

/// Tests run in the directory of their package.
fn absolute(program: &Path) -> PathBuf {
    path::absolute(program).unwrap_or_else(|_| program.to_owned())
}
