//! A device's first steps behind an IOMMU: attached to a domain, memory mapped for it, an access that is blocked.
//!
//! `cargo run -p virtio-iommu --example attach_and_map`

#[expect(dead_code, reason = "the device answers at once")]
mod support;

use std::error::Error;

use support::{DISK, Machine, NETWORK};
use virtio_iommu::{Direction, DmaDevice, DomainOptions, EndpointOptions, Platform};

fn main() -> Result<(), Box<dyn Error>> {
    let (machine, viommu) = Machine::start()?;
    println!("the IOMMU maps {} in granules of {:#x} bytes", viommu.input_range(), viommu.granule());

    // A domain of its own. A kernel turns the device's bus mastering on after this.
    let domain = viommu.create_domain(DomainOptions::default())?;
    let disk = viommu.open(DISK, &domain, EndpointOptions::default())?;
    println!("endpoint {DISK} is attached to domain {}", domain.id());

    // Memory that the driver and the device share, such as a ring.
    let ring = disk.alloc_coherent(4096)?;
    println!("its ring is at {} for the device", ring.iova());
    machine.device_writes(DISK, ring.iova().get(), b"done").map_err(|error| format!("{error:?}"))?;
    // SAFETY: inside of the ring, and the device is quiet.
    let word = unsafe { ring.ptr().cast::<[u8; 4]>().read_volatile() };
    println!("the device wrote {:?} there", String::from_utf8_lossy(&word));

    // A buffer that the kernel has already, in place, for the device to read.
    let buffer = machine.dma_alloc(0x2000, 0x1000).ok_or("no memory")?;
    // SAFETY: whole pages, which nobody else uses until they are unmapped.
    let mapping = unsafe { disk.map(buffer.phys, buffer.len, Direction::ToDevice) }?;
    let at = mapping.iova().get();
    println!("{:#x} bytes at {} are at {} for the device", buffer.len, buffer.phys, mapping.iova());
    println!("  the device reads them: {}", outcome(machine.device_reads(DISK, at, 16).is_ok()));
    println!("  and writes to them: {}", outcome(machine.device_writes(DISK, at, &[1]).is_ok()));
    println!("  another device reads them: {}", outcome(machine.device_reads(NETWORK, at, 16).is_ok()));
    disk.unmap(mapping)?;
    println!("  the device reads them, unmapped: {}", outcome(machine.device_reads(DISK, at, 16).is_ok()));

    disk.free_coherent(ring)?;
    disk.close()?;
    let stats = viommu.stats();
    println!(
        "{} requests by {} doorbells, {} mapped, {} unmapped",
        stats.requests, stats.kicks, stats.maps, stats.unmaps
    );
    Ok(())
}

fn outcome(reached: bool) -> &'static str {
    if reached { "reached" } else { "blocked" }
}
