//! Which QEMU to use.
//!
//! In this order: the one that was named, the one on the search path if it is one that will do, one that was unpacked
//! before, and on Debian one that is unpacked now.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::path::Path;

use anyhow::{Context as _, Error, Result, anyhow};
use qemu_tests::machine::Arch;
use qemu_tests::qemu::{Qemu, Release, Version};

use super::debian::Debian;
use super::unpack;
use crate::{paths, progress};

/// Names the QEMU to use.
const CHOOSE: &str = "XTASK_QEMU";

/// The versions that will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// This one or a later one.
    Since(Version),
    /// One of this release.
    Of(Release),
}

impl Wanted {
    /// Whether a version will do.
    pub(crate) fn fits(self, version: Version) -> bool {
        match self {
            Self::Since(oldest) => version >= oldest,
            Self::Of(release) => release.has(version),
        }
    }

    /// The release that it is about, or begins with.
    pub(crate) fn name(self) -> String {
        match self {
            Self::Since(oldest) => format!("{}.{}", oldest.major, oldest.minor),
            Self::Of(release) => release.to_string(),
        }
    }

    /// The QEMU at `path`, if it will do.
    fn probe(self, path: &Path) -> Result<Qemu> {
        let qemu = Qemu::probe(path)?;
        if !self.fits(qemu.version) {
            let version = qemu.version;
            return Err(anyhow!("{} is QEMU {version}, but {self} is needed", path.display()));
        }
        Ok(qemu)
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Since(oldest) => write!(f, "{oldest} or later"),
            Self::Of(release) => release.fmt(f),
        }
    }
}

/// Finds a QEMU for `arch` that will do, or unpacks one.
///
/// # Errors
///
/// When the chosen one cannot be used, or none can be had; the error says what to do.
pub(crate) fn ensure(arch: Arch, wanted: Wanted, chosen: Option<&Path>) -> Result<Qemu> {
    if let Some(path) = chosen {
        return wanted.probe(path).context("--qemu");
    }
    if let Some(path) = chosen_by_environment() {
        return wanted.probe(Path::new(&path)).context(CHOOSE);
    }
    let [(_, qemu)] = <[_; 1]>::try_from(ensure_each(&[arch], wanted))
        .map_err(|_| anyhow!("no answer about {}", arch.qemu()))?;
    qemu
}

fn chosen_by_environment() -> Option<OsString> {
    env::var_os(CHOOSE).filter(|path| !path.is_empty())
}

/// Whether the environment names the QEMU to use.
pub(crate) fn is_chosen_by_environment() -> bool {
    chosen_by_environment().is_some()
}

/// The same for several architectures, all of which are unpacked at once where they are missing.
pub(crate) fn ensure_each(archs: &[Arch], wanted: Wanted) -> Vec<(Arch, Result<Qemu>)> {
    let mut found: Vec<(Arch, Result<Qemu, Error>)> =
        archs.iter().map(|arch| (*arch, find(*arch, wanted))).collect();
    let missing: Vec<Arch> = found.iter().filter(|(_, qemu)| qemu.is_err()).map(|(arch, _)| *arch).collect();
    if missing.is_empty() {
        return found;
    }
    let unpacked = match Debian::detect() {
        Some(debian) => {
            let names: Vec<&str> = missing.iter().map(|arch| arch.qemu()).collect();
            progress::note(&format!(
                "{} of QEMU {wanted}: not there; the system stays as it is, and it is unpacked under target/qemu",
                names.join(", ")
            ));
            unpack::unpack(&missing, wanted, &debian).context("none could be unpacked")
        }
        None => Err(anyhow!("this is not Debian, so none is unpacked")),
    };
    let unpacked = unpacked.map_err(|error| format!("{error:#}"));
    for (arch, qemu) in &mut found {
        if let Err(before) = qemu {
            let by_hand = by_hand(*arch);
            let before = format!("{before:#}");
            *qemu = match &unpacked {
                Ok(()) => find(*arch, wanted),
                Err(why) => Err(anyhow!("{before}; {why}; install QEMU {wanted}: {by_hand}")),
            };
        }
    }
    found
}

/// The QEMU that is installed, or else the newest that was unpacked before.
///
/// # Errors
///
/// When there is none that will do.
pub(crate) fn find(arch: Arch, wanted: Wanted) -> Result<Qemu> {
    let installed = match paths::find_program(arch.qemu()) {
        Some(path) => wanted.probe(&path),
        None => Err(anyhow!("there is no {} on the search path", arch.qemu())),
    };
    installed.or_else(|error| unpacked(arch, wanted).ok_or(error))
}

/// The newest QEMU that was unpacked before; of the next Debian only where this one has none.
fn unpacked(arch: Arch, wanted: Wanted) -> Option<Qemu> {
    [unpack::home(), unpack::next_home()].iter().find_map(|home| unpacked_in(home, arch, wanted))
}

fn unpacked_in(home: &Path, arch: Arch, wanted: Wanted) -> Option<Qemu> {
    let directories = home.read_dir().ok()?;
    let scripts = directories.flatten().map(|entry| unpack::script(&entry.path(), arch));
    let qemus = scripts.filter(|script| script.is_file()).filter_map(|script| wanted.probe(&script).ok());
    qemus.max_by_key(|qemu| qemu.version)
}

/// The command that installs a QEMU on this system, as far as it is known.
fn by_hand(arch: Arch) -> String {
    let of_debian = unpack::packages(arch)[0];
    let elsewhere = match arch {
        Arch::X86_64 => "qemu-system-x86",
        Arch::Aarch64 => "qemu-system-aarch64",
        Arch::Riscv64 => "qemu-system-riscv",
    };
    let managers = [
        ("apt-get", format!("sudo apt-get install {of_debian}")),
        ("dnf", format!("sudo dnf install {elsewhere}")),
        ("pacman", format!("sudo pacman -S {elsewhere}")),
        ("zypper", format!("sudo zypper install {elsewhere}")),
        ("apk", format!("sudo apk add {}", arch.qemu())),
        ("brew", "brew install qemu".to_owned()),
    ];
    let known = managers.into_iter().find(|(manager, _)| paths::find_program(manager).is_some());
    known.map_or_else(|| "see the system's documentation".to_owned(), |(_, line)| line)
}
