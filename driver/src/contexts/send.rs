//! Sending requests of the draft: all of a list, with one doorbell for as many as the ring takes.

use super::wire::ContextRequest;
use crate::engine::{Attachment, DomainKey};
use crate::error::RequestError;
use crate::exchange::{Need, Shared};
use crate::id::{DomainId, EndpointId};
use crate::platform::Platform;
use crate::queue::{Batch, Outcome};

impl<P: Platform> Shared<P> {
    /// Sends requests in their order and waits for all of them. The first error, of which there may be more; one after
    /// which the outcome is unknown counts more than one that is known.
    ///
    /// Whatever the caller wrote to tables before is visible to the device that sees the requests: publishing them is a
    /// store with release order.
    pub(super) fn send_contexts(&self, key: DomainKey, requests: &[ContextRequest]) -> Outcome {
        self.block_on(async {
            let mut result = Ok(());
            let mut sent = 0;
            while sent < requests.len() {
                let batch = self
                    .with_slot(Need::Slot, |state| {
                        let mut batch = Batch::default();
                        // The domain's record lives as long as its handle, which the caller has.
                        let Some(id) = state.engine.domain(key).map(|domain| domain.id) else { return batch };
                        while let Some(request) = requests.get(sent) {
                            if !state.requests.submit_context(&request.encode(id), &mut batch) {
                                break;
                            }
                            sent += 1;
                            state.sent += 1;
                            state.engine.count_request(key);
                        }
                        state.publish(Some(key), &self.doorbell);
                        batch
                    })
                    .await;
                let batch = match batch {
                    Ok(batch) if batch.is_empty() => return worse(result, Err(RequestError::NoSlot)),
                    Ok(batch) => batch,
                    Err(error) => return worse(result, Err(error)),
                };
                self.wait(batch, |_, answer| {
                    result = worse(result, answer.map_err(|(_, error)| error));
                })
                .await;
            }
            result
        })
    }

    /// Sends a request that is about no domain and waits for it.
    pub(super) fn send_response(&self, request: ContextRequest) -> Outcome {
        self.block_on(async {
            let batch = self
                .with_slot(Need::Slot, |state| {
                    let mut batch = Batch::default();
                    if state.requests.submit_context(&request.encode(DomainId::new(0)), &mut batch) {
                        state.sent += 1;
                    }
                    state.publish(None, &self.doorbell);
                    batch
                })
                .await?;
            match batch.is_empty() {
                true => Err(RequestError::NoSlot),
                false => self.finish(batch).await,
            }
        })
    }

    /// An endpoint that the device confirmed to be in the domain.
    pub(super) fn member(&self, key: DomainKey) -> Option<EndpointId> {
        let state = self.state.lock();
        let mut done = None;
        // Bounded: each round goes to a higher number.
        while let Some(endpoint) = state.engine.next_attached(done) {
            done = Some(endpoint);
            let record = state.engine.endpoint(endpoint);
            if record.is_some_and(|record| record.attachment == Attachment::Attached(key)) {
                return Some(endpoint);
            }
        }
        None
    }

    /// Whether an endpoint may be in the domain, or in one that the device had under its number before, of which that is not
    /// known for certain.
    pub(super) fn is_in_doubt(&self, key: DomainKey) -> bool {
        let state = self.state.lock();
        state.engine.domain(key).is_some_and(|domain| domain.possible != domain.attached())
    }

    /// Whether the device has nothing of the domain: no endpoint is or may be in it, and none bypasses.
    pub(super) fn is_dead(&self, key: DomainKey) -> bool {
        let state = self.state.lock();
        let empty = state.engine.domain(key).is_none_or(|domain| domain.possible == 0);
        empty && state.engine.bypass_closed
    }
}

fn worse(first: Outcome, second: Outcome) -> Outcome {
    match (first, second) {
        (Err(known), Err(error)) if error.outcome_unknown() && !known.outcome_unknown() => Err(error),
        (Ok(()), second) => second,
        (first, _) => first,
    }
}
