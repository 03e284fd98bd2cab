//! One request from its bytes to its reply.

use alloc::vec;
use alloc::vec::Vec;

use crate::bytes::array_at;
use crate::chain::Chain;
use crate::check::{Envelope, check};
use crate::device::Device;
use crate::domain::Mapping;
use crate::inject::Inject;
use crate::iommu::{Crash, Outcome};
use crate::memory::GuestMemory;
use crate::number::{
    HEAD_LEN, LONGEST_REQUEST, Status, TAIL_LEN, TYPE_ATTACH_TABLE, TYPE_INVALIDATE, TYPE_MAP,
    TYPE_MAP_CONTEXT, TYPE_PAGE_RESP, TYPE_PROBE, TYPE_UNMAP, TYPE_UNMAP_CONTEXT, feature,
};
use crate::quirks::ShortProbe;
use crate::record::{Answer, LIST_LIMIT, LogEntry, push_bounded};
use crate::request::Request;

/// Requests with a longer writable part are returned unwritten, so that zero-filling it is bounded.
const MAX_WRITABLE: u64 = 65_536;

/// What is written from the start of the writable part on, and what the used ring says.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    /// Properties or zeros, then the tail; empty, or at least the tail.
    pub(crate) bytes: Vec<u8>,
    pub(crate) used_len: u32,
}

impl Reply {
    /// Nothing is written.
    pub(crate) const UNWRITTEN: Self = Self { bytes: Vec::new(), used_len: 0 };

    /// `area` zero bytes, then the tail; all of it counts as written.
    fn with_area(area: u64, status: u8, tail_reserved: [u8; 3]) -> Self {
        let mut bytes = vec![0; area as usize];
        bytes.push(status);
        bytes.extend_from_slice(&tail_reserved);
        Self { used_len: bytes.len() as u32, bytes }
    }

    /// A status in a writable part of any length.
    pub(crate) fn refusal(writable_len: u64, status: u8) -> Self {
        if !(TAIL_LEN..=MAX_WRITABLE).contains(&writable_len) {
            return Self::UNWRITTEN;
        }
        Self::with_area(writable_len - TAIL_LEN, status, [0; 3])
    }

    pub(crate) fn set_status(&mut self, status: u8) {
        if let Some(byte) = self.tail_mut().first_mut() {
            *byte = status;
        }
    }

    pub(crate) fn set_tail_reserved(&mut self, reserved: [u8; 3]) {
        if let Some(bytes) = self.tail_mut().get_mut(1..) {
            bytes.copy_from_slice(&reserved);
        }
    }

    fn tail_mut(&mut self) -> &mut [u8] {
        let start = self.bytes.len().saturating_sub(TAIL_LEN as usize);
        &mut self.bytes[start..]
    }
}

/// The device stops without answering.
pub(crate) struct Stop;

impl Device {
    /// Reads, checks, executes and logs one request, and lays out its reply.
    pub(crate) fn execute(
        &mut self,
        chain: &Chain,
        inject: Inject,
        mem: &dyn GuestMemory,
    ) -> Result<Reply, Stop> {
        let mut entry = self.examine(chain, inject, mem)?;
        let (outcome, properties) = self.run(&entry.request, mem);
        let (answer, result) = self.lay_out(&entry.request, outcome, &properties, entry.writable_len);
        entry.answer = answer;
        self.remember(entry);
        result
    }

    /// Reads, checks and logs one request that is not executed.
    pub(crate) fn note(&mut self, chain: &Chain, inject: Inject, mem: &dyn GuestMemory) -> Result<(), Stop> {
        let entry = self.examine(chain, inject, mem)?;
        self.remember(entry);
        Ok(())
    }

    fn remember(&mut self, entry: LogEntry) {
        self.counters.count(&entry.request, entry.answer);
        push_bounded(&mut self.log, entry, self.iommu.config.log_limit);
    }

    fn examine(&mut self, chain: &Chain, inject: Inject, mem: &dyn GuestMemory) -> Result<LogEntry, Stop> {
        let bytes = chain.read(mem, LONGEST_REQUEST).map_err(|error| {
            self.ring_failed(error.into());
            Stop
        })?;
        let entry = LogEntry {
            number: self.requests,
            head: chain.head,
            request: self.decode(chain, &bytes),
            head_reserved: array_at(&bytes, 1),
            readable_len: chain.readable_len(),
            writable_len: chain.writable_len(),
            answer: Answer::NotExecuted,
            inject,
        };
        self.requests += 1;
        self.check_rules(&entry);
        Ok(entry)
    }

