//! Domains: address spaces that endpoints are attached to.

use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::dma::HeldMemory;
use crate::engine::{DomainKey, DomainStats, Engine, Limits, Op, UnmapPlan};
use crate::error::{MapError, RequestError, UnmapError};
use crate::exchange::{Shared, State};
use crate::id::DomainId;
use crate::platform::Platform;
use crate::prot::Prot;
use crate::queue::{Batch, Outcome};
use crate::wire::request::Status;
use alloc::sync::Arc;
use core::fmt;

/// A domain: an address space with its mappings. Clones are handles to the same one.
///
/// When the last handle goes, endpoints that are still attached stay so, and its number stays taken until they
/// are detached.
///
/// The methods here are the raw layer: they let endpoints reach memory on the caller's word. Device drivers use
/// [`DmaDevice`](crate::DmaDevice).
pub struct Domain<P: Platform>(Arc<Handle<P>>);

struct Handle<P: Platform> {
    shared: Arc<Shared<P>>,
    key: DomainKey,
}

impl<P: Platform> Drop for Handle<P> {
    fn drop(&mut self) {
        // Two statements, so that the record's memory is freed without the lock.
        let record = self.shared.state.lock().engine.release_domain(self.key);
        drop(record);
    }
}

impl<P: Platform> Clone for Domain<P> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<P: Platform> fmt::Debug for Domain<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Domain({})", self.id())
    }
}

/// Where a mapping leads, by the driver's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The whole mapping.
    pub range: IovaRange,
    /// Where its first byte lies.
    pub phys: PhysAddr,
    /// What it allows.
    pub prot: Prot,
}

impl<P: Platform> Domain<P> {
    pub(crate) fn new(shared: Arc<Shared<P>>, key: DomainKey) -> Self {
        Self(Arc::new(Handle { shared, key }))
    }

    pub(crate) fn key(&self) -> DomainKey {
        self.0.key
    }

    fn with<R>(&self, read: impl FnOnce(&mut Engine) -> R) -> R {
        read(&mut self.0.shared.state.lock().engine)
    }

    /// The number that requests carry. It can change before the first mapping succeeded, when the device
    /// still has mappings of an earlier life under it.
    pub fn id(&self) -> DomainId {
        let key = self.0.key;
        self.with(|engine| engine.domain(key).map_or(DomainId::new(0), |domain| domain.id))
    }

    /// What the domain did so far.
    pub fn stats(&self) -> DomainStats {
        let key = self.0.key;
        self.with(|engine| engine.domain(key).map_or(DomainStats::default(), |domain| domain.stats))
    }

    /// Mappings that are recorded, those in quarantine included.
    pub fn mapping_count(&self) -> usize {
        let key = self.0.key;
        self.with(|engine| engine.domain(key).map_or(0, |domain| domain.mappings.len()))
    }

    /// Where `iova` leads, by the driver's records, quarantined mappings included. Asks nothing of the device.
    pub fn translate(&self, iova: Iova) -> Option<Translation> {
        let key = self.0.key;
        self.with(|engine| {
            let record = engine.domain(key)?.mappings.containing(iova)?;
            Some(Translation { range: record.range, phys: record.phys, prot: record.prot })
        })
    }

    /// Makes room for `mappings` mappings in all. Allocates; mapping and unmapping never do.
    pub fn reserve(&self, mappings: usize) {
        let spare = Engine::prepare_growth(Limits::new(&self.0.shared.options), mappings);
        // Two statements, so that the old lists are freed without the lock.
        let old = self.with(|engine| engine.grow_domain(self.0.key, spare));
        drop(old);
    }

    /// Maps `len` bytes from `phys` at an address of the driver's choice up to `limit`.
    ///
    /// `phys` and `len` are multiples of the granule. Waits for the answer; allocates nothing.
    ///
    /// # Errors
    /// [`MapError`]. With [`MapError::Quarantined`] the device may have the mapping, and the memory must not be
    /// reused before the quarantine is empty again; else nothing is mapped.
    ///
    /// # Safety
    /// Until the mapping is unmapped with success the memory is one that the domain's endpoints may access at
    /// any time as `prot` says: no Rust reference depends on it, and it is not given to anyone else.
    pub unsafe fn map(&self, phys: PhysAddr, len: u64, prot: Prot, limit: Iova) -> Result<Iova, MapError> {
        let range = self.with(|engine| {
            // Checked before anything is taken, at an address that is always good.
            let start = engine.geometry.usable.start();
            match engine.check_map(self.0.key, start, len, phys, prot) {
                // A length that fits nowhere: the allocator has the better words.
                Ok(_) | Err(MapError::OutsideInputRange { .. }) => {}
                Err(error) => return Err(error),
            }
            engine.allocate(self.0.key, len, limit, 1)
        })?;
        self.map_runs(range, core::iter::once(Run { phys, len }), prot, &mut None)?;
        Ok(range.start())
    }

