//! Unmapping.

use super::{InFlight, Need, Shared, State};
use crate::addr::IovaRange;
use crate::engine::{DomainKey, Engine, UnmapPlan};
use crate::error::{RequestError, UnmapError};
use crate::platform::Platform;
use crate::queue::{Batch, Outcome};
use crate::wire::request::Status;

/// Mappings that only the operation at hand knows. Where it ends early they are in quarantine: nobody is left who
/// could unmap them.
pub(crate) struct Owned<'a, P: Platform> {
    pub(super) shared: &'a Shared<P>,
    pub(super) key: DomainKey,
    range: Option<IovaRange>,
}

impl<P: Platform> Drop for Owned<'_, P> {
    fn drop(&mut self) {
        if let Some(range) = self.range {
            self.shared.state.lock().engine.disown(self.key, range);
        }
    }
}

/// Unmaps whole neighbouring mappings. Memory that was held for them goes back to its owner. `first` is what was sent
/// already, if it is one.
pub(crate) async fn unmap<P: Platform>(
    mut owned: Owned<'_, P>,
    range: IovaRange,
    first: Option<InFlight<'_, P>>,
) -> Result<(), UnmapError> {
    let result = match first {
        Some(in_flight) => {
            // The record says what it is.
            owned.settled();
            owned.end(in_flight, range).await
        }
        None => unmap_once(&mut owned, range, Engine::begin_unmap).await,
    };
    let refused = Err(RequestError::Refused(Status::Range));
    if !matches!(result, Err(UnmapError::Request { error, .. }) if Err(error) == refused) {
        return result;
    }
    owned.range = Some(range);
    unmap_apart(&mut owned, refused).await.map_err(|error| UnmapError::Request { range, error })
}

impl<'a, P: Platform> Owned<'a, P> {
    pub(crate) fn new(shared: &'a Shared<P>, key: DomainKey, range: IovaRange) -> Self {
        Self { shared, key, range: Some(range) }
    }

    /// The records say what they are.
    pub(crate) fn settled(&mut self) {
        self.range = None;
    }

    /// Sends the request, if it takes one. From then on the records of `range` say what they are, and are owned no more.
    /// Called under the lock.
    #[inline]
    fn begin(
        &mut self,
        state: &mut State,
        range: IovaRange,
        begin: fn(&mut Engine, DomainKey, IovaRange) -> Result<UnmapPlan, UnmapError>,
    ) -> Result<Option<Batch>, UnmapError> {
        self.range = self.range.and_then(|owned| owned.after(range));
        Ok(match begin(&mut state.engine, self.key, range)? {
            UnmapPlan::Nothing => None,
            UnmapPlan::Send(request, op) => Some(self.shared.submit_one(state, &request, op)),
        })
    }

    async fn end(&self, in_flight: InFlight<'_, P>, range: IovaRange) -> Result<(), UnmapError> {
        let outcome = in_flight.outcome().await;
        self.shared.release_unmapped(self.key, range);
        outcome.map_err(|error| UnmapError::Request { range, error })
    }
}

impl<P: Platform> Shared<P> {
    /// Gives back what was held for mappings that are gone.
    #[inline]
    pub(crate) fn release_unmapped(&self, key: DomainKey, range: IovaRange) {
        while let Some(held) = { self.state.lock().engine.take_released(key, range) } {
            self.release(held);
        }
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

async fn unmap_once<P: Platform>(
    owned: &mut Owned<'_, P>,
    range: IovaRange,
    begin: fn(&mut Engine, DomainKey, IovaRange) -> Result<UnmapPlan, UnmapError>,
) -> Result<(), UnmapError> {
    let (shared, key) = (owned.shared, owned.key);
    // In a dead domain it takes no request, so no slot.
    let dead = {
        let mut state = shared.state.lock();
        state.engine.is_gone(key, range).then(|| owned.begin(&mut state, range, begin))
    };
    let failed = |error| UnmapError::Request { range, error };
    let begun = match dead {
        Some(done) => done?,
        None => {
            let plan = |state: &mut State| owned.begin(state, range, begin);
            shared.with_slot(Need::Slot, plan).await.map_err(failed)??
        }
    };
    match begun.and_then(|batch| shared.begin(batch)) {
        Some(in_flight) => owned.end(in_flight, range).await,
        None => {
            shared.release_unmapped(key, range);
            Ok(())
        }
    }
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
