//! Unmapping.

use super::{Need, Shared, State};
use crate::addr::IovaRange;
use crate::engine::{DomainKey, Engine, UnmapPlan};
use crate::error::{RequestError, UnmapError};
use crate::platform::Platform;
use crate::queue::Outcome;
use crate::wire::request::Status;
use core::future::Future;

/// Mappings that only the operation at hand knows. Where it ends early they are in quarantine: nobody is left who
/// could unmap them.
struct Owned<'a, P: Platform> {
    shared: &'a Shared<P>,
    key: DomainKey,
    range: Option<IovaRange>,
}

impl<P: Platform> Drop for Owned<'_, P> {
    fn drop(&mut self) {
        if let Some(range) = self.range {
            self.shared.state.lock().engine.disown(self.key, range);
        }
    }
}

/// Unmaps whole neighbouring mappings. Memory that was held for them goes back to its owner.
pub(crate) fn unmap<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    range: IovaRange,
) -> impl Future<Output = Result<(), UnmapError>> + Send {
    // Also when it is dropped before it was first polled.
    let mut owned = Owned { shared, key, range: Some(range) };
    async move {
        let result = unmap_once(&mut owned, range, Engine::begin_unmap).await;
        let refused = Err(RequestError::Refused(Status::Range));
        if !matches!(result, Err(UnmapError::Request { error, .. }) if Err(error) == refused) {
            return result;
        }
        owned.range = Some(range);
        unmap_apart(&mut owned, refused).await.map_err(|error| UnmapError::Request { range, error })
    }
}

/// Tries to unmap one mapping that is in quarantine.
pub(crate) async fn reclaim<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    range: IovaRange,
) -> Result<(), UnmapError> {
    unmap_once(&mut Owned { shared, key, range: None }, range, Engine::begin_reclaim).await
}

/// From the time that the request is sent the records of `range` say what they are, and are owned no more.
async fn unmap_once<P: Platform>(
    owned: &mut Owned<'_, P>,
    range: IovaRange,
    begin: fn(&mut Engine, DomainKey, IovaRange) -> Result<UnmapPlan, UnmapError>,
) -> Result<(), UnmapError> {
    let (shared, key) = (owned.shared, owned.key);
    let rest = owned.range.and_then(|owned| owned.after(range));
    let mut plan = |state: &mut State| {
        owned.range = rest;
        Ok(match begin(&mut state.engine, key, range)? {
            UnmapPlan::Nothing => None,
            UnmapPlan::Send(request, op) => Some(shared.submit_one(state, &request, op)),
        })
    };
    // In a dead domain it takes no request, so no slot.
    let dead = {
        let mut state = shared.state.lock();
        state.engine.is_gone(key, range).then(|| plan(&mut state))
    };
    let failed = |error| UnmapError::Request { range, error };
    let begun = match dead {
        Some(done) => done?,
        None => shared.with_slot(Need::Slot, plan).await.map_err(failed)??,
    };
    let outcome = match begun {
        Some(batch) => shared.finish(batch).await,
        None => Ok(()),
    };
    while let Some(held) = { shared.state.lock().engine.take_released(key, range) } {
        shared.release(held);
    }
    outcome.map_err(failed)
}

/// A device that refuses to unmap several mappings at once may have removed some: each is unmapped by itself,
/// and what the device does not have any more it confirms (I6). What it refuses even so is in quarantine.
async fn unmap_apart<P: Platform>(owned: &mut Owned<'_, P>, refused: Outcome) -> Outcome {
    let mut outcome = None;
    // Bounded: each round goes on behind a mapping.
    while let Some(rest) = owned.range {
        let part = { owned.shared.state.lock().engine.next_apart(owned.key, rest) };
        let Some(part) = part else { break };
        let unmapped = match unmap_once(owned, part, Engine::begin_unmap_apart).await {
            Err(UnmapError::Request { error, .. }) => Err(error),
            _ => Ok(()),
        };
        outcome = Some(outcome.unwrap_or(Ok(())).and(unmapped));
        if let Some(unsent) = owned.range.filter(|range| range.contains(part)) {
            owned.shared.state.lock().engine.disown(owned.key, part);
            owned.range = unsent.after(part);
        }
    }
    owned.range = None;
    // A single mapping that the device calls out of range is as it was refused.
    outcome.unwrap_or(refused)
}