    /// Maps `len` bytes from `phys` at `iova`. All three are multiples of the granule.
    ///
    /// Waits for the answer; allocates nothing.
    ///
    /// # Errors
    /// As for [`map`](Self::map), and [`MapError::InUse`] where not all of the range is free.
    ///
    /// # Safety
    /// As for [`map`](Self::map).
    pub unsafe fn map_at(&self, iova: Iova, phys: PhysAddr, len: u64, prot: Prot) -> Result<(), MapError> {
        let range = self.with(|engine| {
            let range = engine.check_map(self.0.key, iova, len, phys, prot)?;
            engine.take(self.0.key, range).map(|()| range)
        })?;
        self.map_runs(range, core::iter::once(Run { phys, len }), prot, &mut None)
    }

    /// Maps `len` bytes from `start` at their own addresses, around what is reserved for the domain's endpoints: what
    /// an identity domain is where the device has none. One mapping for each stretch between reserved regions.
    ///
    /// Waits for the answers; allocates nothing.
    ///
    /// # Errors
    /// As for [`map_at`](Self::map_at). The stretches before the one that failed stay mapped.
    ///
    /// # Safety
    /// As for [`map`](Self::map): the endpoints may access all of it at any time.
    pub unsafe fn map_identity(&self, start: PhysAddr, len: u64, prot: Prot) -> Result<(), MapError> {
        let mut next = IovaRange::from_len(Iova::new(start.get()), len);
        if next.is_none() {
            return Err(MapError::PhysicalWraps { phys: start, len });
        }
        // Bounded by the reserved regions: each round passes a whole stretch between two of them.
        while let Some(rest) = next {
            let Some(stretch) = self.with(|engine| engine.unreserved_in(self.0.key, rest)) else { break };
            let (at, len) = (stretch.start(), stretch.len_bytes().unwrap_or(0));
            // SAFETY: the caller's promise.
            unsafe { self.map_at(at, PhysAddr::new(at.get()), len, prot) }?;
            next = stretch.last().checked_add(1).and_then(|at| IovaRange::new(at, rest.last()));
        }
        Ok(())
    }

    /// Unmaps `len` bytes at `iova`: one mapping, or several whole ones that touch each other, by one request.
    /// When this returns `Ok`, no endpoint reaches the memory through them any more.
    ///
    /// Waits for the answer; allocates nothing.
    ///
    /// # Errors
    /// [`UnmapError`]. The memory must not be reused: with [`UnmapError::Request`] the mappings are in
    /// quarantine, else nothing changed.
    ///
    /// # Safety
    /// The caller made these mappings, by [`map`](Self::map) or [`map_at`](Self::map_at): another owner's
    /// device may be using them, and would reach whatever is mapped at the address next.
    pub unsafe fn unmap(&self, iova: Iova, len: u64) -> Result<(), UnmapError> {
        let range = IovaRange::from_len(iova, len).ok_or(UnmapError::NotMapped(iova))?;
        self.unmap_range(range)
    }

    /// Maps runs into `range`, which was allocated for them or taken and which they fill. All or nothing: on an
    /// error no mapping is left, the range is free and `held` is back, except for what is in quarantine.
    ///
    /// When the device refuses the first mapping that the domain ever has, its number may still have mappings
    /// of an earlier life: it gets another (I12).
    pub(crate) fn map_runs(
        &self,
        range: IovaRange,
        runs: impl Iterator<Item = Run> + Clone,
        prot: Prot,
        held: &mut Option<HeldMemory>,
    ) -> Result<(), MapError> {
        let lent = held.is_some();
        let mut result = self.try_map_runs(range, runs.clone(), prot, held);
        for _ in 0..MAX_RENUMBERINGS {
            let inval = RequestError::Refused(Status::Inval);
            let stale = matches!(result, Err(MapError::Request { error, .. }) if error == inval);
            let first = stale && runs.clone().nth(1).is_none() && self.stats().maps == 0;
            if !first || held.is_some() != lent {
                break;
            }
            log::warn!("domain {} cannot be mapped: an earlier life of the device may use it", self.id());
            if !self.renumber() || self.with(|engine| engine.take(self.0.key, range)).is_err() {
                break;
            }
            result = self.try_map_runs(range, runs.clone(), prot, held);
        }
        result
    }

