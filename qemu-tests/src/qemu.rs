//! A QEMU binary that can be started, and its version.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
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
        Self::of_digits(rest)
    }

    /// Reads the version that `rest` begins with: two or three numbers, and then anything.
    #[must_use]
    pub fn of_digits(rest: &str) -> Option<Self> {
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

/// A release of QEMU, such as 7.2: every version that begins with these numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Release {
    /// First number.
    pub major: u32,
    /// Second number; none stands for any.
    pub minor: Option<u32>,
}

impl Release {
    /// Whether a version is one of it.
    #[must_use]
    pub fn has(self, version: Version) -> bool {
        self.major == version.major && self.minor.is_none_or(|minor| minor == version.minor)
    }
}

impl FromStr for Release {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |digits: &str| digits.parse().map_err(|_| format!("`{text}` is not like `7.2` or `10`"));
        match text.split_once('.') {
            Some((major, minor)) => Ok(Self { major: number(major)?, minor: Some(number(minor)?) }),
            None => Ok(Self { major: number(text)?, minor: None }),
        }
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.minor {
            Some(minor) => write!(f, "{}.{minor}", self.major),
            None => write!(f, "{}", self.major),
        }
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
        let qemu = Self::probe(path)?;
        if qemu.version < OLDEST {
            bail!("{} is QEMU {}, but {OLDEST} or later is needed", path.display(), qemu.version);
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
    fn a_release_has_every_version_that_begins_like_it() {
        let version = |major, minor, micro| Version { major, minor, micro };
        let stable: Release = "7.2".parse().unwrap();
        assert!(
            stable.has(version(7, 2, 22)) && !stable.has(version(7, 1, 22)) && !stable.has(version(8, 2, 0))
        );
        let any: Release = "10".parse().unwrap();
        assert!(any.has(version(10, 0, 2)) && any.has(version(10, 1, 0)) && !any.has(version(1, 0, 0)));
        assert_eq!((stable.to_string(), any.to_string()), ("7.2".into(), "10".into()));
        for text in ["", ".", "7.", ".2", "7.2.1", "x", "-7"] {
            assert!(text.parse::<Release>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Qemu::probe(Path::new("/nonexistent/qemu")).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/qemu"));
    }
}
