//! Translation of one address, without side effects.

use super::{EndpointState, Iommu};
use crate::domain::{Domain, Mapping};
use crate::fault::{AccessKind, FaultReason};
use crate::number::flag;
use crate::quirks::FaultStyle;

/// Where an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Guest-physical memory from this address on.
    Memory(u64),
    /// The MSI doorbell.
    Doorbell,
}

/// A run of IOVAs that go the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) target: Target,
    /// Last IOVA of the run.
    pub(crate) last: u64,
}

/// A refused access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Denied {
    pub(crate) reason: FaultReason,
    /// Whether there is a mapping, which lacks the permission.
    pub(crate) permission: bool,
}

pub(super) const NOT_MAPPED: Denied = Denied { reason: FaultReason::Mapping, permission: false };

impl Iommu {
    /// Where an access of one kind at one IOVA goes, and how far the same holds.
    pub(crate) fn resolve(&self, endpoint: u32, iova: u64, kind: AccessKind) -> Result<Run, Denied> {
        let state = self.endpoints.get(&endpoint);
        let bypasses = self.bypasses(endpoint);
        let domain = state.and_then(|state| state.domain).and_then(|id| self.domains.get(&id));
        if !bypasses && domain.is_none() && !self.is_known_to_qemu(state) {
            return Err(Denied { reason: self.unattached_reason(state), permission: false });
        }
        let regions = state.map_or(&[][..], |state| &state.properties.reserved);
        if let Some(region) = regions.iter().find(|region| region.contains(iova)) {
            if region.is_msi() && kind == AccessKind::Write {
                return Ok(Run { target: Target::Doorbell, last: region.last });
            }
            if !bypasses {
                return Err(NOT_MAPPED);
            }
        }
        let next_region = regions.iter().map(|region| region.first).filter(|first| *first > iova).min();
        let limit = next_region.map_or(u64::MAX, |first| first - 1);
        if bypasses {
            return Ok(Run { target: Target::Memory(iova), last: limit });
        }
        let Some(domain) = domain else {
            return Err(Denied { reason: FaultReason::Domain, permission: false });
        };
        let mapping = self.mapping_at(domain, iova).ok_or(NOT_MAPPED)?;
        if !self.permits(mapping, kind) {
            return Err(Denied { reason: FaultReason::Mapping, permission: true });
        }
        let (phys, last) = self.translation(mapping, iova);
        Ok(Run { target: Target::Memory(phys), last: last.min(limit) })
    }

    /// QEMU looks at reserved regions of endpoints that it remembers before it looks for their domain.
    fn is_known_to_qemu(&self, state: Option<&EndpointState>) -> bool {
        self.config.quirks.faults == FaultStyle::Qemu && state.is_some_and(|state| state.remembered)
    }

    pub(super) fn unattached_reason(&self, state: Option<&EndpointState>) -> FaultReason {
        let forgotten = self.config.quirks.faults == FaultStyle::Qemu;
        if state.is_none() || forgotten { FaultReason::Unknown } else { FaultReason::Domain }
    }

    /// The mapping that decides about an IOVA. QEMU looks up two bytes, and takes the one that it meets first.
    fn mapping_at<'a>(&self, domain: &'a Domain, iova: u64) -> Option<&'a Mapping> {
        if self.config.quirks.granule_translation {
            return domain.first_met(iova, iova.wrapping_add(1));
        }
        domain.lookup(iova)
    }

    pub(super) fn permits(&self, mapping: &Mapping, kind: AccessKind) -> bool {
        let quirks = self.config.quirks;
        let enough = match kind {
            AccessKind::Read if quirks.write_implies_read => flag::MAP_READ | flag::MAP_WRITE,
            AccessKind::Read => flag::MAP_READ,
            AccessKind::Write => flag::MAP_WRITE,
        };
        quirks.permissions_ignored || mapping.flags & enough != 0
    }

    /// Physical address of an IOVA, and the last IOVA to which the same offset applies.
    pub(super) fn translation(&self, mapping: &Mapping, iova: u64) -> (u64, u64) {
        let phys = iova.wrapping_sub(mapping.virt_first).wrapping_add(mapping.phys_first);
        match self.config.granule() {
            Some(granule) if self.config.quirks.granule_translation => {
                let mask = granule - 1;
                (phys & !mask | iova & mask, iova | mask)
            }
            _ => (phys, mapping.virt_last),
        }
    }
}
