//! The driver's bookkeeping: what the device was told, what it confirmed, what is in doubt.
//!
//! Sans-IO. Each operation begins here, which checks it and marks the records, and gives the request to send;
//! and it is settled here when its answer comes, in time or late, through the one function
//! [`Engine::settle`]. Nothing here allocates but what says so, so all of it may run under the driver's lock.
#![forbid(unsafe_code)]

mod attach;
#[cfg(feature = "contexts")]
mod context;
mod deferred;
mod domain;
mod endpoint;
mod fault;
mod group;
mod join;
mod map;
mod mapping;
mod quick;
mod recover;
mod revive;
mod settle;
mod space;
mod tag;

pub(crate) use attach::AttachPlan;
#[cfg(feature = "contexts")]
pub(crate) use context::{ContextEffect, ContextKey, ContextRecords, ToldAgain};
pub(crate) use deferred::{Deferral, DeferredList, FlushDue, MERGED, first_run, stamp};
pub use domain::DomainStats;
pub(crate) use domain::{Counts, DomainRecord};
pub(crate) use endpoint::Attachment;
use endpoint::EndpointRecord;
pub(crate) use map::{Made, Placement, Reach, Spot, Unmade, UnmapPlan};
pub(crate) use mapping::{ListId, MappingHandle, MappingState, Purpose, Record};
pub(crate) use quick::Sum;
pub(crate) use recover::Revival;
pub(crate) use revive::Wish;
pub(crate) use tag::Tag;

use crate::addr::{Iova, IovaRange};
use crate::error::DomainError;
use crate::fault::FaultWindow;
use crate::id::{DomainId, EndpointId};
use crate::options::{DomainKind, Options};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};
use space::Room;
pub(crate) use space::{Parts, Space};
use tag::Tags;

/// Names a domain's record: its place in the lower half, and a generation that tells it from a later one there in the
/// upper. One word, since each request is compared by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DomainKey(u64);

impl DomainKey {
    /// No domain's: there are not as many places.
    const NONE: Self = Self(u64::MAX);

    fn new(place: u32, generation: u32) -> Self {
        Self(u64::from(place) | u64::from(generation) << 32)
    }

    #[inline(always)]
    fn place(self) -> usize {
        self.0 as u32 as usize
    }

    /// A number that no other domain of any IOMMU has.
    #[cfg(feature = "dma-api-0_10")]
    pub(crate) fn unique(self) -> u32 {
        (self.0 >> 32) as u32
    }
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
        record: MappingHandle,
    },
    /// A mapping of a domain that had died, which has an endpoint again.
    Replay {
        domain: DomainKey,
        range: IovaRange,
        record: MappingHandle,
    },
    /// One mapping, or several that touch each other.
    Unmap {
        domain: DomainKey,
        range: IovaRange,
        /// The first.
        record: MappingHandle,
    },
    /// A request of the draft, about a context.
    #[cfg(feature = "contexts")]
    Context {
        context: ContextKey,
        effect: ContextEffect,
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
            #[cfg(feature = "contexts")]
            Self::Context { context, .. } => Some(context.domain),
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

    /// What a domain has records for: its mappings, its reserved regions, and one granule that faults for each
    /// endpoint.
    fn room(self, mappings: usize) -> Room {
        Room { mappings, holes: MAX_RESERVED, others: self.endpoints }
    }
}

/// The most domains: finding a free number takes their square in steps at worst.
const MAX_DOMAINS: usize = 4096;

/// Reserved regions that a domain has room for, over all its endpoints.
pub(crate) const MAX_RESERVED: usize = 64;

/// What was sent, and what the device confirmed of it, over all domains. The engine keeps of requests, MAPs and UNMAPs those
/// of domains that are gone, and of requests those of no domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub requests: u64,
    pub attaches: u64,
    pub detaches: u64,
    pub maps: u64,
    pub unmaps: u64,
}

impl Totals {
    fn with(self, counts: &Counts) -> Self {
        let Counts { requests, maps, unmaps, .. } = *counts;
        Self {
            requests: self.requests + requests,
            maps: self.maps + maps,
            unmaps: self.unmaps + unmaps,
            ..self
        }
    }
}

