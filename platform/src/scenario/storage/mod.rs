//! What is done with a disk, whatever drives it, and how many requests of the IOMMU that takes.
//!
//! The disk is the image that the host made: its first half is given by a seed, and what is written to its second half
//! the host checks afterwards.

mod attack;

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use fastrand::Rng;
use sha2::{Digest, Sha256};

use super::default::{DISK_HALF_BYTES, WRITTEN_BYTES, WRITTEN_SEED, hex, text};
use super::setup::Opened;
use super::word;
use crate::boot::BootInfo;
use crate::devices::dma::Dma;
use crate::devices::storage::buffer::scattered;
use crate::devices::storage::{
    Buffer, Completion, Operation, Request, Storage, StorageError, TIMEOUT_NS, finish,
};
use crate::iommu::Iommu;
use crate::memory::frames::{self, FRAME_BYTES};
use crate::println;
use crate::report::Report;
use crate::time::Deadline;

/// A page of data.
const PAGE: usize = FRAME_BYTES as usize;
/// A long request, of pages that do not touch.
const LONG: usize = 128 * 1024;
/// Short requests in flight: what two queues take of eight each.
const IN_FLIGHT: usize = 16;
/// Short requests that are submitted, and mapped, together.
const BATCH: usize = 16;
/// Batches.
const BATCHES: u64 = 8;
/// Mappings at a time: a record for each page of the first half, and what is mapped for good.
const RECORDS: usize = DISK_HALF_BYTES / PAGE + 256;
/// What is written: the bytes that the host looks for, and as many behind them that end as zeros.
const AREA: usize = 2 * WRITTEN_BYTES;

/// How many short requests are made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    /// Each mapped and unmapped for itself.
    pub mapped: u64,
    /// From memory that is mapped once.
    pub pooled: u64,
}

impl Work {
    /// What the command line says, as `mapped=` and `pooled=`; 64 of each where it does not.
    pub(super) fn of(info: &BootInfo) -> Result<Self, String> {
        let number = |key| info.command_line.number(key).map(|number| number.unwrap_or(64)).map_err(text);
        Ok(Self { mapped: number("mapped")?, pooled: number("pooled")? })
    }
}

/// The image on a disk.
#[derive(Clone, Debug)]
pub(super) struct Image {
    /// What it was made from.
    seed: u64,
    /// The digest of its first half.
    sha256: String,
}

impl Image {
    /// The image of the command line's seed, changed by `change`, and with the digest that is there as `key`.
    pub(super) fn of(info: &BootInfo, change: u64, key: &str) -> Result<Self, String> {
        let seed = info.command_line.number("seed").map_err(text)?;
        let seed = seed.ok_or_else(|| word(info, "seed").err().unwrap_or_default())?;
        Ok(Self { seed: seed ^ change, sha256: word(info, key)?.into() })
    }
}

/// A disk on the bench.
pub(super) struct Bench<'a> {
    pub storage: &'a mut dyn Storage,
    pub dma: Dma<'a>,
    /// What stands between it and memory; nothing, where its driver uses physical addresses.
    pub through: Option<(&'a Iommu, &'a Opened)>,
    pub work: Work,
    /// What the image's first half holds.
    given: Vec<u8>,
    image: Image,
}

/// What a part of the work took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Figures {
    pub name: &'static str,
    /// Requests of the disk, and bytes that they moved.
    pub requests: u64,
    pub bytes: u64,
    /// The most that were in flight at a time.
    pub in_flight: u64,
    /// What the IOMMU was asked meanwhile.
    pub maps: u64,
    pub unmaps: u64,
    pub kicks: u64,
}

/// A part of the work.
pub(super) type Part = (&'static str, fn(&mut Bench<'_>) -> Result<Figures, String>);

/// What every disk does.
pub(super) const PARTS: [Part; 6] = [
    ("read", |bench| bench.read_all()),
    ("written", |bench| bench.write()),
    ("mapped", |bench| bench.mapped()),
    ("batched", |bench| bench.batched()),
    ("pooled", |bench| bench.pooled()),
    ("out-of-range", |bench| bench.out_of_range()),
];

/// What a disk behind an IOMMU does too.
pub(super) const ATTACKS: [Part; 2] =
    [("attack.write", attack::write_to_memory), ("attack.read", attack::read_from_memory)];

/// Does every part, and gives the figures of each. Requests may be in flight after an error.
pub(super) fn exercise(bench: &mut Bench<'_>, parts: &[Part]) -> Result<Vec<Figures>, String> {
    let done = parts.iter().map(|(name, part)| part(bench).map_err(|error| format!("{name}: {error}")));
    done.collect()
}

/// Checks that a disk that was closed works like a new one, and that it leaves no frame behind.
pub(super) fn check_again(
    disk: &str,
    exercise: impl FnOnce() -> Result<Vec<Figures>, String>,
    report: &mut Report,
) {
    let before = frames::usage();
    let again = exercise().and_then(|figures| {
        let after = frames::usage();
        let requests: u64 = figures.iter().map(|figures| figures.requests).sum();
        if after == before {
            Ok(format!("{requests} requests after it was closed and opened; no frame is lost"))
        } else {
            Err(format!("frames in use: {} before, {} after", before.used, after.used))
        }
    });
    report.check_result(&format!("{disk}.again"), again, String::clone);
}

