//! Nested spaces: the same call of the innermost driver at each depth, down to QEMU's device.
//!
//! ```text
//! depth 3   driver -> model -> nest, driver -> model -> nest, driver -> QEMU's device
//! depth 2                      driver       -> model -> nest, driver -> QEMU's device
//! depth 1                                               driver       -> QEMU's device
//! ```

use alloc::string::String;

use virtio_iommu::{Domain, DomainOptions, EndpointId, Iova, Options, PhysAddr, Platform, Prot, Viommu};

use super::super::meter::Meter;
use super::super::rows::{End, Rig, keep_if_failed};
use super::super::text;
use super::below::Below;
use crate::guest::{Guest, NestedIommu};
use crate::memory::dma::DmaPages;

const PAGE: u64 = 4096;
/// Where a guest finds its memory, and how much it has.
const GUEST_BASE: u64 = 0x4000_0000;
const GUEST_PAGES: usize = 256;
/// What a guest gives to its own guest.
const INNER_PAGES: usize = 4;
const READ_WRITE: Prot = Prot::READ.union(Prot::WRITE);
/// What is mapped and unmapped.
const TRIED: u64 = 0x1800_0000;

/// A guest, whose virtio-iommu is nested in another one.
struct Inside<P: Platform> {
    guest: Guest,
    nested: NestedIommu<P>,
    driver: Viommu<Guest>,
}

impl<P: Platform> Inside<P> {
    /// Offers an IOMMU to a guest, and starts the guest's driver. `pages` of the guest's memory are at `memory` of what the
    /// outer driver maps.
    fn new(
        outer: &Viommu<P>,
        guest: Guest,
        memory: PhysAddr,
        pages: u64,
        endpoint: EndpointId,
    ) -> Result<Self, String> {
        // It lives as long as the kernel: what its devices reach is never given back.
        core::mem::forget(guest.clone());
        let nested = NestedIommu::new(outer, guest.clone(), &[endpoint]);
        let (root, base) = (nested.memory(), Iova::new(GUEST_BASE));
        // SAFETY: memory of a guest's, which is never freed, and which nothing uses but the accesses that are mapped.
        unsafe { nested.with_nest(|nest| nest.map_memory(root, base, memory, pages * PAGE, READ_WRITE)) }
            .map_err(text)?;
        let staged =
            Viommu::start(nested.device().clone(), guest.clone(), Options::default()).map_err(text)?;
        staged.introduce(endpoint).map_err(text)?;
        Ok(Self { guest, nested, driver: staged.go_live().map_err(text)? })
    }
}

/// The driver of the machine's IOMMU alone.
pub(super) fn one(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let page = DmaPages::allocate(1).map_err(text)?;
    let (viommu, target) = (&rig.iommu.viommu, PhysAddr::new(page.phys()));
    let mut below = Below::nothing();
    let measured = map_unmap(viommu, rig.idle, target, "nested_map_unmap_depth1", &mut below, meter);
    keep_if_failed(measured, page)
}

/// A guest's driver on it.
pub(super) fn two(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let guest = outer_guest(rig)?;
    let mut below = Below::device(meter, guest.nested.device(), &[guest.nested.mapping()]);
    let target = PhysAddr::new(guest.guest.allocate(1, 1).map_err(text)?);
    map_unmap(&guest.driver, rig.idle, target, "nested_map_unmap_depth2", &mut below, meter)?;
    Ok(End::Measured)
}

/// The driver of a guest of that guest.
pub(super) fn three(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let outer = outer_guest(rig)?;
    let memory = PhysAddr::new(outer.guest.allocate(INNER_PAGES, 1).map_err(text)?);
    // Its driver's rings are elsewhere: only its own device reaches them, and that is software.
    let guest = Guest::new(GUEST_BASE, GUEST_PAGES, 1).map_err(text)?;
    let inner = Inside::new(&outer.driver, guest, memory, INNER_PAGES as u64, rig.idle)?;
    let layers = [inner.nested.mapping(), outer.nested.device().doorbells(), outer.nested.mapping()];
    let mut below = Below::device(meter, inner.nested.device(), &layers);
    let target = PhysAddr::new(GUEST_BASE);
    map_unmap(&inner.driver, rig.idle, target, "nested_map_unmap_depth3", &mut below, meter)?;
    Ok(End::Measured)
}

fn outer_guest(rig: &Rig) -> Result<Inside<crate::iommu::KernelPlatform>, String> {
    let guest = Guest::new(GUEST_BASE, GUEST_PAGES, 1).map_err(text)?;
    let memory = PhysAddr::new(guest.phys());
    Inside::new(&rig.iommu.viommu, guest, memory, GUEST_PAGES as u64, rig.idle)
}

/// Maps and unmaps a page in a domain of its own, as a nest does in its shadow.
fn map_unmap<P: Platform>(
    driver: &Viommu<P>,
    endpoint: EndpointId,
    target: PhysAddr,
    name: &'static str,
    below: &mut Below<'_>,
    meter: &mut Meter,
) -> Result<(), String> {
    let domain: Domain<P> = driver.create_domain(DomainOptions::default()).map_err(text)?;
    driver.attach(endpoint, &domain).map_err(text)?;
    let iova = Iova::new(TRIED);
    meter.measure([name], 1, |laps| {
        below.during(|| {
            laps.time(0, || {
                // SAFETY: the caller's page, which is kept where this fails.
                unsafe { domain.map_at(iova, target, PAGE, READ_WRITE) }.map_err(text)?;
                // SAFETY: mapped in the line above.
                unsafe { domain.unmap(iova, PAGE) }.map_err(text)
            })
        })
    })?;
    below.state(meter, name);
    driver.detach(endpoint).map_err(text)
}
