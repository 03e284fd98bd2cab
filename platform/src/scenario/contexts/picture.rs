//! What people read: the domain with its contexts, and what each lets through.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use virtio_iommu::EndpointId;
use virtio_iommu_model::Access;

use super::access::LEN;
use super::descriptors::Arrangement;
use super::space::Kind;
use super::{AGENT, NO_CONTEXT, OTHER_AGENT, OWN, PAGE, READ_ONLY, SHARED, World};
use crate::println;

/// Draws the domain.
pub(super) fn contexts(world: &World) {
    let domain = world.contexts.domain().id().get();
    println!();
    let device = world.agents.device();
    println!("  agent, endpoint {:#x} --- domain {domain} of {device}", AGENT.get());
    println!("                           |");
    for space in &world.spaces {
        let pasid = space.kind.pasid().map_or_else(|| "no PASID".into(), |pasid| format!("PASID {pasid}"));
        println!("                           +-- {pasid:<9} {}", space.describe());
    }
    println!("                           '-- PASID {NO_CONTEXT:<3} none");
}

/// Tries each address in each context, in both directions, and draws what came of it.
pub(super) fn matrix(world: &World) {
    let columns = Kind::ALL.map(Kind::pasid);
    println!();
    println!("  address     no PASID   PASID 1    PASID 2    PASID 3    PASID 4    PASID {NO_CONTEXT}");
    println!("              MAP        x86-64     Sv39       VMSAv8-64  MAP        none");
    let own = (0..Kind::ALL.len()).map(|at| OWN + at as u64 * PAGE);
    for iova in [SHARED, READ_ONLY].into_iter().chain(own) {
        let mut line = format!("  {iova:<#10x}  ");
        for pasid in columns.into_iter().chain([Some(NO_CONTEXT)]) {
            line.push_str(&format!("{:<11}", tried(world, AGENT, pasid, iova)));
        }
        println!("{}", line.trim_end());
    }
    println!();
    world.forget_faults();
}

/// What came of each address in each context.
pub(super) fn all_tried(world: &World) -> Vec<&'static str> {
    let columns = Kind::ALL.map(Kind::pasid).into_iter().chain([Some(NO_CONTEXT)]);
    let own = (0..Kind::ALL.len()).map(|at| OWN + at as u64 * PAGE);
    let rows = [SHARED, READ_ONLY].into_iter().chain(own);
    let tried = rows.flat_map(|iova| columns.clone().map(move |pasid| tried(world, AGENT, pasid, iova)));
    let tried = tried.collect();
    world.forget_faults();
    tried
}

/// Draws what each arrangement of descriptors lets through.
pub(super) fn descriptors(lines: &[String]) {
    println!();
    println!(
        "another agent, endpoint {:#x}, whose contexts are found by descriptors, reaches for",
        OTHER_AGENT.get()
    );
    println!(
        "{SHARED:#x} without a PASID, by those of PASID 0 and 1, by a far one, and by one more without a context:"
    );
    println!();
    lines.iter().for_each(|line| println!("{line}"));
    println!();
}

/// Tries an address by each PASID, and without one.
pub(super) fn by_descriptors(world: &World, arrangement: Arrangement, pasids: &[u32]) -> String {
    let mut line = format!("  {:<26}", arrangement.name);
    for pasid in [None].into_iter().chain(pasids.iter().map(|pasid| Some(*pasid))) {
        let by = pasid.map_or_else(|| "none".into(), |pasid| format!("{pasid}"));
        line.push_str(&format!("{by:>4}: {:<11}", tried(world, OTHER_AGENT, pasid, SHARED)));
    }
    world.forget_faults();
    line.trim_end().into()
}

/// What an agent may do: by reading, and by writing back what it read.
fn tried(world: &World, agent: EndpointId, pasid: Option<u32>, iova: u64) -> &'static str {
    let mut bytes = [0; LEN];
    let read = world.access(agent, pasid, iova, Access::Read(&mut bytes)).is_ok();
    let write = world.access(agent, pasid, iova, Access::Write(&bytes)).is_ok();
    match (read, write) {
        (true, true) => "read+write",
        (true, false) => "read",
        (false, true) => "write",
        (false, false) => "blocked",
    }
}

/// Draws what changed on the way.
pub(super) fn told(world: &World) {
    println!();
    for line in &world.told {
        println!("  {line}");
    }
    println!();
}
