//! Contexts by PASID, a stale translation, and a nested address space: a draft, over the software IOMMU.
//!
//! `cargo run -p virtio-iommu --features contexts --example contexts`

#[expect(dead_code, reason = "nothing is held back here, and devices only write")]
mod support;

use std::error::Error;

use support::{DISK, MEMORY, Machine, NETWORK};
use virtio_iommu::contexts::nested::Nest;
use virtio_iommu::contexts::table::{PageTable, TableFormat, TableOptions};
use virtio_iommu::contexts::{Anonymous, ContextsOptions, Pasid};
use virtio_iommu::{Iova, IovaRange, Options, PhysAddr, Prot, Viommu};
use virtio_iommu_model::Config;

const PAGE: u64 = 4096;
const RW: Prot = Prot::READ.union(Prot::WRITE);
/// Memory that this kernel gives to nobody else.
const BUFFERS: u64 = MEMORY + (4 << 20);

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options { accept_contexts: true, ..Options::default() };
    let (machine, viommu) = Machine::start_as(Config::contexts(), options)?;
    contexts(&machine, &viommu)?;
    nesting(&machine, &viommu)
}

/// One line of the picture.
fn show(machine: &Machine, who: &str, pasid: Option<u32>, iova: u64) {
    let way = match machine.device_writes_in(DISK, pasid, iova, &[1]) {
        Ok(()) => "allowed",
        Err(_) => "blocked",
    };
    println!("  {who:<34} {iova:#7x}  {way}");
}

fn contexts(machine: &Machine, viommu: &Viommu<Machine>) -> Result<(), Box<dyn Error>> {
    let support = viommu.context_support(DISK)?;
    println!("the disk has PASIDs of {} bits; tables of VT-d: {}", support.pasid_bits, support.vtd);
    let anonymous = Some(Anonymous::Blocked);
    let contexts = viommu.create_contexts(ContextsOptions { anonymous, ..Default::default() })?;
    viommu.attach(DISK, contexts.domain())?;

    let (one, two) = (Pasid::new(1).ok_or("PASID")?, Pasid::new(2).ok_or("PASID")?);
    let mut mapped = contexts.add_mapped(one)?;
    let table = PageTable::new(TableFormat::X86_64, viommu.clone(), TableOptions::default())?;
    let mut owned = contexts.add_owned(two, table, 0).map_err(|not_added| not_added.error)?;
    // SAFETY: the buffers are nobody else's, and the disk may write them at any time.
    unsafe {
        mapped.map(Iova::new(0x1000), PhysAddr::new(BUFFERS), PAGE, RW)?;
        owned.map(Iova::new(0x2000), PhysAddr::new(BUFFERS + PAGE), 2 * PAGE, RW)?;
    }
    println!("the disk's domain, and what it tries:");
    for iova in [0x1000, 0x2000] {
        show(machine, "no PASID, anonymous: blocked", None, iova);
        show(machine, "PASID 1, MAP and UNMAP", Some(1), iova);
        show(machine, "PASID 2, a page table", Some(2), iova);
        show(machine, "PASID 3, no context", Some(3), iova);
    }

    println!("a page goes from the table:");
    let page = IovaRange::from_len(Iova::new(0x2000), PAGE).ok_or("range")?;
    owned.unmap_later(page)?;
    show(machine, "PASID 2, not invalidated", Some(2), 0x2000);
    owned.invalidate()?;
    show(machine, "PASID 2, invalidated", Some(2), 0x2000);
    show(machine, "PASID 2, the page beside it", Some(2), 0x3000);
    owned.remove().map_err(|(_, error)| error)?;
    mapped.remove().map_err(|(_, error)| error)?;
    viommu.detach(DISK)?;
    Ok(())
}

fn nesting(machine: &Machine, viommu: &Viommu<Machine>) -> Result<(), Box<dyn Error>> {
    let mut nest = Nest::new(viommu.clone());
    let guest = nest.add_root();
    let inner = nest.add_child(guest)?;
    let deepest = nest.add_child(inner)?;
    nest.attach(NETWORK, deepest)?;
    nest.map(deepest, Iova::new(0x7000), Iova::new(0x5000), PAGE, RW)?;
    nest.map(inner, Iova::new(0x5000), Iova::new(0x10_0000), PAGE, RW)?;
    println!("three levels, 0x7000 -> 0x5000 -> 0x100000 -> memory:");
    let reach = |machine: &Machine| machine.device_writes(NETWORK, 0x7008, &[1]).is_ok();
    println!("  before the guest has the memory: {} shadows, {}", nest.shadows(deepest), reach(machine));
    // What the guest would be told.
    viommu.poll();
    let last = core::iter::from_fn(|| viommu.next_fault()).last().ok_or("no fault")?;
    let fault = nest.explain(&last).ok_or("nobody's fault")?;
    println!(
        "  fault at {} of its own, since at {} nothing is mapped",
        fault.seen.address, fault.blamed.address
    );
    // SAFETY: as above.
    unsafe { nest.map_memory(guest, Iova::new(0x10_0000), PhysAddr::new(BUFFERS), PAGE, RW)? };
    println!("  with it: {} shadow, {}", nest.shadows(deepest), reach(machine));
    nest.unmap(guest, IovaRange::from_len(Iova::new(0x10_0000), PAGE).ok_or("range")?)?;
    println!("  taken away again: {} shadows, {}", nest.shadows(deepest), reach(machine));
    Ok(())
}
