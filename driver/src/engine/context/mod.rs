//! Records of a domain's contexts: what the device was told of each, and what it still owes an answer about.
//!
//! ```text
//!         begin           refused, or removed
//!   none ------> There -----------------------> Gone ---> none, once nobody has it and nothing of it is in flight
//!                 |  ^ told again                 ^
//!                 |  '------------- Lost ---------' removed, which takes no request
//!                 '---------------> '   the domain died, or came back whole from a reset
//! ```
//! Where a domain did not come back whole, what it had is Stranded: an endpoint may still reach it by a number that the
//! domain does not have any more.

mod begin;
mod settle;

use super::mapping::{MappingState, Record};
use super::space::Room;
use super::{Attachment, DomainKey, DomainRecord, EndpointRecord, Engine, Geometry, Op, Space};
use crate::addr::{Iova, IovaRange};
use crate::contexts::{ContextRequest, Pasid, TableDescription};
use crate::error::RequestError;
use crate::id::EndpointId;
use alloc::boxed::Box;
use alloc::vec::Vec;

/// Mappings that a mapped context has records for at first.
const FIRST_MAPPINGS: usize = 16;

/// Names a context's record. The generation tells a record from a later one in the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ContextKey {
    pub domain: DomainKey,
    index: u32,
    generation: u32,
}

/// What a request does to a context when its answer comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContextEffect {
    Add,
    /// After the device lost it.
    AddAgain,
    Remove,
    Map(IovaRange),
    Unmap(IovaRange),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ContextState {
    /// The device has it, or may have it.
    There,
    /// The device does not have it.
    Lost,
    /// The device may have it under a number that the domain had before.
    Stranded,
    /// The device does not have it, and is not told of it again.
    Gone,
}

pub(crate) struct ContextRecord {
    generation: u32,
    /// `None` for a table of context descriptors.
    pasid: Option<Pasid>,
    table: TableDescription,
    /// What is mapped in it by requests, or may be.
    space: Option<Box<Space>>,
    state: ContextState,
    /// Whether somebody has it, who will remove it.
    owned: bool,
    /// Requests that were given up on, and that the device may still carry out.
    late: u32,
}

/// The contexts of a domain. Its capacity is the most there can be.
pub(crate) type ContextRecords = Vec<Option<ContextRecord>>;

/// What the device is to be told of a domain's contexts next, after it lost them.
pub(crate) enum ToldAgain {
    Context(ContextKey),
    /// A mapping in one that it has again.
    Mapping(ContextRequest, Op),
}

impl ContextRecord {
    /// Nobody has it any more: what is mapped in it is in quarantine.
    fn disown(&mut self) {
        self.owned = false;
        if let Some(space) = &mut self.space {
            space.retain_all(|record| {
                record.owned = false;
                if record.state == MappingState::Live {
                    record.state = MappingState::Quarantined;
                }
                true
            });
        }
    }

    /// The device does not have it. What its owner counts on is to be told again; the rest is forgotten, but for what the
    /// device owes an answer about.
    fn lose(&mut self) {
        if self.state != ContextState::Gone {
            self.state = if self.owned { ContextState::Lost } else { ContextState::Gone };
        }
        let Some(space) = &mut self.space else { return };
        space.retain_all(|record| {
            match record.state {
                MappingState::Quarantined if !record.owned => return false,
                MappingState::Live | MappingState::Quarantined => {
                    (record.state, record.on_device) = (MappingState::Live, false);
                }
                _ => {}
            }
            true
        });
    }

    /// Whether the device has nothing of it.
    fn is_absent(&self) -> bool {
        matches!(self.state, ContextState::Lost | ContextState::Gone)
    }

    /// Whether its room may go to another.
    fn is_free(&self) -> bool {
        self.state == ContextState::Gone && self.late == 0 && !self.owned
    }

    fn needs_telling(&self) -> bool {
        let mappings = self.space.as_ref().is_some_and(|space| space.tally().lost > 0);
        self.state == ContextState::Lost || self.state == ContextState::There && mappings
    }
}

impl DomainRecord {
    fn contexts(&self) -> impl Iterator<Item = &ContextRecord> {
        self.contexts.iter().flatten()
    }

    /// Whether the device has contexts of it, or owes answers about them, or will be told of them again.
    pub(super) fn has_contexts(&self) -> bool {
        self.contexts().any(|record| record.state != ContextState::Gone || record.late > 0)
    }

    /// Whether the device may have contexts of it, by whatever number.
    pub(super) fn has_contexts_there(&self) -> bool {
        let there = [ContextState::There, ContextState::Stranded];
        self.contexts().any(|record| there.contains(&record.state))
    }

    pub(super) fn has_stranded_contexts(&self) -> bool {
        self.contexts().any(|record| record.state == ContextState::Stranded)
    }

    /// A mapping of a context that meets this range.
    pub(super) fn context_mapping_in(&self, range: IovaRange) -> Option<IovaRange> {
        self.contexts().find_map(|record| first_in(record.space.as_ref()?, range)).map(|record| record.range)
    }

    /// The device has none of its contexts any more.
    pub(super) fn lose_contexts(&mut self) {
        self.contexts.iter_mut().flatten().for_each(ContextRecord::lose);
    }

    /// A reset was survived by endpoints that may still reach them.
    pub(super) fn strand_contexts(&mut self) {
        for record in self.contexts.iter_mut().flatten() {
            if record.state == ContextState::There {
                record.state = ContextState::Stranded;
            }
        }
    }

