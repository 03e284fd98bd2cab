//! What the policies of unmapping promise, and what they do not: `edu` reaches for memory that was unmapped, or given back.
//!
//! ```text
//! strict     unmapped: back with its owner, and blocked at once
//! deferred   unmapped: still reached, and held back; blocked, and back with its owner, after the flush, which comes when it is
//!            asked for, when a bound is reached, or when the oldest is too old
//! pool       given back: still reached; memory that is not in the pool is not; closed: blocked
//! ```
//!
//! Blocked is memory that did not change *and* a fault that names `edu` and the address. Each address is used with success
//! just before.

use alloc::format;
use alloc::string::String;
use core::sync::atomic::{AtomicUsize, Ordering};

use virtio_iommu::{
    DeferredBounds, Direction, DmaDevice, DmaMapping, DmaMemory, DmaPool, DomainOptions, HeldMemory, Iova,
    Options, PhysAddr, UnmapPolicy, Unmapped,
};

use super::attack::{ATTACK, Arena, LEN, OFFSET, PAGE, SECRET};
use super::default::{close, text};
use super::setup::{self, Opened, find};
use super::{give_up, show};
use crate::boot::BootInfo;
use crate::devices::edu::{self, Edu};
use crate::devices::virtio::{ENTROPY, VENDOR};
use crate::iommu::Iommu;
use crate::machine::Machine;
use crate::memory::dma::DmaPages;
use crate::memory::frames;
use crate::pci::function::{BusMaster, Function};
use crate::report::Report;
use crate::time;

/// Checks beside the stages: the IOMMU, and two of what is left.
const CHECKS: usize = 3;

/// Bounds that are never reached: a transfer of `edu` takes a tenth of a second.
const NEVER: DeferredBounds = DeferredBounds { mappings: 64, bytes: 1 << 30, age_ns: u64::MAX };
const OLD_NS: u64 = 5_000_000;
/// Buffers of a pool, of a page each.
const BUFFERS: usize = 4;
/// What takes the other endpoint's highest addresses, so that its pool is where `edu` has nothing mapped.
const APART_BYTES: usize = 256 * 1024;

/// One policy: what is shown of it, and how.
struct Stage {
    name: &'static str,
    unmap: UnmapPolicy,
    run: fn(&mut Arena<'_>, &Opened) -> Result<&'static str, String>,
}

const STAGES: [Stage; 6] = [
    Stage { name: "strict", unmap: UnmapPolicy::Strict, run: strict },
    Stage { name: "deferred.flushed", unmap: UnmapPolicy::Deferred(NEVER), run: flushed },
    Stage {
        name: "deferred.bounded",
        unmap: UnmapPolicy::Deferred(DeferredBounds { mappings: 2, ..NEVER }),
        run: bounded,
    },
    Stage {
        name: "deferred.aged",
        unmap: UnmapPolicy::Deferred(DeferredBounds { age_ns: OLD_NS, ..NEVER }),
        run: aged,
    },
    Stage { name: "pool.reached", unmap: UnmapPolicy::Strict, run: pool },
    Stage { name: "pool.foreign", unmap: UnmapPolicy::Strict, run: foreign },
];

pub(super) fn run(info: &BootInfo) -> ! {
    let mut report = Report::start(CHECKS + STAGES.len());
    let (machine, iommu) = match setup::bring_up(info, Options::default()) {
        Ok(up) => up,
        Err(error) => give_up(report, "iommu", error),
    };
    show::live(&iommu, &mut report);
    let before = frames::usage().live_runs;
    let attacker = match stages(&machine, &iommu, &mut report) {
        Ok(attacker) => attacker,
        Err(error) => give_up(report, "policies", error),
    };
    iommu.viommu.poll();
    let after = frames::usage().live_runs;
    report.check("frames", before == after, format_args!("{before} runs of frames before and {after} after"));
    if let Some(id) = iommu.endpoint(attacker) {
        show::nothing_lost(&iommu, id, &mut report);
    }
    show::totals(&iommu, &mut report);
    report.end()
}

/// Every stage with `edu` in a domain of its own; and the attacker.
fn stages<'m>(machine: &'m Machine, iommu: &Iommu, report: &mut Report) -> Result<&'m Function, String> {
    let attacker = find(machine, edu::VENDOR, edu::DEVICE, "edu device")?;
    // Its bus mastering stays off.
    let other = setup::open(iommu, find(machine, VENDOR, ENTROPY, "entropy source")?, 0).map_err(text)?;
    for stage in STAGES {
        let shown = show_stage(machine, iommu, attacker, &other, &stage);
        report.check_result(&format!("policy.{}", stage.name), shown, |shown| *shown);
    }
    close(iommu, other.endpoint)?;
    Ok(attacker)
}

