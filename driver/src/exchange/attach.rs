//! Attaching and detaching endpoints, and mapping again what a domain lost.

use super::{Need, Sent, Shared, State, flush};
use crate::addr::IovaRange;
use crate::engine::{AttachPlan, DomainKey, Op};
use crate::error::{AttachError, DetachError, RequestError};
use crate::id::EndpointId;
use crate::platform::Platform;
use crate::queue::{Batch, Outcome};
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
            if let Err(unreplayed) = replayed {
                if let Err(error) = self.detach(endpoint).await {
                    log::error!("endpoint {endpoint} stays attached: {error}");
                }
                return Err(unreplayed.keeps_out(endpoint));
            }
        }
        Ok(sent)
    }

    /// Tells the device again what a domain lost when it died.
    pub(crate) async fn replay(&self, key: DomainKey, need: Need) -> Result<(), Unreplayed> {
        let mapped = self.replay_mappings(key, need).await;
        mapped.map_err(|(range, error)| Unreplayed::Mapping(range, error))?;
        #[cfg(feature = "contexts")]
        self.replay_contexts(key, need).await.map_err(Unreplayed::Contexts)?;
        Ok(())
    }

    /// Maps again what a domain lost: one request each, one doorbell for as many as the ring takes.
    async fn replay_mappings(&self, key: DomainKey, need: Need) -> Result<(), (IovaRange, RequestError)> {
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
        let outcome = self.finish(begun.await.map_err(failed)??).await;
        self.detached(endpoint, outcome)
    }

    /// What a DETACH that was sent and waited for comes to.
    pub(crate) fn detached(&self, endpoint: EndpointId, outcome: Outcome) -> Result<(), DetachError> {
        match outcome {
            // Unplugged: it is in no domain any more.
            Ok(()) | Err(RequestError::Refused(Status::NoEnt)) => Ok(()),
            // Nor one that turned out not to be where it may have been.
            Err(_) if self.is_detached(endpoint) => Ok(()),
            Err(error) => Err(DetachError::Request { endpoint, error }),
        }
    }
}

/// Attaches an endpoint that is known, in no domain and in no group, to a domain without mappings. Where it did not succeed
/// with the slot of what was sent, if that is still to be waited for.
pub(crate) fn attach_first<P: Platform>(
    shared: &Shared<P>,
    endpoint: EndpointId,
    key: DomainKey,
) -> Result<(), Option<usize>> {
    let op = Op::Attach { endpoint, domain: key };
    let (slot, place) = {
        let Some(mut state) = shared.state.usual() else { return Err(None) };
        let State { engine, requests, .. } = &mut *state;
        let Some(slot) = requests.free_slot() else { return Err(None) };
        let Some((request, place, domain)) = engine.begin_attach_one(endpoint, key) else { return Err(None) };
        let index = slot.index();
        let wanted = slot.send(&request, op);
        shared.note_sent(domain, wanted);
        (index, place)
    };
    let Some(mut state) = shared.answer(slot) else { return Err(Some(slot)) };
    if !state.engine.attached_one(place, endpoint, key) {
        state.succeeded(op);
        // What more there is to do finds the endpoint where it is to be.
        return Err(None);
    }
    Ok(())
}

/// Detaches an endpoint that is in no group from a domain without mappings. Says whether it had none to the end: else what
/// it had may wait to go back to its owner. Where it did not succeed as [`attach_first`].
pub(crate) fn detach_first<P: Platform>(
    shared: &Shared<P>,
    endpoint: EndpointId,
) -> Result<bool, Option<usize>> {
    let (slot, place, key) = {
        let Some(mut state) = shared.state.usual() else { return Err(None) };
        let State { engine, requests, .. } = &mut *state;
        let Some(slot) = requests.free_slot() else { return Err(None) };
        let Some(((request, place, domain), key)) = engine.begin_detach_one(endpoint) else {
            return Err(None);
        };
        let index = slot.index();
        let wanted = slot.send(&request, Op::Detach { endpoint, domain: key });
        shared.note_sent(domain, wanted);
        (index, place, key)
    };
    let Some(mut state) = shared.answer(slot) else { return Err(Some(slot)) };
    let done = state.engine.detached_one(place, endpoint, key);
    if !done {
        state.succeeded(Op::Detach { endpoint, domain: key });
    }
    Ok(done)
}

/// What the device did not take again.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unreplayed {
    Mapping(IovaRange, RequestError),
    #[cfg(feature = "contexts")]
    Contexts(RequestError),
}

impl Unreplayed {
    /// Why an endpoint is not in the domain then.
    pub(crate) fn keeps_out(self, endpoint: EndpointId) -> AttachError {
        match self {
            Self::Mapping(range, error) => AttachError::Replay { endpoint, range, error },
            #[cfg(feature = "contexts")]
            Self::Contexts(error) => AttachError::Contexts { endpoint, error },
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
