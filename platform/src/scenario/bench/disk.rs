//! What an IOMMU adds to a disk's requests: the same rows behind one, and on a machine that has none.
//!
//! An operation is one request: its submission and its completion, without the wait between. Where the disk answers
//! within nothing but the host's time, a wait is no figure.
//!
//! With a pool a request's data is one piece that stays mapped, so that without an IOMMU it is one piece of frames.

use alloc::string::String;
use alloc::vec::Vec;
use core::mem;

use virtio_iommu::{DeferredBounds, Direction, DmaDevice, DmaPool, DomainOptions, Iova, UnmapPolicy};

use super::meter::Meter;
use super::rows::{End, Rig, Row};
use super::text;
use crate::devices::block::Block;
use crate::devices::dma::Dma;
use crate::devices::storage::buffer::scattered;
use crate::devices::storage::{Buffer, Operation, Request, Storage, StorageError, TIMEOUT_NS};
use crate::devices::virtio::{BLOCK, VENDOR};
use crate::machine::Machine;
use crate::memory::dma::DmaPages;
use crate::memory::frames::FRAME_BYTES;
use crate::pci::function::BusMaster;
use crate::scenario::block::open;
use crate::scenario::default::close;
use crate::scenario::setup::{self, find};
use crate::time::Deadline;

/// How a request's data comes into the disk's reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Its frames are mapped for it, and unmapped.
    Strict,
    /// The same in a domain that defers unmapping.
    Deferred,
    /// It takes a buffer of a pool, and gives it back.
    Pool,
}

/// The same rows where there is no IOMMU, and each way is the same but for the kind of memory.
pub(super) const DIRECT_ROWS: [Row<Machine>; 3] = [
    Row { name: "blk_strict", run: |machine, meter| direct(machine, meter, Way::Strict) },
    Row { name: "blk_deferred", run: |machine, meter| direct(machine, meter, Way::Deferred) },
    Row { name: "blk_pool", run: |machine, meter| direct(machine, meter, Way::Pool) },
];

