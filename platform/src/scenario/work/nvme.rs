//! The NVMe disk, many requests in flight, each page mapped for its own request. A round: the first half read and compared,
//! a part of the second half written and read back.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use fastrand::Rng;
use sha2::{Digest, Sha256};
use virtio_iommu::{Endpoint, MappingStatus};

use super::{Bench, Done, Work};
use crate::devices::dma::Dma;
use crate::devices::nvme::Nvme;
use crate::devices::storage::buffer::scattered;
use crate::devices::storage::{Buffer, Completion, Operation, Request, Storage, StorageError, TIMEOUT_NS};
use crate::iommu::KernelPlatform;
use crate::memory::frames::FRAME_BYTES;
use crate::pci::function::BusMaster;
use crate::scenario::default::{DISK_HALF_BYTES, WRITTEN_BYTES, WRITTEN_SEED, text};
use crate::scenario::nvme;
use crate::scenario::setup::Opened;
use crate::scenario::show::{Worker, hex};
use crate::scenario::word;
use crate::time::Deadline;

/// What is read or written by a request.
const PAGE: usize = FRAME_BYTES as usize;
/// Requests in flight.
const IN_FLIGHT: usize = 16;

struct NvmeWork<'b> {
    worker: Worker,
    endpoint: &'b Endpoint<KernelPlatform>,
    disk: Nvme<'b>,
    /// What the first half holds, and its SHA-256.
    given: Vec<u8>,
    digest: String,
    /// What is written.
    written: Vec<u8>,
    pass: Pass,
    /// Pages of this pass that were submitted, and that are done.
    submitted: usize,
    finished: usize,
    /// Pages that no request has.
    buffers: Vec<Buffer>,
    due: Deadline,
    done: Done,
}

/// A part of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Read,
    Write,
    ReadBack,
}

impl Pass {
    fn operation(self) -> Operation {
        match self {
            Self::Read | Self::ReadBack => Operation::Read,
            Self::Write => Operation::Write,
        }
    }
}

pub(in crate::scenario) fn open<'b>(bench: &'b Bench<'_>) -> Result<Box<dyn Work + 'b>, String> {
    let function = nvme::find(bench.machine)?;
    let seed = bench.seed ^ nvme::SEED;
    let mut given = vec![0; DISK_HALF_BYTES];
    Rng::with_seed(seed).fill(&mut given);
    let (digest, expected) = (hex(&Sha256::digest(&given)), word(bench.info, "nvme.sha256")?);
    if digest != expected {
        return Err(format!("the seed makes a disk of SHA-256 {digest} instead of {expected}"));
    }
    let mut written = vec![0; WRITTEN_BYTES];
    Rng::with_seed(seed ^ WRITTEN_SEED).fill(&mut written);
    let mut buffers = Vec::new();
    for page in scattered(IN_FLIGHT).map_err(text)? {
        buffers.push(Buffer::frames(vec![page]));
    }
    let Opened { id, domain, endpoint } = bench.open(function, 0, "nvme")?;
    bench.nvme.set(endpoint).map_err(|_| "it was opened before")?;
    let endpoint = bench.nvme.get().ok_or("it is not open")?;
    let disk = nvme::open(bench.machine, function, Dma::Through(endpoint))?;
    Ok(Box::new(NvmeWork {
        worker: Worker { id, address: function.address, name: "nvme", domain },
        endpoint,
        disk,
        given,
        digest,
        written,
        pass: Pass::Read,
        submitted: 0,
        finished: 0,
        buffers,
        due: Deadline::after_ns(TIMEOUT_NS),
        done: Done::default(),
    }))
}

impl NvmeWork<'_> {
    /// What the disk holds where this pass goes, or is to.
    fn content(&self) -> &[u8] {
        if self.pass == Pass::Read { &self.given } else { &self.written }
    }

    fn pages(&self) -> usize {
        self.content().len() / PAGE
    }

    fn submit(&mut self) -> Result<(), String> {
        let start = if self.pass == Pass::Read { 0 } else { DISK_HALF_BYTES };
        while self.submitted < self.pages() {
            let Some(mut buffer) = self.buffers.pop() else { break };
            let at = self.submitted * PAGE;
            if self.pass == Pass::Write {
                buffer.write(&self.written[at..at + PAGE]);
            }
            let sector = ((start + at) / self.disk.limits().sector_bytes) as u64;
            let mut request = vec![Request { tag: at as u64, sector, len_bytes: PAGE, buffer }];
            self.disk.submit(self.pass.operation(), &mut request).map_err(text)?;
            self.submitted += 1;
        }
        Ok(())
    }

    /// With all buffers here, nothing that was unmapped may be in the disk's reach.
    fn check_flushed(&self) -> Result<(), String> {
        let mut mappings = self.worker.domain.mappings();
        match mappings.find(|mapping| mapping.status == MappingStatus::Deferred) {
            None => Ok(()),
            Some(mapping) => Err(format!("{}: a buffer came back before the flush", mapping.range)),
        }
    }

    /// A request is done.
    fn take(&mut self, completion: Completion) -> Result<(), String> {
        let Completion { tag, buffer, result } = completion;
        result.map_err(text)?;
        let buffer = buffer.ok_or("a buffer is lost")?;
        let moved = PAGE as u64;
        if self.pass == Pass::Write {
            self.done.to_device += moved;
        } else {
            self.done.from_device += moved;
            let mut page = [0; PAGE];
            buffer.read(&mut page);
            if page[..] != self.content()[tag as usize..][..PAGE] {
                return Err(format!("{:?}: the page at {tag:#x} is something else", self.pass));
            }
        }
        self.buffers.push(buffer);
        self.finished += 1;
        Ok(())
    }
}

impl Work for NvmeWork<'_> {
    fn worker(&self) -> &Worker {
        &self.worker
    }

    fn done(&self) -> Done {
        self.done
    }

    fn detail(&self) -> String {
        format!("SHA-256 {}, {IN_FLIGHT} requests in flight", self.digest)
    }

    fn step(&mut self) -> Result<(), String> {
        self.submit()?;
        let expired = self.due.expired();
        let before = self.finished;
        // Bounded: only what is in flight comes back.
        while let Some(completion) = self.disk.complete().map_err(text)? {
            self.take(completion)?;
        }
        if self.finished > before {
            self.due = Deadline::after_ns(TIMEOUT_NS);
        } else if expired {
            return Err(text(StorageError::Timeout { in_flight: self.disk.in_flight() }));
        } else {
            self.disk.check_health().map_err(text)?;
        }
        if self.finished == self.pages() {
            self.check_flushed()?;
            (self.submitted, self.finished) = (0, 0);
            self.pass = match self.pass {
                Pass::Read => Pass::Write,
                Pass::Write => Pass::ReadBack,
                Pass::ReadBack => {
                    self.done.rounds += 1;
                    Pass::Read
                }
            };
        }
        Ok(())
    }

    fn close(self: Box<Self>, bench: &Bench<'_>) -> Result<(), String> {
        let Self { worker, endpoint, disk, .. } = *self;
        let strays = disk.strays();
        disk.close(&mut Vec::new()).map_err(text)?;
        bench.machine.pci.set_bus_master(worker.address, BusMaster::Off);
        endpoint.close().map_err(text)?;
        if strays == Default::default() { Ok(()) } else { Err(format!("completions of nothing: {strays:?}")) }
    }
}

// Each pass is of whole pages.
const _: () = assert!(DISK_HALF_BYTES.is_multiple_of(PAGE) && WRITTEN_BYTES.is_multiple_of(PAGE));
