//! What is mapped in a domain, by the driver's records.

use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::domain::Domain;
use crate::engine::{Engine, MappingState, Record};
use crate::platform::Platform;
use crate::prot::Prot;
use core::fmt;

/// Where a mapping leads, by the driver's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The whole mapping.
    pub range: IovaRange,
    /// Where its first byte lies.
    pub phys: PhysAddr,
    /// What it allows.
    pub prot: Prot,
    /// What has become of it.
    pub status: MappingStatus,
    /// What its maker calls it; empty where he did not say.
    pub tag: &'static str,
}

/// What has become of a mapping, by the driver's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MappingStatus {
    /// The device confirmed it, and somebody is to unmap it.
    Mapped,
    /// A request about it is under way, or about to be sent.
    Changing,
    /// The device does not have it, since the domain lost its endpoints. It is mapped again with the next one.
    Lost,
    /// It was unmapped, and the device has it until its domain's flush.
    Deferred,
    /// The device may have it, or get it, and its owner cannot use it any more.
    Quarantined,
    /// The device does not have it, and its addresses and memory are about to go back.
    Returning,
}

impl MappingStatus {
    fn of(record: &Record) -> Self {
        match record.state {
            MappingState::Live if record.on_device => Self::Mapped,
            MappingState::Live => Self::Lost,
            MappingState::Mapping
            | MappingState::Replaying
            | MappingState::Unmapping
            | MappingState::Apart => Self::Changing,
            MappingState::Deferred => Self::Deferred,
            MappingState::Quarantined | MappingState::QuarantinedInFlight | MappingState::Stranded => {
                Self::Quarantined
            }
            MappingState::Released | MappingState::Returned => Self::Returning,
        }
    }
}

impl Translation {
    pub(crate) fn of(record: &Record, engine: &Engine) -> Self {
        Self {
            range: record.range,
            phys: record.phys,
            prot: record.prot(),
            status: MappingStatus::of(record),
            tag: engine.tag_of(record),
        }
    }
}

/// The mappings of a domain in the order of their addresses, from [`Domain::mappings`].
///
/// Takes the driver's lock for each, and holds it not in between: what is mapped meanwhile is seen if it lies behind.
pub struct Mappings<'a, P: Platform> {
    domain: &'a Domain<P>,
    /// Where the next one may start.
    next: Option<Iova>,
}

impl<'a, P: Platform> Mappings<'a, P> {
    pub(crate) fn new(domain: &'a Domain<P>) -> Self {
        Self { domain, next: Some(Iova::new(0)) }
    }
}

impl<P: Platform> Iterator for Mappings<'_, P> {
    type Item = Translation;

    fn next(&mut self) -> Option<Translation> {
        let found = self.domain.next_mapping(self.next?);
        self.next = found.and_then(|mapping| mapping.range.last().checked_add(1));
        found
    }
}

impl<P: Platform> fmt::Debug for Mappings<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mappings({:?} from {:?})", self.domain, self.next)
    }
}
