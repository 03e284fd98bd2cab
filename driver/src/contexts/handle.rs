//! A domain whose contexts are added one by one.

use super::anonymous::Anonymous;
use super::error::ContextError;
use super::mapped::MappedContext;
use super::owned::{NotAdded, OwnedContext};
use super::pages::PageAnswer;
use super::pasid::{PageGroupId, Pasid};
use super::table::{PageTable, TableMemory};
use super::wire::{ContextRequest, Invalidate, TableDescription};
use crate::domain::Domain;
use crate::engine::DomainKey;
use crate::error::{DomainError, RequestError};
use crate::exchange::Shared;
use crate::lock::Mutex;
use crate::options::{DomainKind, DomainOptions};
use crate::platform::Platform;
use crate::queue::Outcome;
use crate::viommu::Viommu;
use crate::wire::feature::Features;
use crate::wire::request::Status;
use alloc::sync::Arc;
use alloc::vec::Vec;
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
/// them. Contexts end on the device with the domain's last endpoint, and with a reset: what is asked of them is then answered
/// NOENT, and removing them succeeds.
pub struct Contexts<P: Platform>(Arc<Inner<P>>);

pub(super) struct Inner<P: Platform> {
    pub(super) shared: Arc<Shared<P>>,
    domain: Domain<P>,
    pub(super) granule: u64,
    pub(super) anonymous: Option<Anonymous>,
    /// PASIDs that have a context, or may have one. Its capacity is the most there can be.
    taken: Mutex<P::Lock, Vec<Pasid>>,
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
        Ok(Contexts(Arc::new(Inner {
            shared: Arc::clone(&self.shared),
            domain,
            granule: self.granule(),
            anonymous: options.anonymous,
            taken: Mutex::new(Vec::with_capacity(options.max_contexts)),
            limit: options.max_contexts,
        })))
    }

    /// Answers a group of page requests: its accesses are tried again, or end. Waits for the device.
    ///
    /// # Errors
    /// [`RequestError`]; NOENT for a group that was answered, or whose context is gone.
    pub fn respond(&self, group: PageGroupId, answer: PageAnswer) -> Result<(), RequestError> {
        if !self.features().contains(Features::CONTEXTS) {
            return Err(RequestError::NotHandled);
        }
        self.shared.send_response(ContextRequest::PageResponse { group, answer })
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
        self.take(pasid)?;
        self.attach_table(pasid, TableDescription::Mapped).map_err(|(error, _)| error)?;
        Ok(MappedContext::new(self.clone(), pasid))
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
        if let Err(error) = self.take(pasid) {
            return Err(NotAdded { error, table: Some(table) });
        }
        match self.attach_table(pasid, TableDescription::of(&table, asid)) {
            Ok(()) => Ok(OwnedContext::new(self.clone(), pasid, table)),
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
        self.send(&[ContextRequest::Invalidate(Invalidate::Domain)])
    }

    fn attach_table(&self, pasid: Pasid, table: TableDescription) -> Result<(), (ContextError, Known)> {
        let failed = |error, known| {
            if known == Known::Yes {
                self.give_back(pasid);
            }
            Err((error, known))
        };
        let Some(endpoint) = self.member() else { return failed(ContextError::NoEndpoint, Known::Yes) };
        match self.send(&[ContextRequest::AttachTable { endpoint, pasid, table }]) {
            Ok(()) => Ok(()),
            Err(error) => {
                let known = if error.outcome_unknown() { Known::No } else { Known::Yes };
                failed(ContextError::Request { pasid, error }, known)
            }
        }
    }

    /// Removes a context, with what the device cached of it.
    pub(super) fn detach(&self, pasid: Pasid) -> Result<(), ContextError> {
        let outcome = match self.member() {
            Some(endpoint) => self.send(&[ContextRequest::DetachPasid { endpoint, pasid }]),
            None if self.0.shared.is_dead(self.key()) => Ok(()),
            None => return Err(ContextError::NoEndpoint),
        };
        match outcome {
            Ok(()) => {}
            // The device does not have it: it ended with the domain's last endpoint, or with a reset. Unless an endpoint did
            // not come back from that, which may still be in the domain of before.
            Err(RequestError::Refused(Status::NoEnt)) if !self.0.shared.is_in_doubt(self.key()) => {}
            Err(error) => return Err(ContextError::Request { pasid, error }),
        }
        self.give_back(pasid);
        Ok(())
    }

    pub(super) fn key(&self) -> DomainKey {
        self.0.domain.key()
    }

    pub(super) fn inner(&self) -> &Inner<P> {
        &self.0
    }

    pub(super) fn member(&self) -> Option<crate::id::EndpointId> {
        self.0.shared.member(self.key())
    }

    pub(super) fn send(&self, requests: &[ContextRequest]) -> Outcome {
        self.0.shared.send_contexts(self.key(), requests)
    }

    /// Takes a PASID, for whose context there is room.
    pub(super) fn take(&self, pasid: Pasid) -> Result<(), ContextError> {
        let mut taken = self.0.taken.lock();
        if taken.contains(&pasid) {
            return Err(ContextError::Taken { pasid });
        }
        let limit = self.0.limit;
        if taken.len() >= limit {
            return Err(ContextError::TooMany { limit });
        }
        // Within the capacity: allocates nothing.
        taken.push(pasid);
        Ok(())
    }

    pub(super) fn give_back(&self, pasid: Pasid) {
        self.0.taken.lock().retain(|other| *other != pasid);
    }
}

/// Whether it is known that the device has nothing of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Yes,
    No,
}
