//! Mapping and unmapping.

use super::mapping::{ListId, MappingHandle, MappingState, Purpose, Record};
use super::{DomainKey, Engine, Op};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::dma::HeldMemory;
use crate::error::{MapError, RequestError, UnmapError};
use crate::exchange::{Mapped, Run};
use crate::id::DomainId;
use crate::options::DomainKind;
use crate::prot::Prot;
use crate::wire::request::Request;

/// What an unmapping takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnmapPlan {
    /// Nothing: the device cannot reach the memory any more, since the domain died.
    Nothing,
    Send(Request, Op),
}

/// Where an endpoint takes a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    /// The highest address.
    pub limit: Iova,
    /// What the first address is a multiple of: a power of two, at least the granule in any case.
    pub align: u64,
}

impl Placement {
    /// Anywhere.
    pub(crate) const ANYWHERE: Self = Self::up_to(Iova::mask(64));

    /// Anywhere up to `limit`.
    pub(crate) const fn up_to(limit: Iova) -> Self {
        Self { limit, align: 1 }
    }
}

/// Which addresses a mapping gets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Spot {
    /// Any that this allows.
    Within(Placement),
    /// Exactly these, as many as it has bytes.
    At(IovaRange),
}

/// What an endpoint can put on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reach {
    /// The highest address.
    pub limit: Iova,
    /// A power of two whose multiples are not crossed by what fits between two of them.
    pub boundary: Option<u64>,
}

impl Reach {
    /// Where it takes a mapping of so many bytes.
    #[inline(always)]
    pub(crate) fn placement(&self, len: u64) -> Placement {
        Placement { limit: self.limit, align: self.alignment(len) }
    }

    /// Whether a mapping of so many bytes, which is there already, suits it too.
    #[inline(always)]
    pub(super) fn suits(&self, range: IovaRange, len: u64) -> bool {
        let start = range.start().get();
        // As for a new one: not at 0.
        start != 0
            && range.last() <= self.limit
            && (self.boundary.is_none() || start & (self.alignment(len) - 1) == 0)
    }

    /// The alignment that keeps what fits within the boundary from crossing it. What is longer begins at one, so that it
    /// crosses no more of them than it must.
    #[inline(always)]
    fn alignment(&self, len: u64) -> u64 {
        match self.boundary {
            None => 1,
            Some(boundary) => len.checked_next_power_of_two().map_or(boundary, |size| size.min(boundary)),
        }
    }
}

/// A part of a failed list.
#[derive(Debug)]
pub(crate) enum Unmade {
    /// The device refused it. With the memory that was lent for it.
    Refused { range: IovaRange, memory: Option<HeldMemory> },
    /// To be unmapped.
    Live(IovaRange),
}

/// What became of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    /// The device has it.
    Live,
    /// The device refused it, and nothing is left of it.
    Refused,
    /// The device may have it: it is in quarantine.
    Unknown,
}

impl Engine {
    /// Takes `len` bytes of IOVA (rounded up to granules by the caller) out of the free ones, where `placement` says,
    /// for as many mappings as `parts` says.
    pub(crate) fn allocate(
        &mut self,
        key: DomainKey,
        len: u64,
        placement: Placement,
        parts: usize,
    ) -> Result<IovaRange, MapError> {
        let granule = self.geometry.granule;
        let domain = self.domain_mut(key).ok_or(MapError::NoEndpoint)?;
        if domain.kind == DomainKind::Identity {
            return Err(MapError::IdentityDomain);
        }
        #[cfg(feature = "contexts")]
        if matches!(domain.kind, DomainKind::Contexts(_)) {
            return Err(MapError::NoDefaultContext);
        }
        if len == 0 {
            return Err(MapError::Empty);
        }
        // IOVA 0 stays free: virtio-drivers takes it for a failure, and it catches null pointers of devices.
        let lowest = Iova::new(granule);
        let Placement { limit, align } = placement;
        match domain.space.allocate(len, align.max(granule), (lowest, limit), parts) {
            Ok(Some(range)) => Ok(range),
            Ok(None) => Err(MapError::IovaExhausted { len, limit }),
            Err(_full) => Err(MapError::NoRecord { capacity: domain.space.capacity() }),
        }
    }

    /// Takes exactly this range out of the free addresses, for a caller that chose it.
    pub(crate) fn take(&mut self, key: DomainKey, range: IovaRange) -> Result<(), MapError> {
        let domain = self.domain_mut(key).ok_or(MapError::NoEndpoint)?;
        match domain.space.take(range) {
            Ok(true) => Ok(()),
            Ok(false) => Err(MapError::InUse(range)),
            Err(_full) => Err(MapError::NoRecord { capacity: domain.space.capacity() }),
        }
    }

