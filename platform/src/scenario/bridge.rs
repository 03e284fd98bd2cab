//! The unmodified device drivers of `virtio-drivers`, each through the bridge: disk, network, entropy source, console.
//!
//! The crate's drivers of the last two wait without a bound of their own: the harness's deadline is the bound.

use alloc::format;
use alloc::string::{String, ToString};

use virtio_iommu::Options;

use super::default::{ENTROPY_BOUNCE_BYTES, text};
use super::setup::Opened;
use super::work::{self, Bench};
use super::{give_up, setup, show};
use crate::boot::BootInfo;
use crate::devices::virtio::console::{self, Console, ConsoleSlot};
use crate::devices::virtio::{self, CONSOLE, ENTROPY, Entropy, EntropySlot, Undroppable, VENDOR};
use crate::memory::frames;
use crate::pci::function::BusMaster;
use crate::report::Report;

/// How a device is opened, used and closed, and what came of it.
type Run = fn(&Bench<'_>, &mut Report) -> Result<String, String>;

/// Each device, and the name of its check.
const DEVICES: [(&str, Run); 4] =
    [("disk", disk), ("net", network), ("entropy", entropy), ("console", write_to_console)];
/// Checks around those of the devices.
const CHECKS: usize = 2;

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS + DEVICES.len());
    let (machine, iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    let bench = match Bench::new(&machine, &iommu, info) {
        Ok(bench) => bench,
        Err(error) => give_up(report, "iommu", error),
    };
    show::live(&iommu, &mut report);
    let before = frames::usage();
    for (name, device) in DEVICES {
        match device(&bench, &mut report) {
            Ok(detail) => report.check(name, true, detail),
            Err(error) => give_up(report, name, error),
        };
    }
    show::nothing_left(&iommu, before, &mut report);
    show::totals(&iommu, &mut report);
    report.end()
}

fn disk(bench: &Bench<'_>, _: &mut Report) -> Result<String, String> {
    work::run(bench, work::disk::open, 1).map(|row| row.to_string())
}

fn network(bench: &Bench<'_>, report: &mut Report) -> Result<String, String> {
    let row = work::run(bench, work::net::open, 1)?;
    report.value("net.rounds", row.done.rounds, "rounds");
    Ok(row.to_string())
}

fn entropy(bench: &Bench<'_>, _: &mut Report) -> Result<String, String> {
    let function = setup::find(bench.machine, VENDOR, ENTROPY, "entropy source")?;
    let Opened { domain, endpoint, .. } = bench.open(function, ENTROPY_BOUNCE_BYTES, "entropy")?;
    EntropySlot::fill(endpoint).map_err(|_| "its slot is filled already")?;
    let mut source = Undroppable::new(Entropy::new(bench.machine, function).map_err(text)?);
    bench.machine.pci.set_bus_master(function.address, BusMaster::On);
    let mut bytes = [[0; 64]; 2];
    for part in &mut bytes {
        let len = source.read(part).map_err(text)?;
        if len != part.len() {
            return Err(format!("{len} bytes instead of {}", part.len()));
        }
    }
    // SAFETY: the slot's only driver, of this function; the slot was filled when it was opened.
    unsafe { virtio::close::<_, EntropySlot>(bench.machine, function, source) }?;
    match bytes {
        [first, second] if first != second && first != [0; 64] => Ok(format!("2 times 64 bytes, {domain:?}")),
        _ => Err("bytes that are not random".into()),
    }
}

fn write_to_console(bench: &Bench<'_>, report: &mut Report) -> Result<String, String> {
    let function = setup::find(bench.machine, VENDOR, CONSOLE, "console")?;
    let Opened { domain, endpoint, .. } = bench.open(function, console::BOUNCE_BYTES, "console")?;
    ConsoleSlot::fill(endpoint).map_err(|_| "its slot is filled already")?;
    let mut console = Undroppable::new(Console::new(bench.machine, function).map_err(text)?);
    bench.machine.pci.set_bus_master(function.address, BusMaster::On);
    // What the harness looks for, and from where it knows the domain.
    let line = format!("seed {:#x} by way of domain {}\n", bench.seed, domain.id());
    console.write(line.as_bytes()).map_err(text)?;
    report.value("console.domain", domain.id().get().into(), "domain");
    // SAFETY: the slot's only driver, of this function; the slot was filled when it was opened.
    unsafe { virtio::close::<_, ConsoleSlot>(bench.machine, function, console) }?;
    Ok(format!("{} bytes, {domain:?}", line.len()))
}
