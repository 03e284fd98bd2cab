//! Contexts that are a page table of the guest's.

use super::claim::Claim;
use super::error::{ContextError, OwnedMapError, OwnedUnmapError};
use super::invalidate;
use super::pasid::Pasid;
use super::table::{NotPresent, PageTable, TableMemory};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::error::RequestError;
use crate::exchange::Shared;
use crate::platform::Platform;
use crate::prot::Prot;
use alloc::sync::Arc;
use core::fmt;

/// A context of a domain that is a page table of the guest's, which the device walks.
///
/// There is no MAP in it, as in a [`MappedContext`](super::MappedContext) there is nothing to invalidate: neither compiles.
/// Dropping it without [`remove`](Self::remove) leaves it, and its table's memory, with the device.
pub struct OwnedContext<P: Platform, M: TableMemory> {
    claim: Claim<P>,
    pasid: Pasid,
    table: PageTable<M>,
}

/// A context was not added.
pub struct NotAdded<M: TableMemory> {
    /// Why.
    pub error: ContextError,
    /// The table, unless the device may walk it.
    pub table: Option<PageTable<M>>,
}

impl<M: TableMemory> fmt::Debug for NotAdded<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NotAdded").field("error", &self.error).field("table", &self.table).finish()
    }
}

impl<P: Platform, M: TableMemory> OwnedContext<P, M> {
    pub(super) fn new(claim: Claim<P>, pasid: Pasid, table: PageTable<M>) -> Self {
        Self { claim, pasid, table }
    }

    /// Its number.
    pub fn pasid(&self) -> Pasid {
        self.pasid
    }

    /// The table, to look at.
    pub fn table(&self) -> &PageTable<M> {
        &self.table
    }

    /// Maps `len` bytes: writes the table, and invalidates only where the device caches that nothing is mapped. Allocates.
    ///
    /// # Errors
    /// [`OwnedMapError`].
    ///
    /// # Safety
    /// The domain's endpoints may do with the memory what `prot` allows, from now until it was unmapped with success,
    /// which includes the invalidation, or the context removed. So may those of a domain with another context of this
    /// ASID, which an Arm IOMMU does not tell from this one.
    pub unsafe fn map(
        &mut self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
    ) -> Result<(), OwnedMapError> {
        let shared = Arc::clone(self.shared());
        // SAFETY: the caller's promise is the same.
        shared.block_on(unsafe { self.map_async(iova, phys, len, prot) })
    }

    /// [`map`](Self::map) as a future. The table is written when it is first polled; dropped before its end it leaves the
    /// mapping there.
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
    ) -> Result<(), OwnedMapError> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.table.map(iova, phys, len, prot) }.map_err(OwnedMapError::Table)?;
        if self.table.not_present() == NotPresent::MayBeCached {
            self.invalidate_async().await.map_err(OwnedMapError::Invalidate)?;
        }
        Ok(())
    }

    /// Unmaps all that is mapped in the range, and has the device forget it. Returns how many bytes it was. When this
    /// returns `Ok`, no endpoint reaches them any more.
    ///
    /// # Errors
    /// [`OwnedUnmapError`].
    pub fn unmap(&mut self, range: IovaRange) -> Result<u64, OwnedUnmapError> {
        let shared = Arc::clone(self.shared());
        shared.block_on(self.unmap_async(range))
    }

    /// [`unmap`](Self::unmap) as a future. The table is written when it is first polled; dropped before its end it leaves
    /// what was unmapped stale, until [`invalidate`](Self::invalidate) succeeds.
    ///
    /// # Errors
    /// As there.
    pub async fn unmap_async(&mut self, range: IovaRange) -> Result<u64, OwnedUnmapError> {
        let bytes = self.unmap_later(range).map_err(OwnedUnmapError::Table)?;
        self.invalidate_async().await.map_err(OwnedUnmapError::Invalidate)?;
        Ok(bytes)
    }

    /// Unmaps as [`unmap`](Self::unmap) does, but leaves what the device has cached: endpoints may reach the memory until
    /// [`invalidate`](Self::invalidate) succeeds, for all that was unmapped before at once.
    ///
    /// # Errors
    /// [`TableUnmapError`](super::table::TableUnmapError). Nothing was changed.
    pub fn unmap_later(&mut self, range: IovaRange) -> Result<u64, super::table::TableUnmapError> {
        self.table.unmap(range)
    }

    /// Has the device forget all that is stale: INVALIDATE for exactly that, with one doorbell, after the table was
    /// written. Then pages of tables that are gone are freed. Sends nothing where nothing is stale. Waits for the device.
    ///
    /// # Errors
    /// [`RequestError`]: all of it is stale still.
    pub fn invalidate(&mut self) -> Result<(), RequestError> {
        let shared = Arc::clone(self.shared());
        shared.block_on(self.invalidate_async())
    }

    /// [`invalidate`](Self::invalidate) as a future. Dropped before its end it leaves all of it stale.
    ///
    /// # Errors
    /// As there.
    pub async fn invalidate_async(&mut self) -> Result<(), RequestError> {
        invalidate::stale(&self.claim, self.pasid, &mut self.table).await
    }

    /// Removes the context, and gives its table's memory back. Waits for the device. What was mapped is then out of reach.
    ///
    /// # Errors
    /// The context, and why: what is mapped in it counts as mapped.
    #[expect(clippy::result_large_err, reason = "what the caller lent comes back")]
    pub fn remove(self) -> Result<(), (Self, ContextError)> {
        let shared = Arc::clone(self.shared());
        shared.block_on(self.remove_async())
    }

    /// [`remove`](Self::remove) as a future. Dropped before its end it leaves the context and its table's memory with the
    /// device, as dropping the context does.
    ///
    /// # Errors
    /// As there.
    pub async fn remove_async(self) -> Result<(), (Self, ContextError)> {
        match self.claim.contexts.remove(self.claim.key).await {
            Ok(()) => {
                // SAFETY: the device confirmed that the context is gone, and with it all that it cached of the table.
                unsafe { self.table.free() };
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }

    fn shared(&self) -> &Arc<Shared<P>> {
        self.claim.contexts.shared()
    }
}

impl<P: Platform, M: TableMemory> fmt::Debug for OwnedContext<P, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnedContext({:?}, {}, {:?})", self.claim.contexts, self.pasid, self.table)
    }
}
