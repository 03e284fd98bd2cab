//! What a device tried and was not allowed to: records with their owner, a storm that is limited, and a device that is
//! suspended.
//!
//! `cargo run -p virtio-iommu --example faults`

#[expect(dead_code, reason = "this device does not read")]
mod support;

use std::error::Error;

use support::{DISK, Machine, NETWORK};
use virtio_iommu::{DomainOptions, EndpointOptions, Interrupt, Viommu};

/// What this kernel knows its devices by.
const NAMES: [&str; 2] = ["the disk", "the network card"];

fn main() -> Result<(), Box<dyn Error>> {
    let (machine, viommu) = Machine::start()?;
    let mut views = Vec::new();
    for (tag, endpoint) in [DISK, NETWORK].into_iter().enumerate() {
        let domain = viommu.create_domain(DomainOptions::default())?;
        views.push(viommu.open(
            endpoint,
            &domain,
            EndpointOptions { tag: Some(tag), ..Default::default() },
        )?);
    }

    println!("the disk writes where nothing is mapped for it:");
    assert!(machine.device_writes(DISK, 0xdead_0000, &[1]).is_err());
    // The kernel's interrupt handler, and what it wakes.
    assert_ne!(viommu.on_interrupt(), Interrupt::NotOurs);
    show(&viommu);

    println!("the network card does so 500 times:");
    for access in 0..500_u64 {
        let _ = machine.device_writes(NETWORK, 0xbad0_0000 + access * 4096, &[1]);
        viommu.poll();
    }
    show(&viommu);
    println!("  the device reported {} of its accesses in all", viommu.fault_count(NETWORK));

    println!("it is suspended:");
    viommu.suspend(NETWORK)?;
    println!("  suspended: {}, the disk: {}", viommu.is_suspended(NETWORK), viommu.is_suspended(DISK));
    viommu.resume(NETWORK)?;
    println!("  and back: {}", !viommu.is_suspended(NETWORK));

    let counts = viommu.stats().faults;
    println!("{counts:?}");
    Ok(())
}

/// Fetches what there is, and shows the first of it.
fn show(viommu: &Viommu<Machine>) {
    viommu.poll();
    let mut fetched = 0;
    while let Some(fault) = viommu.next_fault() {
        if fetched == 0 {
            let name = fault.tag.and_then(|tag| NAMES.get(tag)).unwrap_or(&"somebody");
            println!("  {name}: {fault}");
        }
        fetched += 1;
    }
    println!("  {fetched} records were kept");
}
