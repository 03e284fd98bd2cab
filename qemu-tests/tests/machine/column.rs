//! The columns of the matrix: a machine on a QEMU.
//!
//! The environment names a kernel and some QEMUs for each architecture. Each of the architecture's machines is tried on each
//! QEMU; where that cannot be, the column says why, and so does every case in it.

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};

use qemu_tests::boot::NEEDS_CONTEXTS;
use qemu_tests::machine::{Arch, Iommu, Machine, Need};
use qemu_tests::qemu::Qemu;

/// Begins the name of the variable with the kernel image; that of the architecture follows.
const KERNEL: &str = "QEMU_TESTS_KERNEL_";
/// The same for a kernel that is built with its feature `contexts`.
const KERNEL_WITH_CONTEXTS: &str = "QEMU_TESTS_KERNEL_WITH_CONTEXTS_";
/// The same for the QEMUs, as the search path has its directories.
const QEMU: &str = "QEMU_TESTS_QEMU_";
/// The same for QEMUs that should be there and are not: a line for each, `RELEASE: WHY`.
const MISSING: &str = "QEMU_TESTS_MISSING_";
/// The same for the QEMU that has an IOMMU over vhost-user, and why there is none.
const VHOST_QEMU: &str = "QEMU_TESTS_VHOST_QEMU_";
const VHOST_MISSING: &str = "QEMU_TESTS_VHOST_MISSING_";
/// Names the program that serves that IOMMU.
const VHOST_SERVER: &str = "QEMU_TESTS_VHOST_SERVER";
/// What is said where the environment names nothing.
const NOT_SET: &str = "`cargo xtask test --tier machine` names kernels and QEMUs, and runs these tests";

/// A machine on a QEMU.
#[derive(Clone, Debug)]
pub(crate) struct Column {
    pub(crate) arch: Arch,
    pub(crate) iommu: Iommu,
    /// The release of QEMU: `7.2`, or a word in place of it.
    release: String,
    /// Whether this is the newest QEMU on which there is the machine.
    pub(crate) newest: bool,
    /// What it takes to run, or why that is not to be had.
    pub(crate) host: Result<Host, String>,
}

/// What it takes to run a case.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    kernels: Kernels,
    pub(crate) qemu: Qemu,
    /// What serves an IOMMU over vhost-user.
    pub(crate) iommu_server: Option<PathBuf>,
}

/// The kernel images.
#[derive(Clone, Debug)]
struct Kernels {
    standard: PathBuf,
    with_contexts: PathBuf,
}

impl Kernels {
    /// Those that the environment names for an architecture.
    fn of(arch: &str) -> Result<Self, String> {
        let named = |prefix: &str| match env::var_os(format!("{prefix}{arch}")).map(PathBuf::from) {
            Some(kernel) if kernel.is_file() => Ok(kernel),
            Some(kernel) => Err(format!("there is no kernel at {}", kernel.display())),
            None => Err(format!("{prefix}{arch} names no kernel")),
        };
        Ok(Self { standard: named(KERNEL)?, with_contexts: named(KERNEL_WITH_CONTEXTS)? })
    }

    fn of_scenario(&self, scenario: &str) -> &Path {
        if NEEDS_CONTEXTS.contains(&scenario) { &self.with_contexts } else { &self.standard }
    }
}

impl fmt::Display for Column {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.arch.name(), self.transport(), self.release)
    }
}

impl Column {
    /// The three words of its name.
    pub(crate) fn words(&self) -> [&str; 3] {
        [self.arch.name(), self.transport(), &self.release]
    }

    /// The machine without anything that a case adds, with the kernel that has the scenario.
    pub(crate) fn machine(&self, host: &Host, scenario: &str) -> Machine {
        let kernel = host.kernels.of_scenario(scenario).to_owned();
        Machine { iommu: self.iommu, ..Machine::new(self.arch, kernel) }
    }

    /// Where a case leaves its files.
    pub(crate) fn directory(&self, case: &str) -> PathBuf {
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(self.to_string()).join(case)
    }

    fn transport(&self) -> &'static str {
        match self.iommu {
            Iommu::Pci => "pci",
            Iommu::Mmio | Iommu::TwoMmio => "mmio",
            Iommu::VhostUser => "vhost",
            Iommu::Off => "none",
        }
    }
}

