//! Unpacks Debian's QEMU packages beside the system.
//!
//! apt gets a state of its own, in which nothing is installed, and so downloads QEMU with every library down to libc.
//! The packages are unpacked into one directory, and a script starts QEMU there by its own dynamic loader. No root is
//! needed, nothing of the system changes, and a later run needs no network.
//!
//! ```text
//! target/qemu/VERSION/root/...                       the packages' files
//! target/qemu/VERSION/bin/qemu-system-ARCH           the script
//! target/qemu/unpacking/                             an attempt; it becomes VERSION by a rename once QEMU ran
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use qemu_tests::machine::Arch;
use qemu_tests::qemu::Qemu;

use super::apt::{self, Source};
use super::debian::{APT_LIMIT, Debian};
use crate::{command, paths, progress};

/// How long one package may take to unpack.
const UNPACK_LIMIT: Duration = Duration::from_secs(120);
/// The data directories of QEMU that packages may bring.
const DATA: [&str; 3] = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];

/// Where unpacked QEMUs are.
pub(crate) fn home() -> PathBuf {
    paths::target().join("qemu")
}

/// The script that starts the QEMU for `arch` in `directory`.
pub(crate) fn script(directory: &Path, arch: Arch) -> PathBuf {
    directory.join("bin").join(arch.qemu())
}

/// The packages that hold the QEMUs that are unpacked together.
fn packages(arch: Arch) -> &'static [&'static str] {
    match arch {
        Arch::X86_64 => &["qemu-system-x86"],
    }
}

/// Downloads and unpacks the newest QEMU that the machine's own mirror has for this release.
///
/// # Errors
///
/// When the mirror cannot be found or reached, or what it has does not run.
pub(crate) fn unpack(arch: Arch, debian: &Debian) -> Result<Qemu> {
    let sources = apt::sources(Path::new("/etc/apt"), &debian.codename);
    if sources.is_empty() {
        bail!("the apt sources of this machine name no mirror for {}", debian.codename);
    }
    // Whatever an interrupted attempt left behind.
    let attempt = home().join("unpacking");
    if attempt.exists() {
        fs::remove_dir_all(&attempt).with_context(|| format!("cannot remove {}", attempt.display()))?;
    }
    let backports = format!("{}-backports", debian.codename);
    let apt = Apt::new(&attempt.join("apt"))?;
    let archives = match apt.download(&sources, debian, Some(&backports), packages(arch)) {
        Ok(archives) => archives,
        Err(error) => {
            progress::note(&format!("{backports} cannot be used ({error:#}); trying {}", debian.codename));
            apt.download(&sources, debian, None, packages(arch))?
        }
    };
    let root = attempt.join("root");
    progress::during(&format!("unpacking {} packages", archives.len()), || extract(&archives, &root))?;
    write_script(&attempt, arch)?;
    let version =
        Qemu::probe_recent(&script(&attempt, arch)).context("the unpacked QEMU does not run")?.version;
    fs::remove_dir_all(attempt.join("apt")).context("cannot remove the downloaded packages")?;
    let directory = home().join(version.to_string());
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("cannot replace {}", directory.display()))?;
    }
    fs::rename(&attempt, &directory).with_context(|| format!("cannot make {}", directory.display()))?;
    progress::note(&format!("QEMU {version} is in {}", directory.display()));
    Qemu::probe_recent(&script(&directory, arch))
}

/// An apt with a configuration and a state of its own.
struct Apt {
    directory: PathBuf,
}

impl Apt {
    fn new(directory: &Path) -> Result<Self> {
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

    /// Downloads `packages` and all that they need; returns the files.
    fn download(
        &self,
        sources: &[Source],
        debian: &Debian,
        backports: Option<&str>,
        packages: &[&str],
    ) -> Result<Vec<PathBuf>> {
        let suites: Vec<String> =
            [debian.codename.as_str()].into_iter().chain(backports).map(str::to_owned).collect();
        let entries: Vec<String> = sources.iter().map(|source| source.entry(&suites)).collect();
        fs::write(self.directory.join("sources/qemu.sources"), entries.join("\n"))
            .context("cannot write apt's sources")?;
        let what = format!("reading the package lists of {}", suites.join(" and "));
        progress::during(&what, || self.get(&["update", "--error-on=any"]))?;
        let mut install = vec!["install", "--download-only", "-y"];
        if let Some(backports) = backports {
            install.extend(["-t", backports]);
        }
        install.extend(packages);
        progress::during(&format!("downloading {} and its libraries", packages.join(" ")), || {
            self.get(&install)
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

    fn get(&self, arguments: &[&str]) -> Result<String> {
        let mut apt = Command::new("apt-get");
        apt.env("APT_CONFIG", self.directory.join("apt.conf")).env("LC_ALL", "C").arg("-q").args(arguments);
        command::output(&mut apt, APT_LIMIT)
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
