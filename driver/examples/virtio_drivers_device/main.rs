//! An unmodified driver of the `virtio-drivers` crate behind the IOMMU: its ring and its buffers are reached by addresses
//! that the IOMMU translates, and by no others.
//!
//! `cargo run -p virtio-iommu --example virtio_drivers_device`

mod entropy;
#[expect(dead_code, reason = "one device, and the IOMMU answers at once")]
#[path = "../support/mod.rs"]
mod support;

use std::error::Error;
use std::ptr::NonNull;
use std::sync::OnceLock;

use entropy::EntropyDevice;
use support::{DISK, MEMORY, Machine};
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE};
use virtio_iommu::bridge::virtio_drivers::{IommuHal, PlatformTransport};
use virtio_iommu::{DomainOptions, EndpointOptions, Platform, dma_slot};

dma_slot!(
    /// The source of entropy, which has the disk's place here.
    Entropy
);

static MACHINE: OnceLock<Machine> = OnceLock::new();

/// The `Hal` that the kernel had before there was an IOMMU.
struct KernelHal;

// SAFETY: fresh, zeroed pages of the machine's.
unsafe impl Hal for KernelHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (u64, NonNull<u8>) {
        let memory = MACHINE.get().and_then(|machine| machine.dma_alloc(pages * PAGE_SIZE, PAGE_SIZE));
        memory.map_or((0, NonNull::dangling()), |memory| (memory.phys.get(), memory.ptr))
    }

    unsafe fn dma_dealloc(_: u64, _: NonNull<u8>, _: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(_: u64, _: usize) -> NonNull<u8> {
        unreachable!("this machine has no registers in memory")
    }

    unsafe fn share(_: NonNull<[u8]>, _: BufferDirection) -> u64 {
        unreachable!("behind the IOMMU buffers bounce")
    }

    unsafe fn unshare(_: u64, _: NonNull<[u8]>, _: BufferDirection) {}
}

fn main() -> Result<(), Box<dyn Error>> {
    let (machine, viommu) = Machine::start()?;
    MACHINE.set(machine.clone()).map_err(|_| "there is a machine already")?;
    let domain = viommu.create_domain(DomainOptions::default())?;
    let options = EndpointOptions { bounce_bytes: 16 * PAGE_SIZE, ..EndpointOptions::default() };
    Entropy::fill(viommu.open(DISK, &domain, options)?).map_err(|_| "the slot is filled")?;

    let before = viommu.stats();
    let transport = PlatformTransport::<_, Entropy>::new(EntropyDevice::new(machine.clone(), DISK));
    let mut driver = VirtIORng::<IommuHal<KernelHal, Entropy>, _>::new(transport)?;
    let ready = viommu.stats();
    println!("the driver is up: {} pieces of ring memory mapped", ready.maps - before.maps);

    let mut bytes = [0; 16];
    let len = driver.request_entropy(&mut bytes)?;
    println!("{len} bytes of entropy: {bytes:02x?}");
    println!("requests to the IOMMU for that: {}", viommu.stats().requests - ready.requests);

    let reached = machine.device_writes(DISK, MEMORY, &[1]).is_ok();
    println!(
        "the device writes to memory that is not its own: {}",
        if reached { "reached" } else { "blocked" }
    );
    drop(driver);
    println!("the driver is gone: {} unmapped", viommu.stats().unmaps - before.unmaps);
    Ok(())
}
