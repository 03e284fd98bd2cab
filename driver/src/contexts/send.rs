//! Sending requests of the draft, one or a list of them, and waiting for the answers.

use super::wire::ContextRequest;
use crate::engine::{DomainKey, Op};
use crate::error::RequestError;
use crate::exchange::{Need, Shared, State};
use crate::id::DomainId;
use crate::platform::Platform;
use crate::queue::{Batch, Outcome};

impl<P: Platform> Shared<P> {
    /// Submits one request of the draft and publishes it. Called under the lock, by whoever made sure of a slot.
    ///
    /// Whatever was written to tables before is visible to a device that sees it: publishing is a store with release order.
    pub(super) fn submit_context(
        &self,
        state: &mut State,
        domain: Option<DomainKey>,
        (request, op): (ContextRequest, Op),
    ) -> Batch {
        let mut batch = Batch::default();
        state.submit_context(domain, request, op, &mut batch);
        state.publish(domain, &self.doorbell);
        batch
    }

    /// Sends INVALIDATE requests in their order, as many by one doorbell as the ring takes, and waits for all of them. Sends
    /// nothing, and succeeds, where the device has nothing of the domain's any more. The first error, of which there may be
    /// more.
    pub(super) async fn invalidate(
        &self,
        domain: DomainKey,
        requests: &[ContextRequest],
        is_cached: impl Fn(&State) -> Result<bool, RequestError>,
    ) -> Outcome {
        let mut result = Ok(());
        let mut sent = 0;
        while sent < requests.len() {
            // What a domain that died had cached went with it, which takes no slot to know.
            if !is_cached(&self.state.lock())? {
                return result;
            }
            let batch = self.with_slot(Need::Slot, |state| {
                let mut batch = Batch::default();
                // A recovery may have been waited for.
                if !is_cached(state)? {
                    return Ok(batch);
                }
                while let Some(request) = requests.get(sent).filter(|_| state.requests.can_submit(false)) {
                    state.submit_context(Some(domain), *request, Op::None, &mut batch);
                    sent += 1;
                }
                state.publish(Some(domain), &self.doorbell);
                Ok(batch)
            });
            let batch = batch.await??;
            if batch.is_empty() {
                return result;
            }
            self.wait(batch, |_, answer| result = result.and(answer.map_err(|(_, error)| error))).await;
        }
        result
    }
}

impl State {
    /// Puts a request of the draft into the ring. The caller made sure of a slot. Of a domain that is gone, which whoever
    /// has a handle of prevents, the number is 0.
    pub(super) fn submit_context(
        &mut self,
        domain: Option<DomainKey>,
        request: ContextRequest,
        op: Op,
        batch: &mut Batch,
    ) {
        let record = domain.and_then(|key| self.engine.domain(key));
        let id = record.map_or(DomainId::new(0), |domain| domain.id);
        let submitted = self.requests.submit_context(&request.encode(id), op, batch);
        debug_assert!(submitted, "the caller makes sure of a slot");
        self.engine.count_request(domain);
    }
}