    /// The device forgot all that it owed an answer about.
    pub(super) fn no_contexts_in_flight(&mut self) {
        for record in self.contexts.iter_mut().flatten() {
            record.late = 0;
            let Some(space) = &mut record.space else { continue };
            space.retain_all(|record| {
                if record.state == MappingState::QuarantinedInFlight {
                    record.state = MappingState::Quarantined;
                }
                true
            });
        }
    }

    /// Mappings in quarantine in its contexts, and their bytes.
    pub(super) fn contexts_quarantined(&self) -> (u64, u64) {
        let tallies = self.contexts().filter_map(|record| Some(record.space.as_ref()?.tally()));
        tallies.fold((0, 0), |(count, bytes), tally| {
            (count + tally.quarantined, bytes + tally.quarantined_bytes)
        })
    }
}

/// The first mapping that meets a range.
fn first_in(space: &Space, range: IovaRange) -> Option<&Record> {
    let next = || space.iter_from(range.start()).next();
    space.containing(range.start()).or_else(next).filter(|record| record.range.overlaps(range))
}

impl Engine {
    /// The part of a mapped context's record that needs memory, made before the lock is taken.
    pub(crate) fn prepare_context(geometry: &Geometry) -> Box<Space> {
        let room = Room { mappings: FIRST_MAPPINGS, holes: 0, others: 0 };
        Box::new(Space::new(geometry.usable, geometry.granule, room))
    }

    fn context(&self, key: ContextKey) -> Option<(&DomainRecord, &ContextRecord)> {
        let domain = self.domain(key.domain)?;
        let record = domain.contexts.get(key.index as usize)?.as_ref()?;
        (record.generation == key.generation).then_some((domain, record))
    }

    fn context_mut(&mut self, key: ContextKey) -> Option<&mut ContextRecord> {
        let record = self.domain_mut(key.domain)?.contexts.get_mut(key.index as usize)?.as_mut()?;
        (record.generation == key.generation).then_some(record)
    }

    /// An endpoint that the device confirmed to be in the domain.
    fn member(&self, key: DomainKey) -> Option<EndpointId> {
        let attached = |record: &&EndpointRecord| record.attachment == Attachment::Attached(key);
        self.endpoints.iter().find(attached).map(|record| record.id)
    }

    /// A context that nobody has, and of which nothing is in flight, so that it can be removed.
    pub(crate) fn abandoned_context(&self, key: DomainKey, pasid: Option<Pasid>) -> Option<ContextKey> {
        let abandoned = |record: &ContextRecord| {
            let there = record.state == ContextState::There;
            there && record.pasid == pasid && !record.owned && record.late == 0
        };
        self.context_where(key, abandoned)
    }

    fn context_where(&self, key: DomainKey, is: impl Fn(&ContextRecord) -> bool) -> Option<ContextKey> {
        self.domain(key)?.contexts.iter().enumerate().find_map(|(index, record)| {
            let record = record.as_ref().filter(|record| is(record))?;
            Some(ContextKey { domain: key, index: index as u32, generation: record.generation })
        })
    }

    /// Its owner let go of it: what the device has of it stays there.
    pub(crate) fn release_context(&mut self, key: ContextKey) {
        if let Some(record) = self.context_mut(key) {
            record.disown();
            if record.state == ContextState::Lost {
                record.state = ContextState::Gone;
            }
        }
    }

    /// A record that nothing depends on any more, to be dropped outside of the lock.
    pub(crate) fn take_gone_context(&mut self, key: DomainKey) -> Option<ContextRecord> {
        let gone = self.context_where(key, ContextRecord::is_free)?;
        self.domain_mut(key)?.contexts.get_mut(gone.index as usize)?.take()
    }

    /// Whether the device has nothing of it, so that whatever ends takes no request.
    pub(crate) fn is_context_absent(&self, key: ContextKey) -> bool {
        self.context(key).is_none_or(|(_, record)| record.is_absent())
    }

    /// What of the device's a request of this context is for; `None` where the device has nothing of it.
    fn reach_context(
        &self,
        key: ContextKey,
    ) -> Result<Option<(&DomainRecord, &ContextRecord)>, RequestError> {
        match self.context(key) {
            Some((_, record)) if record.state == ContextState::Stranded => Err(RequestError::Reset),
            Some(found) if found.1.state == ContextState::There => Ok(Some(found)),
            _ => Ok(None),
        }
    }

    /// Whether INVALIDATE has to be sent for it.
    pub(crate) fn is_cached(&self, key: ContextKey) -> Result<bool, RequestError> {
        self.reach_context(key).map(|found| found.is_some())
    }

    /// The same for all contexts of a domain.
    pub(crate) fn are_cached(&self, key: DomainKey) -> Result<bool, RequestError> {
        match self.domain(key) {
            Some(domain) if domain.has_stranded_contexts() => Err(RequestError::Reset),
            Some(domain) => Ok(domain.has_contexts_there()),
            None => Ok(false),
        }
    }

    /// The first mapping of a context that starts at or above `from`.
    pub(crate) fn next_context_mapping(&self, key: ContextKey, from: Iova) -> Option<IovaRange> {
        let space = self.context(key)?.1.space.as_ref()?;
        space.iter_from(from).next().map(|record| record.range)
    }

    /// The PASID of a context; none where it is a table of descriptors.
    pub(crate) fn pasid_of(&self, key: ContextKey) -> Option<Pasid> {
        self.context(key).and_then(|(_, record)| record.pasid)
    }
}
