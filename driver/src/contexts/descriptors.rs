//! Contexts that are found by a table of context descriptors in the guest's memory, as SMMUv3 has it.

use super::claim::Claim;
use super::error::{ContextError, OwnedUnmapError};
use super::handle::{Contexts, Known};
use super::invalidate;
use super::owned::NotAdded;
use super::pasid::Pasid;
use super::table::{ContextTable, PageTable, TableMemory};
use super::wire::{ContextRequest, Invalidate, TableDescription};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::exchange::State;
use crate::platform::Platform;
use crate::prot::Prot;
use crate::queue::Outcome;
use alloc::sync::Arc;
use core::fmt;

/// A domain's table of context descriptors. Contexts are added by writing it, and having the device forget what it cached
/// of that PASID; there is no request for each.
///
/// A device that lost the table, by a reset or with the domain's last endpoint, is told of it again as of single contexts.
/// What is in it is there again with that.
///
/// Dropping it leaves the tables' memory with the device; [`free`](Self::free) gives it back.
pub struct DescriptorContexts<P: Platform, M: TableMemory> {
    claim: Claim<P>,
    table: ContextTable<M>,
}

/// A table of context descriptors was not taken.
#[derive(Debug)]
pub struct NotAttached<M: TableMemory> {
    /// Why.
    pub error: ContextError,
    /// The table, unless the device may use it.
    pub table: Option<ContextTable<M>>,
}

impl<P: Platform> Contexts<P> {
    /// Gives the domain a table of context descriptors in place of single contexts (ATTACH_TABLE, format 2). The domain
    /// has no default context and no contexts. Waits for the device.
    ///
    /// # Errors
    /// [`NotAttached`], with the table unless the device may use it.
    pub fn attach_descriptors<M: TableMemory>(
        &self,
        table: ContextTable<M>,
    ) -> Result<DescriptorContexts<P, M>, NotAttached<M>> {
        self.shared().block_on(self.attach_descriptors_async(table))
    }

    /// [`attach_descriptors`](Self::attach_descriptors) as a future. Dropped before its end it leaves the table with the
    /// device.
    ///
    /// # Errors
    /// As there.
    pub async fn attach_descriptors_async<M: TableMemory>(
        &self,
        table: ContextTable<M>,
    ) -> Result<DescriptorContexts<P, M>, NotAttached<M>> {
        // The device refuses a domain with a default context, whatever is said here.
        let s1dss = self.anonymous().map_or(0, |anonymous| anonymous.s1dss());
        let description = TableDescription::of_descriptors(&table, s1dss);
        match self.add(None, description, None).await {
            Ok(claim) => Ok(DescriptorContexts { claim, table }),
            Err((error, known)) => {
                let table = (known == Known::Yes).then_some(table);
                Err(NotAttached { error, table })
            }
        }
    }
}

impl<P: Platform, M: TableMemory> DescriptorContexts<P, M> {
    /// The domain's contexts, for attaching endpoints.
    pub fn contexts(&self) -> &Contexts<P> {
        &self.claim.contexts
    }

    /// The table, to look at.
    pub fn table(&self) -> &ContextTable<M> {
        &self.table
    }

    /// Gives a PASID a page table in one of Arm's formats: writes its descriptor, and has the device forget that there
    /// was none. Waits for the device.
    ///
    /// # Errors
    /// [`NotAdded`], with the table unless the device may walk it.
    #[expect(clippy::result_large_err, reason = "what the caller lent comes back")]
    pub fn add<T: TableMemory>(
        &mut self,
        pasid: Pasid,
        table: PageTable<T>,
        asid: u16,
    ) -> Result<DescribedContext<T>, NotAdded<T>> {
        let shared = Arc::clone(self.claim.contexts.shared());
        shared.block_on(self.add_async(pasid, table, asid))
    }

    /// [`add`](Self::add) as a future. The descriptor is written when it is first polled; dropped before its end it
    /// empties that, and leaves the table's memory with the device.
    ///
    /// # Errors
    /// As there.
    pub async fn add_async<T: TableMemory>(
        &mut self,
        pasid: Pasid,
        table: PageTable<T>,
        asid: u16,
    ) -> Result<DescribedContext<T>, NotAdded<T>> {
        let Some(registers) = table.arm_registers() else {
            return Err(NotAdded { error: ContextError::NotArm { pasid }, table: Some(table) });
        };
        if let Err(error) = self.table.set(pasid.get(), registers, asid) {
            return Err(NotAdded { error: ContextError::Descriptors(error), table: Some(table) });
        }
        let mut unsure = Unsure { table: &mut self.table, pasid: Some(pasid) };
        match forget(&self.claim, pasid).await {
            Ok(()) => {
                unsure.pasid = None;
                Ok(DescribedContext { pasid, table })
            }
            // The device may have read the descriptor: the table stays with it.
            Err(error) => Err(NotAdded { error: ContextError::Request { pasid, error }, table: None }),
        }
    }

    /// Unmaps in a context's table, and has the device forget it. Returns how many bytes it was.
    ///
    /// # Errors
    /// [`OwnedUnmapError`].
    pub fn unmap<T: TableMemory>(
        &mut self,
        context: &mut DescribedContext<T>,
        range: IovaRange,
    ) -> Result<u64, OwnedUnmapError> {
        let shared = Arc::clone(self.claim.contexts.shared());
        shared.block_on(self.unmap_async(context, range))
    }

