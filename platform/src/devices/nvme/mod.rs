//! NVMe: a controller that fetches its commands from memory and reads and writes where they say, all by itself.
//!
//! ```text
//! controller   registers: on, off, doorbells
//! command      the formats
//! queue        pairs of queues in shared memory, commands in flight
//! ```
//!
//! Rings and lists of pages are mapped once. Data is mapped for each request, or once where a request brings memory that
//! is mapped already. The first namespace is the disk. Several pairs of queues take turns.
//!
//! Leaves out: interrupts, other namespaces, metadata, SGLs, pages other than 4096 bytes.

mod command;
mod controller;
mod error;
mod queue;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use virtio_iommu::Iova;

pub use error::NvmeError;

use self::command::{Command, IDENTIFY_CONTROLLER, IDENTIFY_NAMESPACE};
use self::controller::{Controller, Doorbells};
use self::queue::{IoQueue, PAGE_BYTES, Pair};
use super::dma::{Coherent, Dma};
use super::storage::{
    Buffer, Completion, Limits, Operation, Request, Storage, StorageError, Strays, TIMEOUT_NS,
};
use crate::mmio::Registers;
use crate::pci::function::Class;
use crate::time::Deadline;

/// What PCI calls an NVMe controller.
pub const CLASS: Class = Class { base: 0x01, sub: 0x08, interface: 0x02 };

/// The pairs of I/O queues that are asked for.
const IO_QUEUES: u16 = 2;
const ADMIN_ENTRIES: u16 = 8;
const IO_ENTRIES: u16 = 64;
/// The requests of one submission.
const BATCH: usize = 32;
/// The longest transfer that there is room for.
const MAX_BYTES: usize = 512 * 1024;
const NAMESPACE: u32 = 1;

/// A controller that is off: it accesses no memory, whatever was asked of it before.
#[derive(Debug)]
pub struct Stopped<'a>(Nvme<'a>);

/// A controller at work. Dropping it leaves it at work, with all of its memory: [`close`](Self::close) ends it in order.
pub struct Nvme<'a> {
    dma: Dma<'a>,
    controller: Controller,
    registers_len: u64,
    admin: Pair,
    admin_doorbells: Doorbells,
    /// What admin commands read and write.
    page: Coherent,
    queues: Vec<IoQueue>,
    /// Of each queue.
    limits: Limits,
    /// The queue whose turn it is.
    turn: usize,
    /// Admin completions that made no sense.
    strays: Strays,
}

impl fmt::Debug for Nvme<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nvme({} queues, {:?})", self.queues.len(), self.dma)
    }
}

