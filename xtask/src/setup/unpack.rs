//! Unpacks Debian's QEMU packages beside the system.
//!
//! A private apt downloads QEMU with every library down to libc, and its firmware. The packages are unpacked into one
//! directory, and a script for each architecture starts QEMU there by its own dynamic loader. No root is needed, nothing
//! of the system changes, and a later run needs no network.
//!
//! ```text
//! target/qemu/VERSION/root/...                       the packages' files
//! target/qemu/VERSION/bin/qemu-system-ARCH           the scripts
//! target/qemu/unpacking/                             an attempt; it becomes VERSION by a rename once each QEMU ran
//! target/qemu/next/...                               the same of the next Debian
//! ```
//!
//! What this Debian has not got the next one may have. That is kept apart, so that it is taken only where nothing else will do.

use std::error::Error;
use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::slice;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use qemu_tests::machine::Arch;
use qemu_tests::qemu::{Qemu, Version};

use super::apt::{self, Source};
use super::debian::Debian;
use super::private_apt::{Apt, Candidate};
use super::qemu::Wanted;
use crate::{command, paths, progress};

/// How long one package may take to unpack.
const UNPACK_LIMIT: Duration = Duration::from_secs(120);
/// The data directories of QEMU that packages may bring.
const DATA: [&str; 3] = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];

/// Where unpacked QEMUs are.
pub(crate) fn home() -> PathBuf {
    paths::target().join("qemu")
}

/// Where those of the next Debian are.
pub(crate) fn next_home() -> PathBuf {
    home().join("next")
}

/// The script that starts the QEMU for `arch` in `directory`.
pub(crate) fn script(directory: &Path, arch: Arch) -> PathBuf {
    directory.join("bin").join(arch.qemu())
}

/// The packages that hold a QEMU: the first that a suite has is the one.
pub(crate) fn packages(arch: Arch) -> &'static [&'static str] {
    match arch {
        Arch::X86_64 => &["qemu-system-x86"],
        Arch::Aarch64 => &["qemu-system-arm"],
        // It was one of the miscellaneous ones once.
        Arch::Riscv64 => &["qemu-system-riscv", "qemu-system-misc"],
    }
}

/// The packages of its firmware that are only recommended.
fn firmware(arch: Arch) -> &'static [&'static str] {
    match arch {
        Arch::X86_64 | Arch::Aarch64 => &[],
        Arch::Riscv64 => &["opensbi"],
    }
}

/// Downloads and unpacks the newest QEMU that is wanted and that the machine's own mirror has, for all of `archs`: for
/// this release, or else for the next one. Where the same version was unpacked before, for others, they stay.
///
/// # Errors
///
/// When the mirror cannot be found or reached, or has none that is wanted, or what it has does not run.
pub(crate) fn unpack(archs: &[Arch], wanted: Wanted, debian: &Debian) -> Result<()> {
    let sources = apt::sources(Path::new("/etc/apt"), &debian.codename);
    if sources.is_empty() {
        bail!("the apt sources of this machine name no mirror for {}", debian.codename);
    }
    let unpacked = unpack_of(debian, &home(), archs, wanted, &sources);
    match (unpacked, debian.next()) {
        (Err(error), Some(next)) if error.is::<NoneWanted>() => {
            progress::note(&format!("{error}; trying {}", next.codename));
            unpack_of(&next, &next_home(), archs, wanted, &sources)
                .with_context(|| format!("of {}", next.codename))
        }
        (unpacked, _) => unpacked,
    }
}

/// A release that has none that is wanted.
#[derive(Debug)]
struct NoneWanted(String);

impl fmt::Display for NoneWanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for NoneWanted {}

/// The same for one release, into `home`.
fn unpack_of(debian: &Debian, home: &Path, archs: &[Arch], wanted: Wanted, sources: &[Source]) -> Result<()> {
    // Whatever an interrupted attempt left behind.
    let attempt = home.join("unpacking");
    if attempt.exists() {
        fs::remove_dir_all(&attempt).with_context(|| format!("cannot remove {}", attempt.display()))?;
    }
    let apt = Apt::new(&attempt.join("apt"))?;
    let backports = format!("{}-backports", debian.codename);
    if let Err(error) = apt.update(sources, &[debian.codename.clone(), backports.clone()]) {
        progress::note(&format!("{backports} cannot be used ({error:#}); trying {}", debian.codename));
        apt.update(sources, slice::from_ref(&debian.codename))?;
    }
    let choice = Choice::make(&apt, archs, wanted)?;
    let archs = choice.with_those_of_before(home, archs);
    let mut names = choice.packages(&apt, &archs)?;
    names.extend(archs.iter().flat_map(|arch| firmware(*arch)).map(|name| (*name).to_owned()));
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let archives = apt.download(&choice.suite, &names)?;
    let root = attempt.join("root");
    progress::during(&format!("unpacking {} packages", archives.len()), || extract(&archives, &root))?;
    let mut version = None;
    for arch in archs {
        write_script(&attempt, arch)?;
        let qemu = Qemu::probe_recent(&script(&attempt, arch)).context("the unpacked QEMU does not run")?;
        version = Some(qemu.version);
    }
    let version = version.context("no QEMU was asked for")?;
    fs::remove_dir_all(attempt.join("apt")).context("cannot remove the downloaded packages")?;
    let directory = home.join(version.to_string());
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("cannot replace {}", directory.display()))?;
    }
    fs::rename(&attempt, &directory).with_context(|| format!("cannot make {}", directory.display()))?;
    progress::note(&format!("QEMU {version} is in {}", directory.display()));
    Ok(())
}

