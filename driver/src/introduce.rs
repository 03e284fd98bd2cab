//! Making endpoints known: what they reserve, and that they are in no domain.
//!
//! ```text
//!   PROBE -> reserved regions
//!   ATTACH to an empty scratch domain -> the endpoint left whatever domain an earlier life put it in
//!   DETACH -> and this one too; domains of an earlier life die with their last endpoint
//! ```

use crate::engine::{MAX_RESERVED, Op};
use crate::error::{AttachError, DetachError, RequestError, StartError};
use crate::exchange::{Need, State};
use crate::id::EndpointId;
use crate::options::DomainOptions;
use crate::platform::Platform;
use crate::queue::Answer;
use crate::start::Staged;
use crate::viommu::Viommu;
use crate::wire::feature::Features;
use crate::wire::property::{Properties, Property, ReservedRegion};
use crate::wire::request::{Request, Status};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

/// What became of an endpoint that was introduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Introduction {
    /// The device knows it, and it is in no domain.
    Known,
    /// The device does not know it: its DMA does not go through this IOMMU.
    Unknown,
    /// The device cannot detach endpoints. It is in an empty domain, blocked, and can be attached to one domain
    /// that has nothing else.
    CannotDetach,
    /// The device knows it and refuses to attach it: why.
    Refused(Status),
}

impl<P: Platform> Staged<P> {
    /// Makes the endpoint known: reads its reserved regions (virtio 1.4, IOMMU device, PROBE request), and takes it
    /// out of any domain that an earlier life of the device left it in. Its bus mastering must be off.
    ///
    /// Sends PROBE, ATTACH and DETACH and waits for them. Allocates.
    ///
    /// # Errors
    /// [`StartError::Endpoint`] when the device answers in a way that leaves the endpoint's state unknown, and
    /// [`StartError::OwnEndpoint`], [`StartError::TooManyEndpoints`] or [`StartError::Domain`], which send nothing.
    pub fn introduce(&self, endpoint: EndpointId) -> Result<Introduction, StartError> {
        let failed = |error| StartError::Endpoint { endpoint, error };
        let shared = &self.0.shared;
        let needed = shared.state.lock().engine.needs_introduction(endpoint);
        let needed = needed.map_err(|error| match error {
            AttachError::OwnEndpoint(_) => StartError::OwnEndpoint(endpoint),
            _ => StartError::TooManyEndpoints { limit: shared.options.max_endpoints },
        })?;
        if !needed {
            return Ok(Introduction::Known);
        }
        let mut reserved = match shared.block_on(self.0.probe(endpoint, Need::Probe)) {
            Ok(reserved) => reserved,
            Err(AttachError::Request { error: RequestError::Refused(Status::NoEnt), .. }) => {
                return Ok(Introduction::Unknown);
            }
            Err(AttachError::Request { error, .. }) => return Err(failed(error)),
            Err(_) => return Ok(Introduction::Refused(Status::NoMem)),
        };
        shared.state.lock().engine.introduce(endpoint, &mut reserved);
        let introduction = self.sweep(endpoint);
        if introduction == Ok(Introduction::Unknown) {
            // Two statements, so that the record is dropped without the lock.
            let record = shared.state.lock().engine.forget(endpoint);
            drop(record);
        }
        introduction
    }

    /// Attaches the endpoint to an empty domain and detaches it, so that it leaves any other (I12). A number that
    /// the device refuses may be in use by an earlier life: one more is tried.
    fn sweep(&self, endpoint: EndpointId) -> Result<Introduction, StartError> {
        let shared = &self.0.shared;
        let scratch = || {
            self.0
                .create_domain(DomainOptions { mappings: 0, ..DomainOptions::default() })
                .map_err(StartError::Domain)
        };
        let first = scratch()?;
        let second;
        let mut attached = shared.block_on(shared.attach(endpoint, first.key()));
        let refused = |result: &Result<_, AttachError>| match result {
            Err(AttachError::Request { error: RequestError::Refused(status), .. }) => Some(*status),
            _ => None,
        };
        if refused(&attached).is_some_and(|status| status != Status::NoEnt) {
            second = scratch()?;
            attached = shared.block_on(shared.attach(endpoint, second.key()));
        }
        match (refused(&attached), attached) {
            (Some(Status::NoEnt), _) => return Ok(Introduction::Unknown),
            (Some(status), _) => return Ok(Introduction::Refused(status)),
            (None, Err(AttachError::Request { error, .. })) => {
                return Err(StartError::Endpoint { endpoint, error });
            }
            (None, Err(_)) => return Ok(Introduction::Refused(Status::NoMem)),
            (None, Ok(_)) => {}
        }
        // The scratch domains go with their handles; a number stays taken as long as the endpoint may be in it.
        match shared.block_on(shared.detach(endpoint)) {
            Ok(()) => Ok(Introduction::Known),
            Err(DetachError::Request { error: RequestError::Refused(Status::Unsupp), .. }) => {
                Ok(Introduction::CannotDetach)
            }
            Err(DetachError::Request { error, .. }) => Err(StartError::Endpoint { endpoint, error }),
            Err(DetachError::NotAttached(_)) => Ok(Introduction::Known),
        }
    }
}

impl<P: Platform> Viommu<P> {
    /// Reads the endpoint's reserved regions, none where the device has no PROBE. Allocates.
    pub(crate) async fn probe(
        &self,
        endpoint: EndpointId,
        need: Need,
    ) -> Result<Arc<[ReservedRegion]>, AttachError> {
        if !self.features().contains(Features::PROBE) {
            return Ok(Arc::from([]));
        }
        let failed = |error| AttachError::Request { endpoint, error };
        let mut area = vec![0; self.probe_size];
        let request = Request::Probe { endpoint };
        let submit = |state: &mut State| self.shared.submit_one(state, &request, Op::Probe);
        let batch = self.shared.with_slot(need, submit).await.map_err(failed)?;
        let mut result = Ok(());
        let each = |state: &mut State, answer: Answer| {
            result = answer.map_err(|(_, error)| error);
            // Under the same lock that took the answer: the next PROBE cannot overwrite it.
            state.requests.copy_properties(&mut area);
        };
        self.shared.wait(batch, each).await;
        result.map_err(failed)?;
        let mut regions = Vec::new();
        let mut malformed = 0;
        for property in Properties::new(&area) {
            match property {
                Property::Reserved(region) if regions.len() < MAX_RESERVED => regions.push(region),
                Property::Reserved(_) => return Err(AttachError::TooManyReserved { endpoint }),
                Property::Ignored => {}
                Property::Malformed => malformed += 1,
            }
        }
        if malformed > 0 {
            log::warn!("endpoint {endpoint}: {malformed} malformed properties are ignored");
        }
        Ok(regions.into())
    }
}