pub(crate) struct Engine {
    pub(crate) geometry: Geometry,
    limits: Limits,
    /// The IOMMU's own endpoint, which is never attached.
    own_endpoint: Option<EndpointId>,
    /// Sorted by id.
    endpoints: Vec<EndpointRecord>,
    /// Where an endpoint was that was looked for: a hint.
    last_place: usize,
    /// Boxed, so that one is found without a multiplication.
    domains: Vec<Option<Box<DomainRecord>>>,
    next_domain_id: u32,
    /// Numbers that an earlier life of the device still uses.
    retired_ids: Vec<u32>,
    /// Whether unattached endpoints are known to be blocked.
    pub(crate) bypass_closed: bool,
    totals: Totals,
    /// Records in state Released.
    released: usize,
    /// Faults of endpoints that are not known.
    strangers: FaultWindow,
    /// The list that was begun last.
    list: ListId,
    tags: Tags,
    /// Domains that the embedder let go of.
    orphans: usize,
}

impl Engine {
    /// Empty records. Allocates all that they will ever need but mappings.
    pub(crate) fn new(geometry: Geometry, limits: Limits, own_endpoint: Option<EndpointId>) -> Self {
        Self {
            geometry,
            limits,
            own_endpoint,
            endpoints: Vec::with_capacity(limits.endpoints),
            last_place: 0,
            domains: (0..limits.domains).map(|_| None).collect(),
            next_domain_id: geometry.domain_ids.0,
            retired_ids: Vec::with_capacity(2 * limits.domains),
            bypass_closed: false,
            totals: Totals::default(),
            released: 0,
            strangers: FaultWindow::default(),
            list: ListId::new(0),
            tags: Tags::new(),
            orphans: 0,
        }
    }

    /// A domain's record with room for so many mappings, made before the lock is taken. Allocates.
    pub(crate) fn prepare_domain(
        geometry: &Geometry,
        limits: Limits,
        mappings: usize,
        kind: DomainKind,
        deferred: Option<DeferredList>,
    ) -> Box<DomainRecord> {
        let space = Space::new(geometry.usable, geometry.granule, limits.room(mappings));
        Box::new(DomainRecord::new(space, kind, deferred))
    }

    /// How many records a domain lacks for so many mappings in all.
    pub(crate) fn lacks(&self, key: DomainKey, mappings: usize) -> usize {
        self.domain(key).map_or(0, |domain| domain.space.lacks(mappings))
    }

    /// Adds the records that a domain [lacks](Self::lacks), an empty list of that capacity. It comes back if it is not
    /// needed, to be dropped outside of the lock.
    pub(crate) fn grow_domain(
        &mut self,
        key: DomainKey,
        mappings: usize,
        spare: Vec<Record>,
    ) -> Option<Vec<Record>> {
        match self.domain_mut(key) {
            Some(domain) => domain.space.grow(mappings, spare),
            None => Some(spare),
        }
    }

    /// Takes `prepared`, unless there is an error: then the caller drops it outside of the lock.
    pub(crate) fn create_domain(
        &mut self,
        prepared: &mut Option<Box<DomainRecord>>,
    ) -> Result<DomainKey, DomainError> {
        let Some(index) = self.domains.iter().position(Option::is_none) else {
            return Err(DomainError::TooMany { limit: self.limits.domains });
        };
        let id = self.next_id()?;
        let limit = self.limits.domains;
        let mut domain = prepared.take().ok_or(DomainError::TooMany { limit })?;
        let key = DomainKey::new(index as u32, GENERATIONS.fetch_add(1, Ordering::Relaxed));
        (domain.key, domain.id) = (key, id);
        self.domains[index] = Some(domain);
        Ok(key)
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
        let record = self.domains.get(key.place())?.as_deref()?;
        (record.key == key).then_some(record)
    }

