//! The driver's bookkeeping: what the device was told, what it confirmed, what is in doubt.
//!
//! Sans-IO. Each operation begins here, which checks it and marks the records, and gives the request to send;
//! and it is settled here when its answer comes, in time or late, through the one function
//! [`Engine::settle`]. Nothing here allocates but what says so, so all of it may run under the driver's lock.
#![forbid(unsafe_code)]

mod attach;
mod deferred;
mod domain;
mod endpoint;
mod fault;
mod group;
mod iova;
mod map;
mod mapping;
mod recover;
mod settle;

pub(crate) use attach::AttachPlan;
pub(crate) use deferred::{Deferral, DeferredList, MERGED, first_run};
pub(crate) use domain::DomainRecord;
pub use domain::DomainStats;
pub(crate) use endpoint::Attachment;
use endpoint::EndpointRecord;
pub(crate) use map::{Placement, Unmade, UnmapPlan};
pub(crate) use mapping::{ListId, Mapping, Purpose};
pub(crate) use recover::Revival;

use crate::addr::IovaRange;
use crate::error::DomainError;
use crate::fault::FaultWindow;
use crate::id::{DomainId, EndpointId};
use crate::options::{DomainKind, Options};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};
use iova::IovaAllocator;
use mapping::{MappingState, MappingTable};

/// Names a domain's record. The generation tells a record from a later one in the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DomainKey {
    index: u16,
    generation: u32,
}

/// Counts all domains that were ever created, over all IOMMUs, so that a handle of one is never taken for a handle
/// of another.
static GENERATIONS: AtomicU32 = AtomicU32::new(0);

/// What a request does to the records when its answer comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// Nothing.
    None,
    Probe,
    Attach {
        endpoint: EndpointId,
        domain: DomainKey,
    },
    Detach {
        endpoint: EndpointId,
        domain: DomainKey,
    },
    /// ATTACH after a reset: a refusal does not say that the endpoint is nowhere.
    Readmit {
        endpoint: EndpointId,
        domain: DomainKey,
    },
    Map {
        domain: DomainKey,
        range: IovaRange,
    },
    /// A mapping of a domain that had died, which has an endpoint again.
    Replay {
        domain: DomainKey,
        range: IovaRange,
    },
    Unmap {
        domain: DomainKey,
        range: IovaRange,
    },
}

impl Op {
    /// The domain that the request is counted for.
    pub(crate) fn domain(&self) -> Option<DomainKey> {
        match *self {
            Self::None | Self::Probe => None,
            Self::Attach { domain, .. } | Self::Detach { domain, .. } | Self::Readmit { domain, .. } => {
                Some(domain)
            }
            Self::Map { domain, .. } | Self::Replay { domain, .. } | Self::Unmap { domain, .. } => {
                Some(domain)
            }
        }
    }
}

/// What the device can do, as negotiated and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// The smallest mapping, a power of two.
    pub granule: u64,
    /// IOVAs that may be mapped: the input range in whole granules, never the last one of the 64-bit space.
    pub usable: IovaRange,
    /// The first and last domain number.
    pub domain_ids: (u32, u32),
    /// Whether MAP takes the MMIO flag.
    pub mmio_flag: bool,
}

/// How much the driver keeps records for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub endpoints: usize,
    pub domains: usize,
}

impl Limits {
    /// The embedder's choice, cut to what the driver can count and search in bounded time.
    pub(crate) fn new(options: &Options) -> Self {
        Self { endpoints: options.max_endpoints.min(1 << 16), domains: options.max_domains.min(MAX_DOMAINS) }
    }

    /// Ranges of IOVA that may leave a domain's free list: its mappings, its reserved regions, and one granule
    /// that faults for each endpoint.
    fn ranges(self, mappings: usize) -> usize {
        mappings + MAX_RESERVED + self.endpoints
    }
}

/// The most domains: finding a free number takes their square in steps at worst.
const MAX_DOMAINS: usize = 4096;

/// Reserved regions that a domain has room for, over all its endpoints.
pub(crate) const MAX_RESERVED: usize = 64;

