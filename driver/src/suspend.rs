//! Endpoints that fault too often, or are to be kept quiet for another reason.

use crate::error::{AttachError, DetachError};
use crate::id::EndpointId;
use crate::platform::Platform;
use crate::viommu::Viommu;

impl<P: Platform> Viommu<P> {
    /// Detaches an endpoint until [`resume`](Self::resume), and lets nobody attach it meanwhile. It reaches nothing
    /// then, if the bypass is closed. Its domain keeps its mappings, and [`Platform::quiesce`] is called first.
    /// [`poll`](Self::poll) does this by itself to endpoints that fault more often than
    /// [`Options::suspend_after`](crate::Options::suspend_after) says.
    ///
    /// # Errors
    /// [`DetachError`]: it stays where it is.
    pub fn suspend(&self, endpoint: EndpointId) -> Result<(), DetachError> {
        let shared = &self.shared;
        shared.platform.quiesce(endpoint);
        if !{ shared.state.lock().engine.begin_suspension(endpoint) } {
            return Err(DetachError::NotAttached(endpoint));
        }
        let detached = shared.block_on(shared.detach(endpoint));
        if detached.is_err() {
            shared.state.lock().engine.end_suspension(endpoint);
        }
        self.collect();
        detached
    }

    /// Attaches a suspended endpoint to its domain again, which gets back what it had mapped. Does nothing to one that
    /// is not suspended. Turn its bus mastering on only after this succeeded.
    ///
    /// # Errors
    /// [`AttachError`]: it stays suspended. [`AttachError::DeadDomain`] where its domain is gone:
    /// [`detach`](Self::detach) ends the suspension then.
    pub fn resume(&self, endpoint: EndpointId) -> Result<(), AttachError> {
        let shared = &self.shared;
        let Some(key) = ({ shared.state.lock().engine.end_suspension(endpoint) }) else { return Ok(()) };
        let attached = shared.block_on(shared.attach(endpoint, key));
        if attached.is_err() {
            shared.state.lock().engine.suspend_again(endpoint, key);
        }
        attached.map(|_| ())
    }

    /// Whether an endpoint is suspended.
    pub fn is_suspended(&self, endpoint: EndpointId) -> bool {
        self.shared.state.lock().engine.suspended(endpoint).is_some()
    }

    /// Suspends those that faulted too often.
    pub(crate) fn suspend_due(&self) {
        // Bounded by the endpoints: each round takes one off the list, and faults come in by `poll` only.
        while let Some(endpoint) = { self.shared.state.lock().engine.next_to_suspend() } {
            match self.suspend(endpoint) {
                Ok(()) => log::warn!("endpoint {endpoint} faults too often: it is suspended"),
                Err(error) => log::error!("endpoint {endpoint} faults too often, and stays: {error}"),
            }
        }
    }
}
