//! A domain whose contexts are added one by one.

use super::anonymous::Anonymous;
use super::claim::Claim;
use super::error::ContextError;
use super::mapped::MappedContext;
use super::owned::{NotAdded, OwnedContext};
use super::pages::PageAnswer;
use super::pasid::{PageGroupId, Pasid};
use super::table::{PageTable, TableMemory};
use super::wire::{ContextRequest, Invalidate, TableDescription};
use crate::domain::Domain;
use crate::engine::{ContextEffect, ContextKey, ContextRecords, DomainKey, Engine, Geometry, Op, Space};
use crate::error::{DomainError, RequestError};
use crate::exchange::{Need, Shared, State};
use crate::options::{DomainKind, DomainOptions};
use crate::platform::Platform;
use crate::viommu::Viommu;
use crate::wire::feature::Features;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;

/// Choices for a domain with contexts.
#[derive(Clone, Copy, Debug)]
pub struct ContextsOptions {
    /// What accesses without a PASID meet. `None`: the default context, which is mapped through
    /// [`Contexts::domain`] as any domain.
    pub anonymous: Option<Anonymous>,
    /// The rest, as for any domain; its kind is not looked at.
    pub domain: DomainOptions,
    /// The most contexts.
    pub max_contexts: usize,
}

impl Default for ContextsOptions {
    fn default() -> Self {
        Self { anonymous: Some(Anonymous::Blocked), domain: DomainOptions::default(), max_contexts: 64 }
    }
}

/// A domain whose contexts are added and removed one by one, by PASID. Clones are handles to the same one.
///
/// Endpoints are attached to [`domain`](Self::domain), at least one before the first context; a context holds for all of
/// them. Contexts end on the device with the domain's last endpoint, and with a reset: they and what is mapped in them are
/// there again with the domain's next endpoint, and when [`Viommu::recover`] returned.
pub struct Contexts<P: Platform>(Arc<Inner<P>>);

struct Inner<P: Platform> {
    shared: Arc<Shared<P>>,
    domain: Domain<P>,
    geometry: Geometry,
    anonymous: Option<Anonymous>,
    limit: usize,
}

impl<P: Platform> Clone for Contexts<P> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<P: Platform> fmt::Debug for Contexts<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Contexts({})", self.0.domain.id())
    }
}

impl<P: Platform> Viommu<P> {
    /// Creates a domain with contexts, which exists for the device once an endpoint is attached. Allocates its records.
    ///
    /// # Errors
    /// [`DomainError::NoContexts`] where the draft was not negotiated, and as [`create_domain`](Self::create_domain).
    pub fn create_contexts(&self, options: ContextsOptions) -> Result<Contexts<P>, DomainError> {
        if !self.features().contains(Features::CONTEXTS) {
            return Err(DomainError::NoContexts);
        }
        let kind = options.anonymous.map_or(DomainKind::Translated, DomainKind::Contexts);
        let domain = self.create_domain(DomainOptions { kind, ..options.domain })?;
        // As many as there are PASIDs, and a table of descriptors.
        let limit = options.max_contexts.min(1 << 20);
        let mut contexts = ContextRecords::with_capacity(limit + 1);
        let geometry = {
            let mut state = self.shared.state.lock();
            if let Some(record) = state.engine.domain_mut(domain.key()) {
                core::mem::swap(&mut record.contexts, &mut contexts);
            }
            state.engine.geometry
        };
        Ok(Contexts(Arc::new(Inner {
            shared: Arc::clone(&self.shared),
            domain,
            geometry,
            anonymous: options.anonymous,
            limit,
        })))
    }

    /// Answers a group of page requests: its accesses are tried again, or end. Waits for the device.
    ///
    /// # Errors
    /// [`RequestError`]; NOENT for a group that was answered, or whose context is gone.
    pub fn respond(&self, group: PageGroupId, answer: PageAnswer) -> Result<(), RequestError> {
        self.shared.block_on(self.respond_async(group, answer))
    }

    /// [`respond`](Self::respond) as a future. Dropped before its end it leaves the answer, if it was sent, with the device.
    ///
    /// # Errors
    /// As there.
    pub async fn respond_async(&self, group: PageGroupId, answer: PageAnswer) -> Result<(), RequestError> {
        if !self.features().contains(Features::CONTEXTS) {
            return Err(RequestError::NotHandled);
        }
        let response = (ContextRequest::PageResponse { group, answer }, Op::None);
        let submit = |state: &mut State| self.shared.submit_context(state, None, response);
        let batch = self.shared.with_slot(Need::Slot, submit).await?;
        self.shared.finish(batch).await
    }
}

impl<P: Platform> Contexts<P> {
    /// The domain, for attaching endpoints, and for mapping in the default context if there is one.
    pub fn domain(&self) -> &Domain<P> {
        &self.0.domain
    }

    /// What accesses without a PASID meet; `None`: the default context.
    pub fn anonymous(&self) -> Option<Anonymous> {
        self.0.anonymous
    }

    /// Adds a context that is driven by MAP and UNMAP with its PASID. Waits for the device. Allocates.
    ///
    /// # Errors
    /// [`ContextError`].
    pub fn add_mapped(&self, pasid: Pasid) -> Result<MappedContext<P>, ContextError> {
        self.0.shared.block_on(self.add_mapped_async(pasid))
    }

    /// [`add_mapped`](Self::add_mapped) as a future. Dropped before its end it leaves the context, if it was sent, with the
    /// device, until the PASID is added again.
    ///
    /// # Errors
    /// As there.
    pub async fn add_mapped_async(&self, pasid: Pasid) -> Result<MappedContext<P>, ContextError> {
        let space = Engine::prepare_context(&self.0.geometry);
        let added = self.add(Some(pasid), TableDescription::Mapped, Some(space)).await;
        added.map(|claim| MappedContext::new(claim, pasid)).map_err(|(error, _)| error)
    }

