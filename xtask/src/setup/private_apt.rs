//! An apt with a configuration and a state of its own, in which nothing is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use qemu_tests::qemu::Version;

use super::apt::Source;
use super::debian::APT_LIMIT;
use crate::{command, progress};

/// An apt that knows some suites of a mirror.
pub(crate) struct Apt {
    directory: PathBuf,
}

/// A package in a suite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Its name.
    pub(crate) package: String,
    /// The version of the program in it.
    pub(crate) version: Version,
    /// The suite.
    pub(crate) suite: String,
}

impl Apt {
    /// Makes one in `directory`.
    ///
    /// # Errors
    ///
    /// When that cannot be written, or its name is beyond apt.
    pub(crate) fn new(directory: &Path) -> Result<Self> {
        let text = directory.to_str().filter(|text| !text.contains(['"', '\\', '\n']));
        let text = text.with_context(|| format!("apt cannot be told the path {}", directory.display()))?;
        for part in ["state/lists/partial", "cache/archives/partial", "sources", "parts"] {
            fs::create_dir_all(directory.join(part)).with_context(|| format!("cannot make {text}/{part}"))?;
        }
        fs::write(directory.join("status"), "").context("cannot write apt's state")?;
        // The system's settings for reaching the mirror stay; its hooks, which clean up and refresh other things, do not.
        let dump = command::output(Command::new("apt-config").arg("dump"), Duration::from_secs(30))?;
        let reach: Vec<&str> = dump.lines().filter(|line| line.starts_with("Acquire::")).collect();
        let own = [
            format!("Dir::State \"{text}/state\";"),
            format!("Dir::State::status \"{text}/status\";"),
            format!("Dir::Cache \"{text}/cache\";"),
            "Dir::Etc::main \"/dev/null\";".to_owned(),
            format!("Dir::Etc::parts \"{text}/parts\";"),
            "Dir::Etc::sourcelist \"/dev/null\";".to_owned(),
            format!("Dir::Etc::sourceparts \"{text}/sources\";"),
            "Dir::Etc::preferences \"/dev/null\";".to_owned(),
            format!("Dir::Etc::preferencesparts \"{text}/parts\";"),
            format!("Dir::Log \"{text}\";"),
            "APT::Sandbox::User \"root\";".to_owned(),
            "APT::Install-Recommends \"false\";".to_owned(),
            "Acquire::Retries \"3\";".to_owned(),
        ];
        let configuration = format!("{}\n{}\n", reach.join("\n"), own.join("\n"));
        fs::write(directory.join("apt.conf"), configuration).context("cannot write apt's configuration")?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// Reads the package lists of `suites`.
    ///
    /// # Errors
    ///
    /// When one of them cannot be read.
    pub(crate) fn update(&self, sources: &[Source], suites: &[String]) -> Result<()> {
        let entries: Vec<String> = sources.iter().map(|source| source.entry(suites)).collect();
        fs::write(self.directory.join("sources/qemu.sources"), entries.join("\n"))
            .context("cannot write apt's sources")?;
        let what = format!("reading the package lists of {}", suites.join(" and "));
        progress::during(&what, || self.apt("apt-get", &["update", "--error-on=any"])).map(drop)
    }

    /// The versions that there are of these packages, in each suite.
    ///
    /// # Errors
    ///
    /// When apt does not answer.
    pub(crate) fn candidates(&self, packages: &[&str]) -> Result<Vec<Candidate>> {
        let listed = self.apt("apt-cache", &[&["madison"], packages].concat())?;
        Ok(listed.lines().filter_map(candidate).collect())
    }

    /// Downloads `packages` of `suite` and all that they need; returns the files.
    ///
    /// # Errors
    ///
    /// When that fails.
    pub(crate) fn download(&self, suite: &str, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let install = ["install", "--download-only", "-y", "-t", suite];
        progress::during(&format!("downloading {} and what they need", packages.join(" ")), || {
            self.apt("apt-get", &[&install, packages].concat())
        })?;
        let files =
            fs::read_dir(self.directory.join("cache/archives")).context("cannot list what was downloaded")?;
        let mut archives: Vec<PathBuf> = files.flatten().map(|entry| entry.path()).collect();
        archives.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
        archives.sort();
        if archives.is_empty() {
            bail!("apt downloaded nothing");
        }
        Ok(archives)
    }

    fn apt(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut apt = Command::new(program);
        apt.env("APT_CONFIG", self.directory.join("apt.conf")).env("LC_ALL", "C").arg("-q").args(arguments);
        command::output(&mut apt, APT_LIMIT)
    }
}

/// Reads ` PACKAGE | EPOCH:VERSION+DEBIAN | URI SUITE/main ARCHITECTURE Packages`.
fn candidate(line: &str) -> Option<Candidate> {
    let mut fields = line.split('|').map(str::trim);
    let (package, version, place) = (fields.next()?, fields.next()?, fields.next()?);
    let version = version.split_once(':').map_or(version, |(_, version)| version);
    let suite = place.split_whitespace().nth(1)?.split('/').next()?;
    let version = Version::of_digits(version)?;
    Some(Candidate { package: package.to_owned(), version, suite: suite.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_as_apt_lists_them() {
        let line = "qemu-system-arm | 1:10.0.2+ds-2+deb13u1~bpo12+1 | http://mirror.invalid/debian bookworm-backports/main amd64 Packages";
        let expected = Candidate {
            package: "qemu-system-arm".into(),
            version: Version { major: 10, minor: 0, micro: 2 },
            suite: "bookworm-backports".into(),
        };
        assert_eq!(candidate(line), Some(expected));
        let line = "   opensbi |      1.1-2 | http://mirror.invalid/debian bookworm/main amd64 Packages";
        let found = candidate(line).unwrap();
        assert_eq!((found.package.as_str(), found.suite.as_str()), ("opensbi", "bookworm"));
        assert_eq!(found.version, Version { major: 1, minor: 1, micro: 0 });
    }

    #[test]
    fn odd_lines_are_nothing() {
        for line in ["", "|", "a | b | c", "a | 1:x | u s/main", "a | 1.2 | u"] {
            assert_eq!(candidate(line), None, "{line}");
        }
    }
}
