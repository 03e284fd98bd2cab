//! Contexts that are driven by MAP and UNMAP with their PASID.

use super::error::{ContextError, ContextMapError, ContextUnmapError};
use super::handle::Contexts;
use super::pasid::Pasid;
use super::wire::ContextRequest;
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::platform::Platform;
use crate::prot::Prot;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;

/// A context of a domain in which memory is mapped by requests.
///
/// Dropping it without [`remove`](Self::remove) leaves it, and all that is mapped, with the device.
pub struct MappedContext<P: Platform> {
    contexts: Contexts<P>,
    pasid: Pasid,
    /// By first address, as the device has them or may have them: the last address.
    mappings: BTreeMap<u64, u64>,
}

impl<P: Platform> MappedContext<P> {
    pub(super) fn new(contexts: Contexts<P>, pasid: Pasid) -> Self {
        Self { contexts, pasid, mappings: BTreeMap::new() }
    }

    /// Its number.
    pub fn pasid(&self) -> Pasid {
        self.pasid
    }

    /// What the device has mapped in it, or may have, in ascending order.
    pub fn mappings(&self) -> impl Iterator<Item = IovaRange> + '_ {
        self.mappings.iter().filter_map(|(start, last)| IovaRange::new(Iova::new(*start), Iova::new(*last)))
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
        let range = self.check(iova, phys, len, prot)?;
        let request = ContextRequest::Map { pasid: self.pasid, range, phys, prot };
        match self.contexts.send(&[request]) {
            Ok(()) => {
                self.mappings.insert(range.start().get(), range.last().get());
                Ok(())
            }
            Err(error) if error.outcome_unknown() => {
                self.mappings.insert(range.start().get(), range.last().get());
                Err(ContextMapError::Unknown(error))
            }
            Err(error) => Err(ContextMapError::Refused(error)),
        }
    }

    fn check(&self, iova: Iova, phys: PhysAddr, len: u64, prot: Prot) -> Result<IovaRange, ContextMapError> {
        let inner = self.contexts.inner();
        let granule = inner.granule;
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
        if phys.checked_add(len - 1).is_none() {
            return Err(wraps);
        }
        let key = self.contexts.key();
        {
            let state = inner.shared.state.lock();
            let geometry = state.engine.geometry;
            let mmio = prot.contains(Prot::MMIO) && !geometry.mmio_flag;
            if mmio || !Prot::all().contains(prot) || !prot.intersects(Prot::READ | Prot::WRITE) {
                return Err(ContextMapError::Prot { prot });
            }
            let free = state.engine.unreserved_in(key, range);
            if !geometry.usable.contains(range) || free != Some(range) {
                return Err(ContextMapError::Unusable { range });
            }
        }
        match self.mappings().find(|mapping| mapping.overlaps(range)) {
            Some(range) => Err(ContextMapError::InUse { range }),
            None => Ok(range),
        }
    }

    /// Unmaps all mappings in the range, which may have holes (UNMAP_CONTEXT, which is this project's own). Waits for the
    /// device; sends nothing where nothing is mapped.
    ///
    /// # Errors
    /// [`ContextUnmapError`]: they count as mapped.
    pub fn unmap(&mut self, range: IovaRange) -> Result<(), ContextUnmapError> {
        let met: Vec<IovaRange> = self.mappings().filter(|mapping| mapping.overlaps(range)).collect();
        if let Some(mapping) = met.iter().find(|mapping| !range.contains(**mapping)) {
            return Err(ContextUnmapError::Splits { mapping: *mapping });
        }
        let (Some(first), Some(last)) = (met.first(), met.last()) else { return Ok(()) };
        let Some(covered) = IovaRange::new(first.start(), last.last()) else { return Ok(()) };
        self.contexts
            .send(&[ContextRequest::Unmap { pasid: self.pasid, range: covered }])
            .map_err(ContextUnmapError::Request)?;
        for mapping in met {
            self.mappings.remove(&mapping.start().get());
        }
        Ok(())
    }

    /// Removes the context, and all that is mapped in it. Waits for the device.
    ///
    /// # Errors
    /// The context, and why: its mappings count as mapped.
    pub fn remove(self) -> Result<(), (Self, ContextError)> {
        match self.contexts.detach(self.pasid) {
            Ok(()) => Ok(()),
            Err(error) => Err((self, error)),
        }
    }
}

impl<P: Platform> fmt::Debug for MappedContext<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappedContext({:?}, {})", self.contexts, self.pasid)
    }
}
