//! Driving a disk, and counting what that asks of the IOMMU.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use fastrand::Rng;

use super::super::default::{DISK_HALF_BYTES, text};
use super::super::setup::Opened;
use super::{Figures, Image, PAGE, Work};
use crate::devices::dma::Dma;
use crate::devices::storage::buffer::scattered;
use crate::devices::storage::{Buffer, Completion, Operation, Request, Storage, StorageError, TIMEOUT_NS};
use crate::iommu::Iommu;
use crate::time::Deadline;

/// A long request, of pages that do not touch.
const LONG: usize = 128 * 1024;
/// Mappings at a time: a record for each page of the first half, and what is mapped for good.
const RECORDS: usize = DISK_HALF_BYTES / PAGE + 256;

/// A disk on the bench.
pub(in super::super) struct Bench<'a> {
    pub storage: &'a mut dyn Storage,
    pub dma: Dma<'a>,
    /// What stands between it and memory; nothing, where its driver uses physical addresses.
    pub through: Option<(&'a Iommu, &'a Opened)>,
    pub work: Work,
    /// What the image's first half holds.
    pub given: Vec<u8>,
    pub image: Image,
}

impl<'a> Bench<'a> {
    pub(in super::super) fn new(
        storage: &'a mut dyn Storage,
        through: Option<(&'a Iommu, &'a Opened)>,
        work: Work,
        image: Image,
    ) -> Self {
        let mut given = vec![0; DISK_HALF_BYTES];
        Rng::with_seed(image.seed).fill(&mut given);
        let dma = through.map_or(Dma::Direct, |(_, opened)| Dma::Through(&opened.endpoint));
        if let Some((_, opened)) = through {
            opened.domain.reserve(RECORDS);
        }
        Self { storage, dma, through, work, given, image }
    }

    /// Sees that the disk serves the next request.
    pub(super) fn serves(&mut self, figures: Figures) -> Result<Figures, String> {
        let requests = self.requests(0, PAGE, PAGE, &[])?;
        let (figures, done) = self.drive(figures, Operation::Read, requests, 1)?;
        if self.gather(done, PAGE, PAGE)? == self.given[..PAGE] {
            Ok(figures)
        } else {
            Err("the next request reads something else".into())
        }
    }

    /// The length of a long request for this disk.
    pub(super) fn long(&self) -> usize {
        let limits = self.storage.limits();
        LONG.min(limits.max_bytes).min(limits.max_pieces * PAGE)
    }

    /// Requests of `len` bytes each for `bytes` bytes of the disk from `start`, in pages that do not touch, filled with
    /// `content` where there is any.
    pub(super) fn requests(
        &self,
        start: usize,
        bytes: usize,
        len: usize,
        content: &[u8],
    ) -> Result<Vec<Request>, String> {
        let sector_bytes = self.storage.limits().sector_bytes;
        let mut frames = scattered(bytes.div_ceil(PAGE)).map_err(text)?;
        let mut requests = Vec::new();
        for at in (0..bytes).step_by(len) {
            let len_bytes = len.min(bytes - at);
            let mut buffer = Buffer::frames(frames.drain(..len_bytes.div_ceil(PAGE)).collect());
            buffer.write(content.get(at..at + len_bytes).unwrap_or_default());
            let sector = ((start + at) / sector_bytes) as u64;
            requests.push(Request { tag: at as u64, sector, len_bytes, buffer });
        }
        Ok(requests)
    }

    /// What requests by [`requests`](Self::requests) read, in its order.
    pub(super) fn gather(&self, done: Vec<Completion>, bytes: usize, len: usize) -> Result<Vec<u8>, String> {
        let mut all = vec![0; bytes];
        for Completion { tag, buffer, .. } in done {
            let Some(buffer) = buffer else { return Err("a buffer is lost".into()) };
            let at = tag as usize;
            buffer.read(&mut all[at..bytes.min(at + len)]);
        }
        Ok(all)
    }

    /// As [`drive_any`](Self::drive_any), where every request must succeed.
    pub(super) fn drive(
        &mut self,
        before: Figures,
        operation: Operation,
        requests: Vec<Request>,
        batch: usize,
    ) -> Result<(Figures, Vec<Completion>), String> {
        let (figures, done) = self.drive_any(before, operation, requests, batch)?;
        match done.iter().find_map(|done| done.result.err()) {
            None => Ok((figures, done)),
            Some(error) => Err(text(error)),
        }
    }

    /// Submits requests, `batch` at a time, as many as there is room for, and waits for all of them.
    pub(super) fn drive_any(
        &mut self,
        before: Figures,
        operation: Operation,
        mut requests: Vec<Request>,
        batch: usize,
    ) -> Result<(Figures, Vec<Completion>), String> {
        let mut done = Vec::with_capacity(requests.len());
        let mut figures = before;
        let count = requests.len();
        figures.requests += count as u64;
        figures.bytes += requests.iter().map(|request| request.len_bytes as u64).sum::<u64>();
        let start = self.asked();
        let mut deadline = Deadline::after_ns(TIMEOUT_NS);
        while done.len() < count {
            let expired = deadline.expired();
            while !requests.is_empty() {
                let mut now = requests.split_off(requests.len().saturating_sub(batch));
                match self.storage.submit(operation, &mut now) {
                    Ok(()) => {
                        figures.in_flight = figures.in_flight.max(self.storage.in_flight() as u64);
                    }
                    Err(StorageError::Full { .. }) if self.storage.in_flight() > 0 => {
                        requests.append(&mut now);
                        break;
                    }
                    Err(error) => return Err(text(error)),
                }
            }
            match self.storage.complete().map_err(text)? {
                Some(completion) => {
                    done.push(completion);
                    deadline = Deadline::after_ns(TIMEOUT_NS);
                }
                None if expired => {
                    return Err(text(StorageError::Timeout { in_flight: self.storage.in_flight() }));
                }
                None => self.storage.check_health().map_err(text)?,
            }
        }
        let end = self.asked();
        figures.maps += end.0 - start.0;
        figures.unmaps += end.1 - start.1;
        figures.kicks += end.2 - start.2;
        Ok((figures, done))
    }

    /// MAPs, UNMAPs and doorbells for the disk so far.
    pub(super) fn asked(&self) -> (u64, u64, u64) {
        let stats = self.through.map(|(_, opened)| opened.domain.stats());
        stats.map_or((0, 0, 0), |stats| (stats.maps, stats.unmaps, stats.kicks))
    }

    pub(super) fn figures(&self, name: &'static str) -> Figures {
        Figures { name, ..Figures::default() }
    }

    /// Holds figures against what they must be: behind an IOMMU exactly this, without one nothing.
    pub(super) fn expect(&self, figures: &Figures, maps: u64, unmaps: u64, kicks: u64) -> Result<(), String> {
        let wanted = if self.through.is_some() { [maps, unmaps, kicks] } else { [0; 3] };
        let took = [figures.maps, figures.unmaps, figures.kicks];
        if took == wanted {
            return Ok(());
        }
        let requests = figures.requests;
        Err(format!("{requests} requests: MAPs, UNMAPs and kicks are {took:?} instead of {wanted:?}"))
    }
}
