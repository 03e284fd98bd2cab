//! The QEMUs that the machine tier runs on: the oldest release that is promised, and a newer one.

use anyhow::{Error, Result, anyhow};
use qemu_tests::machine::{Arch, Iommu};
use qemu_tests::qemu::{OLDEST, Qemu, Release, Version};

use super::SetupArguments;
use super::qemu::{self, Wanted};

/// What each architecture is to run on.
const WANTED: [Wanted; 2] = [
    Wanted::Of(Release { major: OLDEST.major, minor: Some(OLDEST.minor) }),
    Wanted::Since(Version { major: 10, minor: 0, micro: 0 }),
];

/// The architecture whose machine has an IOMMU over vhost-user too.
pub(crate) const VHOST_USER: Arch = Arch::X86_64;

/// What there is for one architecture.
#[derive(Debug)]
pub(crate) struct Found {
    /// The architecture.
    pub(crate) arch: Arch,
    /// What it can run on, each version once.
    pub(crate) qemus: Vec<Qemu>,
    /// What it should run on too.
    pub(crate) missing: Vec<Missing>,
}

/// A release that is not to be had.
#[derive(Debug)]
pub(crate) struct Missing {
    /// Its name.
    pub(crate) release: String,
    /// Why it is not, in one line.
    pub(crate) why: String,
}

/// Whether the user chose the one QEMU to run on.
pub(crate) fn is_chosen(arguments: &SetupArguments) -> bool {
    arguments.qemu.is_some() || qemu::is_chosen_by_environment()
}

/// Finds, or unpacks, the QEMUs for `archs`; only the one that was chosen, if one was.
pub(crate) fn find(archs: &[Arch], arguments: &SetupArguments) -> Vec<Found> {
    let mut found: Vec<Found> =
        archs.iter().map(|arch| Found { arch: *arch, qemus: Vec::new(), missing: Vec::new() }).collect();
    if is_chosen(arguments) {
        let wanted = Wanted::Since(OLDEST);
        for found in &mut found {
            found.take(wanted, qemu::ensure(found.arch, wanted, arguments.qemu.as_deref()));
        }
        return found;
    }
    let release = arguments.qemu_version.map(Wanted::Of);
    let wanted: &[Wanted] = release.as_ref().map_or(&WANTED, std::slice::from_ref);
    for wanted in wanted {
        let each = qemu::ensure_each(archs, *wanted);
        for (found, (_, qemu)) in found.iter_mut().zip(each) {
            found.take(*wanted, qemu);
        }
    }
    for found in &mut found {
        // Where there is neither, what the system has must do.
        if found.qemus.is_empty() && release.is_none() {
            found.qemus.extend(qemu::find(found.arch, Wanted::Since(OLDEST)));
        }
    }
    found
}

/// The same for the machine with an IOMMU over vhost-user, if it is one of `archs`. The one that was chosen is not for
/// it if it is older.
pub(crate) fn find_for_vhost_user(
    archs: &[Arch],
    arguments: &SetupArguments,
) -> Option<Result<Qemu, Missing>> {
    if !archs.contains(&VHOST_USER) {
        return None;
    }
    if !cfg!(target_os = "linux") {
        return Some(Err(missing("11", &anyhow!("there is no vhost-user but on Linux"))));
    }
    let qemu = super::qemu(VHOST_USER, Iommu::VhostUser, arguments);
    Some(qemu.map_err(|error| missing("11", &error)))
}

impl Found {
    fn take(&mut self, wanted: Wanted, qemu: Result<Qemu>) {
        match qemu {
            Ok(qemu) if self.qemus.contains(&qemu) => {}
            Ok(qemu) => self.qemus.push(qemu),
            Err(error) => self.missing.push(missing(&wanted.name(), &error)),
        }
    }
}

fn missing(release: &str, error: &Error) -> Missing {
    Missing { release: release.to_owned(), why: format!("{error:#}").replace('\n', " ") }
}
