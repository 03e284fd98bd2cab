//! What is mapped and unmapped in contexts, and what may be reached after it.

use virtio_iommu::contexts::{ContextMapError, ContextUnmapError, OwnedMapError, OwnedUnmapError};
use virtio_iommu::{Iova, IovaRange, MapError, PhysAddr, Prot, UnmapError};

use super::{Context, Domain, Handle, Session, pick, prot};
use crate::contexts::reach::{BLOCK, range};
use crate::trace;

impl Session {
    pub(super) fn map(&mut self, context: usize, at: u8, pages: u8, write: bool) {
        let phys = self.fresh() + range(at, pages).0 % BLOCK;
        let (start, len) = range(at, pages);
        let (iova, prot) = (Iova::new(start), prot(write));
        let Some(range) = IovaRange::from_len(iova, len) else { return };
        let Context { handle, reach, .. } = &mut self.contexts[context];
        match handle {
            // SAFETY: no access is made, so that the memory need not exist.
            Handle::Mapped(mapped) => match unsafe { mapped.map(iova, PhysAddr::new(phys), len, prot) } {
                Ok(()) => reach.map(range, phys, prot),
                Err(ContextMapError::Unknown(error)) => {
                    trace("    ", &error);
                    reach.may_map(range, phys);
                }
                Err(error) => trace("    ", &error),
            },
            // SAFETY: as above.
            Handle::Owned(owned) => match unsafe { owned.map(iova, PhysAddr::new(phys), len, prot) } {
                Ok(()) => reach.map(range, phys, prot),
                Err(OwnedMapError::Invalidate(error)) => {
                    trace("    ", &error);
                    reach.map(range, phys, prot);
                    reach.unsettle();
                }
                Err(error) => trace("    ", &error),
            },
            Handle::None => {}
        }
    }

    pub(super) fn unmap(&mut self, context: u8, at: u8, pages: u8) {
        let Some(context) = pick(self.contexts.len(), context) else { return };
        let (start, len) = range(at, pages);
        let Some(range) = IovaRange::from_len(Iova::new(start), len) else { return };
        let Context { handle, reach, .. } = &mut self.contexts[context];
        match handle {
            Handle::Mapped(mapped) => {
                // Most often one mapping, which goes only whole.
                let one = pick(mapped.mappings().count(), at).and_then(|one| mapped.mappings().nth(one));
                let range = one.filter(|_| pages < 0xc0).unwrap_or(range);
                match mapped.unmap(range) {
                    Ok(()) => reach.unmap(range),
                    Err(ContextUnmapError::Request(error)) => {
                        trace("    ", &error);
                        reach.doubt(range);
                    }
                    Err(error) => trace("    ", &error),
                }
            }
            Handle::Owned(owned) => match owned.unmap(range) {
                Ok(bytes) => {
                    trace("    ", &bytes);
                    reach.unmap(range);
                    reach.settle();
                }
                Err(OwnedUnmapError::Invalidate(error)) => {
                    trace("    ", &error);
                    reach.doubt(range);
                    reach.unsettle();
                }
                Err(error) => trace("    ", &error),
            },
            Handle::None => {}
        }
    }

    pub(super) fn unmap_later(&mut self, context: u8, at: u8, pages: u8) {
        let Some(context) = pick(self.contexts.len(), context) else { return };
        let (start, len) = range(at, pages);
        let Some(range) = IovaRange::from_len(Iova::new(start), len) else { return };
        let Context { handle: Handle::Owned(owned), reach, .. } = &mut self.contexts[context] else { return };
        if owned.unmap_later(range).is_ok() {
            reach.doubt(range);
            // What remains of a block that was split may fault.
            reach.unsettle();
        }
    }

    pub(super) fn invalidate(&mut self, context: u8) {
        let Some(context) = pick(self.contexts.len(), context) else { return };
        let Context { handle: Handle::Owned(owned), reach, .. } = &mut self.contexts[context] else { return };
        let done = owned.invalidate();
        trace("    ", &done);
        match done {
            Ok(()) => reach.settle(),
            Err(_) => reach.unsettle(),
        }
    }

    pub(super) fn map_default(&mut self, domain: u8, at: u8, pages: u8) {
        let Some(at_domain) = pick(self.domains.len(), domain) else { return };
        let phys = self.fresh() + range(at, pages).0 % BLOCK;
        let (start, len) = range(at, pages);
        let (iova, prot) = (Iova::new(start), Prot::READ | Prot::WRITE);
        let Some(range) = IovaRange::from_len(iova, len) else { return };
        let Domain { contexts, default, mapped } = &mut self.domains[at_domain];
        // SAFETY: no access is made, so that the memory need not exist.
        let done = unsafe { contexts.domain().map_at(iova, PhysAddr::new(phys), len, prot) };
        trace("    ", &done);
        match done {
            Ok(()) => {
                default.map(range, phys, prot);
                mapped.push((iova, len));
            }
            Err(MapError::Quarantined { .. }) => {
                default.may_map(range, phys);
                self.doubt(at_domain);
            }
            // It may have tried another number, and lost endpoints on the way.
            Err(MapError::Request { .. }) => self.doubt(at_domain),
            Err(_) => {}
        }
    }

    pub(super) fn unmap_default(&mut self, domain: u8, which: u8) {
        let Some(at) = pick(self.domains.len(), domain) else { return };
        let Domain { contexts, default, mapped } = &mut self.domains[at];
        let Some(which) = pick(mapped.len(), which) else { return };
        let (iova, len) = mapped.swap_remove(which);
        let Some(range) = IovaRange::from_len(iova, len) else { return };
        // SAFETY: mapped by the session.
        let done = unsafe { contexts.domain().unmap(iova, len) };
        trace("    ", &done);
        match done {
            Ok(()) => default.unmap(range),
            Err(UnmapError::Request { .. }) => default.doubt(range),
            // It is in quarantine since an attachment failed.
            Err(_) => default.doubt(range),
        }
    }
}
