//! What the device remembers for tests: requests, counters, and rules that the driver broke.

use alloc::collections::VecDeque;

use crate::inject::Inject;
use crate::number::Status;
use crate::request::Request;

/// Entries of the lists that have no limit of their own.
pub(crate) const LIST_LIMIT: usize = 4096;

/// Appends to a list that keeps the newest `limit` entries.
pub(crate) fn push_bounded<T>(list: &mut VecDeque<T>, item: T, limit: usize) {
    if limit == 0 {
        return;
    }
    if list.len() >= limit {
        list.pop_front();
    }
    list.push_back(item);
}

/// One request that was executed, or that injection kept from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Running number, from 0 at the device's making; counts logged requests.
    pub number: u64,
    /// Head descriptor of its chain.
    pub head: u16,
    /// The request.
    pub request: Request,
    /// Reserved bytes of its head.
    pub head_reserved: [u8; 3],
    /// Length of its readable part.
    pub readable_len: u64,
    /// Length of its writable part.
    pub writable_len: u64,
    /// The device's own answer, before any injection changed it.
    pub answer: Answer,
    /// What was injected.
    pub inject: Inject,
}

/// How a request was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// With a status.
    Status(Status),
    /// With nothing written and used length 0.
    Unwritten,
    /// Not at all: the device stopped.
    Stopped,
    /// By injection alone: the request was not executed.
    NotExecuted,
}

/// Running counts since the device's making, or since they were last taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// ATTACH requests.
    pub attach: u64,
    /// DETACH requests.
    pub detach: u64,
    /// MAP requests.
    pub map: u64,
    /// UNMAP requests.
    pub unmap: u64,
    /// PROBE requests.
    pub probe: u64,
    /// Requests of the draft.
    pub contexts: u64,
    /// Requests of unknown type, truncated, or malformed.
    pub other: u64,
    /// Requests with status OK.
    pub ok: u64,
    /// Requests with another status.
    pub failed: u64,
    /// Requests returned unwritten.
    pub unwritten: u64,
    /// Notifications of each queue.
    pub kicks: [u64; 2],
    /// Interrupts raised for each queue.
    pub interrupts: [u64; 2],
    /// Interrupts that were not due by the driver's own suppression.
    pub suppressed: [u64; 2],
    /// Interrupts of configuration changes and NEEDS_RESET.
    pub config_interrupts: u64,
    /// Accesses that were refused.
    pub faults: u64,
    /// Fault records that were delivered.
    pub events: u64,
    /// Fault records dropped for want of a buffer.
    pub events_dropped: u64,
    /// Event buffers that were too small for a record.
    pub event_buffers_short: u64,
    /// Page requests for which there was no room.
    pub page_requests_dropped: u64,
    /// Device resets.
    pub resets: u64,
}

impl Counters {
    pub(crate) fn count(&mut self, request: &Request, answer: Answer) {
        let kind = match request {
            Request::Attach { .. } => &mut self.attach,
            Request::Detach { .. } => &mut self.detach,
            Request::Map { .. } => &mut self.map,
            Request::Unmap { .. } => &mut self.unmap,
            Request::Probe { .. } => &mut self.probe,
            Request::AttachTable { .. }
            | Request::Invalidate { .. }
            | Request::PageResponse { .. }
            | Request::MapContext { .. }
            | Request::UnmapContext { .. } => &mut self.contexts,
            Request::Truncated { .. } | Request::Unknown { .. } | Request::Malformed => &mut self.other,
        };
        *kind += 1;
        match answer {
            Answer::Status(Status::Ok) => self.ok += 1,
            Answer::Status(_) => self.failed += 1,
            Answer::Unwritten => self.unwritten += 1,
            Answer::Stopped | Answer::NotExecuted => {}
        }
    }
}

/// A rule that the driver broke. The device may all the same have answered OK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Number of the rule in PROTOCOL 2.1 such as `"D-25"`; `"I5"` for what this project's drivers never
    /// send, whatever the device would answer; `"core"` for a rule of virtio itself.
    pub rule: &'static str,
    /// What the driver did.
    pub what: &'static str,
    /// Number of the request in the log, if it was one.
    pub request: Option<u64>,
}

/// One write into the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigWrite {
    /// Offset of the first byte.
    pub offset: usize,
    /// Length in bytes.
    pub len_bytes: usize,
    /// The first eight bytes, little-endian.
    pub value: u64,
    /// Whether it took effect.
    pub accepted: bool,
}