/// Requests of a kind.
struct Shape {
    /// What they are called, way by way.
    names: [&'static str; 3],
    pages: usize,
    /// How many are submitted together.
    depth: usize,
}

const SHAPES: [Shape; 3] = [
    Shape { names: ["blk_4k_qd1_strict", "blk_4k_qd1_deferred", "blk_4k_qd1_pool"], pages: 1, depth: 1 },
    Shape { names: ["blk_4k_qd32_strict", "blk_4k_qd32_deferred", "blk_4k_qd32_pool"], pages: 1, depth: 32 },
    Shape {
        names: ["blk_128k_qd1_strict", "blk_128k_qd1_deferred", "blk_128k_qd1_pool"],
        pages: 32,
        depth: 1,
    },
];

/// Mappings at a time: what is in flight, what is deferred, and what is mapped for good.
const RECORDS: usize = 1024;

/// Behind the IOMMU.
pub(super) fn run(rig: &mut Rig, meter: &mut Meter, way: Way) -> Result<End, String> {
    // Without a bound of time, which here would be the time that the disk takes on the host.
    let bounds = DeferredBounds { age_ns: u64::MAX, ..DeferredBounds::default() };
    let unmap = if way == Way::Deferred { UnmapPolicy::Deferred(bounds) } else { UnmapPolicy::Strict };
    let function = find(&rig.machine, VENDOR, BLOCK, "disk")?;
    let options = DomainOptions { mappings: RECORDS, unmap, ..DomainOptions::default() };
    let opened = setup::open_in(&rig.iommu, function, 0, options).map_err(text)?;
    measure(&rig.machine, Some(&opened.endpoint), meter, way)?;
    close(&rig.iommu, opened.endpoint)?;
    Ok(End::Measured)
}

/// By physical addresses.
fn direct(machine: &Machine, meter: &mut Meter, way: Way) -> Result<End, String> {
    measure(machine, None, meter, way)?;
    Ok(End::Measured)
}

fn measure(
    machine: &Machine,
    through: Option<&dyn DmaDevice>,
    meter: &mut Meter,
    way: Way,
) -> Result<(), String> {
    let dma = through.map_or(Dma::Direct, Dma::Through);
    let function = find(machine, VENDOR, BLOCK, "disk")?;
    let mut disk = open(machine, function, dma)?;
    if way == Way::Deferred {
        // SAFETY: `measure_shape` uses frames for nothing else, and gives them back after a flush.
        unsafe { disk.unmap_by_policy() };
    }
    for shape in &SHAPES {
        measure_shape(&mut disk, dma, meter, way, shape)?;
    }
    disk.close(&mut Vec::new()).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    Ok(())
}

fn measure_shape(
    disk: &mut Block<'_>,
    dma: Dma<'_>,
    meter: &mut Meter,
    way: Way,
    shape: &Shape,
) -> Result<(), String> {
    let Shape { names, pages, depth } = *shape;
    let (name, len) = (names[way as usize], pages * FRAME_BYTES as usize);
    let (mut runs, mut buffers) = (Vec::new(), Vec::with_capacity(depth));
    // Of one request or of several: no two of them touch.
    let mut frames = scattered(if way == Way::Pool { 0 } else { depth * pages }).map_err(text)?;
    for _ in 0..depth {
        if way == Way::Pool {
            let run = DmaPages::allocate(pages).map_err(text)?;
            // SAFETY: the frames are in `runs` as long as they are used.
            buffers.push(unsafe { Buffer::elsewhere(Iova::new(run.phys()), len) });
            runs.push(run);
        } else {
            buffers.push(Buffer::frames(frames.drain(..pages).collect()));
        }
    }
    let pool = match (way, dma) {
        (Way::Pool, Dma::Through(device)) => {
            Some(DmaPool::new(device, depth, len, Direction::FromDevice).map_err(text)?)
        }
        _ => None,
    };
    let mut measured = read(disk, pool.as_ref(), meter, name, len, &mut buffers);
    if measured.is_ok() {
        measured =
            dma.flush().and_then(|()| pool.map_or(Ok(()), |pool| pool.close().map(drop))).map_err(text);
    }
    if measured.is_err() {
        // The disk may still reach them.
        mem::forget((runs, buffers));
    }
    measured
}

/// Reads into all of the buffers at a time, over and over, and gives them back. Those of a pool take their place.
fn read(
    disk: &mut Block<'_>,
    pool: Option<&DmaPool<'_>>,
    meter: &mut Meter,
    name: &'static str,
    len_bytes: usize,
    buffers: &mut Vec<Buffer>,
) -> Result<(), String> {
    let (depth, limits) = (buffers.len(), disk.limits());
    let sectors = (len_bytes / limits.sector_bytes) as u64;
    let (mut sector, mut requests) = (0, Vec::with_capacity(depth));
    meter.measure([name], depth as u64, |laps| {
        for buffer in buffers.drain(..) {
            requests.push(Request { tag: 0, sector, len_bytes, buffer });
            sector = (sector + sectors) % (limits.sectors - sectors);
        }
        let submit = || {
            if let Some(pool) = pool {
                for request in &mut requests {
                    let full = || StorageError::Full { requests: depth, room: 0 };
                    let buffer = pool.take().ok_or_else(full)?;
                    // SAFETY: the buffer is out until its request is done.
                    request.buffer = unsafe { Buffer::elsewhere(buffer.iova(), len_bytes) };
                    request.tag = buffer.into_raw() as u64;
                }
            }
            disk.submit(Operation::Read, &mut requests)
        };
        laps.time(0, submit).map_err(text)?;
        wait(disk, depth)?;
        let complete = || {
            for _ in 0..depth {
                let Some(done) = disk.complete()? else { break };
                // First, so that the memory is kept whatever came of it.
                buffers.extend(done.buffer);
                done.result?;
                if let Some(pool) = pool {
                    // SAFETY: made raw by the request's submission.
                    drop(unsafe { pool.from_raw(done.tag as usize) });
                }
            }
            Ok::<_, StorageError>(())
        };
        laps.time(0, complete).map_err(text)?;
        if buffers.len() == depth { Ok(()) } else { Err(text(StorageError::Timeout { in_flight: depth })) }
    })
}

/// Waits until the disk is done with so many requests, and takes none of them.
fn wait(disk: &Block<'_>, count: usize) -> Result<(), String> {
    let mut deadline = Deadline::after_ns(TIMEOUT_NS);
    while disk.answered() < count {
        if deadline.expired() {
            return Err(text(StorageError::Timeout { in_flight: count }));
        }
        core::hint::spin_loop();
    }
    Ok(())
}
