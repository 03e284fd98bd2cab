//! A disk is told to use memory that it must not reach.
//!
//! Just before, the same address is used in a way that is allowed. Proof is memory that did not change, or did not get
//! out, *and* a fault that names the disk and the address. What the disk itself says proves nothing: QEMU's do not notice
//! that their data went nowhere.

use alloc::format;
use alloc::string::String;
use alloc::vec;

use virtio_iommu::{Fault, Iova, PhysAddr, Prot};

use super::super::default::{DISK_HALF_BYTES, WRITTEN_BYTES, text};
use super::{Bench, Figures, PAGE};
use crate::devices::storage::{Buffer, Completion, Operation, Request};
use crate::memory::dma::DmaPages;
use crate::time;

/// What the memory holds that the disk must not see or change.
const SECRET: u8 = 0xc3;
/// Where in the page: clear of its edges, where QEMU's look-up is wrong.
const OFFSET: u64 = 0x200;
/// A sector, so that few fault records come of it: QEMU makes one of each four bytes.
const LEN: usize = 512;
/// Where on the disk a write goes that must not carry the secret: to what is zero in the end.
const SCRATCH: usize = DISK_HALF_BYTES + WRITTEN_BYTES;
/// Longer than the driver counts fault records for its limit, so that records of the last attack hide none of this one.
const FAULT_WINDOW_NS: u64 = 120_000_000;

/// The disk is told to write to memory, which is to read a sector.
pub(super) fn write_to_memory(bench: &mut Bench<'_>) -> Result<Figures, String> {
    let figures = bench.figures("attack.write");
    with_victim(bench, |bench, at, victim| {
        let figures = transfer(bench, figures, Operation::Read, 0, at)?;
        let mut arrived = [0; LEN];
        victim.read(OFFSET as usize, &mut arrived);
        if arrived[..] != bench.given[..LEN] {
            return Err("the allowed transfer does not work".into());
        }
        victim.fill(SECRET);
        revoke(bench, at)?;
        let figures = transfer(bench, figures, Operation::Read, 0, at)?;
        if !victim.all_bytes_are(SECRET) {
            return Err(format!("memory changed through {at:#x}"));
        }
        expect_fault(bench, at..at + LEN as u64)?;
        bench.serves(figures)
    })
}

/// The disk is told to read memory, which is to write a sector.
pub(super) fn read_from_memory(bench: &mut Bench<'_>) -> Result<Figures, String> {
    let figures = bench.figures("attack.read");
    let sector = (SCRATCH / bench.storage.limits().sector_bytes) as u64;
    with_victim(bench, |bench, at, victim| {
        victim.fill(!SECRET);
        let figures = transfer(bench, figures, Operation::Write, sector, at)?;
        if scratch(bench)? != [!SECRET; LEN] {
            return Err("the allowed transfer does not work".into());
        }
        victim.fill(SECRET);
        revoke(bench, at)?;
        let figures = transfer(bench, figures, Operation::Write, sector, at)?;
        let learned = scratch(bench)?;
        if learned.contains(&SECRET) {
            return Err(format!("the disk learned {:02x?} from {at:#x}", &learned[..8]));
        }
        expect_fault(bench, at..at + LEN as u64)?;
        let zeros = bench.requests(SCRATCH, PAGE, PAGE, &[0; PAGE])?;
        let figures = bench.drive(figures, Operation::Write, zeros, 1)?.0;
        bench.serves(figures)
    })
}

/// Lends a page at an address of the disk's own, which is mapped until it is [revoked](revoke).
fn with_victim(
    bench: &mut Bench<'_>,
    work: impl FnOnce(&mut Bench<'_>, u64, &mut DmaPages) -> Result<Figures, String>,
) -> Result<Figures, String> {
    time::busy_wait_ns(FAULT_WINDOW_NS);
    drain_faults(bench);
    let Some((_, opened)) = bench.through else { return Err("there is no IOMMU".into()) };
    let mut page = DmaPages::allocate(1).map_err(text)?;
    let phys = PhysAddr::new(page.phys());
    let iova = Iova::new(phys.get());
    // SAFETY: the page is ours until it is unmapped, and leaked on an error.
    unsafe { opened.domain.map_at(iova, phys, PAGE as u64, Prot::READ | Prot::WRITE) }.map_err(text)?;
    let done = work(bench, iova.get() + OFFSET, &mut page);
    if done.is_err() {
        // It may still be mapped: nobody gets it any more.
        page.into_raw();
    }
    done
}

/// Takes the page around `at` away, after a transfer that was allowed and so faulted nothing.
fn revoke(bench: &Bench<'_>, at: u64) -> Result<(), String> {
    if let Some(fault) = next_fault(bench) {
        return Err(format!("the allowed transfer faults: {fault}"));
    }
    let Some((_, opened)) = bench.through else { return Err("there is no IOMMU".into()) };
    // SAFETY: our own mapping, made by `with_victim`.
    unsafe { opened.domain.unmap(Iova::new(at - OFFSET), PAGE as u64) }.map_err(text)
}

/// One sector, by an address that may or may not be mapped. The disk may say of it what it likes.
fn transfer(
    bench: &mut Bench<'_>,
    figures: Figures,
    operation: Operation,
    sector: u64,
    at: u64,
) -> Result<Figures, String> {
    // SAFETY: a page that nobody else uses is there, or nothing.
    let buffer = unsafe { Buffer::elsewhere(Iova::new(at), LEN) };
    let request = Request { tag: 0, sector, len_bytes: LEN, buffer };
    Ok(bench.drive_any(figures, operation, vec![request], 1)?.0)
}

/// What is on the disk at [`SCRATCH`].
fn scratch(bench: &mut Bench<'_>) -> Result<[u8; LEN], String> {
    let requests = bench.requests(SCRATCH, PAGE, PAGE, &[])?;
    let figures = bench.figures("");
    let (_, done) = bench.drive(figures, Operation::Read, requests, 1)?;
    let mut bytes = [0; LEN];
    for Completion { buffer, .. } in done {
        buffer.map(|buffer| buffer.read(&mut bytes));
    }
    Ok(bytes)
}

fn drain_faults(bench: &Bench<'_>) {
    while next_fault(bench).is_some() {}
}

fn next_fault(bench: &Bench<'_>) -> Option<Fault> {
    let (iommu, _) = bench.through?;
    iommu.viommu.poll();
    iommu.viommu.next_fault()
}

/// Sees that faults were reported, and that all of them are the disk's, at these addresses.
pub(super) fn expect_fault(bench: &Bench<'_>, addresses: core::ops::Range<u64>) -> Result<(), String> {
    let Some((_, opened)) = bench.through else { return Err("there is no IOMMU".into()) };
    let mut records = 0;
    while let Some(fault) = next_fault(bench) {
        let inside = fault.address.is_some_and(|address| addresses.contains(&address.get()));
        if fault.endpoint != opened.id || !inside {
            return Err(format!("a fault that nobody caused: {fault}"));
        }
        records += 1;
    }
    if records > 0 { Ok(()) } else { Err("blocked, but no fault was reported".into()) }
}
