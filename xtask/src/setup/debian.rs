//! What kind of system this is, as far as installing things goes.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::{command, paths, progress};

/// How long apt may take for one command.
pub(crate) const APT_LIMIT: Duration = Duration::from_secs(900);

/// A Debian system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Debian {
    /// Its codename, such as `bookworm`.
    pub(crate) codename: String,
}

/// Releases by their codenames, each with the next one, whose packages may be newer than any for it.
const NEXT: [(&str, &str); 1] = [("bookworm", "trixie")];

impl Debian {
    /// The release after this one.
    pub(crate) fn next(&self) -> Option<Self> {
        let (_, next) = NEXT.into_iter().find(|(codename, _)| *codename == self.codename)?;
        Some(Self { codename: next.to_owned() })
    }

    /// This system, if it is Debian's.
    pub(crate) fn detect() -> Option<Self> {
        Self::parse(&fs::read_to_string("/etc/os-release").ok()?)
    }

    fn parse(os_release: &str) -> Option<Self> {
        let field = |name: &str| {
            let value = os_release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
            Some(value.trim().trim_matches('"').to_owned())
        };
        let codename = field("VERSION_CODENAME").filter(|name| !name.is_empty())?;
        (field("ID")? == "debian").then_some(Self { codename })
    }
}

/// Installs packages with apt, as root or by way of a sudo that asks nothing.
///
/// # Errors
///
/// When neither is possible, with the command to type, or when apt fails.
pub(crate) fn install(packages: &[&str], what_for: &str) -> Result<()> {
    let by_hand = format!("apt-get update && apt-get install {}", packages.join(" "));
    let Some(prefix) = privilege() else {
        bail!("{what_for} needs packages that only root can install; type: sudo sh -c '{by_hand}'");
    };
    progress::note(&format!("installing the Debian packages {} for {what_for}", packages.join(" ")));
    let apt = |arguments: &[&str]| {
        let words = prefix.iter().copied().chain(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]);
        let words: Vec<&str> = words.chain(arguments.iter().copied()).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        command
    };
    progress::during("apt-get update", || command::output(&mut apt(&["update"]), APT_LIMIT))?;
    let mut install = apt(&["install", "-y", "--no-install-recommends"]);
    install.args(packages);
    progress::during("apt-get install", || command::output(&mut install, APT_LIMIT))?;
    Ok(())
}

/// The words that make a command run as root; none if there is no way without a password.
fn privilege() -> Option<&'static [&'static str]> {
    let limit = Duration::from_secs(10);
    let user = command::output(Command::new("id").arg("-u"), limit).ok()?;
    if user.trim() == "0" {
        return Some(&[]);
    }
    paths::find_program("sudo")?;
    command::output(Command::new("sudo").args(["-n", "true"]), limit).ok()?;
    Some(&["sudo", "-n"])
}

/// Whether a file is there.
pub(crate) fn has(path: &str) -> bool {
    Path::new(path).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_is_known_by_its_os_release() {
        let bookworm =
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(Debian::parse(bookworm), Some(Debian { codename: "bookworm".into() }));
        let quoted = "ID=\"debian\"\nVERSION_CODENAME=\"trixie\"\n";
        assert_eq!(Debian::parse(quoted), Some(Debian { codename: "trixie".into() }));
    }

    #[test]
    fn only_what_is_known_comes_next() {
        let debian = |codename: &str| Debian { codename: codename.to_owned() };
        assert_eq!(debian("bookworm").next(), Some(debian("trixie")));
        assert_eq!(debian("trixie").next(), None);
    }

    #[test]
    fn others_are_not_debian() {
        assert_eq!(Debian::parse("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n"), None);
        assert_eq!(Debian::parse("ID=debian\nPRETTY_NAME=sid\n"), None);
        assert_eq!(Debian::parse(""), None);
    }
}
