//! `cargo xtask run`: one boot, shown as it happens.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use qemu_tests::boot::{Boot, DEFAULT_SCENARIO, DEFAULT_SEED};
use qemu_tests::machine::{self, Gdb, Iommu, Machine};

use crate::kernel::{self, Features};
use crate::setup::SetupArguments;
use crate::{Arch, backtrace, paths, progress, setup, vhost};

/// Arguments of `cargo xtask run`.
#[derive(Args)]
pub(crate) struct RunArguments {
    /// Architecture to boot
    #[arg(long, value_enum, default_value_t)]
    arch: Arch,
    /// Whether the machine has a virtio-iommu
    #[arg(long, value_enum, default_value_t)]
    iommu: Switch,
    /// What the IOMMU is reached by
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,
    /// Where the devices are
    #[arg(long, value_enum, default_value_t)]
    place: Place,
    /// How many CPUs there are
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// What the kernel is to do; it names its scenarios when it does not know one
    #[arg(long, value_name = "NAME", default_value = DEFAULT_SCENARIO)]
    scenario: String,
    /// What the disk image and everything random are made from, in hexadecimal
    #[arg(long, value_name = "HEX", value_parser = parse_seed)]
    seed: Option<u64>,
    /// More words for the kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "", hide_default_value = true)]
    append: String,
    #[command(flatten)]
    setup: SetupArguments,
    /// Let QEMU wait for gdb on port 1234; there is no deadline then
    #[arg(long)]
    gdb: bool,
    /// Keep QEMU's trace of the IOMMU in this file
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Show the lines of the protocol (`@@ ...`) too
    #[arg(long, short)]
    verbose: bool,
    /// Arguments that QEMU gets as they are
    #[arg(last = true, value_name = "QEMU ARGS")]
    extra: Vec<OsString>,
}

/// What carries the IOMMU's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Transport {
    #[default]
    Pci,
    /// virtio over MMIO, in front of the same PCI devices
    Mmio,
    /// Two of these, for a root bus each
    TwoMmio,
    /// PCI, of a device that a process beside QEMU serves: the scenario `contexts` finds its device there
    VhostUser,
}

/// Where the devices are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Place {
    #[default]
    RootBus,
    /// On the root bus, as functions of one device
    Functions,
    /// Each behind a root port of its own
    RootPorts,
    /// All below one PCIe switch
    Switch,
    /// All behind one PCIe-to-PCI bridge: one endpoint
    PciBridge,
    /// Behind root ports of a second root bus
    SecondRoot,
    /// The same, where the bus bypasses the IOMMU
    BypassingRoot,
}

impl From<Place> for machine::Place {
    fn from(place: Place) -> Self {
        match place {
            Place::RootBus => Self::RootBus,
            Place::Functions => Self::Functions,
            Place::RootPorts => Self::RootPorts,
            Place::Switch => Self::Switch,
            Place::PciBridge => Self::PciBridge,
            Place::SecondRoot => Self::SecondRoot,
            Place::BypassingRoot => Self::BypassingRoot,
        }
    }
}

/// On or off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Switch {
    #[default]
    On,
    Off,
}

/// Boots, and returns success if the guest passed and nothing speaks against it.
pub(crate) fn run(arguments: &RunArguments) -> Result<ExitCode> {
    let arch = arguments.arch.into();
    let iommu = match (arguments.iommu, arguments.transport) {
        (Switch::On, Transport::Pci) => Iommu::Pci,
        (Switch::On, Transport::Mmio) => Iommu::Mmio,
        (Switch::On, Transport::TwoMmio) => Iommu::TwoMmio,
        (Switch::On, Transport::VhostUser) => Iommu::VhostUser,
        (Switch::Off, _) => Iommu::Off,
    };
    let qemu = setup::qemu(arch, iommu, &arguments.setup)?;
    let kernel = kernel::build(arch, Features::of(&arguments.scenario))?;
    let directory = paths::target().join("run");

    let mut machine = Machine::new(arch, kernel.image);
    machine.iommu = iommu;
    machine.place = arguments.place.into();
    machine.cpus = arguments.cpus;
    machine.gdb = if arguments.gdb { Gdb::Wait } else { Gdb::Off };
    // Relative to where the user is, while QEMU's own directory may change one day.
    machine.trace = arguments.trace.as_ref().map(std::path::absolute).transpose().context("--trace")?;
    machine.extra = arguments.extra.clone();
    let mut boot = Boot::new(machine, &arguments.scenario, &directory);
    if iommu == Iommu::VhostUser {
        boot.iommu_server = Some(vhost::build_server()?);
    }
    boot.seed = arguments.seed.unwrap_or(DEFAULT_SEED);
    boot.words = arguments.append.clone();

    if arguments.gdb {
        progress::note("QEMU waits for a debugger. In another terminal:");
        progress::note(&format!(
            "  gdb {} -ex 'target remote :1234' -ex 'hbreak kernel_main' -ex continue",
            kernel.elf.display()
        ));
    }
    let outcome = boot.run(&qemu, &mut |line| {
        if arguments.verbose || !line.starts_with("@@") {
            println!("{line}");
        }
    })?;

    let stderr = outcome.stderr.trim_end();
    if !stderr.is_empty() {
        eprintln!("QEMU says:\n{stderr}");
    }
    if outcome.passed() {
        let mut line =
            format!("{} on QEMU {} in {}", arguments.scenario, qemu.version, progress::seconds(outcome.wall));
        if let Some(seen) = outcome.seen {
            line.push_str(&format!(
                "; QEMU's trace agrees: {} ATTACH, {} DETACH, {} MAP, {} UNMAP, {} kicks",
                seen.attach, seen.detach, seen.map, seen.unmap, seen.kicks
            ));
        }
        if iommu == Iommu::VhostUser {
            line.push_str("; what served the IOMMU agrees");
        }
        progress::pass(&line);
        Ok(ExitCode::SUCCESS)
    } else {
        for line in backtrace::explain(&outcome.lines, &kernel.elf) {
            println!("{line}");
        }
        progress::fail(&outcome.summary());
        Ok(ExitCode::FAILURE)
    }
}

fn parse_seed(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).map_err(|error| format!("not a hexadecimal number of 64 bits: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_hexadecimal() {
        assert_eq!(parse_seed("0x5eed"), Ok(0x5eed));
        assert_eq!(parse_seed("ffffffffffffffff"), Ok(u64::MAX));
        assert!(parse_seed("seed").is_err());
        assert!(parse_seed("").is_err());
        assert!(parse_seed("10000000000000000").is_err());
    }
}