/// Every column that the environment asks for; where it asks for none, one for each architecture that says so.
pub(crate) fn all() -> Vec<Column> {
    let columns: Vec<Column> = Arch::ALL.into_iter().flat_map(of_arch).collect();
    if !columns.is_empty() {
        return columns;
    }
    let nothing = |arch| Column {
        arch,
        iommu: Iommu::Pci,
        release: "none".to_owned(),
        newest: true,
        host: Err(NOT_SET.to_owned()),
    };
    Arch::ALL.into_iter().map(nothing).collect()
}

/// The columns of one architecture.
fn of_arch(arch: Arch) -> Vec<Column> {
    let name = arch.name().to_uppercase();
    let variable = |prefix: &str| env::var_os(format!("{prefix}{name}"));
    let kernels = Kernels::of(&name);
    let qemus = variable(QEMU).unwrap_or_default();
    let missing = variable(MISSING).unwrap_or_default().to_string_lossy().into_owned();
    let there: Vec<Result<Qemu, String>> = env::split_paths(&qemus)
        .filter(|path| !path.as_os_str().is_empty())
        .map(|path| Qemu::probe_recent(&path).map_err(|error| format!("{error:#}")))
        .collect();
    let absent: Vec<(&str, &str)> = missing.lines().filter_map(|line| line.split_once(": ")).collect();
    if there.is_empty() && absent.is_empty() {
        return Vec::new();
    }
    let mut columns = Vec::new();
    for iommu in [Iommu::Pci, Iommu::Mmio] {
        if let Err(why) = Need::of(arch, iommu) {
            let (release, host) = ("any".to_owned(), Err(why.to_owned()));
            columns.push(Column { arch, iommu, release, newest: false, host });
            continue;
        }
        columns.extend(there.iter().map(|qemu| column(arch, iommu, &kernels, qemu.clone())));
        columns.extend(absent.iter().map(|(release, why)| {
            let (release, host) = ((*release).to_owned(), Err((*why).to_owned()));
            Column { arch, iommu, release, newest: false, host }
        }));
    }
    columns.extend(over_vhost_user(arch, &kernels));
    let version = |column: &Column| column.host.as_ref().ok().map(|host| host.qemu.version);
    for iommu in [Iommu::Pci, Iommu::Mmio] {
        let able = columns.iter_mut().filter(|column| column.iommu == iommu && column.host.is_ok());
        if let Some(newest) = able.max_by_key(|column| version(column)) {
            newest.newest = true;
        }
    }
    columns
}

/// The column with an IOMMU over vhost-user, if the environment says anything of it.
fn over_vhost_user(arch: Arch, kernels: &Result<Kernels, String>) -> Option<Column> {
    let iommu = Iommu::VhostUser;
    let name = arch.name().to_uppercase();
    let variable = |prefix: &str| env::var_os(format!("{prefix}{name}"));
    if let Some(path) = variable(VHOST_QEMU) {
        let qemu = Qemu::probe_recent(Path::new(&path)).map_err(|error| format!("{error:#}"));
        let mut column = column(arch, iommu, kernels, qemu);
        let server = env::var_os(VHOST_SERVER).map(PathBuf::from);
        match (&mut column.host, server) {
            (Ok(host), Some(server)) => host.iommu_server = Some(server),
            (host @ Ok(_), None) => *host = Err(format!("{VHOST_SERVER} names no program")),
            (Err(_), _) => {}
        }
        return Some(column);
    }
    let why = variable(VHOST_MISSING)?.to_string_lossy().into_owned();
    let (release, why) = why.split_once(": ").unwrap_or(("any", &why));
    Some(Column { arch, iommu, release: release.to_owned(), newest: false, host: Err(why.to_owned()) })
}

fn column(arch: Arch, iommu: Iommu, kernels: &Result<Kernels, String>, qemu: Result<Qemu, String>) -> Column {
    let release = match &qemu {
        Ok(qemu) => format!("{}.{}", qemu.version.major, qemu.version.minor),
        Err(_) => "unknown".to_owned(),
    };
    Column { arch, iommu, release, newest: false, host: host(arch, iommu, kernels, qemu) }
}

fn host(
    arch: Arch,
    iommu: Iommu,
    kernels: &Result<Kernels, String>,
    qemu: Result<Qemu, String>,
) -> Result<Host, String> {
    let need = Need::of(arch, iommu)?;
    let qemu = qemu?;
    if qemu.version < need.oldest {
        return Err(need.why.to_owned());
    }
    Ok(Host { kernels: kernels.clone()?, qemu, iommu_server: None })
}
