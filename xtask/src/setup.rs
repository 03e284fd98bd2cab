//! `cargo xtask setup`: what is needed beside a host compiler, found or installed.
//!
//! A machine with git, a C compiler and rustup's stable Rust lacks two things: a compiler that can build for bare metal
//! ([`toolchain`]), and QEMU ([`mod@qemu`]). A QEMU that is installed is never changed: where it is missing or too old, a
//! newer one is unpacked under `target/qemu` ([`unpack`]).

pub(crate) mod apt;
pub(crate) mod debian;
pub(crate) mod qemu;
pub(crate) mod toolchain;
pub(crate) mod unpack;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use qemu_tests::machine::Arch;
use qemu_tests::qemu::{OLDEST, Qemu, Version};

use crate::progress;

/// Arguments that say which tools to use.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct SetupArguments {
    /// The QEMU to use, instead of the one that is found (also: XTASK_QEMU)
    #[arg(long, value_name = "PATH")]
    pub(crate) qemu: Option<PathBuf>,
}

/// The oldest QEMU that the benchmark runs on: what it is compared with was measured on this one.
const OLDEST_FOR_BENCH: Version = Version { major: 10, minor: 0, micro: 0 };

/// Finds or installs everything and says what will be used.
pub(crate) fn setup(arguments: &SetupArguments) -> Result<()> {
    let arch = Arch::X86_64;
    let toolchain = toolchain::ensure(arch)?;
    progress::note(&format!("the kernel for {} is built with {toolchain}", arch.name()));
    let qemu = qemu(arch, arguments.qemu.as_deref())?;
    progress::note(&format!("it runs on QEMU {} at {}", qemu.version, qemu.path.display()));
    Ok(())
}

/// The QEMU to use for `arch`; unpacks one where there is none.
///
/// # Errors
///
/// When none can be had; the error says what to do.
pub(crate) fn qemu(arch: Arch, chosen: Option<&Path>) -> Result<Qemu> {
    qemu::ensure(arch, OLDEST, chosen)
}

/// Finds or unpacks a QEMU whose figures can be compared.
///
/// # Errors
///
/// As [`qemu()`].
pub(crate) fn qemu_for_bench(arch: Arch, chosen: Option<&Path>) -> Result<Qemu> {
    qemu::ensure(arch, OLDEST_FOR_BENCH, chosen)
}
