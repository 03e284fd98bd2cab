//! From the boot information to a live IOMMU with endpoints that are open.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use virtio_iommu::{
    DeferredBounds, Domain, DomainOptions, Endpoint, EndpointId, EndpointOptions, OpenError, Options,
    UnmapPolicy,
};

use crate::acpi::Signature;
use crate::boot::BootInfo;
use crate::iommu::topology::{self, Topology};
use crate::iommu::{self, BringUpError, Iommu, KernelPlatform, Wrap};
use crate::machine::{DiscoverError, Firmware, Machine};
use crate::memory::frames::FRAME_BYTES;
use crate::pci::function::Function;

/// The name of the table.
const VIOT: Signature = Signature(*b"VIOT");

/// Why the machine cannot be used for the scenario.
#[derive(Debug)]
pub(super) enum SetupError {
    Machine(DiscoverError),
    Iommu(BringUpError),
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine(error) => error.fmt(f),
            Self::Iommu(error) => error.fmt(f),
        }
    }
}

/// Discovers the machine and brings the first of its IOMMUs up.
pub(super) fn bring_up(info: &BootInfo, options: Options) -> Result<(Machine, Iommu), SetupError> {
    bring_up_first(info, options, None)
}

/// The same with something before the transport.
pub(super) fn bring_up_wrapped(
    info: &BootInfo,
    options: Options,
    wrap: Wrap<'_>,
) -> Result<(Machine, Iommu), SetupError> {
    bring_up_first(info, options, Some(wrap))
}

/// Discovers the machine and brings all of its IOMMUs up, by the order of what is behind them.
pub(super) fn bring_up_all(info: &BootInfo, options: Options) -> Result<(Machine, Vec<Iommu>), SetupError> {
    let (machine, found) = discover(info)?;
    machine.pci.quiesce_all();
    let up = |found| iommu::bring_up(&machine, found, options, None).map_err(SetupError::Iommu);
    let iommus = found.iter().map(up).collect::<Result<_, _>>()?;
    Ok((machine, iommus))
}

/// Discovers the machine and its IOMMUs.
fn discover(info: &BootInfo) -> Result<(Machine, Vec<Topology>), SetupError> {
    let machine = Machine::discover(info).map_err(SetupError::Machine)?;
    let found = find_again(info, &machine)?;
    Ok((machine, found))
}

/// The IOMMUs of the machine, and what is behind them now.
pub(super) fn find_again(info: &BootInfo, machine: &Machine) -> Result<Vec<Topology>, SetupError> {
    let viot = firmware_viot(info, machine);
    let viot = viot.as_deref().map_err(Clone::clone);
    topology::find(machine, &info.command_line, viot).map_err(SetupError::Iommu)
}

fn bring_up_first(
    info: &BootInfo,
    options: Options,
    wrap: Option<Wrap<'_>>,
) -> Result<(Machine, Iommu), SetupError> {
    let (machine, found) = discover(info)?;
    let first = found.first().ok_or(SetupError::Iommu(BringUpError::NoDevice))?;
    machine.pci.quiesce_all();
    let iommu = iommu::bring_up(&machine, first, options, wrap).map_err(SetupError::Iommu)?;
    Ok((machine, iommu))
}

/// The machine's VIOT, after what the command line wants done to it: `hide=VIOT`, `viot=cut` (its last node
/// misses its end), `viot=stray` (a range names an IOMMU outside of the table).
fn firmware_viot(info: &BootInfo, machine: &Machine) -> Result<Vec<u8>, String> {
    if info.command_line.get("hide") == Some("VIOT") {
        return Err("hidden by the command line".into());
    }
    let Firmware::Acpi(tables) = &machine.firmware else { return Err("there are no ACPI tables".into()) };
    let mut table = tables.find(VIOT).map_err(|error| error.to_string())?.to_vec();
    match info.command_line.get("viot") {
        Some("cut") => table.truncate(table.len().saturating_sub(6)),
        // Offset 16 of the second node, which QEMU puts behind a header of 48 bytes and a node of 16.
        Some("stray") => table[48 + 16 + 16..][..2].fill(0xff),
        _ => {}
    }
    Ok(table)
}

/// What the command line wants domains to be made with: `policy=strict`, which is what there is without the word, or
/// `policy=deferred`, with the driver's own bounds.
pub(super) fn domain_options(info: &BootInfo) -> Result<DomainOptions, String> {
    let unmap = match info.command_line.get("policy").unwrap_or("strict") {
        "strict" => UnmapPolicy::Strict,
        "deferred" => UnmapPolicy::Deferred(DeferredBounds::default()),
        other => return Err(format!("policy={other} is not a way of unmapping; there are: strict deferred")),
    };
    Ok(DomainOptions { unmap, ..DomainOptions::default() })
}

/// The first function with these numbers, which `name` names for people.
pub(super) fn find<'m>(
    machine: &'m Machine,
    vendor: u16,
    device: u16,
    name: &str,
) -> Result<&'m Function, String> {
    machine
        .pci
        .with_id(vendor, device)
        .next()
        .ok_or_else(|| format!("no {name}: the machine has no PCI function {vendor:04x}:{device:04x}"))
}

/// An endpoint in a domain of its own.
pub(super) struct Opened {
    pub id: EndpointId,
    pub domain: Domain<KernelPlatform>,
    pub endpoint: Endpoint<KernelPlatform>,
}

/// Why an endpoint could not be opened.
#[derive(Debug)]
pub(super) enum OpenFailure {
    /// The IOMMU does not know the function.
    NotBehind,
    Domain(virtio_iommu::DomainError),
    Open(OpenError),
}

impl fmt::Display for OpenFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBehind => f.write_str("the IOMMU does not know the function"),
            Self::Domain(error) => error.fmt(f),
            Self::Open(error) => error.fmt(f),
        }
    }
}

/// Opens a function in a new domain. Its bus mastering stays off.
pub(super) fn open(iommu: &Iommu, function: &Function, bounce_bytes: usize) -> Result<Opened, OpenFailure> {
    open_in(iommu, function, bounce_bytes, DomainOptions::default())
}

/// Opens a function in a new domain that is made with `options`. Its bus mastering stays off.
pub(super) fn open_in(
    iommu: &Iommu,
    function: &Function,
    bounce_bytes: usize,
    options: DomainOptions,
) -> Result<Opened, OpenFailure> {
    let id = iommu.endpoint(function).ok_or(OpenFailure::NotBehind)?;
    let domain = iommu.viommu.create_domain(options).map_err(OpenFailure::Domain)?;
    // Its length is for granules of a frame. With larger ones each buffer takes more.
    let bounce_bytes = bounce_bytes * (iommu.viommu.granule() / FRAME_BYTES).max(1) as usize;
    let options = EndpointOptions { bounce_bytes, ..EndpointOptions::default() };
    let endpoint = iommu.viommu.open(id, &domain, options).map_err(OpenFailure::Open)?;
    Ok(Opened { id, domain, endpoint })
}