    /// One request for each run, and one doorbell for as many as the ring takes.
    fn try_map_runs(
        &self,
        range: IovaRange,
        runs: impl Iterator<Item = Run> + Clone,
        prot: Prot,
        held: &mut Option<HeldMemory>,
    ) -> Result<(), MapError> {
        let shared = &self.0.shared;
        let mut rest = Rest { runs, range: Some(range) };
        let mut result = Ok(());
        let mut unknown = None;
        while result.is_ok() && rest.runs.clone().next().is_some() {
            let sent = shared.with_slot(false, |state| self.submit_runs(state, &mut rest, prot, held));
            let (batch, begun) = match sent {
                Ok(sent) => sent,
                Err(error) => {
                    result = Err(MapError::Request { range, error });
                    break;
                }
            };
            result = begun;
            shared.ring();
            shared.wait(batch, |_, op, outcome| {
                if let (Op::Map { range, .. }, Err(error)) = (op, outcome) {
                    unknown = unknown.or(Some(error).filter(RequestError::outcome_unknown));
                    result = result.and(Err(MapError::Request { range, error }));
                }
            });
        }
        if result.is_err() {
            unknown = self.roll_back(range).err().or(unknown);
            self.give_back_rest(rest);
            *held = held.take().or_else(|| self.with(|engine| engine.take_returned(self.0.key, range)));
        }
        match unknown {
            Some(error) => Err(MapError::Quarantined { range, error }),
            None => result,
        }
    }

    /// Begins and submits runs while there are slots.
    fn submit_runs(
        &self,
        state: &mut State,
        rest: &mut Rest<impl Iterator<Item = Run> + Clone>,
        prot: Prot,
        held: &mut Option<HeldMemory>,
    ) -> (Batch, Result<(), MapError>) {
        let mut batch = Batch::default();
        let mut begun = Ok(());
        while state.requests.can_submit(false) {
            let (Some(run), Some(free)) = (rest.runs.clone().next(), rest.range) else { break };
            let part = IovaRange::from_len(free.start(), run.len).filter(|part| free.contains(*part));
            let request = part.ok_or(MapError::Empty).and_then(|part| {
                let begun = state.engine.begin_map(self.0.key, part, run.phys, prot, held);
                begun.map(|(request, op)| (part, request, op))
            });
            match request {
                Ok((part, request, op)) => {
                    state.submit(&request, op, &mut batch);
                    rest.runs.next();
                    rest.range =
                        part.last().checked_add(1).and_then(|next| IovaRange::new(next, free.last()));
                }
                Err(error) => {
                    begun = Err(error);
                    break;
                }
            }
        }
        state.publish(Some(self.0.key), &self.0.shared.doorbell);
        (batch, begun)
    }

    /// Unmaps what a failed list mapped. The last error is why some of it is in quarantine instead.
    fn roll_back(&self, range: IovaRange) -> Result<(), RequestError> {
        let mut result = Ok(());
        // Bounded: each round turns live mappings into something else.
        while let Some(live) = self.with(|engine| engine.live_run_in(self.0.key, range)) {
            if let Err(UnmapError::Request { error, .. }) = self.unmap_range(live) {
                result = Err(error);
            }
        }
        result
    }

    /// Gives back what a failed list did not get to.
    fn give_back_rest(&self, rest: Rest<impl Iterator<Item = Run>>) {
        if let Some(range) = rest.range {
            let parts = rest.runs.count();
            self.with(|engine| engine.give_back(self.0.key, range, parts));
        }
    }

    /// Takes `len` bytes of IOVA out of the free ones, for as many mappings as `parts` says.
    pub(crate) fn allocate(&self, len: u64, limit: Iova, parts: usize) -> Result<IovaRange, MapError> {
        self.with(|engine| engine.allocate(self.0.key, len, limit, parts))
    }

