//! The domain that shadows a space.

use super::compose::Piece;
use super::error::NestError;
use crate::addr::IovaRange;
use crate::domain::Domain;
use crate::error::MapError;
use crate::id::EndpointId;
use crate::platform::Platform;
use crate::viommu::Viommu;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// A domain, and what the device has mapped there, or may have.
pub(super) struct Hardware<P: Platform> {
    pub domain: Domain<P>,
    pub endpoints: Vec<EndpointId>,
    /// By first address: the range.
    shadows: BTreeMap<u64, IovaRange>,
}

impl<P: Platform> Hardware<P> {
    pub(super) fn new(domain: Domain<P>) -> Self {
        Self { domain, endpoints: Vec::new(), shadows: BTreeMap::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.shadows.len()
    }

    /// Maps pieces. On an error those before the one that failed stay, and it as well if the device may have it.
    pub(super) fn make(&mut self, pieces: &[Piece]) -> Result<(), NestError> {
        self.domain.reserve(self.shadows.len() + pieces.len());
        for piece in pieces {
            let Piece { range, phys, prot } = *piece;
            let len = range.len_bytes().ok_or(NestError::Stuck { range })?;
            // SAFETY: who mapped the memory in the root promised that it may be accessed from every space below, as
            // far as is allowed there, and `prot` is no more than that. It stays so until this shadow is gone, since the
            // root's mapping goes only then.
            let mapped = unsafe { self.domain.map_at(range.start(), phys, len, prot) };
            if matches!(mapped, Ok(()) | Err(MapError::Quarantined { .. })) {
                self.shadows.insert(range.start().get(), range);
            }
            mapped.map_err(|error| NestError::Shadow { range, error })?;
        }
        Ok(())
    }

    /// Unmaps all shadows in a range, of which none lies across its edges.
    pub(super) fn drop_in(&mut self, viommu: &Viommu<P>, range: IovaRange) -> Result<(), NestError> {
        let inside = self.shadows.range(range.start().get()..=range.last().get());
        let inside: Vec<IovaRange> = inside.map(|(_, shadow)| *shadow).collect();
        for shadow in inside {
            let len = shadow.len_bytes().ok_or(NestError::Stuck { range: shadow })?;
            // SAFETY: `make` mapped it, and nobody else maps in this domain.
            let unmapped = unsafe { self.domain.unmap(shadow.start(), len) };
            // One that failed before is in the driver's quarantine, which it tries to empty.
            if unmapped.is_err() && self.is_recorded(shadow) {
                viommu.reclaim();
                if self.is_recorded(shadow) {
                    return Err(NestError::Stuck { range: shadow });
                }
            }
            self.shadows.remove(&shadow.start().get());
        }
        Ok(())
    }

    /// Whether the driver has a record of a shadow, so that the device may have it.
    fn is_recorded(&self, shadow: IovaRange) -> bool {
        self.domain.translate(shadow.start()).is_some()
    }
}
