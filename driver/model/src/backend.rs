//! What stands behind a device that is itself in software: whoever carries its mappings out for real endpoints.

use alloc::sync::Arc;
use core::fmt;

use crate::device::Device;
use crate::domain::Mapping;
use crate::iommu::Outcome;
use crate::number::Status;

/// Carries out what a driver asks of a device, before the device answers: for one that is offered to a guest, and whose
/// endpoints are behind another IOMMU.
///
/// Each method is called for a request that the device's own rules allow. The status that it returns instead of success is
/// the request's answer, and the device's own state then stays as it was.
pub trait Backend: Send + Sync {
    /// An endpoint enters a domain, and leaves the one that it was in, which goes with its last endpoint.
    ///
    /// # Errors
    ///
    /// The status to answer.
    fn attach(&self, domain: u32, endpoint: u32) -> Result<(), Status>;

    /// An endpoint leaves its domain, which goes with its last one.
    ///
    /// # Errors
    ///
    /// The status to answer.
    fn detach(&self, domain: u32, endpoint: u32) -> Result<(), Status>;

    /// A mapping is made.
    ///
    /// # Errors
    ///
    /// The status to answer.
    fn map(&self, domain: u32, mapping: &Mapping) -> Result<(), Status>;

    /// All mappings in a range go, whole.
    ///
    /// # Errors
    ///
    /// The status to answer: they count as mapped.
    fn unmap(&self, domain: u32, first: u64, last: u64) -> Result<(), Status>;
}

/// A backend that may be there.
#[derive(Clone, Default)]
pub(crate) struct Behind(pub(crate) Option<Arc<dyn Backend>>);

impl fmt::Debug for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "a backend" } else { "nothing" })
    }
}

impl Device {
    /// Puts something behind the device that carries out what it is asked for. Bypass and resets are not its business:
    /// endpoints are to be detached before a reset.
    pub fn set_backend(&mut self, backend: Arc<dyn Backend>) {
        self.behind = Behind(Some(backend));
    }

    /// ATTACH: the backend follows where the device allowed it. Where it cannot, the endpoint is in no domain.
    pub(crate) fn attach_behind(&mut self, domain: u32, endpoint: u32, status: Status) -> Status {
        let Some(backend) = self.behind.0.clone().filter(|_| status == Status::Ok) else { return status };
        match backend.attach(domain, endpoint) {
            Ok(()) => status,
            Err(refused) => {
                self.iommu.detach(domain, endpoint);
                refused
            }
        }
    }

    /// DETACH: the backend goes first.
    pub(crate) fn detach_behind(&mut self, domain: u32, endpoint: u32) -> Status {
        let there = self.domain_of(endpoint) == Some(domain);
        if let Some(backend) = self.behind.0.clone().filter(|_| there)
            && let Err(refused) = backend.detach(domain, endpoint)
        {
            return refused;
        }
        self.iommu.detach(domain, endpoint)
    }

    /// MAP: the device's own check first, then the backend, or nothing.
    pub(crate) fn map_behind(&mut self, domain: u32, mapping: Mapping) -> Outcome {
        let outcome = self.iommu.map(domain, mapping);
        let Some(backend) = self.behind.0.clone() else { return outcome };
        if outcome != Status::Ok.into() {
            return outcome;
        }
        match backend.map(domain, &mapping) {
            Ok(()) => outcome,
            Err(refused) => {
                self.iommu.unmap(domain, mapping.virt_first, mapping.virt_last, 0);
                refused.into()
            }
        }
    }

    /// UNMAP: tried on a copy, then the backend, and only then for good.
    pub(crate) fn unmap_behind(&mut self, domain: u32, first: u64, last: u64, reserved: u32) -> Outcome {
        if let Some(backend) = self.behind.0.clone() {
            let outcome = self.iommu.clone().unmap(domain, first, last, reserved);
            if outcome != Status::Ok.into() {
                return outcome;
            }
            if let Err(refused) = backend.unmap(domain, first, last) {
                return refused.into();
            }
        }
        self.iommu.unmap(domain, first, last, reserved)
    }
}
