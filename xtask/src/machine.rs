//! The machine tier: kernels for each architecture, on each QEMU.
//!
//! The test binary of `qemu-tests` makes a matrix of what is named to it here, and says of each cell how it ended.

use std::env;
use std::ffi::OsString;
use std::panic::resume_unwind;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, bail};
use qemu_tests::machine::Arch;

use crate::kernel::{self, Features};
use crate::setup::matrix::{self, Found};
use crate::setup::toolchain;
use crate::test::TestArguments;
use crate::{command, progress, vhost};

/// Builds the kernels, finds the QEMUs, and runs the cases.
///
/// # Errors
///
/// When there is no compiler or no QEMU at all, or a case fails.
pub(crate) fn test(arguments: &TestArguments) -> Result<()> {
    progress::heading("machine tests");
    let archs = archs(arguments);
    let found = matrix::find(&archs, &arguments.setup);
    if found.iter().all(|found| found.qemus.is_empty()) {
        let why = found.iter().flat_map(|found| &found.missing).map(|missing| missing.why.as_str()).next();
        bail!("no QEMU to run anything on: {}", why.unwrap_or("none was looked for"));
    }
    let mut tests = command::cargo(&["test", "--package", "qemu-tests", "--test", "machine"]);
    tests.env_remove("QEMU_TESTS_TIER");
    for arch in Arch::ALL {
        for variable in ["KERNEL", "KERNEL_WITH_CONTEXTS", "QEMU", "MISSING", "VHOST_QEMU", "VHOST_MISSING"] {
            tests.env_remove(name(variable, arch));
        }
    }
    for Found { arch, qemus, missing } in &found {
        let lines: Vec<String> =
            missing.iter().map(|missing| format!("{}: {}", missing.release, missing.why)).collect();
        tests.env(name("MISSING", *arch), lines.join("\n"));
        if qemus.is_empty() {
            continue;
        }
        for qemu in qemus {
            progress::note(&format!("{} on QEMU {} at {}", arch.name(), qemu.version, qemu.path.display()));
        }
        let paths = env::join_paths(qemus.iter().map(|qemu| &qemu.path)).context("the path of a QEMU")?;
        tests.env(name("QEMU", *arch), paths);
    }
    let archs_with_qemu = found.iter().filter(|found| !found.qemus.is_empty()).map(|found| found.arch);
    build_kernels(&mut tests, &archs_with_qemu.collect::<Vec<_>>())?;
    with_vhost_user(&mut tests, &archs, arguments)?;
    tests.args(arguments.filter.as_slice());
    command::run(&mut tests)
}

/// Builds the kernels and names them: all architectures at once, since most of a build is one long link on one CPU, and one
/// kind after the other, which share most of what they consist of.
fn build_kernels(tests: &mut Command, archs: &[Arch]) -> Result<()> {
    for arch in archs {
        // What has to be installed is installed once.
        toolchain::ensure(*arch)?;
    }
    let kinds = [("KERNEL", Features::Standard), ("KERNEL_WITH_CONTEXTS", Features::Contexts)];
    let build = |arch| -> Result<Vec<_>> {
        kinds
            .iter()
            .map(|(variable, features)| Ok((*variable, kernel::build(arch, *features)?.image)))
            .collect()
    };
    let built: Vec<_> = thread::scope(|scope| {
        let builds: Vec<_> = archs.iter().map(|arch| scope.spawn(|| build(*arch))).collect();
        builds.into_iter().map(|build| build.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    for (arch, images) in archs.iter().zip(built) {
        for (variable, image) in images? {
            tests.env(name(variable, *arch), image);
        }
    }
    Ok(())
}

/// Names the QEMU that has an IOMMU over vhost-user, or why there is none, and what serves that.
fn with_vhost_user(tests: &mut Command, archs: &[Arch], arguments: &TestArguments) -> Result<()> {
    let arch = matrix::VHOST_USER;
    match matrix::find_for_vhost_user(archs, &arguments.setup) {
        None => {}
        Some(Ok(qemu)) => {
            let (version, path) = (qemu.version, qemu.path);
            progress::note(&format!("vhost-user on QEMU {version} at {}", path.display()));
            tests.env(name("VHOST_QEMU", arch), path);
            tests.env("QEMU_TESTS_VHOST_SERVER", vhost::build_server()?);
        }
        Some(Err(missing)) => {
            tests.env(name("VHOST_MISSING", arch), format!("{}: {}", missing.release, missing.why));
        }
    }
    Ok(())
}

/// The architectures that are asked for: by name, or by a filter that names one. A QEMU that was chosen is for one only.
fn archs(arguments: &TestArguments) -> Vec<Arch> {
    if let Some(arch) = arguments.arch {
        return vec![arch.into()];
    }
    let filter = arguments.filter.as_deref().unwrap_or("");
    if let Some(arch) = Arch::ALL.into_iter().find(|arch| filter.contains(arch.name())) {
        return vec![arch];
    }
    if matrix::is_chosen(&arguments.setup) { vec![Arch::X86_64] } else { Arch::ALL.to_vec() }
}

/// The name of a variable that `qemu-tests` reads.
fn name(variable: &str, arch: Arch) -> OsString {
    format!("QEMU_TESTS_{variable}_{}", arch.name().to_uppercase()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_may_name_the_architecture() {
        let asked = |filter: &str| {
            archs(&TestArguments { filter: Some(filter.to_owned()), ..TestArguments::default() })
        };
        assert_eq!(asked("riscv64/mmio/"), [Arch::Riscv64]);
        assert_eq!(asked("soak"), Arch::ALL);
        assert_eq!(name("KERNEL", Arch::X86_64), "QEMU_TESTS_KERNEL_X86_64");
    }
}