    /// [`unmap`](Self::unmap) as a future. The table is written when it is first polled; dropped before its end it leaves
    /// what was unmapped stale, until an unmapping succeeds, of nothing even.
    ///
    /// # Errors
    /// As there.
    pub async fn unmap_async<T: TableMemory>(
        &mut self,
        context: &mut DescribedContext<T>,
        range: IovaRange,
    ) -> Result<u64, OwnedUnmapError> {
        let bytes = context.table.unmap(range).map_err(OwnedUnmapError::Table)?;
        let done = invalidate::stale(&self.claim, context.pasid, &mut context.table).await;
        done.map(|()| bytes).map_err(OwnedUnmapError::Invalidate)
    }

    /// Takes a PASID's table away: empties its descriptor, has the device forget it and what it cached by it, and gives
    /// the table's memory back. Waits for the device.
    ///
    /// # Errors
    /// The context, and why: what is mapped in it counts as mapped. Try again.
    #[expect(clippy::result_large_err, reason = "what the caller lent comes back")]
    pub fn remove<T: TableMemory>(
        &mut self,
        context: DescribedContext<T>,
    ) -> Result<(), (DescribedContext<T>, ContextError)> {
        let shared = Arc::clone(self.claim.contexts.shared());
        shared.block_on(self.remove_async(context))
    }

    /// [`remove`](Self::remove) as a future. The descriptor is emptied when it is first polled; dropped before its end it
    /// leaves the table's memory with the device.
    ///
    /// # Errors
    /// As there.
    pub async fn remove_async<T: TableMemory>(
        &mut self,
        context: DescribedContext<T>,
    ) -> Result<(), (DescribedContext<T>, ContextError)> {
        let pasid = context.pasid;
        if self.table.contains(pasid.get())
            && let Err(error) = self.table.clear(pasid.get())
        {
            return Err((context, ContextError::Descriptors(error)));
        }
        match forget(&self.claim, pasid).await {
            Ok(()) => {
                // SAFETY: no descriptor leads to it, and the device confirmed that it cached none, and nothing by one, or has
                // nothing of the table of descriptors.
                unsafe { context.table.free() };
                Ok(())
            }
            Err(error) => Err((context, ContextError::Request { pasid, error })),
        }
    }

    /// Gives the memory of the table of descriptors back, once the device lost it: after the domain's last endpoint was
    /// detached, since no request takes it away. Sends nothing.
    ///
    /// # Errors
    /// Itself, as long as the device has the table, or may have it.
    pub fn free(self) -> Result<(), Self> {
        let Self { claim, table } = self;
        let absent = { claim.contexts.shared().state.lock().engine.is_context_absent(claim.key) };
        if !absent {
            return Err(Self { claim, table });
        }
        // It is not told again from here on.
        drop(claim);
        // SAFETY: the device lost the table, with all that it cached of it.
        unsafe { table.free() };
        Ok(())
    }
}

/// Has the device forget a PASID's descriptor, and what it cached by it.
async fn forget<P: Platform>(claim: &Claim<P>, pasid: Pasid) -> Outcome {
    let requests = [ContextRequest::Invalidate(Invalidate::Descriptor { pasid })];
    let is_cached = |state: &State| state.engine.is_cached(claim.key);
    claim.contexts.shared().invalidate(claim.key.domain, &requests, is_cached).await
}

/// A descriptor that was written, and that the device may not know. It is emptied, so that the PASID can be added again,
/// which has the device forget it.
struct Unsure<'a, M: TableMemory> {
    table: &'a mut ContextTable<M>,
    pasid: Option<Pasid>,
}

impl<M: TableMemory> Drop for Unsure<'_, M> {
    fn drop(&mut self) {
        if let Some(pasid) = self.pasid {
            // It is there: it was written just before.
            let _ = self.table.clear(pasid.get());
        }
    }
}

impl<P: Platform, M: TableMemory> fmt::Debug for DescriptorContexts<P, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DescriptorContexts({:?}, {:?})", self.claim.contexts, self.table)
    }
}

/// A context of a [`DescriptorContexts`]. Dropping it leaves its table's memory with the device.
#[derive(Debug)]
pub struct DescribedContext<T: TableMemory> {
    pasid: Pasid,
    table: PageTable<T>,
}

impl<T: TableMemory> DescribedContext<T> {
    /// Its number.
    pub fn pasid(&self) -> Pasid {
        self.pasid
    }

    /// Maps `len` bytes: writes the table. Devices of Arm's cache no entry that is not valid, so that there is nothing to
    /// invalidate. Allocates.
    ///
    /// # Errors
    /// [`TableMapError`](super::table::TableMapError).
    ///
    /// # Safety
    /// The domain's endpoints may do with the memory what `prot` allows, from now until it was unmapped with success, or the
    /// context removed. So may those of a domain with another context of this ASID, which an Arm IOMMU does not tell from this
    /// one.
    pub unsafe fn map(
        &mut self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
    ) -> Result<(), super::table::TableMapError> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.table.map(iova, phys, len, prot) }
    }

    /// The table, to look at.
    pub fn table(&self) -> &PageTable<T> {
        &self.table
    }
}
