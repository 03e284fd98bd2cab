//! Contexts that are a page table of the guest's.

use super::error::{ContextError, OwnedMapError, OwnedUnmapError};
use super::handle::Contexts;
use super::invalidate;
use super::pasid::Pasid;
use super::table::{NotPresent, PageTable, TableMemory};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::error::RequestError;
use crate::platform::Platform;
use crate::prot::Prot;
use core::fmt;

/// A context of a domain that is a page table of the guest's, which the device walks.
///
/// There is no MAP in it, as in a [`MappedContext`](super::MappedContext) there is nothing to invalidate: neither compiles.
/// Dropping it without [`remove`](Self::remove) leaves it, and its table's memory, with the device.
pub struct OwnedContext<P: Platform, M: TableMemory> {
    contexts: Contexts<P>,
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
    pub(super) fn new(contexts: Contexts<P>, pasid: Pasid, table: PageTable<M>) -> Self {
        Self { contexts, pasid, table }
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
    /// which includes the invalidation, or the context removed.
    pub unsafe fn map(
        &mut self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
    ) -> Result<(), OwnedMapError> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.table.map(iova, phys, len, prot) }.map_err(OwnedMapError::Table)?;
        if self.table.not_present() == NotPresent::MayBeCached {
            self.invalidate().map_err(OwnedMapError::Invalidate)?;
        }
        Ok(())
    }

    /// Unmaps all that is mapped in the range, and has the device forget it. Returns how many bytes it was. When this
    /// returns `Ok`, no endpoint reaches them any more.
    ///
    /// # Errors
    /// [`OwnedUnmapError`].
    pub fn unmap(&mut self, range: IovaRange) -> Result<u64, OwnedUnmapError> {
        let bytes = self.unmap_later(range).map_err(OwnedUnmapError::Table)?;
        self.invalidate().map_err(OwnedUnmapError::Invalidate)?;
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
        let invalidation = self.table.begin_invalidation();
        let requests = invalidate::requests(self.pasid, invalidation.ranges(), self.table.granule());
        match self.contexts.send(&requests) {
            Ok(()) => {
                // SAFETY: this table's, and the device confirmed each of its ranges just now.
                unsafe { self.table.confirm(invalidation) };
                Ok(())
            }
            Err(error) => {
                self.table.abandon(invalidation);
                Err(error)
            }
        }
    }

    /// Removes the context, and gives its table's memory back. Waits for the device. What was mapped is then out of reach.
    ///
    /// # Errors
    /// The context, and why: what is mapped in it counts as mapped.
    #[expect(clippy::result_large_err, reason = "what the caller lent comes back")]
    pub fn remove(self) -> Result<(), (Self, ContextError)> {
        match self.contexts.detach(self.pasid) {
            Ok(()) => {
                // SAFETY: the device confirmed that the context is gone, and with it all that it cached of the table.
                unsafe { self.table.free() };
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl<P: Platform, M: TableMemory> fmt::Debug for OwnedContext<P, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnedContext({:?}, {}, {:?})", self.contexts, self.pasid, self.table)
    }
}