fn show_stage(
    machine: &Machine,
    iommu: &Iommu,
    function: &Function,
    other: &Opened,
    stage: &Stage,
) -> Result<&'static str, String> {
    // What an earlier stage that failed left.
    BACK.store(0, Ordering::Relaxed);
    let options = DomainOptions { unmap: stage.unmap, ..DomainOptions::default() };
    let opened = setup::open_in(iommu, function, 0, options).map_err(text)?;
    let mut edu = Edu::new(machine.map_bar(function, 0).map_err(text)?).map_err(text)?;
    machine.pci.set_bus_master(function.address, BusMaster::On);
    let shown =
        (stage.run)(&mut Arena { iommu, edu: &mut edu, attacker: &opened, other: &other.domain }, other);
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    let closed = close(iommu, opened.endpoint);
    // What went wrong first says more.
    shown.and_then(|shown| closed.map(|()| shown))
}

/// How many pages came back from the IOMMU's driver and were not asked for yet.
static BACK: AtomicUsize = AtomicUsize::new(0);

/// A page that was lent to the IOMMU's driver.
struct Lent {
    page: Kept,
    mapping: DmaMapping,
}

impl Lent {
    /// Lends a page, and sees that `edu` reaches it.
    fn new(arena: &mut Arena<'_>) -> Result<Self, String> {
        let page = DmaPages::allocate(1).map_err(text)?;
        let memory =
            DmaMemory { phys: PhysAddr::new(page.phys()), ptr: page.as_ptr(), len: page.len_bytes() };
        let mut page = Kept(Some(page));
        // SAFETY: the page is kept until it came back, or for good; until then only this module looks at it, as memory
        // that a device writes to.
        let held = unsafe { HeldMemory::new(memory, came_back) };
        let adopted = arena.attacker.endpoint.adopt(held, Direction::Both);
        let mapping = adopted.map_err(|(error, _)| text(error))?;
        reached(arena, mapping.iova(), page.page()?)?;
        Ok(Self { page, mapping })
    }

    /// Unmaps it, which must end in this way, with as many pages back.
    fn unmap(self, arena: &Arena<'_>, end: Unmapped, pages: usize) -> Result<(Iova, Kept), String> {
        let Self { page, mapping } = self;
        let iova = mapping.iova();
        let found = (arena.attacker.endpoint.unmap(mapping).map_err(text)?, BACK.swap(0, Ordering::Relaxed));
        if found == (end, pages) {
            Ok((iova, page))
        } else {
            Err(format!(
                "unmapped {:?} with {} pages back, instead of {end:?} with {pages}",
                found.0, found.1
            ))
        }
    }
}

/// The driver gives a page back, which stays its owner's.
///
/// # Safety
///
/// None needed; the signature is the driver's.
unsafe fn came_back(_: DmaMemory) {
    BACK.fetch_add(1, Ordering::Relaxed);
}

/// A page that is lost when this is dropped: it may still be reached.
struct Kept(Option<DmaPages>);

impl Kept {
    fn page(&mut self) -> Result<&mut DmaPages, String> {
        self.0.as_mut().ok_or_else(|| "the page is gone".into())
    }

    /// The page is out of reach, and is freed.
    fn free(mut self) {
        drop(self.0.take());
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        core::mem::forget(self.0.take());
    }
}

fn expect_back(pages: usize) -> Result<(), String> {
    match BACK.swap(0, Ordering::Relaxed) {
        back if back == pages => Ok(()),
        back => Err(format!("{back} pages came back instead of {pages}")),
    }
}

/// A write by `edu` arrives, and faults nothing.
fn reached(arena: &mut Arena<'_>, iova: Iova, page: &mut DmaPages) -> Result<(), String> {
    page.fill(SECRET);
    arena.write_allowed(iova.get() + OFFSET, page)
}

/// A write by `edu` faults, and the memory stays as it was.
fn blocked(arena: &mut Arena<'_>, iova: Iova, page: &mut DmaPages) -> Result<(), String> {
    page.fill(SECRET);
    let faulted = write_and_fault(arena, iova);
    if page.all_bytes_are(SECRET) { faulted } else { Err(format!("memory changed through {iova}")) }
}

/// A write by `edu`, and the fault that it must make.
fn write_and_fault(arena: &mut Arena<'_>, iova: Iova) -> Result<(), String> {
    let at = iova.get() + OFFSET;
    arena.drain_faults();
    arena.edu.copy_out(0, at, LEN).map_err(text)?;
    arena.expect_fault(at).map(drop)
}

