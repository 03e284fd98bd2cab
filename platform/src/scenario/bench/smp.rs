//! Four CPUs that map and unmap at once, each in a domain of its own: what that takes of the device.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use spin::Mutex;
use virtio_iommu::{Direction, DmaDevice, DomainOptions, Endpoint, PhysAddr};

use super::meter::Meter;
use super::rows::{End, Rig};
use super::text;
use crate::cpus::{CpuError, Team};
use crate::iommu::KernelPlatform;
use crate::memory::dma::DmaPages;
use crate::scenario::default::close;
use crate::scenario::setup;

const CPUS: usize = 4;
/// What each maps and unmaps.
const TURNS: usize = 64;
const TIMEOUT_NS: u64 = 20_000_000_000;

/// One CPU's endpoint, and the page that it maps.
struct Place {
    endpoint: Endpoint<KernelPlatform>,
    page: PhysAddr,
    len: usize,
}

/// Instructions of several CPUs are no figure: only what they ask of the device is.
pub(super) fn run(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    if !meter.counts_requests() {
        return Ok(End::NotMeasured("only its requests matter"));
    }
    let mut team = match Team::start(&rig.machine.firmware, CPUS) {
        Err(CpuError::TooFew { .. }) => return Ok(End::NotMeasured("the machine has fewer than four CPUs")),
        team => team.map_err(text)?,
    };
    let functions = rig.machine.pci.functions().iter().filter(|function| {
        let id = rig.iommu.endpoint(function);
        !function.is_bridge() && id.is_some() && id != Some(rig.idle) && id != Some(rig.opened.id)
    });
    let mut places = Vec::new();
    for function in functions.take(CPUS) {
        let opened = setup::open_in(&rig.iommu, function, 0, DomainOptions::default()).map_err(text)?;
        // Never freed: where an unmapping fails the device still reaches it.
        let page = DmaPages::allocate(1).map_err(text)?;
        let len = page.len_bytes();
        places.push(Place { endpoint: opened.endpoint, page: PhysAddr::new(page.into_raw()), len });
    }
    if places.len() < CPUS {
        return Err(format!("{} functions are free, {CPUS} are needed", places.len()));
    }
    let (places, failure) = (Arc::new(places), Arc::new(Mutex::new(None)));
    meter.measure(["smp4"], (CPUS * TURNS) as u64, |laps| {
        let (mine, failed) = (Arc::clone(&places), Arc::clone(&failure));
        let work = Arc::new(move |cpu: usize| {
            if let Err(error) = turns(&mine[cpu]) {
                failed.lock().get_or_insert(format!("CPU {cpu}: {error}"));
            }
        });
        laps.time(0, || team.run(work, TIMEOUT_NS)).map_err(text)?;
        failure.lock().take().map_or(Ok(()), Err)
    })?;
    for place in places.iter() {
        close(&rig.iommu, place.endpoint.clone())?;
    }
    Ok(End::Measured)
}

fn turns(place: &Place) -> Result<(), String> {
    let device: &dyn DmaDevice = &place.endpoint;
    for _ in 0..TURNS {
        // SAFETY: the page is this CPU's, and never freed.
        let mapping = unsafe { device.map(place.page, place.len, Direction::Both) }.map_err(text)?;
        device.unmap(mapping).map_err(text)?;
    }
    Ok(())
}
