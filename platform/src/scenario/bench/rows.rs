//! The rows: each an operation, as a device driver calls it.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use virtio_iommu::bench::RawRequest;
use virtio_iommu::{
    Direction, DmaDevice, DmaPool, Domain, DomainOptions, EndpointId, Iova, PhysAddr, PhysSegment,
    UnmapPolicy,
};

use super::disk::{self, Way};
use super::meter::Meter;
use super::smp;
use super::text;
use crate::arch::clock;
use crate::devices::virtio::{BLOCK, VENDOR};
use crate::iommu::{Iommu, KernelPlatform};
use crate::machine::Machine;
use crate::memory::dma::DmaPages;
use crate::memory::frames::FRAME_BYTES;
use crate::memory::heap;
use crate::scenario::default::close;
use crate::scenario::setup::{self, Opened, find};

/// What the rows work on.
pub(super) struct Rig {
    pub machine: Machine,
    pub iommu: Iommu,
    pub opened: Opened,
    /// An endpoint in no domain.
    pub idle: EndpointId,
    /// A domain without endpoints.
    pub empty: Domain<KernelPlatform>,
    /// Requests that no record knows.
    pub raw_requests: u64,
    /// The most live mappings to measure with.
    pub live_limit: u64,
    /// Mappings that stay.
    pub live: u64,
    /// Whether making them did not take too long so far.
    pub can_fill: bool,
    /// What was on the heap before the first of them.
    pub heap_before: Option<u64>,
}

