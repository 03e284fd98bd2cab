//! Builds a kernel image.

use std::path::PathBuf;

use anyhow::{Result, bail};
use qemu_tests::machine::Arch;

use crate::setup::toolchain::{self, Toolchain};
use crate::{command, paths, progress};

/// What the kernel is built with, of the workspace's profiles.
const PROFILE: &str = "kernel";

/// Builds the kernel for `arch` with whatever compiler can, and returns the image.
///
/// # Errors
///
/// When there is no compiler and none can be installed, or when the build fails.
pub(crate) fn build(arch: Arch) -> Result<PathBuf> {
    let toolchain = toolchain::ensure(arch)?;
    let directory = directory(toolchain);
    let mut build = toolchain::cargo(toolchain, arch.target());
    build.args(["build", "--profile", PROFILE, "--package", "platform", "--bin", "kernel"]);
    build.args(["--target", arch.target()]);
    build.arg("--target-dir").arg(&directory);
    progress::note(&format!("building the kernel for {} with {toolchain}", arch.name()));
    command::run(&mut build)?;
    let image = directory.join(arch.target()).join(PROFILE).join("kernel");
    if !image.is_file() {
        bail!("the build left no kernel image at {}", image.display());
    }
    Ok(image)
}

/// Each compiler has a directory of its own, so that changing between them rebuilds nothing.
pub(crate) fn directory(toolchain: Toolchain) -> PathBuf {
    paths::target().join("kernel").join(match toolchain {
        Toolchain::Rustup => "rustup",
        Toolchain::Debian => "debian",
    })
}
