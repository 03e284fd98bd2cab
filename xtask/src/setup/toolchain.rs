//! The compiler for the kernel.
//!
//! Rustup's stable Rust needs the precompiled `core` of the bare-metal target. Where that cannot be downloaded, Debian
//! has a compiler whose library comes as source, and which then builds `core` itself.

use std::env;
use std::fmt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use qemu_tests::machine::Arch;

use super::debian::{self, Debian};
use crate::{command, paths, progress};

/// How long `rustup target add` may take before another way is tried.
const RUSTUP_LIMIT: Duration = Duration::from_secs(60);
/// How long a compiler may take to say something about itself.
const ASK_LIMIT: Duration = Duration::from_secs(30);
/// Forces one of the two ways.
const FORCE: &str = "XTASK_TOOLCHAIN";
/// The minimum that `platform` states.
const OLDEST_MINOR: u32 = 91;

const RUSTC: &str = "/usr/bin/rustc";
const CARGO: &str = "/usr/bin/cargo";
const PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-src", "lld"];

/// A way to build for bare metal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Toolchain {
    /// The compiler that built this program, with the target added.
    Rustup,
    /// Debian's, which builds `core` from source.
    Debian,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rustup => "rustup's Rust",
            Self::Debian => "Debian's Rust",
        })
    }
}

/// The compiler to use for the kernel on `arch`, installed if need be.
///
/// # Errors
///
/// When there is none and none can be installed; the error says what to type.
pub(crate) fn ensure(arch: Arch) -> Result<Toolchain> {
    ensure_target(arch.target())
}

/// The compiler to use for a bare-metal target, installed if need be.
///
/// # Errors
///
/// As for [`ensure`].
pub(crate) fn ensure_target(target: &str) -> Result<Toolchain> {
    match env::var(FORCE).ok().as_deref() {
        Some("rustup") if rustup_has(target) => Ok(Toolchain::Rustup),
        Some("rustup") => add_target(target).map(|()| Toolchain::Rustup),
        Some("debian") if debian_lacks().is_empty() => Ok(Toolchain::Debian),
        Some("debian") => install_debian().map(|()| Toolchain::Debian),
        Some(other) if !other.is_empty() => bail!("{FORCE} is `{other}`; it can be `rustup` or `debian`"),
        _ => ensure_any(target),
    }
}

fn ensure_any(target: &str) -> Result<Toolchain> {
    if rustup_has(target) {
        return Ok(Toolchain::Rustup);
    }
    // Before rustup is asked: where it cannot reach its server, every run would wait for that again.
    if debian_lacks().is_empty() {
        return Ok(Toolchain::Debian);
    }
    let Err(error) = add_target(target) else { return Ok(Toolchain::Rustup) };
    progress::note(&format!("{error:#}"));
    if Debian::detect().is_none() {
        bail!(
            "no compiler for {target}: `rustup target add {target}` does not work here, and this is not Debian"
        );
    }
    install_debian().map(|()| Toolchain::Debian)
}

/// A cargo that can build for `target`, in the root of the workspace; `ensure` has to have returned `toolchain`.
pub(crate) fn cargo(toolchain: Toolchain, target: &str) -> Command {
    match toolchain {
        Toolchain::Rustup => command::cargo(&[]),
        Toolchain::Debian => {
            let mut cargo = Command::new(CARGO);
            cargo.current_dir(paths::root());
            for (name, _) in env::vars_os() {
                if belongs_to_rustup(&name.to_string_lossy()) {
                    cargo.env_remove(&name);
                }
            }
            cargo.env("RUSTC", RUSTC).env("RUSTC_BOOTSTRAP", "1").env(linker_variable(target), "ld.lld");
            cargo.args(["-Z", "build-std=core,alloc"]);
            cargo
        }
    }
}