/// How a row ended.
pub(super) enum End {
    Measured,
    /// Why there are no figures.
    NotMeasured(&'static str),
}

/// A row, or several that are measured together.
pub(super) struct Row<R> {
    pub name: &'static str,
    pub run: fn(&mut R, &mut Meter) -> Result<End, String>,
}

/// Every row, in order. Those of live mappings leave them behind.
pub(super) const ROWS: [Row<Rig>; 23] = [
    Row { name: "raw_request", run: raw_request },
    Row { name: "map_unmap_4k_strict", run: |rig, meter| strict(rig, meter, "map_unmap_4k_strict", 1) },
    Row { name: "map_unmap_64k_strict", run: |rig, meter| strict(rig, meter, "map_unmap_64k_strict", 16) },
    Row { name: "map_unmap_1m_strict", run: |rig, meter| strict(rig, meter, "map_unmap_1m_strict", 256) },
    Row { name: "map_unmap_4k_deferred", run: deferred },
    Row { name: "map_unmap_4k_deferred_other", run: deferred_others },
    Row { name: "map_unmap_4k_pool", run: pool },
    Row { name: "halves_4k_strict", run: halves },
    Row { name: "batch64", run: batch },
    Row { name: "sg64_scattered", run: scattered },
    Row { name: "sg64_contiguous", run: contiguous },
    Row { name: "sg128_scattered", run: whole_ring },
    Row { name: "sg129_scattered", run: more_than_the_ring },
    Row { name: "coherent_4k", run: coherent },
    Row { name: "attach_detach", run: attach_detach },
    Row { name: "blk_strict", run: |rig, meter| disk::run(rig, meter, Way::Strict) },
    Row { name: "blk_deferred", run: |rig, meter| disk::run(rig, meter, Way::Deferred) },
    Row { name: "blk_pool", run: |rig, meter| disk::run(rig, meter, Way::Pool) },
    Row {
        name: "map_unmap_4k_strict_live_1",
        run: |rig, meter| live(rig, meter, "map_unmap_4k_strict_live_1", 1),
    },
    Row {
        name: "map_unmap_4k_strict_live_1k",
        run: |rig, meter| live(rig, meter, "map_unmap_4k_strict_live_1k", 1_000),
    },
    Row {
        name: "map_unmap_4k_strict_live_100k",
        run: |rig, meter| live(rig, meter, "map_unmap_4k_strict_live_100k", 100_000),
    },
    Row {
        name: "map_unmap_4k_strict_live_1m",
        run: |rig, meter| live(rig, meter, "map_unmap_4k_strict_live_1m", 1_000_000),
    },
    // The last one, since the other CPUs go on waiting for work.
    Row { name: "smp4", run: smp::run },
];

const FRAME: usize = FRAME_BYTES as usize;
/// Buffers of a batch, and pages of a scatter list.
const BATCH: usize = 64;
/// Buffers that take turns: more than a domain that defers unmapping lets wait.
const OTHERS: usize = 512;
/// Requests that the ring has room for: two descriptors of [`Options`](virtio_iommu::Options) for each.
const RING: usize = 128;
/// Ticks that making live mappings may take. Where each costs as much as there are others, more of them cannot be had.
const FILL_TICKS: u64 = 20_000_000_000;

const TOO_SLOW: End = End::NotMeasured("making so many mappings takes more than 2 * 10^10 instructions");

/// One request and its answer, without any record.
fn raw_request(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let request = RawRequest::new(&rig.opened.endpoint);
    let sent = &mut rig.raw_requests;
    meter.measure(["raw_request"], 1, |laps| {
        *sent += 1;
        laps.time(0, || request.send()).map_err(text)
    })?;
    Ok(End::Measured)
}

/// Maps and unmaps one buffer of contiguous frames.
fn strict(rig: &Rig, meter: &mut Meter, name: &'static str, frames: usize) -> Result<End, String> {
    let pages = DmaPages::allocate(frames).map_err(text)?;
    let measured = map_unmap(&rig.opened.endpoint, meter, name, &pages);
    keep_if_failed(measured, pages)
}

/// The same in a domain that defers unmapping, within the bounds that it has unless it is told others. The flushes are
/// part of it. The buffer is always the same, so that most of its mappings are one that waited for a flush.
fn deferred(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    in_deferring(rig, |device| {
        let page = DmaPages::allocate(1).map_err(text)?;
        let measured = map_unmap(device, meter, "map_unmap_4k_deferred", &page);
        keep_if_failed(measured.and_then(|()| device.flush().map_err(text)), page)
    })
}

/// The same, each time with another buffer, of more than wait for a flush at a time.
fn deferred_others(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    in_deferring(rig, |device| {
        let pages = DmaPages::allocate(OTHERS).map_err(text)?;
        let mut next =
            (0..OTHERS as u64).map(|page| PhysAddr::new(pages.phys() + page * FRAME_BYTES)).cycle();
        let measured = meter.measure(["map_unmap_4k_deferred_other"], 1, |laps| {
            let phys = next.next().ok_or("no page")?;
            laps.time(0, || map_unmap_once(device, phys, FRAME))
        });
        keep_if_failed(measured.and_then(|()| device.flush().map_err(text)), pages)
    })
}

/// Works in a domain that defers unmapping.
fn in_deferring(rig: &Rig, work: impl FnOnce(&dyn DmaDevice) -> Result<End, String>) -> Result<End, String> {
    let options = DomainOptions { unmap: UnmapPolicy::Deferred(Default::default()), ..Default::default() };
    let function = find(&rig.machine, VENDOR, BLOCK, "disk")?;
    let opened = setup::open_in(&rig.iommu, function, 0, options).map_err(text)?;
    let end = work(&opened.endpoint)?;
    close(&rig.iommu, opened.endpoint)?;
    Ok(end)
}

fn map_unmap(
    device: &dyn DmaDevice,
    meter: &mut Meter,
    name: &'static str,
    pages: &DmaPages,
) -> Result<(), String> {
    let (phys, len) = (PhysAddr::new(pages.phys()), pages.len_bytes());
    meter.measure([name], 1, |laps| laps.time(0, || map_unmap_once(device, phys, len)))
}

#[inline(always)]
fn map_unmap_once(device: &dyn DmaDevice, phys: PhysAddr, len: usize) -> Result<(), String> {
    // SAFETY: the pages are the caller's, who keeps them until they are unmapped for certain, or leaks them.
    match unsafe { device.map(phys, len, Direction::Both) } {
        Ok(mapping) => device.unmap(mapping).map(drop).map_err(text),
        Err(error) => Err(text(error)),
    }
}

/// Takes a buffer from a pool, and gives it back.
fn pool(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let pool = DmaPool::new(&rig.opened.endpoint, BATCH, FRAME, Direction::Both).map_err(text)?;
    meter.measure(["map_unmap_4k_pool"], 1, |laps| {
        let iova = laps.time(0, || pool.take().map(|buffer| buffer.iova()));
        iova.map(drop).ok_or_else(|| format!("{pool:?}"))
    })?;
    pool.close().map_err(text)?;
    Ok(End::Measured)
}

/// The same in two halves.
fn halves(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let pages = DmaPages::allocate(1).map_err(text)?;
    let device: &dyn DmaDevice = &rig.opened.endpoint;
    let phys = PhysAddr::new(pages.phys());
    let measured = meter.measure(["map_4k_strict", "unmap_4k_strict"], 1, |laps| {
        // SAFETY: the page is ours, and leaked below if it may still be mapped.
        let mapping = laps.time(0, || unsafe { device.map(phys, FRAME, Direction::Both) }).map_err(text)?;
        laps.time(1, || device.unmap(mapping)).map(drop).map_err(text)
    });
    keep_if_failed(measured, pages)
}

/// Maps 64 buffers that have nothing to do with each other, then unmaps them.
fn batch(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let pages = apart(BATCH)?;
    let list = segments(&pages);
    let device: &dyn DmaDevice = &rig.opened.endpoint;
    let mut mappings = [const { None }; BATCH];
    let measured = meter.measure(["batch64_map_each", "batch64_unmap_each"], BATCH as u64, |laps| {
        // SAFETY: the pages are ours, and leaked below if they may still be mapped.
        let map = || unsafe { device.map_each(&list, Direction::Both, &mut mappings) };
        laps.time(0, map).map_err(text)?;
        laps.time(1, || device.unmap_each(&mut mappings)).map(drop).map_err(text)
    });
    keep_if_failed(measured, pages)
}

/// A list of 64 pages of which no two touch.
fn scattered(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    scattered_list(rig, meter, ["sg64_scattered_map", "sg64_scattered_unmap"], BATCH)
}

/// As many as the ring has room for.
fn whole_ring(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    counted(rig, meter, ["sg128_scattered_map", "sg128_scattered_unmap"], RING)
}

/// One more.
fn more_than_the_ring(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    counted(rig, meter, ["sg129_scattered_map", "sg129_scattered_unmap"], RING + 1)
}

fn counted(rig: &Rig, meter: &mut Meter, names: [&'static str; 2], pages: usize) -> Result<End, String> {
    if meter.counts_requests() {
        scattered_list(rig, meter, names, pages)
    } else {
        Ok(End::NotMeasured("only its requests matter"))
    }
}

fn scattered_list(
    rig: &Rig,
    meter: &mut Meter,
    names: [&'static str; 2],
    pages: usize,
) -> Result<End, String> {
    let pages = apart(pages)?;
    let measured = list_of(rig, meter, names, &segments(&pages));
    keep_if_failed(measured, pages)
}

/// A list of 64 pages that adjoin.
fn contiguous(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let pages = DmaPages::allocate(BATCH).map_err(text)?;
    let segment =
        |index| PhysSegment { phys: PhysAddr::new(pages.phys() + FRAME_BYTES * index as u64), len: FRAME };
    let list: Vec<_> = (0..BATCH).map(segment).collect();
    let measured = list_of(rig, meter, ["sg64_contiguous_map", "sg64_contiguous_unmap"], &list);
    keep_if_failed(measured, pages)
}

fn list_of(
    rig: &Rig,
    meter: &mut Meter,
    names: [&'static str; 2],
    list: &[PhysSegment],
) -> Result<(), String> {
    let device: &dyn DmaDevice = &rig.opened.endpoint;
    let mut room = [Iova::new(0); RING + 1];
    let iovas = &mut room[..list.len()];
    meter.measure(names, 1, |laps| {
        // SAFETY: the pages are the caller's, who leaks them if they may still be mapped.
        let map = || unsafe { device.map_scatter(list, Direction::Both, iovas) };
        let mapping = laps.time(0, map).map_err(text)?;
        laps.time(1, || device.unmap(mapping)).map(drop).map_err(text)
    })
}

/// Allocates and frees coherent memory, the kernel's own frame allocator and zeroing included.
fn coherent(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let device: &dyn DmaDevice = &rig.opened.endpoint;
    meter.measure(["coherent_4k"], 1, |laps| {
        laps.time(0, || {
            let memory = device.alloc_coherent(FRAME).map_err(text)?;
            device.free_coherent(memory).map(drop).map_err(text)
        })
    })?;
    Ok(End::Measured)
}

/// Attaches an endpoint to an empty domain, and detaches it.
fn attach_detach(rig: &mut Rig, meter: &mut Meter) -> Result<End, String> {
    let (viommu, idle, empty) = (&rig.iommu.viommu, rig.idle, &rig.empty);
    meter.measure(["attach_detach"], 1, |laps| {
        laps.time(0, || {
            viommu.attach(idle, empty).map_err(text)?;
            viommu.detach(idle).map_err(text)
        })
    })?;
    Ok(End::Measured)
}

/// Maps and unmaps one page beside `count` others.
fn live(rig: &mut Rig, meter: &mut Meter, name: &'static str, count: u64) -> Result<End, String> {
    if count > rig.live_limit {
        return Ok(End::NotMeasured("the command line has a lower limit of live mappings"));
    }
    if !rig.can_fill {
        return Ok(TOO_SLOW);
    }
    let before = *rig.heap_before.get_or_insert_with(heap_bytes);
    rig.opened.domain.reserve(count as usize + 16);
    // One page for all: what counts is the number of mappings.
    let page = DmaPages::allocate(1).map_err(text)?;
    let phys = PhysAddr::new(page.into_raw());
    let device: &dyn DmaDevice = &rig.opened.endpoint;
    let start = clock::ticks();
    while rig.live < count {
        // SAFETY: the page is ours, and never freed.
        let mapping = unsafe { device.map(phys, FRAME, Direction::Both) }.map_err(text)?;
        // It stays until the machine ends.
        drop(mapping);
        rig.live += 1;
        if clock::ticks().wrapping_sub(start) > FILL_TICKS {
            rig.can_fill = false;
            return Ok(TOO_SLOW);
        }
    }
    meter.report.value(&format!("{name}.heap"), heap_bytes().saturating_sub(before), "bytes");
    strict(rig, meter, name, 1)
}

fn heap_bytes() -> u64 {
    heap::allocated_bytes().unwrap_or(0) as u64
}

/// Pages of which no two touch. Of each pair of frames only the first is used.
fn apart(count: usize) -> Result<Vec<DmaPages>, String> {
    (0..count).map(|_| DmaPages::allocate(2)).collect::<Result<_, _>>().map_err(text)
}

/// The first frame of each.
fn segments(pages: &[DmaPages]) -> Vec<PhysSegment> {
    let segment = |page: &DmaPages| PhysSegment { phys: PhysAddr::new(page.phys()), len: FRAME };
    pages.iter().map(segment).collect()
}

/// Gives memory back, or keeps it for good where a device may still reach it.
pub(super) fn keep_if_failed<M>(measured: Result<(), String>, memory: M) -> Result<End, String> {
    match measured {
        Ok(()) => drop(memory),
        Err(_) => core::mem::forget(memory),
    }
    measured.map(|()| End::Measured)
}
