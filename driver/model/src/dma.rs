//! Accesses by endpoints, and the event queue that reports refused ones.

use alloc::vec::Vec;

use crate::device::Device;
use crate::fault::{Access, AccessError, AccessKind, Doorbell, Fault, FaultReason, LONG_RECORD, short_form};
use crate::iommu::{Denied, Target};
use crate::memory::{GuestMemory, OutOfMemoryRange};
use crate::number::{EVENT_QUEUE, feature};
use crate::quirks::FaultStyle;
use crate::record::{LIST_LIMIT, push_bounded};
use crate::ring::RingError;

/// Where an access ended, and why.
pub(crate) enum Stop {
    /// At this address.
    Denied(u64, AccessKind, Denied),
    NotMemory(OutOfMemoryRange),
}

impl From<OutOfMemoryRange> for Stop {
    fn from(error: OutOfMemoryRange) -> Self {
        Self::NotMemory(error)
    }
}

/// What became of a record offered to the event queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    Done,
    NoBuffer,
}

impl Device {
    /// Performs one DMA access of an endpoint, in ascending order of addresses.
    ///
    /// A doorbell write is kept for [`take_doorbells`](Self::take_doorbells). The access works in every device status, since
    /// endpoints need no driver of the IOMMU; faults reach the driver only once DRIVER_OK is set.
    ///
    /// # Errors
    ///
    /// At the first byte that is refused, which makes one fault record, or that is not memory. What comes before it was
    /// transferred.
    pub fn access(
        &mut self,
        mem: &mut dyn GuestMemory,
        endpoint: u32,
        iova: u64,
        access: Access<'_>,
    ) -> Result<(), AccessError> {
        self.access_context(mem, endpoint, None, iova, access)
    }

    /// The same through a context, on a device of the draft: by PASID, or as [`access`](Self::access) without one.
    ///
    /// # Errors
    ///
    /// As for [`access`](Self::access).
    pub fn access_context(
        &mut self,
        mem: &mut dyn GuestMemory,
        endpoint: u32,
        pasid: Option<u32>,
        iova: u64,
        access: Access<'_>,
    ) -> Result<(), AccessError> {
        self.try_access(mem, (endpoint, pasid), iova, access).map_err(|stop| match stop {
            Stop::Denied(at, kind, denied) => self.refuse(mem, (endpoint, pasid), at, kind, denied),
            Stop::NotMemory(error) => error.into(),
        })
    }

    /// An access that reports nothing.
    pub(crate) fn try_access(
        &mut self,
        mem: &mut dyn GuestMemory,
        (endpoint, pasid): (u32, Option<u32>),
        iova: u64,
        access: Access<'_>,
    ) -> Result<(), Stop> {
        let (kind, mut access) = match access {
            Access::Read(buf) => (AccessKind::Read, Access::Read(buf)),
            Access::Write(data) => (AccessKind::Write, Access::Write(data)),
        };
        let len = match &access {
            Access::Read(buf) => buf.len(),
            Access::Write(data) => data.len(),
        };
        let mut done = 0;
        while done < len {
            let Some(at) = iova.checked_add(done as u64) else {
                let denied = Denied { reason: FaultReason::Mapping, permission: false };
                return Err(Stop::Denied(u64::MAX, kind, denied));
            };
            let resolved = self.iommu.resolve_context(&*mem, (endpoint, pasid), at, kind);
            let run = resolved.map_err(|denied| Stop::Denied(at, kind, denied))?;
            // At least 1: a run holds the address that was asked for.
            let span = usize::try_from(run.last - at).unwrap_or(usize::MAX).saturating_add(1);
            let end = done + span.min(len - done);
            match (run.target, &mut access) {
                (Target::Memory(phys), Access::Read(buf)) => mem.read(phys, &mut buf[done..end])?,
                (Target::Memory(phys), Access::Write(data)) => mem.write(phys, &data[done..end])?,
                (Target::Doorbell, Access::Write(data)) => self.ring_doorbell(endpoint, at, &data[done..end]),
                (Target::Doorbell, Access::Read(_)) => {}
            }
            done = end;
        }
        Ok(())
    }

    fn ring_doorbell(&mut self, endpoint: u32, address: u64, bytes: &[u8]) {
        let data = crate::bytes::u32_at(bytes, 0);
        push_bounded(&mut self.doorbells, Doorbell { endpoint, address, data }, LIST_LIMIT);
    }

