//! `cargo xtask setup`: what is needed beside a host compiler, found or installed.
//!
//! A machine with git, a C compiler and rustup's stable Rust lacks two things: a compiler that can build for bare metal
//! ([`toolchain`]), and QEMU ([`mod@qemu`]). A QEMU that is installed is never changed: where it is missing or too old, a
//! newer one is unpacked under `target/qemu` ([`unpack`]).

pub(crate) mod apt;
pub(crate) mod debian;
pub(crate) mod matrix;
mod private_apt;
pub(crate) mod qemu;
pub(crate) mod toolchain;
pub(crate) mod unpack;

use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;
use qemu_tests::machine::{Arch, Iommu, Need};
use qemu_tests::qemu::{Qemu, Release, Version};

use self::qemu::Wanted;
use crate::progress;

/// Arguments that say which tools to use.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct SetupArguments {
    /// The QEMU to use, instead of the one that is found (also: XTASK_QEMU)
    #[arg(long, value_name = "PATH")]
    pub(crate) qemu: Option<PathBuf>,
    /// The release of QEMU to use, such as 7.2; on Debian it is unpacked where the mirror has it
    #[arg(long, value_name = "RELEASE", conflicts_with = "qemu")]
    pub(crate) qemu_version: Option<Release>,
}

/// The oldest QEMU that the benchmark runs on: what it is compared with was measured on this one.
const OLDEST_FOR_BENCH: Version = Version { major: 10, minor: 0, micro: 0 };

/// Finds or installs everything for `arch` and says what will be used.
pub(crate) fn setup(arch: Arch, arguments: &SetupArguments) -> Result<()> {
    let toolchain = toolchain::ensure(arch)?;
    progress::note(&format!("the kernel for {} is built with {toolchain}", arch.name()));
    // A release that was asked for may do for some of the machines only.
    let iommu = if arguments.qemu_version.is_some() { Iommu::Off } else { Iommu::Pci };
    let qemu = qemu(arch, iommu, arguments)?;
    progress::note(&format!("it runs on QEMU {} at {}", qemu.version, qemu.path.display()));
    Ok(())
}

/// The QEMU to use for a machine; unpacks one where there is none.
///
/// # Errors
///
/// When none can be had; the error says what to do.
pub(crate) fn qemu(arch: Arch, iommu: Iommu, arguments: &SetupArguments) -> Result<Qemu> {
    let need = Need::of(arch, iommu).map_err(|why| anyhow!("there is no such machine: {why}"))?;
    since(arch, need.oldest, arguments).with_context(|| format!("QEMU for {}", arch.name()))
}

/// Finds or unpacks a QEMU whose figures can be compared.
///
/// # Errors
///
/// As [`qemu()`].
pub(crate) fn qemu_for_bench(arch: Arch, arguments: &SetupArguments) -> Result<Qemu> {
    since(arch, OLDEST_FOR_BENCH, arguments)
}

fn since(arch: Arch, oldest: Version, arguments: &SetupArguments) -> Result<Qemu> {
    let wanted = arguments.qemu_version.map_or(Wanted::Since(oldest), Wanted::Of);
    let qemu = qemu::ensure(arch, wanted, arguments.qemu.as_deref())?;
    if qemu.version < oldest {
        bail!("{} is QEMU {}, but {oldest} or later is needed", qemu.path.display(), qemu.version);
    }
    Ok(qemu)
}
