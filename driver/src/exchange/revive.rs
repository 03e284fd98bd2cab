//! Mapping again what waits for a flush of a domain that defers unmapping. Sends nothing, and waits for nothing.

use super::{Mapped, Run, Shared};
use crate::engine::{DomainKey, Purpose, Reach, Wish};
use crate::platform::Platform;

/// Makes the mapping of a buffer live again, if it waits for a flush. `None`, and nothing done, where none does that suits, or
/// anything is unusual.
#[inline(always)]
pub(crate) fn revive_one<P: Platform>(shared: &Shared<P>, key: DomainKey, wish: Wish<'_>) -> Option<Mapped> {
    let mut state = shared.state.usual()?;
    state.engine.revive_one(key, wish)
}

/// The same for a list of so many bytes in all, for an endpoint of this reach.
#[inline]
pub(crate) fn revive_list<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    whole: (&Reach, u64),
    runs: impl Iterator<Item = Run> + Clone,
    purpose: Purpose,
) -> Option<Mapped> {
    let mut state = shared.state.usual()?;
    state.engine.revive_list(key, whole, runs, purpose)
}