/// Does every part as a check each, `disk` being the first word of its name, and shows the figures.
pub(super) fn check(disk: &str, bench: &mut Bench<'_>, parts: &[Part], report: &mut Report) {
    let mut all = Vec::new();
    for (name, part) in parts {
        let mut result = part(bench);
        if result.is_err() {
            // What the next part finds done must be its own.
            result = finish(bench.storage, &mut Vec::new()).map_err(text).and(result);
        }
        let detail = |figures: &Figures| {
            format!(
                "{} requests of {} bytes in all, {} in flight; {} MAPs, {} UNMAPs, {} kicks",
                figures.requests,
                figures.bytes,
                figures.in_flight,
                figures.maps,
                figures.unmaps,
                figures.kicks
            )
        };
        all.extend(report.check_result(&format!("{disk}.{name}"), result, detail));
    }
    let strays = bench.storage.strays();
    report.check(
        &format!("{disk}.no-strays"),
        strays == Default::default(),
        format_args!("{} completions of nothing, {} by a wrong queue", strays.unknown_id, strays.wrong_queue),
    );
    table(&all);
}

/// The checks that [`check`] makes of parts.
pub(super) const fn checks(parts: usize) -> usize {
    parts + 1
}

fn table(all: &[Figures]) {
    println!();
    println!("  part          requests       bytes  in flight    maps  unmaps   kicks");
    for Figures { name, requests, bytes, in_flight, maps, unmaps, kicks } in all {
        println!(
            "  {name:<12}  {requests:>8}  {bytes:>10}  {in_flight:>9}  {maps:>6}  {unmaps:>6}  {kicks:>6}"
        );
    }
    println!();
}

impl<'a> Bench<'a> {
    pub(super) fn new(
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

    /// The whole first half by long requests, all in flight; its digest.
    fn read_all(&mut self) -> Result<Figures, String> {
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
    fn write(&mut self) -> Result<Figures, String> {
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
    fn mapped(&mut self) -> Result<Figures, String> {
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
    fn batched(&mut self) -> Result<Figures, String> {
        let mut frames = Vec::new();
        for page in scattered(BATCH).map_err(text)? {
            frames.push(Buffer::frames(vec![page]));
        }
        let figures = self.random_reads("batched", BATCHES * BATCH as u64, frames, BATCH)?;
        self.expect(&figures, figures.requests, BATCHES, 2 * BATCHES)?;
        Ok(figures)
    }

    /// The same from memory that is mapped before: the IOMMU hears nothing of it.
    fn pooled(&mut self) -> Result<Figures, String> {
        let buffers = (0..IN_FLIGHT).map(|_| Buffer::premapped(self.dma, PAGE).map_err(text));
        let buffers = buffers.collect::<Result<Vec<_>, _>>()?;
        let figures = self.random_reads("pooled", self.work.pooled, buffers, 1)?;
        self.expect(&figures, 0, 0, 0)?;
        Ok(figures)
    }

    /// Sectors that are not there, wholly or in part: refused, and the next request is served.
    fn out_of_range(&mut self) -> Result<Figures, String> {
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

    /// Sees that the disk serves the next request.
    fn serves(&mut self, figures: Figures) -> Result<Figures, String> {
        let requests = self.requests(0, PAGE, PAGE, &[])?;
        let (figures, done) = self.drive(figures, Operation::Read, requests, 1)?;
        if self.gather(done, PAGE, PAGE)? == self.given[..PAGE] {
            Ok(figures)
        } else {
            Err("the next request reads something else".into())
        }
    }

    /// Reads `count` random pages of the first half into these buffers, over and over, `batch` together, and looks at
    /// every byte. The buffers are freed.
    fn random_reads(
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

    /// The length of a long request for this disk.
    fn long(&self) -> usize {
        let limits = self.storage.limits();
        LONG.min(limits.max_bytes).min(limits.max_pieces * PAGE)
    }

    /// Requests of `len` bytes each for `bytes` bytes of the disk from `start`, in pages that do not touch, filled with
    /// `content` where there is any.
    fn requests(
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
    fn gather(&self, done: Vec<Completion>, bytes: usize, len: usize) -> Result<Vec<u8>, String> {
        let mut all = vec![0; bytes];
        for Completion { tag, buffer, .. } in done {
            let Some(buffer) = buffer else { return Err("a buffer is lost".into()) };
            let at = tag as usize;
            buffer.read(&mut all[at..bytes.min(at + len)]);
        }
        Ok(all)
    }

    /// As [`drive_any`](Self::drive_any), where every request must succeed.
    fn drive(
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
    fn drive_any(
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
    fn asked(&self) -> (u64, u64, u64) {
        let stats = self.through.map(|(_, opened)| opened.domain.stats());
        stats.map_or((0, 0, 0), |stats| (stats.maps, stats.unmaps, stats.kicks))
    }

    fn figures(&self, name: &'static str) -> Figures {
        Figures { name, ..Figures::default() }
    }

    /// Holds figures against what they must be: behind an IOMMU exactly this, without one nothing.
    fn expect(&self, figures: &Figures, maps: u64, unmaps: u64, kicks: u64) -> Result<(), String> {
        let wanted = if self.through.is_some() { [maps, unmaps, kicks] } else { [0; 3] };
        let took = [figures.maps, figures.unmaps, figures.kicks];
        if took == wanted {
            return Ok(());
        }
        let requests = figures.requests;
        Err(format!("{requests} requests: MAPs, UNMAPs and kicks are {took:?} instead of {wanted:?}"))
    }
}
