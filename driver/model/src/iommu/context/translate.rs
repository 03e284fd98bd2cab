//! Where an access with or without a PASID goes.

use super::{Anonymous, Context};
use crate::fault::{AccessKind, FaultReason};
use crate::iommu::Iommu;
use crate::iommu::translate::{Denied, NOT_MAPPED, Run, Target};
use crate::memory::GuestMemory;
use crate::walk::{Cache, Table, WalkFault};

/// Descriptors that are cached.
const MAX_FOUND: usize = 4096;

/// There is no context.
const NO_CONTEXT: Denied = Denied { reason: FaultReason::Domain, permission: false };

impl Iommu {
    /// As `resolve`, with a PASID or without. Reads tables, and caches what it found.
    pub(crate) fn resolve_context(
        &mut self,
        mem: &dyn GuestMemory,
        (endpoint, pasid): (u32, Option<u32>),
        iova: u64,
        kind: AccessKind,
    ) -> Result<Run, Denied> {
        let state = self.endpoints.get(&endpoint);
        let id = state.and_then(|state| state.domain);
        let domain = id.and_then(|id| self.domains.get(&id));
        let anonymous = domain.map_or(Anonymous::Mapped, |domain| domain.anonymous);
        if pasid.is_none() && anonymous == Anonymous::Mapped {
            return self.resolve(endpoint, iova, kind);
        }
        if self.bypasses(endpoint) {
            return Ok(Run { target: Target::Memory(iova), last: u64::MAX });
        }
        let Some(id) = id else {
            return Err(Denied { reason: self.unattached_reason(state), permission: false });
        };
        let regions = state.map_or(&[][..], |state| &state.properties.reserved);
        if let Some(region) = regions.iter().find(|region| region.contains(iova)) {
            // Interrupts have no PASID.
            if pasid.is_none() && region.is_msi() && kind == AccessKind::Write {
                return Ok(Run { target: Target::Doorbell, last: region.last });
            }
            return Err(NOT_MAPPED);
        }
        let next_region = regions.iter().map(|region| region.first).filter(|first| *first > iova).min();
        let limit = next_region.map_or(u64::MAX, |first| first - 1);
        let pasid = match (pasid, anonymous) {
            (Some(pasid), _) => pasid,
            (None, Anonymous::Bypass) => return Ok(Run { target: Target::Memory(iova), last: limit }),
            (None, Anonymous::Zero) => 0,
            (None, Anonymous::Blocked | Anonymous::Mapped) => return Err(NO_CONTEXT),
        };
        let run = self.resolve_in(mem, id, pasid, iova, kind)?;
        Ok(Run { last: run.last.min(limit), ..run })
    }

    /// Through one context of a domain.
    fn resolve_in(
        &mut self,
        mem: &dyn GuestMemory,
        domain: u32,
        pasid: u32,
        iova: u64,
        kind: AccessKind,
    ) -> Result<Run, Denied> {
        let target = self.domains.get_mut(&domain).ok_or(NO_CONTEXT)?;
        if let Some(descriptors) = &mut target.descriptors {
            // Bounded: what is forgotten is found again.
            if descriptors.found.len() >= MAX_FOUND && !descriptors.found.contains_key(&pasid) {
                descriptors.found.clear();
                descriptors.caches.clear();
            }
            let find = || descriptors.table.find(mem, pasid).ok();
            let found = descriptors.found.entry(pasid).or_insert_with(find).ok_or(NO_CONTEXT)?;
            let cache = descriptors.caches.entry(pasid).or_default();
            return resolve(&Table::Arm(found.table), cache, mem, iova, kind);
        }
        if let Some(Context::Owned(owned)) = target.contexts.get_mut(&pasid) {
            return resolve(&owned.table, &mut owned.cache, mem, iova, kind);
        }
        let Some(Context::Mapped(mappings)) = self.domains.get(&domain).and_then(|d| d.contexts.get(&pasid))
        else {
            return Err(NO_CONTEXT);
        };
        let mapping = mappings.lookup(iova).ok_or(NOT_MAPPED)?;
        if !self.permits(mapping, kind) {
            return Err(Denied { reason: FaultReason::Mapping, permission: true });
        }
        let (phys, last) = self.translation(mapping, iova);
        Ok(Run { target: Target::Memory(phys), last })
    }
}

/// Through a table, and what is cached of it.
fn resolve(
    table: &Table,
    cache: &mut Cache,
    mem: &dyn GuestMemory,
    iova: u64,
    kind: AccessKind,
) -> Result<Run, Denied> {
    let page = cache.translate(table, mem, iova, kind).map_err(|fault| match fault {
        WalkFault::Address | WalkFault::NotPresent { .. } => NOT_MAPPED,
        WalkFault::Permission => Denied { reason: FaultReason::Mapping, permission: true },
        // The table itself is wrong.
        WalkFault::Reserved { .. } | WalkFault::Memory(_) => {
            Denied { reason: FaultReason::Unknown, permission: false }
        }
    })?;
    Ok(Run { target: Target::Memory(page.phys_of(iova)), last: page.last })
}
