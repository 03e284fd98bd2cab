//! Faults by endpoint: whose they are, how many, and when it is enough.

use super::{Attachment, DomainKey, EndpointRecord, Engine};
use crate::fault::FaultWindow;
use crate::id::EndpointId;
use crate::options::Options;
use crate::wire::fault::Fault;

impl Engine {
    /// Counts a fault for its endpoint, and says whose it is. False where the endpoint had enough of them in the last
    /// while, so that this one is only counted.
    pub(crate) fn take_fault(&mut self, fault: &mut Fault, now_ns: Option<u64>, options: &Options) -> bool {
        let limit = options.fault_limit;
        let key = self.endpoint(fault.endpoint).and_then(EndpointRecord::domain);
        fault.domain = key.and_then(|key| self.domain(key)).map(|domain| domain.id);
        let Some(endpoint) = self.endpoint_mut(fault.endpoint) else {
            return self.strangers.count(now_ns, limit) <= limit.records;
        };
        fault.tag = endpoint.tag;
        endpoint.faults = endpoint.faults.saturating_add(1);
        let recent = endpoint.recent.count(now_ns, limit);
        let attached = matches!(endpoint.attachment, Attachment::Attached(_));
        let enough = options.suspend_after.is_some_and(|after| recent >= after);
        endpoint.suspend_due |= enough && attached;
        recent <= limit.records
    }

    /// All faults were fetched: without a clock that is when a window ends.
    pub(crate) fn end_fault_windows(&mut self) {
        self.strangers = FaultWindow::default();
        for endpoint in &mut self.endpoints {
            endpoint.recent = FaultWindow::default();
        }
    }

    pub(crate) fn set_tag(&mut self, id: EndpointId, tag: Option<usize>) {
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.tag = tag;
        }
    }

    /// An endpoint that faulted too often; it is forgotten that it did.
    pub(crate) fn next_to_suspend(&mut self) -> Option<EndpointId> {
        let endpoint = self.endpoints.iter_mut().find(|record| record.suspend_due)?;
        endpoint.suspend_due = false;
        Some(endpoint.id)
    }

    /// Notes where a suspended endpoint comes back to. False where it is in no domain for certain.
    pub(crate) fn begin_suspension(&mut self, id: EndpointId) -> bool {
        let Some(endpoint) = self.endpoint_mut(id) else { return false };
        let Attachment::Attached(key) = endpoint.attachment else { return false };
        endpoint.suspended = Some(key);
        true
    }

    /// Ends a suspension, and says where the endpoint was.
    pub(crate) fn end_suspension(&mut self, id: EndpointId) -> Option<DomainKey> {
        self.endpoint_mut(id)?.suspended.take()
    }

    /// Takes the end of a suspension back.
    pub(crate) fn suspend_again(&mut self, id: EndpointId, key: DomainKey) {
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.suspended = Some(key);
        }
    }

    /// Whether the endpoint is, or may be, in this domain, or comes back to it when it is resumed.
    pub(crate) fn is_or_was_in(&self, id: EndpointId, key: DomainKey) -> bool {
        let Some(endpoint) = self.endpoint(id) else { return false };
        endpoint.domain().or(endpoint.suspended) == Some(key)
    }

    /// Where a suspended endpoint comes back to.
    pub(crate) fn suspended(&self, id: EndpointId) -> Option<DomainKey> {
        self.endpoint(id)?.suspended
    }
}
