//! MAP_CONTEXT and UNMAP_CONTEXT: the rules of MAP and UNMAP, in one context.

use super::Context;
use crate::domain::{Domain, Mapping};
use crate::iommu::Iommu;
use crate::number::{Status, feature, flag};
use crate::request::Request;

impl Iommu {
    pub(crate) fn map_context(&mut self, request: &Request) -> Status {
        let result = match *request {
            Request::MapContext { domain, pasid, virt_start, virt_end, phys_start, flags } => {
                let mapping =
                    Mapping { virt_first: virt_start, virt_last: virt_end, phys_first: phys_start, flags };
                self.map_in(domain, pasid, mapping)
            }
            Request::UnmapContext { domain, pasid, virt_start, virt_end, reserved } => {
                self.unmap_in(domain, pasid, (virt_start, virt_end), reserved)
            }
            _ => Err(Status::Unsupp),
        };
        result.err().unwrap_or(Status::Ok)
    }

    /// The mappings of a context that has them.
    fn mapped_context(&mut self, domain: u32, pasid: u32) -> Result<&mut Domain, Status> {
        if !self.domain_in_range(domain) {
            return Err(Status::Range);
        }
        let target = self.domains.get_mut(&domain).ok_or(Status::NoEnt)?;
        match target.contexts.get_mut(&pasid) {
            Some(Context::Mapped(mappings)) => Ok(mappings),
            Some(Context::Owned(_)) => Err(Status::Inval),
            None => Err(Status::NoEnt),
        }
    }

    fn map_in(&mut self, domain: u32, pasid: u32, mapping: Mapping) -> Result<(), Status> {
        let mmio = if self.active(feature::MMIO) { flag::MAP_MMIO } else { 0 };
        if mapping.flags & !(flag::MAP_READ | flag::MAP_WRITE | mmio) != 0 {
            return Err(Status::Inval);
        }
        self.mapped_context(domain, pasid)?;
        if mapping.virt_last <= mapping.virt_first {
            return Err(Status::Inval);
        }
        self.check_map(domain, &mapping)?;
        let max_mappings = self.config.max_mappings;
        let mappings = self.mapped_context(domain, pasid)?;
        if mappings.overlap(mapping.virt_first, mapping.virt_last).is_some() {
            return Err(Status::Inval);
        }
        if mappings.len() >= max_mappings {
            return Err(Status::NoMem);
        }
        mappings.insert(mapping);
        Ok(())
    }

    fn unmap_in(
        &mut self,
        domain: u32,
        pasid: u32,
        (first, last): (u64, u64),
        reserved: u32,
    ) -> Result<(), Status> {
        if reserved != 0 {
            return Err(Status::Inval);
        }
        self.mapped_context(domain, pasid)?;
        if last < first {
            return Err(Status::Inval);
        }
        if !self.input_in_range(first, last) {
            return Err(Status::Range);
        }
        self.mapped_context(domain, pasid)?.unmap(first, last).map(drop).map_err(|_| Status::Range)
    }
}