fn strict(arena: &mut Arena<'_>, _: &Opened) -> Result<&'static str, String> {
    let (iova, mut page) = Lent::new(arena)?.unmap(arena, Unmapped::Now, 1)?;
    blocked(arena, iova, page.page()?)?;
    page.free();
    Ok("unmapped: the page was back with its owner, and blocked, at once")
}

fn flushed(arena: &mut Arena<'_>, _: &Opened) -> Result<&'static str, String> {
    let (iova, mut page) = Lent::new(arena)?.unmap(arena, Unmapped::AtFlush, 0)?;
    // What is not promised.
    reached(arena, iova, page.page()?)?;
    // What is: nobody is given the address, and the memory is not back with its owner.
    let (second_iova, second) = Lent::new(arena)?.unmap(arena, Unmapped::AtFlush, 0)?;
    if second_iova == iova {
        return Err(format!("{iova} was used again before the flush"));
    }
    arena.attacker.endpoint.flush().map_err(text)?;
    expect_back(2)?;
    blocked(arena, iova, page.page()?)?;
    page.free();
    second.free();
    Ok(
        "unmapped: still reached, held back, and its address not used again; back with its owner and blocked after the flush",
    )
}

fn bounded(arena: &mut Arena<'_>, _: &Opened) -> Result<&'static str, String> {
    let (first, second) = (Lent::new(arena)?, Lent::new(arena)?);
    // What the transfers left.
    arena.attacker.endpoint.flush().map_err(text)?;
    let (iova, mut page) = first.unmap(arena, Unmapped::AtFlush, 0)?;
    let Lent { page: mut second, mapping } = second;
    let second_iova = mapping.iova();
    arena.attacker.endpoint.unmap(mapping).map_err(text)?;
    expect_back(2)?;
    blocked(arena, iova, page.page()?)?;
    blocked(arena, second_iova, second.page()?)?;
    page.free();
    second.free();
    Ok("the second of two reaches the bound: both were back with their owner, and blocked")
}

fn aged(arena: &mut Arena<'_>, _: &Opened) -> Result<&'static str, String> {
    let lent = Lent::new(arena)?;
    arena.attacker.endpoint.flush().map_err(text)?;
    let (iova, mut page) = lent.unmap(arena, Unmapped::AtFlush, 0)?;
    time::busy_wait_ns(2 * OLD_NS);
    expect_back(0)?;
    arena.iommu.viommu.poll();
    expect_back(1)?;
    blocked(arena, iova, page.page()?)?;
    page.free();
    Ok("old enough, and the driver polled: back with its owner, and blocked")
}

fn new_pool(device: &dyn DmaDevice) -> Result<DmaPool<'_>, String> {
    DmaPool::new(device, BUFFERS, PAGE as usize, Direction::Both).map_err(text)
}

fn pool(arena: &mut Arena<'_>, _: &Opened) -> Result<&'static str, String> {
    let attacker = arena.attacker;
    let pool = new_pool(&attacker.endpoint)?;
    let mut buffer = pool.take().ok_or("the pool is empty")?;
    buffer.write(OFFSET as usize, &[SECRET; LEN]).map_err(text)?;
    let iova = buffer.iova();
    drop(buffer);
    arena.fill_buffer(ATTACK)?;
    arena.drain_faults();
    arena.edu.copy_out(0, iova.get() + OFFSET, LEN).map_err(text)?;
    if let Some(fault) = arena.next_fault() {
        return Err(format!("a buffer that was given back is not reached: {fault}"));
    }
    let buffers: [_; BUFFERS] = core::array::from_fn(|_| pool.take());
    let found = buffers.iter().flatten().find(|buffer| buffer.iova() == iova);
    let mut bytes = [0; LEN];
    found.ok_or("the buffer is gone")?.read(OFFSET as usize, &mut bytes).map_err(text)?;
    if bytes != [ATTACK; LEN] {
        return Err(format!("a buffer that was given back holds {:02x?}", &bytes[..8]));
    }
    drop(buffers);
    if pool.close().map_err(text)? != Unmapped::Now {
        return Err("closing the pool of a strict domain was deferred".into());
    }
    write_and_fault(arena, iova)?;
    Ok("given back: still reached; the pool closed: blocked")
}

fn foreign(arena: &mut Arena<'_>, other: &Opened) -> Result<&'static str, String> {
    let attacker = arena.attacker;
    let own = new_pool(&attacker.endpoint)?;
    let apart = other.endpoint.alloc_coherent(APART_BYTES).map_err(text)?;
    let pool = new_pool(&other.endpoint)?;
    let mut buffer = pool.take().ok_or("the pool is empty")?;
    buffer.write(OFFSET as usize, &[SECRET; LEN]).map_err(text)?;
    let iova = buffer.iova();
    // Its own pool works.
    let own_iova = own.take().ok_or("the pool is empty")?.iova();
    arena.fill_buffer(ATTACK)?;
    arena.drain_faults();
    arena.edu.copy_out(0, own_iova.get() + OFFSET, LEN).map_err(text)?;
    if let Some(fault) = arena.next_fault() {
        return Err(format!("its own pool is not reached: {fault}"));
    }
    // By the address that the other endpoint has for it, and by the physical one.
    let mapping = other.domain.translate(iova).ok_or("the other pool is not mapped")?;
    let phys = mapping.phys.get() + (iova.get() - mapping.range.start().get());
    for at in [iova, Iova::new(phys)] {
        if attacker.domain.translate(at).is_some() {
            return Err(format!("edu has a mapping at {at}, which proves nothing"));
        }
        write_and_fault(arena, at)?;
    }
    let mut bytes = [0; LEN];
    buffer.read(OFFSET as usize, &mut bytes).map_err(text)?;
    drop(buffer);
    pool.close().map_err(text)?;
    own.close().map_err(text)?;
    other.endpoint.free_coherent(apart).map_err(text)?;
    if bytes == [SECRET; LEN] {
        Ok("another endpoint's pool: blocked by its address, and by the physical one")
    } else {
        Err(format!("the other pool holds {:02x?}", &bytes[..8]))
    }
}