impl<'a> Nvme<'a> {
    /// Takes over the controller behind its registers, of `len_bytes`, switches it off, and allocates its admin queues.
    ///
    /// Its bus mastering may come on after this.
    ///
    /// # Errors
    ///
    /// [`NvmeError`]. What was allocated before stays allocated.
    pub fn reset(
        registers: impl Registers + Send + 'static,
        len_bytes: u64,
        dma: Dma<'a>,
    ) -> Result<Stopped<'a>, NvmeError> {
        // Lists hold whole pages, wherever a mapping puts them.
        let granule = dma.granule();
        if granule < PAGE_BYTES as u64 {
            return Err(NvmeError::Unsupported { what: "the IOMMU's granule", value: granule });
        }
        let controller = Controller::new(Box::new(registers), len_bytes)?;
        controller.disable()?;
        let admin_doorbells = controller.doorbells(0, len_bytes)?;
        let admin = Pair::allocate(dma, 0, ADMIN_ENTRIES.min(controller.max_entries()))?;
        let page = dma.alloc(PAGE_BYTES)?;
        let limits = Limits {
            sector_bytes: 512,
            sectors: 0,
            max_bytes: MAX_BYTES,
            max_pieces: MAX_BYTES / PAGE_BYTES,
            // A ring that is full looks empty.
            depth: usize::from(IO_ENTRIES.min(controller.max_entries())) - 1,
            batch: BATCH,
        };
        Ok(Stopped(Self {
            dma,
            controller,
            registers_len: len_bytes,
            admin,
            admin_doorbells,
            page,
            queues: Vec::new(),
            limits,
            turn: 0,
            strays: Strays::default(),
        }))
    }

    /// How many pairs of I/O queues there are.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Starts a request whose addresses are the caller's, on the queue whose turn it is: in place of what its buffer
    /// would have, the first page and the second, or the list of others.
    ///
    /// # Errors
    ///
    /// As [`Storage::submit`].
    ///
    /// # Safety
    ///
    /// Until the request is completed the device may read and write whatever it reaches there.
    pub unsafe fn submit_at(
        &mut self,
        operation: Operation,
        (tag, sector): (u64, u64),
        len_bytes: usize,
        pages: [Iova; 2],
    ) -> Result<(), StorageError> {
        // SAFETY: the address is not used, and those that are, are the caller's.
        let buffer = unsafe { Buffer::elsewhere(pages[0], len_bytes) };
        let mut requests = alloc::vec![Request { tag, sector, len_bytes, buffer }];
        self.submit_with(operation, &mut requests, Some(pages.map(Iova::get)))
    }

    /// Switches the controller off and gives everything back. Requests in flight are added to `done`, as cancelled.
    ///
    /// # Errors
    ///
    /// [`NvmeError`]: all that the controller may still reach stays where it is, and is nobody's.
    pub fn close(self, done: &mut Vec<Completion>) -> Result<(), NvmeError> {
        self.controller.shut_down()?;
        let mut freed = self.admin.free(self.dma).and(self.dma.free(self.page));
        for queue in self.queues {
            freed = freed.and(queue.free(self.dma, done));
        }
        Ok(freed?)
    }

    fn submit_with(
        &mut self,
        operation: Operation,
        requests: &mut Vec<Request>,
        instead: Option<[u64; 2]>,
    ) -> Result<(), StorageError> {
        let count = self.queues.len();
        let chosen = (0..count).map(|step| (self.turn + step) % count);
        // Where none has room the one whose turn it is says so.
        let chosen =
            chosen.clone().find(|queue| self.queues[*queue].room() >= requests.len()).unwrap_or(self.turn);
        let Some(queue) = self.queues.get_mut(chosen) else {
            return Err(StorageError::Full { requests: requests.len(), room: 0 });
        };
        queue.submit(&self.controller, self.dma, operation, requests, instead)?;
        self.turn = (chosen + 1) % count;
        Ok(())
    }

    /// Does an admin command and gives its result.
    fn command(&mut self, mut command: Command) -> Result<u32, NvmeError> {
        let opcode = command.opcode;
        // One is in flight at a time; what comes late for another is not taken for its answer.
        command.id = self.admin.tail().into();
        self.admin.put(command);
        self.controller.ring_tail(self.admin_doorbells, self.admin.tail());
        let mut deadline = Deadline::after_ns(TIMEOUT_NS);
        loop {
            let expired = deadline.expired();
            if let Some(completion) = self.admin.take() {
                self.controller.ring_head(self.admin_doorbells, self.admin.head());
                if completion.submission_queue.get() != 0 {
                    self.strays.wrong_queue += 1;
                } else if completion.command != command.id {
                    self.strays.unknown_id += 1;
                } else {
                    return match completion.status() {
                        0 => Ok(completion.result.get()),
                        status => Err(NvmeError::Refused { opcode, status }),
                    };
                }
            } else {
                self.controller.check()?;
            }
            if expired {
                return Err(NvmeError::NoAnswer { opcode, csts: self.controller.status() });
            }
            core::hint::spin_loop();
        }
    }

    /// Learns what the controller and its namespace are like.
    fn identify(&mut self) -> Result<(), NvmeError> {
        let unsupported = |what, value| NvmeError::Unsupported { what, value };
        let page = self.page.iova().get();
        self.command(Command::identify(IDENTIFY_CONTROLLER, 0, page))?;
        // The most bytes of a transfer, as a power of two of pages; 0 is no limit.
        match self.page.read::<u8>(77) {
            0 => {}
            order => {
                let most = 1usize.checked_shl(order.into()).and_then(|pages| pages.checked_mul(PAGE_BYTES));
                self.limits.max_bytes = self.limits.max_bytes.min(most.unwrap_or(MAX_BYTES));
                self.limits.max_pieces = self.limits.max_bytes / PAGE_BYTES;
            }
        }
        self.command(Command::identify(IDENTIFY_NAMESPACE, NAMESPACE, page))?;
        let sectors = u64::from_le(self.page.read(0));
        // The format in use is one of 16: where its description is.
        let format = 128 + 4 * usize::from(self.page.read::<u8>(26) & 0xf);
        let (metadata, order) = (self.page.read::<u16>(format), self.page.read::<u8>(format + 2));
        if metadata != 0 {
            return Err(unsupported("the namespace's metadata", u16::from_le(metadata).into()));
        }
        if !(9..=12).contains(&order) {
            return Err(unsupported("the order of a block", order.into()));
        }
        if sectors == 0 {
            return Err(unsupported("the number of blocks", 0));
        }
        self.limits.sectors = sectors;
        self.limits.sector_bytes = 1 << order;
        Ok(())
    }

    fn create_queues(&mut self) -> Result<(), NvmeError> {
        let granted = self.command(Command::number_of_queues(IO_QUEUES))?;
        // Both halves count from 0.
        let granted = (granted & 0xffff).min(granted >> 16).saturating_add(1);
        let entries = self.limits.depth as u16 + 1;
        for id in 1..=granted.min(IO_QUEUES.into()) as u16 {
            let doorbells = self.controller.doorbells(id, self.registers_len)?;
            let lists = self.dma.alloc(IoQueue::list_bytes(self.limits) * self.limits.depth)?;
            let pair = Pair::allocate(self.dma, id, entries)?;
            let (submissions, completions) = pair.places();
            // Kept before the controller hears of it, so that it is given back only when that is off.
            self.queues.push(IoQueue::new(pair, doorbells, NAMESPACE, lists, self.limits));
            self.command(Command::create_completion_queue(id, entries, completions.get()))?;
            self.command(Command::create_submission_queue(id, entries, submissions.get()))?;
        }
        Ok(())
    }
}

