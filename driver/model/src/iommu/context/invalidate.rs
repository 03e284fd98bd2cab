//! INVALIDATE: what is cached of tables, and of context descriptors.

use super::{Context, Descriptors, Owned};
use crate::domain::Domain;
use crate::iommu::Iommu;
use crate::number::Status;
use crate::request::Request;

const GRANULARITY_DOMAIN: u16 = 1;
const GRANULARITY_PASID: u16 = 2;
const GRANULARITY_ADDRESS: u16 = 4;

const CACHES_IOTLB: u16 = 1;
/// The model's endpoints cache nothing.
const CACHES_DEV_IOTLB: u16 = 2;
const CACHES_PASID: u16 = 4;

const FLAG_PASID: u16 = 1;
const FLAG_ARCHID: u16 = 2;
const FLAG_LEAF: u16 = 4;

/// Sizes of pages that ranges are given in, as powers of two.
const GRANULES: core::ops::RangeInclusive<u8> = 12..=52;

/// Which contexts.
#[derive(Clone, Copy)]
enum Which {
    Pasid(u32),
    Asid(u16),
}

/// What of a table's cache.
#[derive(Clone, Copy)]
struct Part {
    first: u64,
    last: u64,
    leaf_only: bool,
}

impl Iommu {
    /// Checks everything first, and forgets nothing if something is wrong.
    pub(crate) fn invalidate(&mut self, request: &Request) -> Status {
        self.try_invalidate(request).err().unwrap_or(Status::Ok)
    }

    fn try_invalidate(&mut self, request: &Request) -> Result<(), Status> {
        let Request::Invalidate {
            granularity,
            caches,
            flags,
            domain,
            pasid,
            archid,
            virt_start,
            pages,
            granule,
            reserved_zero,
        } = *request
        else {
            return Err(Status::Unsupp);
        };
        let all_caches = CACHES_IOTLB | CACHES_DEV_IOTLB | CACHES_PASID;
        let all_flags = FLAG_PASID | FLAG_ARCHID | FLAG_LEAF;
        if !reserved_zero || caches == 0 || caches & !all_caches != 0 || flags & !all_flags != 0 {
            return Err(Status::Inval);
        }
        if !self.domain_in_range(domain) {
            return Err(Status::Range);
        }
        let target = self.domains.get_mut(&domain).ok_or(Status::NoEnt)?;
        let which = match flags & (FLAG_PASID | FLAG_ARCHID) {
            FLAG_PASID => Some(Which::Pasid(pasid)),
            FLAG_ARCHID => Some(Which::Asid(u16::try_from(archid).map_err(|_| Status::Range)?)),
            0 => None,
            _ => return Err(Status::Inval),
        };
        let leaf_only = flags & FLAG_LEAF != 0;
        let whole = Part { first: 0, last: u64::MAX, leaf_only };
        match (granularity, which) {
            (GRANULARITY_DOMAIN, None) => target.forget_all(caches, leaf_only),
            (GRANULARITY_PASID, Some(which)) => return target.forget(which, caches, whole),
            (GRANULARITY_ADDRESS, Some(which)) => {
                // Descriptors have no addresses.
                if caches & CACHES_PASID != 0 || !GRANULES.contains(&granule) || pages == 0 {
                    return Err(Status::Inval);
                }
                if virt_start & ((1 << granule) - 1) != 0 {
                    return Err(Status::Inval);
                }
                let len = pages.checked_mul(1 << granule).ok_or(Status::Range)?;
                let last = virt_start.checked_add(len - 1).ok_or(Status::Range)?;
                return target.forget(which, caches, Part { first: virt_start, last, leaf_only });
            }
            _ => return Err(Status::Inval),
        }
        Ok(())
    }
}

impl Domain {
    fn forget_all(&mut self, caches: u16, leaf_only: bool) {
        let part = Part { first: 0, last: u64::MAX, leaf_only };
        for context in self.contexts.values_mut() {
            if let Context::Owned(owned) = context {
                owned.forget(caches, part);
            }
        }
        if let Some(descriptors) = &mut self.descriptors {
            if caches & CACHES_IOTLB != 0 {
                for cache in descriptors.caches.values_mut() {
                    cache.invalidate(part.first, part.last, leaf_only);
                }
            }
            if caches & CACHES_PASID != 0 {
                descriptors.found.clear();
            }
        }
    }

    fn forget(&mut self, which: Which, caches: u16, part: Part) -> Result<(), Status> {
        if let Some(descriptors) = &mut self.descriptors {
            return descriptors.forget(which, caches, part);
        }
        match which {
            Which::Pasid(pasid) => match self.contexts.get_mut(&pasid).ok_or(Status::NoEnt)? {
                Context::Owned(owned) => owned.forget(caches, part),
                // Of what is mapped by requests nothing is cached.
                Context::Mapped(_) => return Err(Status::Inval),
            },
            Which::Asid(asid) => {
                for context in self.contexts.values_mut() {
                    if let Context::Owned(owned) = context
                        && owned.asid == Some(asid)
                    {
                        owned.forget(caches, part);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Descriptors {
    fn forget(&mut self, which: Which, caches: u16, part: Part) -> Result<(), Status> {
        let beyond = |pasid: u32| u64::from(pasid) >> self.table.s1cdmax.min(32) != 0;
        if let Which::Pasid(pasid) = which
            && beyond(pasid)
        {
            return Err(Status::Range);
        }
        let found = &self.found;
        let concerned = |pasid: u32| match which {
            Which::Pasid(named) => pasid == named,
            Which::Asid(asid) => found.get(&pasid).is_some_and(|known| known.is_some_and(|k| k.asid == asid)),
        };
        if caches & CACHES_IOTLB != 0 {
            for (_, cache) in self.caches.iter_mut().filter(|(pasid, _)| concerned(**pasid)) {
                cache.invalidate(part.first, part.last, part.leaf_only);
            }
        }
        if caches & CACHES_PASID != 0 {
            self.found.retain(|pasid, known| match which {
                Which::Pasid(named) => *pasid != named,
                Which::Asid(asid) => !known.is_some_and(|known| known.asid == asid),
            });
        }
        Ok(())
    }
}

impl Owned {
    fn forget(&mut self, caches: u16, part: Part) {
        if caches & CACHES_IOTLB != 0 {
            self.cache.invalidate(part.first, part.last, part.leaf_only);
        }
    }
}
