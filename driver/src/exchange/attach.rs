//! Attaching and detaching endpoints, and mapping again what a domain lost.

use super::{Need, Sent, Shared, flush};
use crate::addr::IovaRange;
use crate::engine::{AttachPlan, DomainKey, Op};
use crate::error::{AttachError, DetachError, RequestError};
use crate::id::EndpointId;
use crate::platform::Platform;
use crate::queue::Batch;
use crate::wire::request::Status;

impl<P: Platform> Shared<P> {
    /// Attaches an endpoint that is known, and maps again what its domain lost. Says whether the attachment took a
    /// request.
    pub(crate) async fn attach(&self, endpoint: EndpointId, key: DomainKey) -> Result<Sent, AttachError> {
        let failed = |error| AttachError::Request { endpoint, error };
        let mut sent = Sent::Nothing;
        if !self.is_attached(endpoint, key) {
            let begun = self.with_slot(Need::Slot, |state| {
                Ok(match state.engine.begin_attach(endpoint, key)? {
                    AttachPlan::Nothing => None,
                    AttachPlan::Send(request, op) => Some(self.submit_one(state, &request, op)),
                })
            });
            if let Some(batch) = begun.await.map_err(failed)?? {
                self.finish(batch).await.map_err(failed)?;
                sent = Sent::Request;
            }
        }
        if self.state.lock().engine.begin_replay(key) {
            let replay = Transition { shared: self, key };
            let replayed = self.replay(key, Need::Slot).await;
            drop(replay);
            if let Err((range, error)) = replayed {
                if let Err(error) = self.detach(endpoint).await {
                    log::error!("endpoint {endpoint} stays attached: {error}");
                }
                return Err(AttachError::Replay { endpoint, range, error });
            }
        }
        Ok(sent)
    }

    /// Maps again what a domain lost when it died: one request each, one doorbell for as many as the ring takes.
    pub(crate) async fn replay(&self, key: DomainKey, need: Need) -> Result<(), (IovaRange, RequestError)> {
        let everything = IovaRange::WHOLE;
        let mut done = None;
        loop {
            let batch = self.with_slot(need, |state| {
                let mut batch = Batch::default();
                while state.requests.can_submit(false) {
                    let Some((request, op, start)) = state.engine.next_replay(key, done) else { break };
                    state.submit(&request, op, &mut batch);
                    done = Some(start);
                }
                state.publish(Some(key), &self.doorbell);
                batch
            });
            let batch = batch.await.map_err(|error| (everything, error))?;
            if batch.is_empty() {
                return Ok(());
            }
            let mut result = Ok(());
            self.wait(batch, |_, answer| {
                if let (Err((Op::Replay { range, .. }, error)), Ok(())) = (answer, result) {
                    result = Err((range, error));
                }
            })
            .await;
            result?;
        }
    }

    pub(crate) async fn detach(&self, endpoint: EndpointId) -> Result<(), DetachError> {
        let failed = |error| DetachError::Request { endpoint, error };
        let deferred = { self.state.lock().engine.flush_before_leaving(endpoint) };
        if let Some(key) = deferred
            && let Err(error) = flush(self, key).await
        {
            log::warn!("before endpoint {endpoint} leaves its domain: {error}");
        }
        let begun = self.with_slot(Need::Slot, |state| {
            let (request, op) = state.engine.begin_detach(endpoint)?;
            Ok(self.submit_one(state, &request, op))
        });
        match self.finish(begun.await.map_err(failed)??).await {
            // Unplugged: it is in no domain any more.
            Ok(()) | Err(RequestError::Refused(Status::NoEnt)) => Ok(()),
            // Nor one that turned out not to be where it may have been.
            Err(_) if self.is_detached(endpoint) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }
}

/// Ends a replay, finished or dropped. What a dropped one did not get to is mapped when an endpoint is attached next.
struct Transition<'a, P: Platform> {
    shared: &'a Shared<P>,
    key: DomainKey,
}

impl<P: Platform> Drop for Transition<'_, P> {
    fn drop(&mut self) {
        self.shared.state.lock().engine.end_transition(self.key);
    }
}
