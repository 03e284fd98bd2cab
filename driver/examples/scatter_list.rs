//! A scatter list: pages from all over memory, side by side for the device, mapped by one doorbell.
//!
//! `cargo run -p virtio-iommu --example scatter_list`

#[expect(dead_code, reason = "one device, which only reads")]
mod support;

use std::error::Error;

use support::{DISK, Machine};
use virtio_iommu::{Direction, DmaDevice, DomainOptions, EndpointOptions, Iova, PhysSegment, Platform};

fn main() -> Result<(), Box<dyn Error>> {
    let (machine, viommu) = Machine::start()?;
    let domain = viommu.create_domain(DomainOptions::default())?;
    let disk = viommu.open(DISK, &domain, EndpointOptions::default())?;

    // Eight pages, of which two pairs touch.
    let mut segments = Vec::new();
    for number in 0..8_u8 {
        let page = machine.dma_alloc(4096, 4096).ok_or("no memory")?;
        // SAFETY: a fresh page.
        unsafe { page.ptr.write_bytes(b'a' + number, page.len) };
        segments.push(PhysSegment { phys: page.phys, len: page.len });
        if number % 4 != 0 {
            // What lies between is somebody else's.
            machine.dma_alloc(4096, 4096).ok_or("no memory")?;
        }
    }

    let before = viommu.stats();
    let mut iovas = vec![Iova::new(0); segments.len()];
    // SAFETY: the pages are this list's until it is unmapped.
    let mapping = unsafe { disk.map_scatter(&segments, Direction::ToDevice, &mut iovas) }?;
    let mapped = viommu.stats();
    for (segment, iova) in segments.iter().zip(&iovas) {
        println!("{} is at {iova} for the device", segment.phys);
    }
    println!("{} MAPs by {} doorbell", mapped.maps - before.maps, mapped.kicks - before.kicks);

    // For the device they are one piece.
    let read = machine.device_reads(DISK, mapping.iova().get(), mapping.len_bytes());
    let read = read.map_err(|error| format!("{error:?}"))?;
    let firsts: Vec<u8> = read.iter().step_by(4096).copied().collect();
    println!("the device reads {:#x} bytes in one go: {}", read.len(), String::from_utf8_lossy(&firsts));

    disk.unmap(mapping)?;
    let unmapped = viommu.stats();
    println!("all of it gone by {} request", unmapped.requests - mapped.requests);
    Ok(())
}