/// What the device confirmed so far, over all domains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Confirmed {
    pub attaches: u64,
    pub detaches: u64,
    pub maps: u64,
    pub unmaps: u64,
}

pub(crate) struct Engine {
    pub(crate) geometry: Geometry,
    limits: Limits,
    /// The IOMMU's own endpoint, which is never attached.
    own_endpoint: Option<EndpointId>,
    /// Sorted by id.
    endpoints: Vec<EndpointRecord>,
    domains: Vec<Option<DomainRecord>>,
    next_domain_id: u32,
    /// Numbers that an earlier life of the device still uses.
    retired_ids: Vec<u32>,
    /// Whether unattached endpoints are known to be blocked.
    pub(crate) bypass_closed: bool,
    pub(crate) confirmed: Confirmed,
    /// Records in state Released.
    released: usize,
    /// Faults of endpoints that are not known.
    strangers: FaultWindow,
    /// Lists that were begun.
    lists: u64,
}

impl Engine {
    /// Empty records. Allocates all that they will ever need but mappings.
    pub(crate) fn new(geometry: Geometry, limits: Limits, own_endpoint: Option<EndpointId>) -> Self {
        Self {
            geometry,
            limits,
            own_endpoint,
            endpoints: Vec::with_capacity(limits.endpoints),
            domains: (0..limits.domains).map(|_| None).collect(),
            next_domain_id: geometry.domain_ids.0,
            retired_ids: Vec::with_capacity(2 * limits.domains),
            bypass_closed: false,
            confirmed: Confirmed::default(),
            released: 0,
            strangers: FaultWindow::default(),
            lists: 0,
        }
    }

    /// The parts of a domain's record that need memory, made before the lock is taken.
    pub(crate) fn prepare_domain(
        geometry: &Geometry,
        limits: Limits,
        mappings: usize,
    ) -> (MappingTable, IovaAllocator) {
        let mappings = MappingTable::new(mappings);
        let ranges = limits.ranges(mappings.capacity());
        (mappings, IovaAllocator::new(geometry.usable, ranges, MAX_RESERVED))
    }

    /// Lists for `capacity` mappings, for [`grow_domain`](Self::grow_domain). Allocates.
    pub(crate) fn prepare_growth(limits: Limits, capacity: usize) -> (Vec<Mapping>, Vec<IovaRange>) {
        (Vec::with_capacity(capacity), IovaAllocator::spare(limits.ranges(capacity)))
    }

    /// Moves a domain's records into larger lists and returns the old ones, to be dropped outside of the lock.
    pub(crate) fn grow_domain(
        &mut self,
        key: DomainKey,
        spare: (Vec<Mapping>, Vec<IovaRange>),
    ) -> (Vec<Mapping>, Vec<IovaRange>) {
        match self.domain_mut(key) {
            Some(domain) => (domain.mappings.grow_into(spare.0), domain.iova.grow_into(spare.1)),
            None => spare,
        }
    }

    /// Takes `parts`, unless there is an error: then the caller drops them outside of the lock.
    pub(crate) fn create_domain(
        &mut self,
        parts: &mut Option<(MappingTable, IovaAllocator)>,
        kind: DomainKind,
        deferred: &mut Option<DeferredList>,
    ) -> Result<DomainKey, DomainError> {
        let Some(index) = self.domains.iter().position(Option::is_none) else {
            return Err(DomainError::TooMany { limit: self.limits.domains });
        };
        let id = self.next_id()?;
        let limit = self.limits.domains;
        let (mappings, iova) = parts.take().ok_or(DomainError::TooMany { limit })?;
        let generation = GENERATIONS.fetch_add(1, Ordering::Relaxed);
        self.domains[index] = Some(DomainRecord {
            generation,
            id,
            kind,
            attached: 0,
            possible: 0,
            mappings,
            iova,
            deferred: deferred.take(),
            stats: DomainStats::default(),
            in_transition: false,
            reviving: false,
            orphaned: false,
        });
        Ok(DomainKey { index: index as u16, generation })
    }

