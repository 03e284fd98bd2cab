//! Contexts that are driven by MAP and UNMAP with their PASID.

use super::claim::Claim;
use super::error::{ContextError, ContextMapError, ContextUnmapError};
use super::handle::Contexts;
use super::pasid::Pasid;
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::exchange::{Need, Shared, State};
use crate::platform::Platform;
use crate::prot::Prot;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

/// A context of a domain in which memory is mapped by requests.
///
/// Dropping it without [`remove`](Self::remove) leaves it, and all that is mapped, with the device until its PASID is added
/// again, or the device loses it.
pub struct MappedContext<P: Platform> {
    claim: Claim<P>,
    pasid: Pasid,
}

impl<P: Platform> MappedContext<P> {
    pub(super) fn new(claim: Claim<P>, pasid: Pasid) -> Self {
        Self { claim, pasid }
    }

    /// Its number.
    pub fn pasid(&self) -> Pasid {
        self.pasid
    }

    /// What is mapped in it, or may be, in ascending order. The lock is not held between two.
    pub fn mappings(&self) -> impl Iterator<Item = IovaRange> + '_ {
        let mut from = Some(Iova::new(0));
        core::iter::from_fn(move || {
            let engine = &self.shared().state.lock().engine;
            let range = engine.next_context_mapping(self.claim.key, from?)?;
            from = range.last().checked_add(1);
            Some(range)
        })
    }

    /// Maps `len` bytes at `iova` (MAP_CONTEXT, which is this project's own). Waits for the device. Allocates.
    ///
    /// # Errors
    /// [`ContextMapError`].
    ///
    /// # Safety
    /// The domain's endpoints may do with the memory what `prot` allows, from now until the range was unmapped with
    /// success, or the context removed; also where this fails with [`ContextMapError::Unknown`].
    pub unsafe fn map(
        &mut self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
    ) -> Result<(), ContextMapError> {
        let shared = Arc::clone(self.shared());
        // SAFETY: the caller's promise is the same.
        shared.block_on(unsafe { self.map_async(iova, phys, len, prot) })
    }

    /// [`map`](Self::map) as a future. Dropped before its end it leaves the mapping, if it was sent, in the context.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there, and where the future is dropped.
    pub async unsafe fn map_async(
        &mut self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
    ) -> Result<(), ContextMapError> {
        let range = check(self.contexts().granule(), iova, phys, len)?;
        let (shared, key) = (self.shared(), self.claim.key);
        let lacking = { shared.state.lock().engine.context_lacks(key) };
        let spare = Vec::with_capacity(lacking);
        // Two statements, so that what is not needed is freed without the lock.
        let unused = { shared.state.lock().engine.grow_context(key, spare) };
        drop(unused);
        let begun = shared.with_slot(Need::Slot, |state| {
            let begun = state.engine.begin_context_map(key, (range, phys, prot))?;
            Ok(shared.submit_context(state, Some(key.domain), begun))
        });
        let batch = begun.await.map_err(ContextMapError::Refused)??;
        shared.finish(batch).await.map_err(|error| match error.outcome_unknown() {
            true => ContextMapError::Unknown(error),
            false => ContextMapError::Refused(error),
        })
    }

    /// Unmaps all mappings in the range, which may have holes (UNMAP_CONTEXT, which is this project's own). Waits for the
    /// device; sends nothing where nothing is mapped.
    ///
    /// # Errors
    /// [`ContextUnmapError`]: they count as mapped.
    pub fn unmap(&mut self, range: IovaRange) -> Result<(), ContextUnmapError> {
        let shared = Arc::clone(self.shared());
        shared.block_on(self.unmap_async(range))
    }

    /// [`unmap`](Self::unmap) as a future. Dropped before its end it leaves the mappings in the context.
    ///
    /// # Errors
    /// As there.
    pub async fn unmap_async(&mut self, range: IovaRange) -> Result<(), ContextUnmapError> {
        let (shared, key) = (self.shared(), self.claim.key);
        let begin = |state: &mut State| {
            let begun = state.engine.begin_context_unmap(key, range)?;
            Ok(begun.map(|begun| shared.submit_context(state, Some(key.domain), begun)))
        };
        // What the device does not have takes no slot.
        let absent = {
            let mut state = shared.state.lock();
            state.engine.is_context_absent(key).then(|| begin(&mut state))
        };
        let begun = match absent {
            Some(done) => done,
            None => shared.with_slot(Need::Slot, begin).await.map_err(ContextUnmapError::Request)?,
        };
        match begun? {
            Some(batch) => shared.finish(batch).await.map_err(ContextUnmapError::Request),
            None => Ok(()),
        }
    }

    /// Removes the context, and all that is mapped in it. Waits for the device.
    ///
    /// # Errors
    /// The context, and why: its mappings count as mapped.
    pub fn remove(self) -> Result<(), (Self, ContextError)> {
        let shared = Arc::clone(self.shared());
        shared.block_on(self.remove_async())
    }

    /// [`remove`](Self::remove) as a future. Dropped before its end it leaves the context with the device, as dropping the
    /// context does.
    ///
    /// # Errors
    /// As there.
    pub async fn remove_async(self) -> Result<(), (Self, ContextError)> {
        match self.contexts().remove(self.claim.key).await {
            Ok(()) => Ok(()),
            Err(error) => Err((self, error)),
        }
    }

    fn contexts(&self) -> &Contexts<P> {
        &self.claim.contexts
    }

    fn shared(&self) -> &Arc<Shared<P>> {
        self.contexts().shared()
    }
}

/// Refuses addresses that cannot be, whatever is mapped.
fn check(granule: u64, iova: Iova, phys: PhysAddr, len: u64) -> Result<IovaRange, ContextMapError> {
    for value in [iova.get(), phys.get(), len] {
        if !value.is_multiple_of(granule) {
            return Err(ContextMapError::Misaligned { value, granule });
        }
    }
    // One byte cannot be said, with a granule of one.
    if len < 2 {
        return Err(ContextMapError::Empty);
    }
    let wraps = ContextMapError::Wraps { phys, len };
    let range = IovaRange::from_len(iova, len).ok_or(wraps)?;
    phys.checked_add(len - 1).map(|_| range).ok_or(wraps)
}

impl<P: Platform> fmt::Debug for MappedContext<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappedContext({:?}, {})", self.claim.contexts, self.pasid)
    }
}
