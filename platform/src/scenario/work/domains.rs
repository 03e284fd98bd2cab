//! A domain that comes and goes, with mappings in it that no device uses: work for the IOMMU alone.
//!
//! A round: an endpoint whose bus mastering is off is attached, mappings are made and unmapped in random order, and the end
//! comes in one of two ways: everything unmapped, then the endpoint detached; or detached first, so that the rest dies
//! with the domain and is unmapped without a request.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use fastrand::Rng;
use virtio_iommu::{Iova, PhysAddr, Prot, Viommu};

use super::{Bench, Done, Work};
use crate::devices::virtio::{CONSOLE, VENDOR};
use crate::iommu::KernelPlatform;
use crate::memory::dma::DmaPages;
use crate::scenario::default::text;
use crate::scenario::show::Worker;

/// Mappings made or unmapped in a round, and in a step.
const CHANGES: u32 = 96;
const CHANGES_OF_A_STEP: u32 = 4;
/// The most mappings at a time, and the most frames of each.
const LIVE: usize = 24;
const FRAMES: usize = 8;

struct DomainsWork {
    worker: Worker,
    viommu: Viommu<KernelPlatform>,
    rng: Rng,
    live: Vec<(Iova, DmaPages)>,
    /// What is left of the round, while the endpoint is attached.
    changes: Option<u32>,
    done: Done,
}

pub(in crate::scenario) fn open(bench: &Bench<'_>) -> Result<Box<dyn Work>, String> {
    // Nothing else in these scenarios uses it.
    let function = bench.find(VENDOR, CONSOLE, "console")?;
    let id = bench.iommu.endpoint(function).ok_or("the IOMMU does not know the console")?;
    let viommu = bench.iommu.viommu.clone();
    let domain = viommu.create_domain(bench.domains).map_err(text)?;
    Ok(Box::new(DomainsWork {
        worker: Worker { id, address: function.address, name: "(nobody)", domain },
        viommu,
        rng: Rng::with_seed(bench.seed),
        live: Vec::new(),
        changes: None,
        done: Done::default(),
    }))
}

impl DomainsWork {
    fn change(&mut self) -> Result<(), String> {
        let live = self.live.len();
        if live == 0 || live < LIVE && self.rng.bool() {
            return self.map();
        }
        let index = self.rng.usize(..live);
        self.unmap(index)
    }

    fn map(&mut self) -> Result<(), String> {
        let pages = DmaPages::allocate(self.rng.usize(1..=FRAMES)).map_err(text)?;
        let (phys, len) = (PhysAddr::new(pages.phys()), pages.len_bytes() as u64);
        let prot = if self.rng.bool() { Prot::READ } else { Prot::READ | Prot::WRITE };
        // SAFETY: the pages are ours, and kept until they are unmapped; an error that may leave them mapped leaks them.
        match unsafe { self.worker.domain.map(phys, len, prot, Iova::new(u64::MAX)) } {
            Ok(iova) => {
                self.live.push((iova, pages));
                Ok(())
            }
            Err(error) => {
                core::mem::forget(pages);
                Err(text(error))
            }
        }
    }

    fn unmap(&mut self, index: usize) -> Result<(), String> {
        let (iova, pages) = self.live.swap_remove(index);
        // SAFETY: `map` made the mapping, of exactly these bytes.
        let unmapped = unsafe { self.worker.domain.unmap(iova, pages.len_bytes() as u64) };
        unmapped.map_err(|error| {
            core::mem::forget(pages);
            text(error)
        })
    }

    fn unmap_all(&mut self) -> Result<(), String> {
        while !self.live.is_empty() {
            self.unmap(self.live.len() - 1)?;
        }
        Ok(())
    }

    fn end_round(&mut self) -> Result<(), String> {
        self.changes = None;
        if self.rng.bool() {
            self.unmap_all()?;
        }
        let (left, before) = (self.live.len(), self.worker.domain.stats().requests);
        self.viommu.detach(self.worker.id).map_err(text)?;
        self.unmap_all()?;
        match self.worker.domain.stats().requests - before {
            1 => Ok(()),
            requests => {
                Err(format!("detaching from {left} mappings took {requests} requests instead of one"))
            }
        }
    }
}

impl Work for DomainsWork {
    fn worker(&self) -> &Worker {
        &self.worker
    }

    fn done(&self) -> Done {
        self.done
    }

    fn detail(&self) -> String {
        format!("{CHANGES} mappings made or unmapped in each round")
    }

    fn step(&mut self) -> Result<(), String> {
        match self.changes {
            None => {
                self.viommu.attach(self.worker.id, &self.worker.domain).map_err(text)?;
                self.changes = Some(CHANGES);
                Ok(())
            }
            Some(0) => {
                self.end_round()?;
                self.done.rounds += 1;
                Ok(())
            }
            Some(left) => {
                self.changes = Some(left.saturating_sub(CHANGES_OF_A_STEP));
                (0..CHANGES_OF_A_STEP.min(left)).try_for_each(|_| self.change())
            }
        }
    }

    fn close(mut self: Box<Self>, _: &Bench<'_>) -> Result<(), String> {
        if self.changes.is_some() { self.end_round() } else { Ok(()) }
    }
}
