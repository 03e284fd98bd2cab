//! The domain that shadows a space.

use super::compose::Piece;
use crate::addr::{Iova, IovaRange};
use crate::domain::Domain;
use crate::id::EndpointId;
use crate::platform::Platform;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// What the device has for a shadow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// The device confirmed it.
    Mapped,
    /// The device may have it: a request about it failed, or has no answer.
    Stuck,
}

/// A domain, and what the device has mapped there, or may have.
pub(super) struct Hardware<P: Platform> {
    pub domain: Domain<P>,
    pub endpoints: Vec<EndpointId>,
    /// By first address.
    shadows: BTreeMap<u64, (IovaRange, Held)>,
    /// Whether there may be a piece without a shadow, or a shadow that is stuck.
    pub lacking: bool,
}

impl<P: Platform> Hardware<P> {
    pub(super) fn new(domain: Domain<P>) -> Self {
        Self { domain, endpoints: Vec::new(), shadows: BTreeMap::new(), lacking: false }
    }

    pub(super) fn len(&self) -> usize {
        self.shadows.len()
    }

    pub(super) fn insert(&mut self, range: IovaRange, held: Held) {
        self.shadows.insert(range.start().get(), (range, held));
    }

    pub(super) fn remove(&mut self, range: IovaRange) {
        self.shadows.remove(&range.start().get());
    }

    /// Whether a shadow starts there.
    pub(super) fn has(&self, start: Iova) -> bool {
        self.shadows.contains_key(&start.get())
    }

    /// Shadows that have an address in the range, in ascending order.
    pub(super) fn overlapping(&self, range: IovaRange) -> impl Iterator<Item = (IovaRange, Held)> + '_ {
        let before = self.shadows.range(..range.start().get()).next_back();
        let inside = self.shadows.range(range.start().get()..=range.last().get());
        let found = before.into_iter().chain(inside).map(|(_, shadow)| *shadow);
        found.filter(move |(shadow, _)| shadow.overlaps(range))
    }

    /// Whether the driver has a record of a shadow, so that the device may have it.
    pub(super) fn is_recorded(&self, shadow: IovaRange) -> bool {
        self.domain.translate(shadow.start()).is_some()
    }

    /// Appends what of a piece has no shadow.
    pub(super) fn without_shadow(&self, piece: Piece, parts: &mut Vec<Piece>) {
        let mut rest = Some(piece.range);
        for (shadow, _) in self.overlapping(piece.range) {
            let Some(range) = rest else { break };
            let before = shadow.start().get().checked_sub(1).map(Iova::new);
            let before = before.and_then(|last| IovaRange::new(range.start(), last));
            parts.extend(before.and_then(|before| piece.part(before)));
            rest = range.after(shadow);
        }
        parts.extend(rest.and_then(|rest| piece.part(rest)));
    }
}
