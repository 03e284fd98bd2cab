//! Requests for shadows, of any number of domains: one doorbell for as many as the ring takes, and each status looked at.

use super::compose::Piece;
use crate::addr::IovaRange;
use crate::engine::{DomainKey, ListId, Made, Op, Purpose, Tag, UnmapPlan};
use crate::error::MapError;
use crate::exchange::{Need, Shared, State};
use crate::platform::Platform;
use crate::queue::{Answer, Batch};
use crate::wire::request::Request;
use alloc::vec::Vec;

/// What became of mappings that were to be made.
pub(super) struct Mapped {
    /// Of the first ones, which were begun.
    pub made: Vec<Made>,
    /// The first that failed, and why.
    pub result: Result<(), (usize, MapError)>,
}

/// Maps all, unless one fails: then those before it, and some behind it, may be made all the same. Waits for the device.
/// Allocates.
///
/// # Safety
/// The endpoints of the domains may do with the memory what the pieces allow, from now until they were unmapped with
/// success; also those whose outcome is [`Made::Unknown`].
pub(super) unsafe fn map_all<P: Platform>(shared: &Shared<P>, wanted: &[(DomainKey, Piece)]) -> Mapped {
    let list = { shared.state.lock().engine.begin_list() };
    let mut begun = 0;
    let mut result = Ok(());
    shared.block_on(async {
        // Bounded: each round begins one, or ends in an error.
        while begun < wanted.len() && result.is_ok() {
            let submit = |state: &mut State| {
                let mut batch = Batch::default();
                while let Some((key, piece)) = wanted.get(begun)
                    && state.requests.has_free_slot()
                {
                    if let Err(error) = submit_map(state, *key, *piece, list, &mut batch) {
                        result = Err((begun, error));
                        break;
                    }
                    begun += 1;
                }
                state.publish(wanted.first().map(|(key, _)| *key), &shared.doorbell);
                batch
            };
            let batch = match shared.with_slot(Need::Slot, submit).await {
                Ok(batch) => batch,
                Err(error) => {
                    result = Err((begun, MapError::NotSent(error)));
                    break;
                }
            };
            let Some(in_flight) = shared.begin(batch) else { continue };
            let answer = |_: &mut State, answer: Answer| {
                let Err((Op::Map { domain, range, .. }, error)) = answer else { return };
                let error = match error.outcome_unknown() {
                    true => MapError::Quarantined { range, error },
                    false => MapError::Request { range, error },
                };
                let at = wanted.iter().position(|(key, piece)| (*key, piece.range) == (domain, range));
                // An answer counts more than what was not begun because of the driver.
                if !matches!(result, Err((first, _)) if first < begun) {
                    result = Err((at.unwrap_or(0), error));
                }
            };
            in_flight.wait(answer).await;
        }
    });
    let became = |(key, piece): &(DomainKey, Piece)| match result {
        Ok(()) => Made::Live,
        Err(_) => shared.state.lock().engine.made(*key, (list, piece.range)),
    };
    Mapped { made: wanted[..begun].iter().map(became).collect(), result }
}

/// Begins and submits one. The caller made sure of a slot. Called under the lock.
fn submit_map(
    state: &mut State,
    key: DomainKey,
    piece: Piece,
    list: ListId,
    batch: &mut Batch,
) -> Result<(), MapError> {
    let State { engine, requests, .. } = state;
    let Piece { range, phys, prot } = piece;
    let len = range.len_bytes().ok_or(MapError::Empty)?;
    engine.check_map(key, range.start(), len, phys, prot)?;
    engine.take(key, range)?;
    let begun = engine.begin_map(key, (list, range), phys, Purpose { prot, tag: Tag::NONE }, &mut None);
    if begun.is_err() {
        engine.give_back(key, range, 1);
    }
    let (record, domain) = begun?;
    let request = Request::Map { domain, range, phys, prot };
    let queued = requests.queue(&request, Op::Map { domain: key, range, record }, batch);
    debug_assert!(queued, "the caller makes sure of a slot");
    Ok(())
}

/// Whether the device confirmed that something is unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unmapped {
    All,
    /// The driver's records say which are not. What the device did not unmap is in quarantine.
    Some,
}

/// Unmaps whole mappings: one, or several that touch each other, for each range. Waits for the device.
pub(super) fn unmap_all<P: Platform>(shared: &Shared<P>, ranges: &[(DomainKey, IovaRange)]) -> Unmapped {
    let mut unmapped = Unmapped::All;
    let mut begun = 0;
    shared.block_on(async {
        // Bounded: each round begins one, or is the last.
        while begun < ranges.len() {
            let submit = |state: &mut State| {
                let mut batch = Batch::default();
                while let Some((key, range)) = ranges.get(begun)
                    && state.requests.has_free_slot()
                {
                    begun += 1;
                    match state.engine.begin_unmap(*key, *range) {
                        Ok(UnmapPlan::Send(request, op)) => state.submit(&request, op, &mut batch),
                        Ok(UnmapPlan::Nothing) => {}
                        Err(_) => unmapped = Unmapped::Some,
                    }
                }
                state.publish(ranges.first().map(|(key, _)| *key), &shared.doorbell);
                batch
            };
            let Ok(batch) = shared.with_slot(Need::Slot, submit).await else {
                unmapped = forget_all(shared, &ranges[begun..]);
                break;
            };
            let Some(in_flight) = shared.begin(batch) else { continue };
            let answer = |state: &mut State, answer| {
                if let Err((op, error)) = answer {
                    // What could be unmapped apart is so by whoever empties the quarantine.
                    state.engine.disown_op(op, error);
                    unmapped = Unmapped::Some;
                }
            };
            in_flight.wait(answer).await;
        }
    });
    unmapped
}

/// Where nothing can be sent: in a dead domain it takes no request.
fn forget_all<P: Platform>(shared: &Shared<P>, ranges: &[(DomainKey, IovaRange)]) -> Unmapped {
    for (key, range) in ranges {
        let mut state = shared.state.lock();
        if state.engine.is_gone(*key, *range) {
            // Nothing to send, and no error: the records go.
            let _ = state.engine.begin_unmap(*key, *range);
        }
    }
    Unmapped::Some
}
