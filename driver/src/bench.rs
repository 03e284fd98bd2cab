//! One request by itself, without records: what every operation pays below the engine. For measuring only.

use crate::dma::Endpoint;
use crate::domain::Domain;
use crate::error::RequestError;
use crate::platform::Platform;
use crate::wire::request::Request;

/// An UNMAP of the address that is never mapped, which a device confirms and which changes nothing.
pub struct RawRequest<'a, P: Platform> {
    domain: &'a Domain<P>,
    request: Request,
}

impl<'a, P: Platform> RawRequest<'a, P> {
    /// The request for the domain of an endpoint.
    pub fn new(endpoint: &'a Endpoint<P>) -> Self {
        let domain = endpoint.domain();
        let request = Request::Unmap { domain: domain.id(), range: endpoint.faulting() };
        Self { domain, request }
    }

    /// Sends it and waits for the answer: a slot, the ring, the doorbell, the deadline, the answer's id, length and
    /// status.
    ///
    /// # Errors
    /// As for every request.
    pub fn send(&self) -> Result<(), RequestError> {
        self.domain.shared().exchange_raw(&self.request)
    }
}