impl<'a> Stopped<'a> {
    /// Switches the controller on, identifies it, and creates its I/O queues. Its bus mastering is on.
    ///
    /// # Errors
    ///
    /// [`NvmeError`]; the controller is off again, if it can be brought to that.
    pub fn start(self) -> Result<Nvme<'a>, NvmeError> {
        let mut nvme = self.0;
        let (submissions, completions) = nvme.admin.places();
        let started = nvme
            .controller
            .enable(nvme.admin.entries(), submissions, completions)
            .and_then(|()| nvme.identify())
            .and_then(|()| nvme.create_queues());
        match started {
            Ok(()) => Ok(nvme),
            Err(error) => {
                if let Err(error) = nvme.close(&mut Vec::new()) {
                    log::warn!("{error}");
                }
                Err(error)
            }
        }
    }
}

impl Storage for Nvme<'_> {
    fn limits(&self) -> Limits {
        Limits { depth: self.limits.depth * self.queues.len(), ..self.limits }
    }

    fn submit(&mut self, operation: Operation, requests: &mut Vec<Request>) -> Result<(), StorageError> {
        self.submit_with(operation, requests, None)
    }

    fn complete(&mut self) -> Result<Option<Completion>, StorageError> {
        Ok(self.queues.iter_mut().find_map(|queue| queue.complete(&self.controller, self.dma)))
    }

    fn in_flight(&self) -> usize {
        self.queues.iter().map(IoQueue::in_flight).sum()
    }

    fn check_health(&self) -> Result<(), StorageError> {
        let csts = self.controller.status();
        let broken = StorageError::Broken { what: "controller status register", value: csts };
        self.controller.check().map_err(|_| broken)
    }

    fn strays(&self) -> Strays {
        self.queues.iter().map(IoQueue::strays).fold(self.strays, |sum, one| Strays {
            unknown_id: sum.unknown_id + one.unknown_id,
            wrong_queue: sum.wrong_queue + one.wrong_queue,
        })
    }
}

#[cfg(test)]
mod tests;
