//! The parts of the work.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use fastrand::Rng;
use sha2::{Digest, Sha256};

use super::super::default::{DISK_HALF_BYTES, WRITTEN_BYTES, WRITTEN_SEED, text};
use super::super::show::hex;
use super::{Bench, Figures, PAGE};
use crate::devices::storage::buffer::scattered;
use crate::devices::storage::{Buffer, Completion, Operation, Request, StorageError};

/// Short requests in flight: what two queues take of eight each.
const IN_FLIGHT: usize = 16;
/// Short requests that are submitted, and mapped, together.
const BATCH: usize = 16;
/// Batches.
const BATCHES: u64 = 8;
/// What is written: the bytes that the host looks for, and as many behind them that end as zeros.
const AREA: usize = 2 * WRITTEN_BYTES;

impl Bench<'_> {
    /// The whole first half by long requests, all in flight; its digest.
    pub(super) fn read_all(&mut self) -> Result<Figures, String> {
        let len = self.long();
        let requests = self.requests(0, DISK_HALF_BYTES, len, &[])?;
        let before = self.figures("read");
        let (figures, done) = self.drive(before, Operation::Read, requests, 1)?;
        let digest = hex(&Sha256::digest(self.gather(done, DISK_HALF_BYTES, len)?));
        if digest != self.image.sha256 {
            return Err(format!(
                "SHA-256 of the first half is {digest}, which must be {}",
                self.image.sha256
            ));
        }
        self.expect(&figures, DISK_HALF_BYTES.div_ceil(PAGE) as u64, figures.requests, 2 * figures.requests)?;
        Ok(figures)
    }

    /// Long requests write what is wrong all over, short ones read that back and write what is right, and long ones
    /// read it back: each kind sees the other's work.
    pub(super) fn write(&mut self) -> Result<Figures, String> {
        let mut right = vec![0; AREA];
        Rng::with_seed(self.image.seed ^ WRITTEN_SEED).fill(&mut right[..WRITTEN_BYTES]);
        let wrong: Vec<u8> = right.iter().map(|byte| !byte).collect();
        let long = self.long();
        let mut figures = self.figures("written");
        for (content, written, read) in [(&wrong, long, PAGE), (&right, PAGE, long)] {
            let requests = self.requests(DISK_HALF_BYTES, AREA, written, content)?;
            figures = self.drive(figures, Operation::Write, requests, 1)?.0;
            let requests = self.requests(DISK_HALF_BYTES, AREA, read, &[])?;
            let (sum, done) = self.drive(figures, Operation::Read, requests, 1)?;
            figures = sum;
            let back = self.gather(done, AREA, read)?;
            if let Some(at) = (0..AREA).find(|at| back[*at] != content[*at]) {
                let (found, wanted) = (back[at], content[at]);
                return Err(format!("byte {at:#x} reads back as {found:#04x} instead of {wanted:#04x}"));
            }
        }
        self.expect(&figures, (4 * AREA / PAGE) as u64, figures.requests, 2 * figures.requests)?;
        Ok(figures)
    }

    /// Pages from here and there, each mapped and unmapped by itself, several in flight.
    pub(super) fn mapped(&mut self) -> Result<Figures, String> {
        let mut frames = Vec::new();
        for page in scattered(IN_FLIGHT).map_err(text)? {
            frames.push(Buffer::frames(vec![page]));
        }
        let figures = self.random_reads("mapped", self.work.mapped, frames, 1)?;
        if figures.in_flight < self.work.mapped.min(IN_FLIGHT as u64) {
            return Err(format!("only {} requests were in flight", figures.in_flight));
        }
        self.expect(&figures, figures.requests, figures.requests, 2 * figures.requests)?;
        Ok(figures)
    }

    /// The same in batches, each of which is mapped by one doorbell and unmapped by one request.
    pub(super) fn batched(&mut self) -> Result<Figures, String> {
        let mut frames = Vec::new();
        for page in scattered(BATCH).map_err(text)? {
            frames.push(Buffer::frames(vec![page]));
        }
        let figures = self.random_reads("batched", BATCHES * BATCH as u64, frames, BATCH)?;
        self.expect(&figures, figures.requests, BATCHES, 2 * BATCHES)?;
        Ok(figures)
    }

    /// The same from memory that is mapped before: the IOMMU hears nothing of it.
    pub(super) fn pooled(&mut self) -> Result<Figures, String> {
        let buffers = (0..IN_FLIGHT).map(|_| Buffer::premapped(self.dma, PAGE).map_err(text));
        let buffers = buffers.collect::<Result<Vec<_>, _>>()?;
        let figures = self.random_reads("pooled", self.work.pooled, buffers, 1)?;
        self.expect(&figures, 0, 0, 0)?;
        Ok(figures)
    }

    /// Sectors that are not there, wholly or in part: refused, and the next request is served.
    pub(super) fn out_of_range(&mut self) -> Result<Figures, String> {
        let limits = self.storage.limits();
        let mut figures = self.figures("out-of-range");
        for sector in [limits.sectors, limits.sectors - 1, u64::MAX / 1024] {
            let buffer = Buffer::frames(scattered(1).map_err(text)?);
            let request = Request { tag: sector, sector, len_bytes: 2 * limits.sector_bytes, buffer };
            let (sum, done) = self.drive_any(figures, Operation::Read, vec![request], 1)?;
            figures = sum;
            let refused = |done: &Completion| matches!(done.result, Err(StorageError::Refused { .. }));
            if !done.iter().all(refused) {
                return Err(format!(
                    "a request for sector {sector:#x} of {:#x} was not refused",
                    limits.sectors
                ));
            }
            figures = self.serves(figures)?;
        }
        self.expect(&figures, figures.requests, figures.requests, 2 * figures.requests)?;
        Ok(figures)
    }

    /// Reads `count` random pages of the first half into these buffers, over and over, `batch` together, and looks at
    /// every byte. The buffers are freed.
    pub(super) fn random_reads(
        &mut self,
        name: &'static str,
        count: u64,
        mut buffers: Vec<Buffer>,
        batch: usize,
    ) -> Result<Figures, String> {
        let sector_bytes = self.storage.limits().sector_bytes;
        let mut random = Rng::with_seed(self.image.seed ^ count);
        let mut figures = self.figures(name);
        let mut left = count as usize;
        while left > 0 {
            let mut requests = Vec::new();
            for buffer in buffers.drain(..left.min(buffers.len())) {
                let page = random.usize(..DISK_HALF_BYTES / PAGE);
                let sector = (page * PAGE / sector_bytes) as u64;
                requests.push(Request { tag: page as u64, sector, len_bytes: PAGE, buffer });
            }
            left -= requests.len();
            let (sum, done) = self.drive(figures, Operation::Read, requests, batch)?;
            figures = sum;
            for Completion { tag, buffer, .. } in done {
                let Some(buffer) = buffer else { return Err("a buffer is lost".into()) };
                let mut page = [0; PAGE];
                buffer.read(&mut page);
                if page[..] != self.given[tag as usize * PAGE..][..PAGE] {
                    return Err(format!("page {tag:#x} is not what the disk holds"));
                }
                buffers.push(buffer);
            }
        }
        for buffer in buffers {
            buffer.free(self.dma).map_err(text)?;
        }
        Ok(figures)
    }
}
