//! Where an endpoint writes to interrupt a CPU.

use super::DmaMapping;
use crate::addr::{Iova, IovaRange, PhysAddr};
use crate::wire::property::{ReservedKind, ReservedRegion};

/// The address of an interrupt controller's doorbell, as an endpoint has to write it. Dropping it leaves the doorbell
/// mapped; see [`DmaDevice::unmap_msi`](super::DmaDevice::unmap_msi).
#[derive(Debug, PartialEq, Eq)]
#[must_use = "dropping it leaves the doorbell mapped"]
pub struct MsiDoorbell {
    pub(super) iova: Iova,
    pub(super) mapping: Option<DmaMapping>,
}

impl MsiDoorbell {
    /// What goes into the address of the MSI.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// Whether it took a mapping: no MSI window of the endpoint has the doorbell.
    pub fn is_mapped(&self) -> bool {
        self.mapping.is_some()
    }
}

/// The bytes of a doorbell.
pub(super) const DOORBELL_LEN: u64 = 4;

/// Whether writes to the doorbell pass untranslated, since it lies in an MSI window.
pub(super) fn is_in_window(regions: &[ReservedRegion], doorbell: PhysAddr) -> bool {
    let range = IovaRange::from_len(Iova::new(doorbell.get()), DOORBELL_LEN);
    let inside = |region: &&ReservedRegion| {
        region.kind == ReservedKind::Msi && range.is_some_and(|range| region.range.contains(range))
    };
    regions.iter().any(|region| inside(&region))
}
