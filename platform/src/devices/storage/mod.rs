//! What drivers of disks have in common: requests that own their memory, many in flight, mapped by as little as it takes.
//!
//! ```text
//! submit     takes requests, maps the data of all of them by one list, tells the device by one doorbell
//! complete   takes what the device is done with, and unmaps: a request comes back when its memory is its own again
//! ```
//!
//! Neither waits; [`finish`] does, with a deadline. Requests that were submitted together have one mapping, which goes
//! when the last of them is done; they come back together then. After a timeout the memory stays with the driver until a
//! reset of the device.
//!
//! Leaves out: interrupts, flushing, and devices with a cache that would need it.

pub mod buffer;
mod error;
mod in_flight;

use alloc::vec::Vec;

pub use buffer::Buffer;
pub use error::StorageError;
pub(super) use in_flight::{InFlight, Piece, Started, Unmapping};

use crate::time::Deadline;

/// How long requests may take.
pub const TIMEOUT_NS: u64 = 2_000_000_000;

/// What is done with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The device writes to memory.
    Read,
    /// The device reads memory.
    Write,
}

/// One transfer between disk and memory.
#[derive(Debug)]
pub struct Request {
    /// What the caller knows it by. It need not differ from others.
    pub tag: u64,
    /// The first sector, of [`Limits::sector_bytes`].
    pub sector: u64,
    /// How much is transferred: whole sectors, from the start of the buffer.
    pub len_bytes: usize,
    /// The memory.
    pub buffer: Buffer,
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// The caller's name for it.
    pub tag: u64,
    /// The memory. `None` where the IOMMU did not confirm that the device does not reach it any more: it is then
    /// nobody's.
    pub buffer: Option<Buffer>,
    /// What the device said.
    pub result: Result<(), StorageError>,
}

/// What a disk can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a sector.
    pub sector_bytes: usize,
    /// Sectors of the disk.
    pub sectors: u64,
    /// The most bytes of a request.
    pub max_bytes: usize,
    /// The most pieces of memory of a request.
    pub max_pieces: usize,
    /// The most requests in flight at a time, and in one submission.
    pub depth: usize,
    /// The most requests of one submission.
    pub batch: usize,
}

/// What the device did that no device does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Strays {
    /// Completions of requests that were not in flight.
    pub unknown_id: u64,
    /// Completions that named another queue than the one they came by.
    pub wrong_queue: u64,
}

/// A disk.
pub trait Storage {
    /// What it can do.
    fn limits(&self) -> Limits;

    /// Starts requests: all of them, or on an error none, and they stay in the list. The data of those in frames is
    /// mapped by one list. Does not wait for the disk, and allocates nothing.
    ///
    /// Sectors are not checked: the device refuses those that it does not have.
    ///
    /// # Errors
    ///
    /// [`StorageError::Full`], [`StorageError::Request`], [`StorageError::Map`].
    fn submit(&mut self, operation: Operation, requests: &mut Vec<Request>) -> Result<(), StorageError>;

    /// A request that is done, if there is one. Does not wait for the disk; unmapping waits for the IOMMU. Where unmapping is
    /// deferred, a request comes back with the flush that serves it and others: as long as the disk has more to do that
    /// takes up to a millisecond.
    ///
    /// # Errors
    ///
    /// [`StorageError::Broken`]: the device cannot be used any more.
    fn complete(&mut self) -> Result<Option<Completion>, StorageError>;

    /// Requests that the caller does not have back yet.
    fn in_flight(&self) -> usize;

    /// Asks the device whether it gave up. Reads registers.
    ///
    /// # Errors
    ///
    /// [`StorageError::Broken`].
    fn check_health(&self) -> Result<(), StorageError>;

    /// What of its completions made no sense.
    fn strays(&self) -> Strays;
}

/// Waits until nothing is in flight, and adds what is done to `done`.
///
/// # Errors
///
/// [`StorageError::Timeout`] after two seconds without a completion, [`StorageError::Broken`].
pub fn finish(storage: &mut dyn Storage, done: &mut Vec<Completion>) -> Result<(), StorageError> {
    let mut deadline = Deadline::after_ns(TIMEOUT_NS);
    while storage.in_flight() > 0 {
        // Expired is asked first, so that a last look at the device comes after the deadline.
        let expired = deadline.expired();
        match storage.complete()? {
            Some(completion) => {
                done.push(completion);
                deadline = Deadline::after_ns(TIMEOUT_NS);
            }
            None if expired => return Err(StorageError::Timeout { in_flight: storage.in_flight() }),
            None => storage.check_health()?,
        }
        core::hint::spin_loop();
    }
    Ok(())
}