    /// Gives back what was allocated for one mapping and not mapped.
    pub(crate) fn give_back(&self, range: IovaRange) {
        self.with(|engine| engine.give_back(self.0.key, range, 1));
    }

    /// Unmaps whole neighbouring mappings. Memory that was held for them goes back to its owner.
    pub(crate) fn unmap_range(&self, range: IovaRange) -> Result<(), UnmapError> {
        unmap(&self.0.shared, self.0.key, range, Engine::begin_unmap)
    }

    /// Puts a live mapping into quarantine, whose owner goes away without unmapping it.
    pub(crate) fn quarantine(&self, range: IovaRange) {
        self.with(|engine| engine.quarantine(self.0.key, range));
    }

    /// Gives the domain another number: detaches its endpoints, and attaches them again. False where that cannot
    /// be done, or not all endpoints came back.
    fn renumber(&self) -> bool {
        let (shared, key) = (&self.0.shared, self.0.key);
        if !self.with(|engine| engine.begin_renumber(key)) {
            return false;
        }
        let mut done = true;
        // Both loops are bounded by the endpoints: each round takes one out.
        while let Some(endpoint) = self.with(|engine| engine.next_to_leave(key)).filter(|_| done) {
            done = shared.detach(endpoint).map_err(|error| log::error!("{error}")).is_ok();
        }
        done =
            done && self.with(|engine| engine.renumber(key)).map_err(|error| log::error!("{error}")).is_ok();
        while let Some(endpoint) = self.with(|engine| engine.next_to_rejoin(key)) {
            let joined = shared.attach(endpoint, key).map_err(|error| log::error!("{error}"));
            done &= joined.is_ok();
        }
        self.with(|engine| engine.end_transition(key));
        done
    }
}

/// What of a list is not begun yet: runs, and the addresses for them.
struct Rest<I> {
    runs: I,
    range: Option<IovaRange>,
}

/// How many numbers in a row may turn out to be in use by an earlier life of the device, before a refusal is taken
/// for what it says.
const MAX_RENUMBERINGS: usize = 8;

/// Physically contiguous bytes, whole granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub phys: PhysAddr,
    pub len: u64,
}

type Begin = fn(&mut Engine, DomainKey, IovaRange) -> Result<UnmapPlan, UnmapError>;

fn unmap<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    range: IovaRange,
    begin: Begin,
) -> Result<(), UnmapError> {
    let failed = |error| UnmapError::Request { range, error };
    let plan = |state: &mut State| {
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
    let begun = match dead {
        Some(done) => Ok(done),
        None => shared.with_slot(false, plan),
    };
    let begun = begun.map_err(|error| {
        // Nothing was sent, but the caller is to find what the documentation says.
        shared.state.lock().engine.quarantine(key, range);
        failed(error)
    })?;
    let mut outcome = begun?.map_or(Ok(()), |batch| shared.finish(batch));
    if outcome == Err(RequestError::Refused(Status::Range)) {
        outcome = unmap_apart(shared, key, range, outcome);
    }
    while let Some(held) = { shared.state.lock().engine.take_released(key, range) } {
        shared.release(held);
    }
    outcome.map_err(failed)
}

/// A device that refuses to unmap several mappings at once may have removed some: each is unmapped by itself,
/// and what the device does not have any more it confirms (I6). What it refuses even so is in quarantine.
fn unmap_apart<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    range: IovaRange,
    refused: Outcome,
) -> Outcome {
    let mut outcome = None;
    // Bounded: each round takes one mapping out of that state.
    while let Some(part) = { shared.state.lock().engine.next_apart(key, range) } {
        let unmapped = match unmap(shared, key, part, Engine::begin_unmap_apart) {
            Err(UnmapError::Request { error, .. }) => Err(error),
            _ => Ok(()),
        };
        outcome = Some(outcome.unwrap_or(Ok(())).and(unmapped));
    }
    // A single mapping that the device calls out of range is as it was refused.
    outcome.unwrap_or(refused)
}

/// Tries to unmap one mapping that is in quarantine.
pub(crate) fn reclaim<P: Platform>(
    shared: &Shared<P>,
    key: DomainKey,
    range: IovaRange,
) -> Result<(), UnmapError> {
    unmap(shared, key, range, Engine::begin_reclaim)
}