/// The version that is unpacked, and the suite that has it.
struct Choice {
    suite: String,
    version: Version,
}

impl Choice {
    /// The newest that is wanted and that there is for every one of `archs`.
    fn make(apt: &Apt, archs: &[Arch], wanted: Wanted) -> Result<Self> {
        let first = archs.first().context("no QEMU was asked for")?;
        let mut offered = apt.candidates(packages(*first))?;
        let versions: Vec<String> = offered.iter().map(|offer| offer.version.to_string()).collect();
        for arch in &archs[1..] {
            let others = apt.candidates(packages(*arch))?;
            offered.retain(|offer| others.iter().any(|other| other.suite == offer.suite));
        }
        let fitting = offered.into_iter().filter(|offer| wanted.fits(offer.version));
        let newest = fitting.max_by_key(|offer| offer.version);
        let Candidate { suite, version, .. } = newest.ok_or_else(|| {
            NoneWanted(format!("the mirror has QEMU {}, but {wanted} is needed", versions.join(" and ")))
        })?;
        Ok(Self { suite, version })
    }

    /// `archs`, and those that were unpacked before of what is about to be replaced.
    fn with_those_of_before(&self, home: &Path, archs: &[Arch]) -> Vec<Arch> {
        let is_there = |arch: &Arch| {
            let directories = home.read_dir().into_iter().flatten().flatten();
            let mut scripts = directories.map(|entry| script(&entry.path(), *arch));
            scripts.any(|script| Qemu::probe(&script).is_ok_and(|qemu| self.is_about(qemu.version)))
        };
        Arch::ALL.into_iter().filter(|arch| archs.contains(arch) || is_there(arch)).collect()
    }

    /// Whether a QEMU calls itself by the version that the package has. Debian leaves out the last number of some.
    fn is_about(&self, version: Version) -> bool {
        (version.major, version.minor) == (self.version.major, self.version.minor)
    }

    /// The packages with the QEMUs for `archs`.
    fn packages(&self, apt: &Apt, archs: &[Arch]) -> Result<Vec<String>> {
        let package = |arch: &Arch| {
            let candidates = apt.candidates(packages(*arch))?;
            let here: Vec<Candidate> =
                candidates.into_iter().filter(|candidate| candidate.suite == self.suite).collect();
            let mut names = packages(*arch).iter();
            let name = names.find(|name| here.iter().any(|candidate| candidate.package == **name));
            let name = name.with_context(|| format!("{} has no {}", self.suite, arch.qemu()))?;
            Ok((*name).to_owned())
        };
        archs.iter().map(package).collect()
    }
}

fn extract(archives: &[PathBuf], root: &Path) -> Result<()> {
    fs::create_dir_all(root).with_context(|| format!("cannot make {}", root.display()))?;
    for archive in archives {
        command::output(Command::new("dpkg-deb").arg("-x").arg(archive).arg(root), UNPACK_LIMIT)?;
    }
    // Nothing here is ever read, and it is a third of the files.
    for part in ["usr/share/doc", "usr/share/man", "usr/share/locale"] {
        let _ = fs::remove_dir_all(root.join(part));
    }
    Ok(())
}

/// Writes the script that starts QEMU with its own loader, libraries, modules and data.
fn write_script(directory: &Path, arch: Arch) -> Result<()> {
    let root = directory.join("root");
    let libraries = library_directories(&root);
    let loader = libraries.iter().find_map(|library| loader(&root, library));
    let loader = loader.context("the unpacked packages have no dynamic loader")?;
    let search: Vec<String> = libraries.iter().map(|library| format!("$root/{library}")).collect();
    let modules =
        libraries.iter().map(|library| format!("{library}/qemu")).find(|path| root.join(path).is_dir());
    let data: Vec<String> = DATA
        .iter()
        .filter(|path| root.join(path).is_dir())
        .map(|path| format!("-L \"$root/{path}\""))
        .collect();
    let text = format!(
        "#!/bin/sh\n# Made by `cargo xtask setup`.\nroot=$(dirname \"$(readlink -f \"$0\")\")/../root\n\
         export QEMU_MODULE_DIR=\"$root/{}\"\nunset LD_LIBRARY_PATH\n\
         exec \"$root/{loader}\" --library-path \"{}\" \"$root/usr/bin/{}\" {} \"$@\"\n",
        modules.unwrap_or_default(),
        search.join(":"),
        arch.qemu(),
        data.join(" "),
    );
    let script = script(directory, arch);
    fs::create_dir_all(directory.join("bin")).context("cannot make the directory of the script")?;
    fs::write(&script, text).with_context(|| format!("cannot write {}", script.display()))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))
        .context("cannot make the script executable")
}

/// The directories of libraries in `root`, relative to it: `lib/TRIPLET` and `usr/lib/TRIPLET`.
fn library_directories(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for parent in ["lib", "usr/lib"] {
        let entries = fs::read_dir(root.join(parent)).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        found.extend(names.filter(|name| name.contains("-linux-")).map(|name| format!("{parent}/{name}")));
    }
    found.sort();
    found
}

/// The dynamic loader in `library`. Not the link in `/lib64`: it is absolute, and leads to the system's.
fn loader(root: &Path, library: &str) -> Option<String> {
    let entries = fs::read_dir(root.join(library)).ok()?.flatten();
    let mut names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.find(|name| name.starts_with("ld-linux")).map(|name| format!("{library}/{name}"))
}