    #[inline]
    pub(crate) fn domain_mut(&mut self, key: DomainKey) -> Option<&mut DomainRecord> {
        let record = self.domains.get_mut(key.place())?.as_deref_mut()?;
        (record.key == key).then_some(record)
    }

    /// The tag of this name. There are 254 at most besides none: further ones go by one name.
    pub(crate) fn tag(&mut self, name: &'static str) -> Tag {
        self.tags.tag(name)
    }

    /// What the maker of a mapping calls it.
    pub(crate) fn tag_of(&self, record: &Record) -> &'static str {
        self.tags.name(record.tag())
    }

    /// Counts a request that was sent, for its domain where it has one.
    pub(crate) fn count_request(&mut self, key: Option<DomainKey>) {
        self.count_requests(key, 1);
    }

    /// The same for several of one domain.
    #[inline]
    pub(crate) fn count_requests(&mut self, key: Option<DomainKey>, count: usize) {
        match key.and_then(|key| self.domain_mut(key)) {
            Some(domain) => domain.counts.requests += count as u64,
            None => self.totals.requests += count as u64,
        }
    }

    /// The embedder let go of a domain. Its record is returned, to be dropped outside of the lock, as soon as
    /// nothing depends on it: now or by [`take_orphan`](Self::take_orphan).
    pub(crate) fn release_domain(&mut self, key: DomainKey) -> Option<Box<DomainRecord>> {
        self.domain_mut(key)?.orphaned = true;
        self.orphans += 1;
        self.revoke_if_empty(key.place());
        self.take_if_idle(key.place())
    }

    /// A record that was let go of and that nothing depends on any more.
    pub(crate) fn take_orphan(&mut self) -> Option<Box<DomainRecord>> {
        // With every detachment this is asked, and nearly always for nothing.
        if self.orphans == 0 {
            return None;
        }
        (0..self.domains.len()).find_map(|index| self.take_if_idle(index))
    }

    fn take_if_idle(&mut self, index: usize) -> Option<Box<DomainRecord>> {
        let idle = self.domains[index].take_if(|domain| domain.orphaned && domain.is_idle());
        if let Some(domain) = &idle {
            self.orphans -= 1;
            self.totals = self.totals.with(&domain.counts);
        }
        idle
    }

    /// Takes note that unattached endpoints are blocked: domains without endpoints are dead from now on.
    pub(crate) fn close_bypass(&mut self) {
        self.bypass_closed = true;
        for index in 0..self.domains.len() {
            self.revoke_if_empty(index);
        }
    }

    /// What was done so far, over all domains.
    pub(crate) fn totals(&self) -> Totals {
        self.domains.iter().flatten().fold(self.totals, |sum, domain| sum.with(&domain.counts))
    }

    /// What is in quarantine: mappings, and their bytes.
    pub(crate) fn quarantined(&self) -> (usize, u64) {
        self.domains.iter().flatten().fold((0, 0), |(count, bytes), domain| {
            let tally = domain.space.tally();
            let (count, bytes) = (count + tally.quarantined as usize, bytes + tally.quarantined_bytes);
            #[cfg(feature = "contexts")]
            let (count, bytes) = {
                let (more, more_bytes) = domain.contexts_quarantined();
                (count + more as usize, bytes + more_bytes)
            };
            (count, bytes)
        })
    }

    /// The next mapping after `after`, in the order of domains and addresses, that is in quarantine and about which
    /// the device owes no answer, so that an UNMAP can be tried.
    pub(crate) fn reclaimable(
        &self,
        after: Option<(DomainKey, IovaRange)>,
    ) -> Option<(DomainKey, IovaRange)> {
        let stuck = MappingState::Quarantined;
        self.domains.iter().enumerate().find_map(|(index, domain)| {
            let domain = domain.as_ref()?;
            let first = match after {
                Some((key, _)) if index < key.place() => return None,
                Some((key, range)) if index == key.place() => range.start().checked_add(1)?,
                _ => Iova::new(0),
            };
            let record = domain.space.iter_from(first).find(|record| record.state == stuck)?;
            Some((domain.key, record.range))
        })
    }
}

#[cfg(test)]
mod tests;
