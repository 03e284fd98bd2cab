//! A domain that comes and goes, with mappings in it that no device uses: work for the IOMMU alone.
//!
//! A round: an endpoint whose bus mastering is off is opened, memory is lent to it and unmapped in random order, and the
//! end comes in one of two ways: everything unmapped, then the endpoint closed; or closed first, so that the rest dies
//! with the domain and is unmapped without a request. Where unmapping is deferred, what was not flushed dies too. Nothing
//! is left after a round.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use fastrand::Rng;
use virtio_iommu::{Direction, DmaDevice, DmaMapping, Endpoint, EndpointOptions, Viommu};

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
    live: Vec<DmaMapping>,
    /// The endpoint while it is attached, and what is left of the round.
    round: Option<(Endpoint<KernelPlatform>, u32)>,
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
        round: None,
        done: Done::default(),
    }))
}

impl DomainsWork {
    fn change(&mut self, endpoint: &Endpoint<KernelPlatform>) -> Result<(), String> {
        let live = self.live.len();
        if live == 0 || live < LIVE && self.rng.bool() {
            return self.map(endpoint);
        }
        let index = self.rng.usize(..live);
        endpoint.unmap(self.live.swap_remove(index)).map(drop).map_err(text)
    }

    fn map(&mut self, endpoint: &Endpoint<KernelPlatform>) -> Result<(), String> {
        let pages = DmaPages::allocate(self.rng.usize(1..=FRAMES)).map_err(text)?;
        let direction = if self.rng.bool() { Direction::ToDevice } else { Direction::Both };
        match endpoint.adopt(pages.into_held(), direction) {
            Ok(mapping) => {
                self.live.push(mapping);
                Ok(())
            }
            // The run ends, and nobody gets the memory.
            Err((error, _)) => Err(text(error)),
        }
    }

    fn unmap_all(&mut self, endpoint: &Endpoint<KernelPlatform>) -> Result<(), String> {
        self.live.drain(..).try_for_each(|mapping| endpoint.unmap(mapping).map(drop)).map_err(text)
    }

    fn end_round(&mut self, endpoint: &Endpoint<KernelPlatform>) -> Result<(), String> {
        if self.rng.bool() {
            self.unmap_all(endpoint)?;
        }
        let (left, before) = (self.live.len(), self.worker.domain.stats().requests);
        endpoint.close().map_err(text)?;
        self.unmap_all(endpoint)?;
        match (self.worker.domain.stats().requests - before, self.worker.domain.mapping_count()) {
            (1, 0) => Ok(()),
            (requests, 0) => {
                Err(format!("detaching from {left} mappings took {requests} requests instead of one"))
            }
            (_, more) => Err(format!("{more} mappings are left after a round")),
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
        match self.round.take() {
            None => {
                let Worker { id, domain, .. } = &self.worker;
                let endpoint = self.viommu.open(*id, domain, EndpointOptions::default()).map_err(text)?;
                self.round = Some((endpoint.tagged("churn"), CHANGES));
                Ok(())
            }
            Some((endpoint, 0)) => {
                self.end_round(&endpoint)?;
                self.done.rounds += 1;
                Ok(())
            }
            Some((endpoint, left)) => {
                let now = CHANGES_OF_A_STEP.min(left);
                (0..now).try_for_each(|_| self.change(&endpoint))?;
                self.round = Some((endpoint, left - now));
                Ok(())
            }
        }
    }

    fn close(mut self: Box<Self>, _: &Bench<'_>) -> Result<(), String> {
        match self.round.take() {
            Some((endpoint, _)) => self.end_round(&endpoint),
            None => Ok(()),
        }
    }
}
