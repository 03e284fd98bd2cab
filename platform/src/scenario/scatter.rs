//! A scatter list: many pages by one doorbell, and away again by one request.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use virtio_iommu::{Direction, DmaDevice, Iova, PhysAddr, PhysSegment};

use super::attack::granules;
use super::default::text;
use super::setup::Opened;
use crate::devices::edu::Edu;
use crate::iommu::Iommu;
use crate::memory::dma::DmaPages;

/// Pages of the list. No two touch, so that each takes a MAP.
const PAGES: usize = 16;
/// Bytes that are read of a page.
const LEN: usize = 32;

/// Maps the list, lets `edu` read its first and last page, and unmaps it. Says how many requests and doorbells that took.
pub(super) fn run(iommu: &Iommu, opened: &Opened, edu: &mut Edu) -> Result<String, String> {
    // Of each pair of granules only the first is used.
    let pairs = (0..PAGES).map(|_| granules(iommu, 2));
    let mut pairs = pairs.collect::<Result<Vec<_>, _>>().map_err(text)?;
    for (index, pair) in pairs.iter_mut().enumerate() {
        pair.fill(index as u8 + 1);
    }
    let segment =
        |pair: &DmaPages| PhysSegment { phys: PhysAddr::new(pair.phys()), len: pair.len_bytes() / 2 };
    let list: Vec<_> = pairs.iter().map(segment).collect();
    let mut iovas = [Iova::new(0); PAGES];

    let before = iommu.viommu.stats();
    // SAFETY: the pages are ours, and on an error below they are leaked.
    let mapping = unsafe { opened.endpoint.map_scatter(&list, Direction::ToDevice, &mut iovas) };
    let mapping = mapping.map_err(text)?;
    let mapped = iommu.viommu.stats();
    let gathered = gather(&opened.endpoint, edu, &iovas);
    let read = iommu.viommu.stats();
    if let Err(error) = opened.endpoint.unmap(mapping) {
        // Still mapped: nobody gets the pages any more.
        core::mem::forget(pairs);
        return Err(text(error));
    }
    let unmapped = iommu.viommu.stats();
    gathered?;

    let counts = [
        mapped.requests - before.requests,
        mapped.kicks - before.kicks,
        unmapped.requests - read.requests,
        unmapped.kicks - read.kicks,
    ];
    if counts != [PAGES as u64, 1, 1, 1] {
        return Err(format!("MAPs, doorbells, UNMAPs, doorbells: {counts:?}"));
    }
    Ok(format!("{PAGES} scattered pages: {PAGES} MAPs by one doorbell, one UNMAP; first and last page read"))
}

/// Has `edu` read some of the first and of the last page into its buffer, and looks at what arrived.
fn gather(device: &dyn DmaDevice, edu: &mut Edu, iovas: &[Iova]) -> Result<(), String> {
    // Each transfer takes a tenth of a second.
    let picked = [0, iovas.len() - 1];
    for (place, page) in picked.into_iter().enumerate() {
        edu.copy_in(iovas[page].get(), place * LEN, LEN).map_err(text)?;
    }
    let memory = device.alloc_coherent(picked.len() * LEN).map_err(text)?;
    let copied = edu.copy_out(0, memory.iova().get(), picked.len() * LEN);
    // SAFETY: inside the memory, and the device is idle.
    let arrived = |at| unsafe { memory.ptr().add(at).read_volatile() };
    let right = |at: usize| arrived(at) == picked[at / LEN] as u8 + 1;
    let wrong = (0..picked.len() * LEN).find(|at| !right(*at));
    device.free_coherent(memory).map_err(text)?;
    copied.map_err(text)?;
    wrong.map_or(Ok(()), |at| Err(format!("byte {at:#x} did not arrive")))
}