/// What rustup's cargo and its run of this program set, and another compiler must not see.
fn belongs_to_rustup(name: &str) -> bool {
    let names = [
        "CARGO",
        "RUSTC",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "LD_LIBRARY_PATH",
    ];
    let prefixes =
        ["RUSTUP_", "RUST_RECURSION", "CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_ENCODED_", "CARGO_BUILD_RUST"];
    names.contains(&name) || prefixes.iter().any(|prefix| name.starts_with(prefix))
}

fn linker_variable(target: &str) -> String {
    format!("CARGO_TARGET_{}_LINKER", target.replace('-', "_").to_uppercase())
}

/// Whether the compiler in use has the library of `target`.
fn rustup_has(target: &str) -> bool {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut ask = Command::new(rustc);
    ask.current_dir(paths::root()).args(["--print", "target-libdir", "--target", target]);
    let Ok(directory) = command::output(&mut ask, ASK_LIMIT) else { return false };
    std::fs::read_dir(directory.trim()).is_ok_and(|mut files| files.next().is_some())
}

fn add_target(target: &str) -> Result<()> {
    progress::note(&format!("rustup's Rust lacks the library for {target}; it is about to be added"));
    let mut add = Command::new("rustup");
    add.current_dir(paths::root()).args(["target", "add", target]);
    progress::during(&format!("rustup target add {target}"), || command::output(&mut add, RUSTUP_LIMIT))
        .map(drop)
        .context("rustup cannot add the target")
}

/// What Debian's way lacks, in words; nothing if it can be used.
fn debian_lacks() -> Vec<&'static str> {
    let mut lacks = Vec::new();
    if !debian::has(CARGO) {
        lacks.push(CARGO);
    }
    if paths::find_program("ld.lld").is_none() {
        lacks.push("ld.lld");
    }
    let ask = |argument: &[&str]| {
        let mut rustc = Command::new(RUSTC);
        rustc.env_remove("LD_LIBRARY_PATH").args(argument);
        command::output(&mut rustc, ASK_LIMIT).ok()
    };
    match ask(&["--version"]).as_deref().and_then(minor_version) {
        None => lacks.push(RUSTC),
        Some(minor) if minor < OLDEST_MINOR => lacks.push("a recent enough rustc"),
        Some(_) => {
            let root = ask(&["--print", "sysroot"]).unwrap_or_default();
            if !debian::has(&format!("{}/lib/rustlib/src/rust/library/core/src/lib.rs", root.trim())) {
                lacks.push("the source of Rust's library");
            }
        }
    }
    lacks
}

fn install_debian() -> Result<()> {
    if Debian::detect().is_none() {
        bail!(
            "this is not Debian: no packages for building the kernel are known; use rustup, and unset {FORCE}"
        );
    }
    debian::install(&PACKAGES, "building the kernel")?;
    let lacks = debian_lacks();
    if !lacks.is_empty() {
        bail!(
            "after installing {}, this is still missing: {} (Rust 1.{OLDEST_MINOR} is needed)",
            PACKAGES.join(" "),
            lacks.join(", ")
        );
    }
    Ok(())
}

/// The second number of `rustc 1.96.0 (...)`.
fn minor_version(text: &str) -> Option<u32> {
    text.strip_prefix("rustc 1.")?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_the_compiler() {
        assert_eq!(
            minor_version("rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)"),
            Some(96)
        );
        assert_eq!(minor_version("rustc 1.85.0"), Some(85));
        assert_eq!(minor_version("cargo 1.85.0"), None);
        assert_eq!(minor_version(""), None);
    }

    #[test]
    fn the_other_compiler_sees_the_users_settings_only() {
        for name in
            ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN", "CARGO_MANIFEST_DIR", "LD_LIBRARY_PATH", "RUSTFLAGS"]
        {
            assert!(belongs_to_rustup(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_HTTP_PROXY", "PATH", "HOME", "RUST_BACKTRACE"]
        {
            assert!(!belongs_to_rustup(name), "{name}");
        }
        assert_eq!(linker_variable(Arch::X86_64.target()), "CARGO_TARGET_X86_64_UNKNOWN_NONE_LINKER");
    }
}