    /// A domain number that nothing uses: numbers go round the device's range, and one is in use as long as its
    /// domain has a record, which outlives its last DETACH (I2).
    fn next_id(&mut self) -> Result<DomainId, DomainError> {
        let (first, last) = self.geometry.domain_ids;
        let ids = u64::from(last - first) + 1;
        let in_use = |id: u32| {
            self.retired_ids.contains(&id)
                || self.domains.iter().flatten().any(|domain| domain.id.get() == id)
        };
        let tries = ids.min((self.domains.len() + self.retired_ids.len()) as u64 + 1);
        let mut id = self.next_domain_id;
        for _ in 0..tries {
            let next = if id == last { first } else { id + 1 };
            if !in_use(id) {
                self.next_domain_id = next;
                return Ok(DomainId::new(id));
            }
            id = next;
        }
        Err(DomainError::IdsExhausted { ids })
    }

    pub(crate) fn domain(&self, key: DomainKey) -> Option<&DomainRecord> {
        let record = self.domains.get(usize::from(key.index))?.as_ref()?;
        (record.generation == key.generation).then_some(record)
    }

    pub(crate) fn domain_mut(&mut self, key: DomainKey) -> Option<&mut DomainRecord> {
        let record = self.domains.get_mut(usize::from(key.index))?.as_mut()?;
        (record.generation == key.generation).then_some(record)
    }

    /// The embedder let go of a domain. Its record is returned, to be dropped outside of the lock, as soon as
    /// nothing depends on it: now or by [`take_orphan`](Self::take_orphan).
    pub(crate) fn release_domain(&mut self, key: DomainKey) -> Option<DomainRecord> {
        self.domain_mut(key)?.orphaned = true;
        self.revoke_if_empty(usize::from(key.index));
        self.take_if_idle(usize::from(key.index))
    }

    /// A record that was let go of and that nothing depends on any more.
    pub(crate) fn take_orphan(&mut self) -> Option<DomainRecord> {
        (0..self.domains.len()).find_map(|index| self.take_if_idle(index))
    }

    fn take_if_idle(&mut self, index: usize) -> Option<DomainRecord> {
        self.domains[index].take_if(|domain| domain.orphaned && domain.is_idle())
    }

    /// Takes note that unattached endpoints are blocked: domains without endpoints are dead from now on.
    pub(crate) fn close_bypass(&mut self) {
        self.bypass_closed = true;
        for index in 0..self.domains.len() {
            self.revoke_if_empty(index);
        }
    }

    /// What is in quarantine: mappings, and their bytes.
    pub(crate) fn quarantined(&self) -> (usize, u64) {
        let records = self.domains.iter().flatten().flat_map(|domain| domain.mappings.iter());
        // One that somebody counts on, and can unmap, is not.
        let stuck = records.filter(|record| match record.state {
            MappingState::Quarantined { .. } => !record.owned,
            state => state == MappingState::Stranded,
        });
        stuck.fold((0, 0), |(count, bytes), record| {
            (count + 1, bytes + record.range.len_bytes().unwrap_or(u64::MAX))
        })
    }

    /// The next mapping after `after`, in the order of domains and addresses, that is in quarantine and about which
    /// the device owes no answer, so that an UNMAP can be tried.
    pub(crate) fn reclaimable(
        &self,
        after: Option<(DomainKey, IovaRange)>,
    ) -> Option<(DomainKey, IovaRange)> {
        let place = |key: DomainKey, range: IovaRange| (key.index, range.start());
        let after = after.map(|(key, range)| place(key, range));
        let keyed = self.domains.iter().enumerate().filter_map(|(index, domain)| {
            let domain = domain.as_ref()?;
            Some((DomainKey { index: index as u16, generation: domain.generation }, domain))
        });
        let mut stuck = keyed.flat_map(|(key, domain)| {
            let stuck = MappingState::Quarantined { in_flight: false };
            let records = domain.mappings.iter().filter(move |record| record.state == stuck);
            records.map(move |record| (key, record.range))
        });
        stuck.find(|(key, range)| Some(place(*key, *range)) > after)
    }
}

#[cfg(test)]
mod tests;
