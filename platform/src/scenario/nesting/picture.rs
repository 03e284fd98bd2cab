//! What people read: the levels, and what passed through them.

use alloc::format;
use alloc::string::String;
use core::fmt;

use virtio_iommu::Prot;
use virtio_iommu::contexts::nested::{SpaceId, Why};

use super::World;
use super::access::{OFFSET, Way};
use crate::iommu::Iommu;
use crate::println;

/// An access that was tried, with what each level had to say at that time.
#[derive(Clone, Debug)]
pub(super) struct Row {
    what: &'static str,
    way: Way,
    iova: u64,
    child: Option<(u64, Prot)>,
    parent: Option<(u64, Prot)>,
    pub verdict: Verdict,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Arrived,
    Blocked { level: &'static str, why: Why },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Arrived => f.write_str("arrived"),
            Self::Blocked { level, why: Why::NotMapped } => write!(f, "blocked, not mapped in the {level}"),
            Self::Blocked { level, why: Why::NotAllowed } => write!(f, "blocked, not allowed in the {level}"),
        }
    }
}

impl World {
    /// What is about to be tried; its verdict is that it arrived, until that is known to be wrong.
    pub(super) fn row(&self, what: &'static str, way: Way, iova: u64) -> Row {
        let child = self.lookup(self.child, iova + OFFSET);
        let parent = child.and_then(|(target, _)| self.lookup(self.nested.memory(), target));
        Row { what, way, iova: iova + OFFSET, child, parent, verdict: Verdict::Arrived }
    }

    /// Where an address of a space leads, and what is allowed there.
    fn lookup(&self, space: SpaceId, address: u64) -> Option<(u64, Prot)> {
        self.nested.with_nest(|nest| {
            let mut mappings = nest.mappings(space).ok()?;
            let (range, target, prot) = mappings
                .find(|(range, ..)| range.start().get() <= address && address <= range.last().get())?;
            Some((target + (address - range.start().get()), prot))
        })
    }
}

/// What a level says: where it leads, and `r`, `w` or both.
fn level(entry: Option<(u64, Prot)>) -> String {
    let Some((target, prot)) = entry else { return "-".into() };
    let letter = |bit, letter| if prot.contains(bit) { letter } else { "-" };
    format!("{target:#x} {}{}", letter(Prot::READ, "r"), letter(Prot::WRITE, "w"))
}

/// Draws the levels, and a line for each access in the order in which they were tried.
pub(super) fn draw(world: &World, iommu: &Iommu) {
    let outer = &iommu.viommu;
    let (guest, domain) = (&world.guest, world.domain.id().get());
    println!();
    println!("  edu, endpoint {:#x}", world.id.get());
    println!("   |  its addresses");
    println!("  domain {domain} of the guest's virtio-iommu, in software          (child)");
    println!("   |  the guest's addresses, {:#x} and on", guest.base());
    println!("  the guest's memory, {:#x} bytes and what is lent           (parent)", guest.len_bytes());
    println!("   |  addresses of the machine, {:#x} and on", guest.phys());
    println!("  memory");
    println!(
        "  Both levels are one domain of the machine's virtio-iommu at {}: shadows, composed.",
        iommu.place
    );
    println!();
    println!(
        "  {:<24} {:<6} {:>11}    {:<15}    {:<15}    outcome",
        "", "access", "address", "child", "parent"
    );
    for Row { what, way, iova, child, parent, verdict } in &world.rows {
        println!(
            "  {what:<24} {:<6} {iova:>#11x} -> {:<15} -> {:<15} => {verdict}",
            way.name(),
            level(*child),
            level(*parent),
        );
    }
    let (inner, outer) = (world.driver.stats(), outer.stats());
    println!();
    println!("  driver        ATTACH   MAP  UNMAP  requests  kicks  faults");
    for (name, stats) in [("the guest's", inner), ("the kernel's", outer)] {
        println!(
            "  {name:<12}  {:>6}  {:>4}  {:>5}  {:>8}  {:>5}  {:>6}",
            stats.attaches, stats.maps, stats.unmaps, stats.requests, stats.kicks, stats.faults.delivered
        );
    }
    println!();
}
