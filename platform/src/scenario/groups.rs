//! Two devices, wherever they are: apart where they can be kept apart, and else in one domain.
//!
//! Apart, each has a domain of its own, and `edu` is blocked where it reaches for memory of the other's. Together, a domain
//! for each is refused, and in one they share all of their memory: that is the truth about them, and no IOMMU changes it.

use alloc::format;
use alloc::string::{String, ToString};

use virtio_iommu::{Domain, DomainOptions, Endpoint, EndpointOptions, Iova, Options, PhysAddr, Prot};

use super::attack::{Arena, LEN, OFFSET, PAGE, SECRET};
use super::default::{close, copy_through, text};
use super::setup::{self, Opened, find};
use super::{give_up, show};
use crate::boot::BootInfo;
use crate::devices::edu::{self, Edu};
use crate::devices::entropy::{BUFFER_BYTES, Entropy};
use crate::devices::virtio::{ENTROPY, VENDOR};
use crate::iommu::{self, Iommu, KernelPlatform};
use crate::machine::Machine;
use crate::memory::dma::DmaPages;
use crate::pci::function::{BusMaster, Function};
use crate::report::Report;

const CHECKS: usize = 8;

/// What the entropy source's domain has mapped. Nothing else is there in any domain.
const SHARED_IOVA: u64 = 0x1234_5000;

/// Whether two functions can be kept apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    Apart,
    /// In one group, of one or two endpoints.
    Together,
}

/// The other device, open.
struct Other {
    endpoint: Endpoint<KernelPlatform>,
    domain: Domain<KernelPlatform>,
    /// Whether the endpoint is its own, and not `edu`'s too.
    is_own: bool,
}

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS);
    let (machine, iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    show::iommu(&machine, &iommu);
    show::live(&iommu, &mut report);
    if let Err(error) = show_groups(&machine, &iommu, &mut report) {
        give_up(report, "groups", error);
    }
    show::totals(&iommu, &mut report);
    report.end()
}

fn show_groups(machine: &Machine, iommu: &Iommu, report: &mut Report) -> Result<(), String> {
    let groups = iommu.keep_together(machine).map_err(text)?;
    let largest = groups.iter().map(|group| group.members.len()).max().unwrap_or(0);
    report.check(
        "groups.formed",
        largest > 0,
        format_args!("{} groups, the largest of {largest} functions", groups.len()),
    );
    let function = find(machine, edu::VENDOR, edu::DEVICE, "edu device")?;
    let others_function = find(machine, VENDOR, ENTROPY, "entropy source")?;
    let both = [function.address, others_function.address];
    let share = groups.iter().any(|group| both.iter().all(|member| group.members.contains(member)));
    let relation = if share { Relation::Together } else { Relation::Apart };

    let opened = setup::open(iommu, function, 0).map_err(text)?;
    let mut edu = Edu::new(machine.map_bar(function, 0).map_err(text)?).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    let (other, told) = open_other(iommu, others_function, &opened, relation)?;
    report.check("groups.second-domain", true, told);

    let copied = copy_through(&opened.endpoint, &mut edu);
    report.check_result("groups.edu", copied, |()| "copied out and in, every byte checked");
    let random = entropy(machine, others_function, &other.endpoint);
    report.check_result("groups.entropy", random, |len| format!("{len} bytes"));
    let arena = Arena { iommu, edu: &mut edu, attacker: &opened, other: &other.domain };
    report.check_result("groups.reach", reach(arena, relation), ToString::to_string);

    machine.pci.set_bus_master(function.address, BusMaster::Off);
    let others_closed = close_other(iommu, other);
    let id = opened.id;
    let closed = others_closed.and_then(|()| close(iommu, opened.endpoint));
    report.check_result("groups.closed", closed, |()| "detached, their memory is back");
    show::nothing_lost(iommu, id, report);
    Ok(())
}

/// Opens the other device: in a domain of its own where it may have one, and where it may not, in the first one's after it
/// was refused.
fn open_other(
    iommu: &Iommu,
    function: &Function,
    first: &Opened,
    relation: Relation,
) -> Result<(Other, String), String> {
    let id = iommu.endpoint(function).ok_or("the IOMMU does not know the entropy source")?;
    let domain = iommu.viommu.create_domain(DomainOptions::default()).map_err(text)?;
    match (iommu.viommu.open(id, &domain, EndpointOptions::default()), relation) {
        (Ok(endpoint), Relation::Apart) => {
            let told = format!("endpoints {} and {id} are apart", first.id);
            Ok((Other { endpoint, domain, is_own: true }, told))
        }
        (Err(error), Relation::Together) => {
            let told = format!("refused: {error}");
            let domain = first.domain.clone();
            let is_own = id != first.id;
            let endpoint = if is_own {
                iommu.viommu.open(id, &domain, EndpointOptions::default()).map_err(text)?
            } else {
                first.endpoint.clone()
            };
            Ok((Other { endpoint, domain, is_own }, told))
        }
        (Ok(_), Relation::Together) => Err(format!("endpoint {id} of the group is in another domain")),
        (Err(error), Relation::Apart) => Err(text(error)),
    }
}

/// Asks the entropy source for a buffer of bytes.
fn entropy(
    machine: &Machine,
    function: &Function,
    endpoint: &Endpoint<KernelPlatform>,
) -> Result<usize, String> {
    let registers = iommu::transport(machine, function).map_err(text)?;
    let mut source = Entropy::new(endpoint, registers).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    let mut bytes = [0; BUFFER_BYTES];
    let answer = source.start().and_then(|()| {
        // It says itself when it waited long enough.
        loop {
            if let Some(len) = source.finish(&mut bytes)? {
                return Ok(len);
            }
            core::hint::spin_loop();
        }
    });
    source.close(endpoint).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    answer.map_err(text)
}

/// `edu` reaches for memory that the other device's domain has mapped.
fn reach(arena: Arena<'_>, relation: Relation) -> Result<String, String> {
    let mut page = DmaPages::allocate(1).map_err(text)?;
    page.fill(SECRET);
    let told = reach_page(arena, relation, &mut page);
    if told.is_err() {
        // It may still be mapped: nobody gets it any more.
        page.into_raw();
    }
    told
}

fn reach_page(mut arena: Arena<'_>, relation: Relation, page: &mut DmaPages) -> Result<String, String> {
    let (iova, at) = (Iova::new(SHARED_IOVA), SHARED_IOVA + OFFSET);
    let phys = PhysAddr::new(page.phys());
    // SAFETY: the page is the caller's, who keeps it for good unless it was unmapped with success.
    unsafe { arena.other.map_at(iova, phys, PAGE, Prot::READ | Prot::WRITE) }.map_err(text)?;
    let told = match relation {
        Relation::Together => {
            arena.write_allowed(at, page)?;
            String::from("edu writes to the other's memory: they are together")
        }
        Relation::Apart => {
            arena.drain_faults();
            arena.edu.copy_out(0, at, LEN).map_err(text)?;
            if !page.all_bytes_are(SECRET) {
                return Err("edu wrote to the other's memory".into());
            }
            arena.expect_fault(at)?.0.to_string()
        }
    };
    // SAFETY: our own mapping.
    unsafe { arena.other.unmap(iova, PAGE) }.map_err(text)?;
    Ok(told)
}

/// Closes the other endpoint, if it is one. `edu`, in the same domain, may be at work still.
fn close_other(iommu: &Iommu, other: Other) -> Result<(), String> {
    if other.is_own {
        other.endpoint.close().map_err(text)?;
        iommu.viommu.poll();
    }
    Ok(())
}
