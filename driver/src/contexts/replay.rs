//! Telling a device again of the contexts that it lost, when the domain died or the device was reset.
//!
//! A context first, and once that is there what is mapped in it. Tables are where they were, in the guest's memory.

use crate::engine::{DomainKey, ToldAgain};
use crate::error::RequestError;
use crate::exchange::{Need, Shared};
use crate::platform::Platform;
use crate::queue::Batch;

impl<P: Platform> Shared<P> {
    /// Adds again what contexts a domain has, and what is mapped in them. Ends with the first that fails.
    pub(crate) async fn replay_contexts(&self, key: DomainKey, need: Need) -> Result<(), RequestError> {
        // Bounded: each round tells the device of at least one context or mapping, or ends.
        loop {
            let batch = self.with_slot(need, |state| {
                let mut batch = Batch::default();
                while state.requests.can_submit(false) {
                    let (request, op) = match state.engine.next_to_tell(key) {
                        Some(ToldAgain::Mapping(request, op)) => (request, op),
                        // Alone: what is mapped in it follows when it is there.
                        Some(ToldAgain::Context(context)) if batch.is_empty() => {
                            let Some(again) = state.engine.begin_context_again(context) else { break };
                            state.submit_context(Some(key), again.0, again.1, &mut batch);
                            break;
                        }
                        _ => break,
                    };
                    state.submit_context(Some(key), request, op, &mut batch);
                }
                state.publish(Some(key), &self.doorbell);
                batch
            });
            let batch = batch.await?;
            if batch.is_empty() {
                return Ok(());
            }
            let mut result = Ok(());
            self.wait(batch, |_, answer| result = result.and(answer.map_err(|(_, error)| error))).await;
            result?;
        }
    }
}
