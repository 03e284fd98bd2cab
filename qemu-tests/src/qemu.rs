//! A QEMU binary that can be started, and its version.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::process;

/// The oldest QEMU whose virtio-iommu does what the x86_64 scenarios need.
pub const OLDEST: Version = Version { major: 7, minor: 2, micro: 0 };

/// How long a QEMU may take to print its version.
const VERSION_DEADLINE: Duration = Duration::from_secs(20);

/// A version of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number; 0 where QEMU prints none.
    pub micro: u32,
}

impl Version {
    /// Reads the version out of what `qemu-system-… --version` prints.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once("QEMU emulator version ")?;
        let digits: &str = rest.split(|c: char| c != '.' && !c.is_ascii_digit()).next()?;
        let mut numbers = digits.split('.').map(|number| number.parse().ok());
        let major = numbers.next()??;
        let minor = numbers.next()??;
        let micro = numbers.next().flatten().unwrap_or(0);
        Some(Self { major, minor, micro })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A QEMU for one architecture.
///
/// A value proves that the binary ran once and printed its version. Where a QEMU was unpacked beside the system, `path`
/// is a small script that sets the library path, the module directory and the data directories.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    /// The program to start.
    pub path: PathBuf,
    /// What it said its version is.
    pub version: Version,
}

impl Qemu {
    /// Asks the program at `path` for its version.
    ///
    /// # Errors
    ///
    /// When it cannot be started, takes too long, or does not print a version of QEMU.
    pub fn probe(path: &Path) -> Result<Self> {
        let mut command = Command::new(path);
        command.arg("--version");
        let output = process::capture(&mut command, VERSION_DEADLINE)
            .with_context(|| format!("cannot run {} --version", path.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        match Version::parse(&text) {
            Some(version) => Ok(Self { path: path.to_owned(), version }),
            None => bail!(
                "{} is not a QEMU: it printed {:?}",
                path.display(),
                text.lines().next().unwrap_or("nothing")
            ),
        }
    }

    /// Asks the program for its version and refuses one older than [`OLDEST`].
    ///
    /// # Errors
    ///
    /// As [`Self::probe`], and when it is too old.
    pub fn probe_recent(path: &Path) -> Result<Self> {
        Self::probe_since(path, OLDEST)
    }

    /// Asks the program for its version and refuses one older than `oldest`.
    ///
    /// # Errors
    ///
    /// As [`Self::probe`], and when it is too old.
    pub fn probe_since(path: &Path, oldest: Version) -> Result<Self> {
        let qemu = Self::probe(path)?;
        if qemu.version < oldest {
            bail!("{} is QEMU {}, but {oldest} or later is needed", path.display(), qemu.version);
        }
        Ok(qemu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_distributions_print_them() {
        let debian = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright (c)";
        assert_eq!(Version::parse(debian), Some(Version { major: 10, minor: 0, micro: 2 }));
        let own = "QEMU emulator version 9.1.50 (v9.1.0-1-gdeadbeef)";
        assert_eq!(Version::parse(own), Some(Version { major: 9, minor: 1, micro: 50 }));
        assert_eq!(
            Version::parse("QEMU emulator version 8.2"),
            Some(Version { major: 8, minor: 2, micro: 0 })
        );
        assert_eq!(Version::parse("QEMU emulator version new"), None);
        assert_eq!(Version::parse("GNU bash, version 5.2"), None);
        assert_eq!(Version::parse(""), None);
    }

    #[test]
    fn ten_is_newer_than_seven() {
        assert!(Version { major: 10, minor: 0, micro: 0 } > OLDEST);
        assert!(Version { major: 7, minor: 1, micro: 9 } < OLDEST);
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Qemu::probe(Path::new("/nonexistent/qemu")).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/qemu"));
    }
}
