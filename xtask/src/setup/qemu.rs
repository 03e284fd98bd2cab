//! Which QEMU to use.
//!
//! In this order: the one that was named, the one on the search path if it is recent enough, one that was unpacked
//! before, and on Debian one that is unpacked now.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use qemu_tests::machine::Arch;
use qemu_tests::qemu::{Qemu, Version};

use super::debian::Debian;
use super::unpack;
use crate::{paths, progress};

/// Names the QEMU to use.
const CHOOSE: &str = "XTASK_QEMU";

/// Finds a QEMU for `arch` that is not older than `oldest`, or unpacks one.
///
/// # Errors
///
/// When the chosen one cannot be used, or none can be had; the error says what to do.
pub(crate) fn ensure(arch: Arch, oldest: Version, chosen: Option<&Path>) -> Result<Qemu> {
    if let Some(path) = chosen {
        return Qemu::probe_since(path, oldest).context("--qemu");
    }
    if let Some(path) = env::var_os(CHOOSE).filter(|path| !path.is_empty()) {
        return Qemu::probe_since(Path::new(&path), oldest).context(CHOOSE);
    }
    let installed = match paths::find_program(arch.qemu()) {
        Some(path) => match Qemu::probe_since(&path, oldest) {
            Ok(qemu) => return Ok(qemu),
            Err(error) => format!("{error:#}"),
        },
        None => format!("there is no {} on the search path", arch.qemu()),
    };
    if let Some(qemu) = unpacked(arch, oldest) {
        return Ok(qemu);
    }
    let Some(debian) = Debian::detect() else {
        bail!("{installed}; install QEMU {oldest} or later: {}", by_hand(arch));
    };
    progress::note(&format!(
        "{installed}; the system stays as it is, and a QEMU is unpacked under target/qemu"
    ));
    let error = match unpack::unpack(arch, &debian) {
        Ok(qemu) if qemu.version >= oldest => return Ok(qemu),
        Ok(qemu) => anyhow!("the mirror has QEMU {}, but {oldest} or later is needed", qemu.version),
        Err(error) => error,
    };
    Err(error.context(format!("{installed}, and none could be unpacked; install one: {}", by_hand(arch))))
}

/// The newest QEMU that was unpacked before.
fn unpacked(arch: Arch, oldest: Version) -> Option<Qemu> {
    let directories = unpack::home().read_dir().ok()?;
    let scripts = directories.flatten().map(|entry| unpack::script(&entry.path(), arch));
    let qemus = scripts
        .filter(|script: &PathBuf| script.is_file())
        .filter_map(|script| Qemu::probe_since(&script, oldest).ok());
    qemus.max_by_key(|qemu| qemu.version)
}

/// The command that installs a QEMU on this system, as far as it is known.
fn by_hand(arch: Arch) -> String {
    let package = match arch {
        Arch::X86_64 => "qemu-system-x86",
    };
    let managers = [
        ("apt-get", format!("sudo apt-get install {package}")),
        ("dnf", format!("sudo dnf install {package}")),
        ("pacman", format!("sudo pacman -S {package}")),
        ("zypper", format!("sudo zypper install {package}")),
        ("apk", format!("sudo apk add {}", arch.qemu())),
        ("brew", "brew install qemu".to_owned()),
    ];
    let known = managers.into_iter().find(|(manager, _)| paths::find_program(manager).is_some());
    known.map_or_else(|| "see the system's documentation".to_owned(), |(_, line)| line)
}
