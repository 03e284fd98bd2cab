//! Contexts that are found by a table of context descriptors in the guest's memory, as SMMUv3 has it.

use super::error::ContextError;
use super::handle::Contexts;
use super::invalidate;
use super::owned::NotAdded;
use super::pasid::Pasid;
use super::table::{ContextTable, PageTable, TableMemory};
use super::wire::{ContextRequest, DescriptorsDescription, Invalidate};
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::error::RequestError;
use crate::platform::Platform;
use crate::prot::Prot;
use core::fmt;

/// A domain's table of context descriptors. Contexts are added by writing it, and having the device forget what it cached
/// of that PASID; there is no request for each.
///
/// After a reset, and after the domain lost its last endpoint, the device does not have the table any more. Removing contexts
/// then fails, and their memory stays.
///
/// Dropping it leaves the tables' memory with the device.
pub struct DescriptorContexts<P: Platform, M: TableMemory> {
    contexts: Contexts<P>,
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
        let Some(endpoint) = self.member() else {
            return Err(NotAttached { error: ContextError::NoEndpoint, table: Some(table) });
        };
        // The device refuses a domain with a default context, whatever is said here.
        let s1dss = self.anonymous().map_or(0, |anonymous| anonymous.s1dss());
        let description = DescriptorsDescription::of(&table, s1dss);
        match self.send(&[ContextRequest::AttachDescriptors { endpoint, table: description }]) {
            Ok(()) => Ok(DescriptorContexts { contexts: self.clone(), table }),
            Err(error) => {
                let table = (!error.outcome_unknown()).then_some(table);
                Err(NotAttached { error: ContextError::DescriptorsRefused(error), table })
            }
        }
    }
}

impl<P: Platform, M: TableMemory> DescriptorContexts<P, M> {
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
        let Some(registers) = table.arm_registers() else {
            return Err(NotAdded { error: ContextError::NotArm { pasid }, table: Some(table) });
        };
        if let Err(error) = self.table.set(pasid.get(), registers, asid) {
            return Err(NotAdded { error: ContextError::Descriptors(error), table: Some(table) });
        }
        match self.forget(pasid) {
            Ok(()) => Ok(DescribedContext { pasid, table }),
            // The device may have read the descriptor: the table stays with it.
            Err(error) => Err(NotAdded { error: ContextError::Request { pasid, error }, table: None }),
        }
    }

    /// Unmaps in a context's table, and has the device forget it. Returns how many bytes it was.
    ///
    /// # Errors
    /// [`OwnedUnmapError`](super::OwnedUnmapError).
    pub fn unmap<T: TableMemory>(
        &mut self,
        context: &mut DescribedContext<T>,
        range: IovaRange,
    ) -> Result<u64, super::OwnedUnmapError> {
        let bytes = context.table.unmap(range).map_err(super::OwnedUnmapError::Table)?;
        let invalidation = context.table.begin_invalidation();
        let requests = invalidate::requests(context.pasid, invalidation.ranges(), context.table.granule());
        match self.contexts.send(&requests) {
            Ok(()) => {
                // SAFETY: the table's own, and the device confirmed each of its ranges just now.
                unsafe { context.table.confirm(invalidation) };
                Ok(bytes)
            }
            Err(error) => {
                context.table.abandon(invalidation);
                Err(super::OwnedUnmapError::Invalidate(error))
            }
        }
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
        let pasid = context.pasid;
        if self.table.contains(pasid.get())
            && let Err(error) = self.table.clear(pasid.get())
        {
            return Err((context, ContextError::Descriptors(error)));
        }
        match self.forget(pasid) {
            Ok(()) => {
                // SAFETY: no descriptor leads to it, and the device confirmed that it cached none, and nothing by one.
                unsafe { context.table.free() };
                Ok(())
            }
            Err(error) => Err((context, ContextError::Request { pasid, error })),
        }
    }

    fn forget(&self, pasid: Pasid) -> Result<(), RequestError> {
        self.contexts.send(&[ContextRequest::Invalidate(Invalidate::Descriptor { pasid })])
    }
}

impl<P: Platform, M: TableMemory> fmt::Debug for DescriptorContexts<P, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DescriptorContexts({:?}, {:?})", self.contexts, self.table)
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
    /// context removed.
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