    /// The first stretch of `range` that is not reserved.
    pub(crate) fn unreserved_in(&self, key: DomainKey, range: IovaRange) -> Option<IovaRange> {
        self.domain(key)?.space.unreserved_in(range)
    }

    /// Gives a range back that was allocated or taken, for `parts` mappings, and never mapped.
    pub(crate) fn give_back(&mut self, key: DomainKey, range: IovaRange, parts: usize) {
        if let Some(domain) = self.domain_mut(key) {
            domain.space.release(range, parts);
        }
    }

    /// Checks a MAP without doing anything.
    pub(crate) fn check_map(
        &self,
        key: DomainKey,
        start: Iova,
        len: u64,
        phys: PhysAddr,
        prot: Prot,
    ) -> Result<IovaRange, MapError> {
        let domain = self.domain(key).ok_or(MapError::NoEndpoint)?;
        domain.check(&self.geometry, (start, len), phys, prot)
    }

    /// Checks all of a MAP but its addresses, before it has any.
    pub(crate) fn check_run(&self, key: DomainKey, run: Run, prot: Prot) -> Result<(), MapError> {
        let start = self.geometry.usable.start();
        match self.check_map(key, start, run.len, run.phys, prot) {
            // A length that fits nowhere: the allocator has the better words.
            Ok(_) | Err(MapError::OutsideInputRange { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes addresses where `placement` allows, and begins a mapping there, whose request is then sent in any case. With
    /// the number that it carries.
    #[cold]
    pub(crate) fn begin_anywhere(
        &mut self,
        key: DomainKey,
        (run, placement): (Run, Placement),
        (purpose, list): (Purpose, ListId),
    ) -> Result<(Mapped, DomainId), MapError> {
        self.check_run(key, run, purpose.prot)?;
        let range = self.allocate(key, run.len, placement, 1)?;
        let begun = self.begin_map(key, (list, range), run.phys, purpose, &mut None);
        if begun.is_err() {
            self.give_back(key, range, 1);
        }
        let (record, domain) = begun?;
        Ok((Mapped { range, record }, domain))
    }

    /// What became of a mapping whose request was answered, or given up on, and which did not succeed or may not have. A
    /// record that the device refused goes.
    pub(crate) fn made(&mut self, key: DomainKey, (list, range): (ListId, IovaRange)) -> Made {
        let Some(domain) = self.domain_mut(key) else { return Made::Unknown };
        let ours = domain.space.get(range.start()).filter(|record| record.is_of(list));
        match ours.map(|record| record.state) {
            Some(MappingState::Live) => Made::Live,
            Some(MappingState::Returned) => {
                let held = domain.space.remove(range.start());
                debug_assert!(held.is_none(), "mapped in place");
                Made::Refused
            }
            _ => Made::Unknown,
        }
    }

    /// Names the mappings that are made next, so that they can be told from others.
    pub(crate) fn begin_list(&mut self) -> ListId {
        self.list = self.list.next();
        self.list
    }

    /// Records a mapping of a range that was allocated or taken, or of its beginning, whose request is then sent in any
    /// case. With the number that it carries. `held` is exactly the memory that it leads to. On an error the range is still
    /// the caller's to give back.
    pub(crate) fn begin_map(
        &mut self,
        key: DomainKey,
        (list, range): (ListId, IovaRange),
        phys: PhysAddr,
        purpose: Purpose,
        held: &mut Option<HeldMemory>,
    ) -> Result<(MappingHandle, DomainId), MapError> {
        let len = range.len_bytes().unwrap_or(0);
        self.check_map(key, range.start(), len, phys, purpose.prot)?;
        let domain = self.domain_mut(key).ok_or(MapError::NoEndpoint)?;
        let record = domain.space.insert(range, phys, (purpose, list), held);
        let record = record.ok_or(MapError::InUse(range))?;
        domain.counts.requests += 1;
        Ok((record, domain.id))
    }

    /// Marks whole neighbouring mappings as being unmapped, and gives the one request for them (I6).
    pub(crate) fn begin_unmap(&mut self, key: DomainKey, range: IovaRange) -> Result<UnmapPlan, UnmapError> {
        self.begin_unmap_of(key, range, MappingState::Live)
    }

    /// The same for one of several that the device did not unmap together.
    pub(crate) fn begin_unmap_apart(
        &mut self,
        key: DomainKey,
        range: IovaRange,
    ) -> Result<UnmapPlan, UnmapError> {
        self.begin_unmap_of(key, range, MappingState::Apart)
    }

    /// The same for a mapping in quarantine.
    pub(crate) fn begin_reclaim(
        &mut self,
        key: DomainKey,
        range: IovaRange,
    ) -> Result<UnmapPlan, UnmapError> {
        self.begin_unmap_of(key, range, MappingState::Quarantined)
    }

    pub(super) fn begin_unmap_of(
        &mut self,
        key: DomainKey,
        range: IovaRange,
        state: MappingState,
    ) -> Result<UnmapPlan, UnmapError> {
        let not_mapped = UnmapError::NotMapped(range.start());
        let domain = self.domain_mut(key).ok_or(not_mapped)?;
        if state == MappingState::Live
            && let Some(record) = domain.space.begin_unmap(range, MappingHandle::UNKNOWN)
        {
            let request = Request::Unmap { domain: domain.id, range };
            return Ok(UnmapPlan::Send(request, Op::Unmap { domain: key, range, record }));
        }
        let Some(record) = domain.space.whole(range) else {
            let starts = domain.space.get(range.start()).is_some_and(|record| record.state == state);
            return Err(if starts { UnmapError::NotWhole(range) } else { not_mapped });
        };
        let mut busy = None;
        let is_ready = |record: &Record| {
            busy = (record.state != state).then(|| UnmapError::NotMapped(record.range.start()));
            busy.is_none()
        };
        if !domain.space.all(record, range.last(), is_ready) {
            let given_up = self.give_up_stuck(key, range, state);
            return Err(
                given_up.map_or(busy.unwrap_or(not_mapped), |error| UnmapError::Request { range, error })
            );
        }
        let mut gone = true;
        domain.space.visit(record, range.last(), |record| {
            gone &= !record.on_device;
            record.owned &= state != MappingState::Live;
            record.state = MappingState::Unmapping;
        });
        if gone {
            self.let_go(key, range, Some(record));
            return Ok(UnmapPlan::Nothing);
        }
        let request = Request::Unmap { domain: domain.id, range };
        Ok(UnmapPlan::Send(request, Op::Unmap { domain: key, range, record }))
    }

    /// The owner of mappings unmaps them, some of which are in quarantine without his doing: he gives them up, so that
    /// all are. Why, if so.
    fn give_up_stuck(
        &mut self,
        key: DomainKey,
        range: IovaRange,
        state: MappingState,
    ) -> Option<RequestError> {
        let space = &self.domain(key)?.space;
        space.whole(range)?;
        let his = |record: &Record| match state {
            MappingState::Live => record.owned,
            MappingState::Apart => true,
            _ => false,
        };
        let stuck = space.iter_in(range).find(|record| record.is_stuck())?.state;
        if !space.iter_in(range).all(|record| his(record) && (record.is_stuck() || record.state == state)) {
            return None;
        }
        self.disown(key, range);
        Some(if stuck == MappingState::Stranded { RequestError::Reset } else { RequestError::TimedOut })
    }

    /// Nobody is left who could unmap what is live in `range`, or wait for what is half-way: it is in quarantine.
    /// What the device refused goes.
    pub(crate) fn disown(&mut self, key: DomainKey, range: IovaRange) {
        self.disown_those(key, range, |_| true);
    }

    /// The same for what was made with a list.
    pub(crate) fn disown_list(&mut self, key: DomainKey, range: IovaRange, list: ListId) {
        self.disown_those(key, range, |record| record.is_of(list));
    }

    fn disown_those(&mut self, key: DomainKey, range: IovaRange, those: impl Fn(&Record) -> bool) {
        let Some(domain) = self.domain_mut(key) else { return };
        let mut released = 0;
        domain.space.retain_in(range, None, |record| {
            if !those(record) {
                return true;
            }
            record.owned = false;
            match record.state {
                MappingState::Live | MappingState::Apart => {
                    record.state = MappingState::Quarantined;
                }
                MappingState::Returned if record.holds_memory() => {
                    record.state = MappingState::Released;
                    released += 1;
                }
                MappingState::Returned => return false,
                _ => {}
            }
            true
        });
        self.released += released;
    }

    /// The same for what is to be unmapped apart.
    pub(crate) fn disown_apart(&mut self, key: DomainKey, range: IovaRange) {
        self.disown_those(key, range, |record| record.state == MappingState::Apart);
    }

    /// Whether somebody counts on the mapping of exactly this range.
    pub(crate) fn is_owned(&self, key: DomainKey, range: IovaRange) -> bool {
        let record = self.domain(key).and_then(|domain| domain.space.get(range.start()));
        record.is_some_and(|record| record.owned && record.range == range)
    }

    /// Whether unmapping takes no request, since the domain died.
    pub(crate) fn is_gone(&self, key: DomainKey, range: IovaRange) -> bool {
        let Some(domain) = self.domain(key) else { return false };
        let first = domain.space.whole(range);
        first.is_some_and(|first| domain.space.all(first, range.last(), |record| !record.on_device))
    }

    /// Whether a domain that has an endpoint again lost mappings. They are to be replayed then, and nothing new
    /// is mapped before [`end_transition`](Self::end_transition).
    pub(crate) fn begin_replay(&mut self, key: DomainKey) -> bool {
        #[cfg(feature = "contexts")]
        let contexts = self.has_contexts_to_tell(key);
        #[cfg(not(feature = "contexts"))]
        let contexts = false;
        let Some(domain) = self.domain_mut(key) else { return false };
        let needed = !domain.is_in_transition() && (domain.space.tally().lost > 0 || contexts);
        if needed {
            domain.set_in_transition(true);
        }
        needed
    }

    /// The next mapping to be replayed, above `after`.
    pub(crate) fn next_replay(&mut self, key: DomainKey, after: Option<Iova>) -> Option<(Request, Op, Iova)> {
        let domain = self.domain_mut(key)?;
        let first = after.map_or(Some(Iova::new(0)), |after| after.checked_add(1))?;
        let record = domain.space.iter_from(first).find(|record| record.needs_replay())?;
        let (range, phys, prot) = (record.range, record.phys, record.prot());
        let start = range.start();
        let record = domain.space.handle(start)?;
        domain.space.change(record, start, |record| {
            (record.state, record.on_device) = (MappingState::Replaying, true);
        });
        let request = Request::Map { domain: domain.id, range, phys, prot };
        Some((request, Op::Replay { domain: key, range, record }, start))
    }

    /// The first of a failed list's mappings in `range`: one that the device refused, whose record goes, or one to be
    /// unmapped, with those of the list that touch it.
    pub(crate) fn next_unmade(
        &mut self,
        key: DomainKey,
        (list, range): (ListId, IovaRange),
    ) -> Option<Unmade> {
        let domain = self.domain_mut(key)?;
        let made = |record: &&Record| {
            let made = matches!(record.state, MappingState::Live | MappingState::Returned)
                || record.owned && record.is_stuck();
            made && record.is_of(list)
        };
        let first = domain.space.iter_in(range).find(made)?;
        let (state, mut run) = (first.state, first.range);
        if state == MappingState::Returned {
            let memory = domain.space.remove(run.start());
            return Some(Unmade::Refused { range: run, memory });
        }
        let first = run.start();
        for record in domain.space.iter_in(range).skip_while(|record| record.range.start() <= first) {
            let touches = run.last().checked_add(1) == Some(record.range.start());
            if !touches || record.state != state || !record.is_of(list) {
                break;
            }
            run = IovaRange::new(run.start(), record.range.last()).unwrap_or(run);
        }
        Some(Unmade::Live(run))
    }

    /// The first mapping in `range` that waits to be unmapped by itself, or cannot be any more.
    pub(crate) fn next_apart(&self, key: DomainKey, range: IovaRange) -> Option<IovaRange> {
        let apart = |record: &&Record| matches!(record.state, MappingState::Apart | MappingState::Stranded);
        self.domain(key)?.space.iter_in(range).find(apart).map(|record| record.range)
    }

    /// Whether any record holds memory that the device cannot reach any more.
    pub(crate) fn has_released(&self) -> bool {
        self.released > 0
    }

    /// Takes memory that the device cannot reach any more out of the records of `range`, one a call.
    pub(crate) fn take_released(&mut self, key: DomainKey, range: IovaRange) -> Option<HeldMemory> {
        if self.released == 0 {
            return None;
        }
        let space = &mut self.domain_mut(key)?.space;
        let released = |record: &&Record| record.state == MappingState::Released;
        let start = space.iter_in(range).find(released)?.range.start();
        let held = space.remove(start);
        self.released -= 1;
        held
    }

    /// The same wherever it lies, for memory whose owner went away.
    pub(crate) fn take_any_released(&mut self) -> Option<HeldMemory> {
        if self.released == 0 {
            return None;
        }
        let key = self.domains.iter().flatten().find_map(|domain| {
            let released = domain.space.tally().released;
            (released > 0).then_some(domain.key)
        })?;
        self.take_released(key, IovaRange::WHOLE)
    }
}