    /// Adds a context that is a page table of the guest's. Waits for the device.
    ///
    /// `asid` is what an Arm IOMMU caches its translations under, different for each context of the IOMMU; other formats do
    /// not have it.
    ///
    /// # Errors
    /// [`NotAdded`], with the table unless the device may walk it.
    #[expect(clippy::result_large_err, reason = "what the caller lent comes back")]
    pub fn add_owned<M: TableMemory>(
        &self,
        pasid: Pasid,
        table: PageTable<M>,
        asid: u16,
    ) -> Result<OwnedContext<P, M>, NotAdded<M>> {
        self.0.shared.block_on(self.add_owned_async(pasid, table, asid))
    }

    /// [`add_owned`](Self::add_owned) as a future. Dropped before its end it leaves the context, if it was sent, and its
    /// table's memory in any case, with the device; the PASID can be added again.
    ///
    /// # Errors
    /// As there.
    pub async fn add_owned_async<M: TableMemory>(
        &self,
        pasid: Pasid,
        table: PageTable<M>,
        asid: u16,
    ) -> Result<OwnedContext<P, M>, NotAdded<M>> {
        match self.add(Some(pasid), TableDescription::of(&table, asid), None).await {
            Ok(claim) => Ok(OwnedContext::new(claim, pasid, table)),
            // Dropping a table gives no memory back.
            Err((error, Known::No)) => Err(NotAdded { error, table: None }),
            Err((error, Known::Yes)) => Err(NotAdded { error, table: Some(table) }),
        }
    }

    /// Has the device forget all that it cached of any of the domain's contexts.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn invalidate_all(&self) -> Result<(), RequestError> {
        self.0.shared.block_on(self.invalidate_all_async())
    }

    /// [`invalidate_all`](Self::invalidate_all) as a future.
    ///
    /// # Errors
    /// As there.
    pub async fn invalidate_all_async(&self) -> Result<(), RequestError> {
        let key = self.key();
        let requests = [ContextRequest::Invalidate(Invalidate::Domain)];
        self.0.shared.invalidate(key, &requests, |state| state.engine.are_cached(key)).await
    }

    /// Tells the device of a context, or of a table of descriptors.
    pub(super) async fn add(
        &self,
        pasid: Option<Pasid>,
        table: TableDescription,
        mut space: Option<Box<Space>>,
    ) -> Result<Claim<P>, (ContextError, Known)> {
        let (shared, domain) = (&self.0.shared, self.key());
        self.sweep();
        // One that nobody has any more makes room.
        let abandoned = { shared.state.lock().engine.abandoned_context(domain, pasid) };
        if let Some(key) = abandoned.filter(|_| pasid.is_some()) {
            self.remove(key).await.map_err(|error| (error, Known::Yes))?;
            self.sweep();
        }
        let begun = shared.with_slot(Need::Slot, |state| {
            let begun = state.engine.begin_context(domain, (pasid, table), &mut space, self.0.limit)?;
            let op = Op::Context { context: begun.1, effect: ContextEffect::Add };
            Ok((begun.1, shared.submit_context(state, Some(domain), (begun.0, op))))
        });
        let begun = begun.await.unwrap_or_else(|error| Err(ContextError::of(pasid, error)));
        let (key, batch) = begun.map_err(|error| (error, Known::Yes))?;
        let claim = Claim { contexts: self.clone(), key };
        match shared.finish(batch).await {
            Ok(()) => Ok(claim),
            Err(error) => {
                let known = if error.outcome_unknown() { Known::No } else { Known::Yes };
                Err((ContextError::of(pasid, error), known))
            }
        }
    }

    /// Removes a context, with what the device cached of it.
    pub(super) async fn remove(&self, key: ContextKey) -> Result<(), ContextError> {
        let shared = &self.0.shared;
        let begin = |state: &mut State| {
            let op = Op::Context { context: key, effect: ContextEffect::Remove };
            let request = state.engine.begin_removal(key)?;
            Ok(request.map(|request| shared.submit_context(state, Some(self.key()), (request, op))))
        };
        // What the device does not have takes no slot.
        let absent = {
            let mut state = shared.state.lock();
            state.engine.is_context_absent(key).then(|| begin(&mut state))
        };
        let pasid = { shared.state.lock().engine.pasid_of(key) };
        let begun = match absent {
            Some(done) => done,
            None => {
                shared.with_slot(Need::Slot, begin).await.map_err(|error| ContextError::of(pasid, error))?
            }
        };
        let Some(batch) = begun? else { return Ok(()) };
        match shared.finish(batch).await {
            // The record knows whether an error says that there is none.
            Err(error) if !{ shared.state.lock().engine.is_context_absent(key) } => {
                Err(ContextError::of(pasid, error))
            }
            _ => Ok(()),
        }
    }

    /// Drops records of contexts that are gone.
    pub(super) fn sweep(&self) {
        // Two statements, so that none is dropped under the lock.
        while let Some(gone) = { self.0.shared.state.lock().engine.take_gone_context(self.key()) } {
            drop(gone);
        }
    }

    pub(super) fn key(&self) -> DomainKey {
        self.0.domain.key()
    }

    pub(super) fn granule(&self) -> u64 {
        self.0.geometry.granule
    }

    pub(super) fn shared(&self) -> &Arc<Shared<P>> {
        &self.0.shared
    }
}

/// Whether it is known that the device has nothing of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    Yes,
    No,
}