    pub(crate) fn refuse(
        &mut self,
        mem: &mut dyn GuestMemory,
        (endpoint, pasid): (u32, Option<u32>),
        iova: u64,
        kind: AccessKind,
        denied: Denied,
    ) -> AccessError {
        let quirks = self.iommu.config.quirks;
        let says_kind = quirks.faults != FaultStyle::Qemu || denied.permission;
        let fault = Fault {
            reason: denied.reason,
            kind: says_kind.then_some(kind),
            endpoint,
            address: (!quirks.omit_fault_address).then_some(iova),
            pasid,
        };
        self.counters.faults += 1;
        if quirks.faults != FaultStyle::Never {
            self.push_fault(mem, &fault, None);
        }
        AccessError::Fault(fault)
    }

    /// Reports a fault, in the draft's form where that is in force; of a page request with its group, and whether it is
    /// the last one of it.
    pub(crate) fn push_fault(&mut self, mem: &mut dyn GuestMemory, fault: &Fault, page: Option<(u16, bool)>) {
        match self.iommu.active(feature::ATTACH_TABLE) {
            true => self.push_event(mem, &fault.long_record(page)),
            false => self.push_event(mem, &fault.record()),
        }
    }

    /// Reports a fault that the device did not find itself: one of an endpoint that is behind another IOMMU.
    pub fn report_fault(&mut self, mem: &mut dyn GuestMemory, fault: &Fault) {
        self.push_fault(mem, fault, None);
    }

    /// Sends raw bytes on the event queue, as a fault record would go: for tests of drivers with records that this device
    /// would not write. At most 4 KiB are sent.
    pub fn push_event(&mut self, mem: &mut dyn GuestMemory, record: &[u8]) {
        let record = &record[..record.len().min(LIST_LIMIT)];
        if self.deliver_event(mem, record) == Delivery::NoBuffer {
            if self.held_events.len() < self.iommu.config.held_events {
                self.held_events.push_back(Vec::from(record));
            } else {
                self.counters.events_dropped += 1;
            }
        }
        self.interrupt_if_due(EVENT_QUEUE, mem);
    }

    /// Delivers records that waited for buffers.
    pub(crate) fn deliver_held_events(&mut self, mem: &mut dyn GuestMemory) {
        while let Some(record) = self.held_events.pop_front() {
            if self.deliver_event(mem, &record) == Delivery::NoBuffer {
                self.held_events.push_front(record);
                break;
            }
        }
    }

    fn deliver_event(&mut self, mem: &mut dyn GuestMemory, record: &[u8]) -> Delivery {
        if !self.is_running() {
            return Delivery::NoBuffer;
        }
        self.try_deliver_event(mem, record).unwrap_or_else(|error| {
            self.ring_failed(error);
            Delivery::NoBuffer
        })
    }

    fn try_deliver_event(&mut self, mem: &mut dyn GuestMemory, record: &[u8]) -> Result<Delivery, RingError> {
        let indirect = self.iommu.negotiated & feature::RING_INDIRECT_DESC != 0;
        let event_idx = self.event_idx();
        let Some(ring) = self.rings[usize::from(EVENT_QUEUE)].as_mut() else {
            return Ok(Delivery::NoBuffer);
        };
        let Some(chain) = ring.pop(mem, indirect)? else {
            return Ok(Delivery::NoBuffer);
        };
        if event_idx {
            ring.request_kick(mem)?;
        }
        // A long record in a short buffer is an older one.
        let older = short_form(record);
        let shorten = self.iommu.negotiated & feature::ATTACH_TABLE != 0
            && record.len() == LONG_RECORD
            && chain.writable_len() < LONG_RECORD as u64;
        let record = if shorten { &older } else { record };
        let fits = chain.writable_len() >= record.len() as u64;
        if !fits && self.iommu.config.quirks.malformed_stops {
            self.fail();
            return Ok(Delivery::NoBuffer);
        }
        // A buffer that is too small goes back empty, and the record is lost.
        let written = if fits { record } else { &[] };
        chain.write(mem, written)?;
        ring.push_used(mem, u32::from(chain.head), written.len() as u32)?;
        if fits {
            self.counters.events += 1;
        } else {
            self.counters.event_buffers_short += 1;
        }
        Ok(Delivery::Done)
    }
}
