//! What cannot be kept apart is kept together.

use alloc::vec::Vec;

use virtio_iommu::{EndpointId, GroupError};

use super::Iommu;
use crate::machine::Machine;
use crate::pci::group::Group;

impl Iommu {
    /// Tells the driver which endpoints are in one domain or in none, by [`Pci::groups`](crate::pci::Pci::groups), and
    /// gives the groups of what is behind this IOMMU. To be called once, before anything is attached.
    ///
    /// # Errors
    ///
    /// [`GroupError`]; groups made before stay.
    pub fn keep_together(&self, machine: &Machine) -> Result<Vec<Group>, GroupError> {
        let mut groups = machine.pci.groups();
        for group in &mut groups {
            let known = |address| machine.pci.at(address).and_then(|function| self.endpoint(function));
            group.members.retain(|member| known(*member).is_some());
            // Several functions may be one endpoint already.
            let mut endpoints: Vec<EndpointId> =
                group.members.iter().filter_map(|member| known(*member)).collect();
            endpoints.sort_unstable();
            endpoints.dedup();
            if endpoints.len() > 1 {
                self.viommu.group(&endpoints)?;
            }
        }
        groups.retain(|group| !group.members.is_empty());
        Ok(groups)
    }
}