    /// The request, which is unknown when its feature is off and malformed when its parts are too small.
    fn decode(&self, chain: &Chain, bytes: &[u8]) -> Request {
        let (readable_len, writable_len) = (chain.readable_len(), chain.writable_len());
        let config = &self.iommu.config;
        let bad_shape =
            config.quirks.one_descriptor_each && (chain.readable.len(), chain.writable.len()) != (1, 1);
        if readable_len < HEAD_LEN || !(TAIL_LEN..=MAX_WRITABLE).contains(&writable_len) || bad_shape {
            return Request::Malformed;
        }
        let request = Request::decode(bytes, readable_len);
        let kind = bytes[0];
        let needs = match kind {
            TYPE_MAP | TYPE_UNMAP => feature::MAP_UNMAP,
            TYPE_PROBE => feature::PROBE,
            TYPE_ATTACH_TABLE | TYPE_INVALIDATE | TYPE_PAGE_RESP | TYPE_MAP_CONTEXT | TYPE_UNMAP_CONTEXT => {
                feature::ATTACH_TABLE
            }
            _ => 0,
        };
        if self.iommu.active(needs) { request } else { Request::Unknown { kind } }
    }

    fn check_rules(&mut self, entry: &LogEntry) {
        let request = &entry.request;
        let probed = request.endpoint().is_some_and(|endpoint| self.probed.contains(&endpoint));
        let envelope =
            Envelope { head_reserved: entry.head_reserved, writable_len: entry.writable_len, probed };
        let mut found = Vec::new();
        check(&self.iommu, request, &envelope, &mut |rule, what| found.push((rule, what)));
        for (rule, what) in found {
            self.violate(rule, what, Some(entry.number));
        }
        if let Request::Probe { endpoint, .. } = *request
            && self.probed.len() < LIST_LIMIT
        {
            self.probed.insert(endpoint);
        }
    }

    fn run(&mut self, request: &Request, mem: &dyn GuestMemory) -> (Outcome, Vec<u8>) {
        let outcome = match *request {
            Request::Attach { domain, endpoint, flags, reserved } => {
                let status = self.iommu.attach(domain, endpoint, flags, reserved);
                self.attach_behind(domain, endpoint, status).into()
            }
            Request::Detach { domain, endpoint, reserved } => {
                let status = match self.iommu.detach_pasid(domain, endpoint, reserved) {
                    Some(status) => status,
                    None => self.detach_behind(domain, endpoint),
                };
                self.drop_orphaned_groups();
                status.into()
            }
            Request::AttachTable { domain, endpoint, flags, format, body } => {
                self.iommu.attach_table(mem, (domain, endpoint), flags, format, &body).into()
            }
            Request::Invalidate { .. } => self.iommu.invalidate(request).into(),
            Request::PageResponse { .. } => self.respond(request).into(),
            Request::MapContext { .. } | Request::UnmapContext { .. } => {
                self.iommu.map_context(request).into()
            }
            Request::Map { domain, virt_start, virt_end, phys_start, flags } => {
                let mapping =
                    Mapping { virt_first: virt_start, virt_last: virt_end, phys_first: phys_start, flags };
                self.map_behind(domain, mapping)
            }
            Request::Unmap { domain, virt_start, virt_end, reserved } => {
                self.unmap_behind(domain, virt_start, virt_end, reserved)
            }
            Request::Probe { endpoint, .. } => {
                let (status, properties) = self.iommu.probe(endpoint);
                return (status.into(), properties);
            }
            Request::Truncated { .. } => Status::Inval.into(),
            Request::Unknown { .. } if self.iommu.config.quirks.unknown_type_unsupp => Status::Unsupp.into(),
            Request::Unknown { .. } | Request::Malformed => Outcome::Unwritten,
        };
        (outcome, Vec::new())
    }

    /// Where status and properties go.
    fn lay_out(
        &mut self,
        request: &Request,
        outcome: Outcome,
        properties: &[u8],
        writable_len: u64,
    ) -> (Answer, Result<Reply, Stop>) {
        let quirks = self.iommu.config.quirks;
        let status = match outcome {
            Outcome::Status(status) => status,
            Outcome::Unwritten if *request == Request::Malformed && quirks.malformed_stops => {
                return (Answer::Stopped, Err(Stop));
            }
            Outcome::Unwritten => return (Answer::Unwritten, Ok(Reply::UNWRITTEN)),
            Outcome::Crash(crash) => return self.die(crash),
        };
        let is_probe = matches!(request, Request::Probe { .. } | Request::Truncated { kind: TYPE_PROBE, .. });
        let wanted = if is_probe { u64::from(self.iommu.config.probe_size) } else { 0 };
        let room = writable_len - TAIL_LEN;
        let short = room < wanted;
        let (status, area) = match (short, quirks.short_probe) {
            (true, ShortProbe::Abort) => return self.die(Crash::Abort),
            (true, ShortProbe::DevErr) => (Status::DevErr, 0),
            (true, ShortProbe::Inval) => (Status::Inval, room),
            (false, _) if quirks.tail_at_expected_place => (status, wanted),
            (false, _) => (status, room),
        };
        let mut reply = Reply::with_area(area, status as u8, quirks.tail_reserved);
        if status == Status::Ok {
            for (byte, new) in reply.bytes.iter_mut().zip(properties) {
                *byte = *new;
            }
        } else if quirks.failure_used_len_zero {
            reply.used_len = 0;
        }
        (Answer::Status(status), Ok(reply))
    }

    fn die(&mut self, crash: Crash) -> (Answer, Result<Reply, Stop>) {
        self.crash = Some(crash);
        (Answer::Stopped, Err(Stop))
    }
}
