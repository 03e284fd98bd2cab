//! MAP and UNMAP.

use super::context::Anonymous;
use super::{Crash, Iommu, Outcome};
use crate::domain::Mapping;
use crate::number::{Status, feature, flag};
use crate::quirks::LastAddress;

impl Iommu {
    /// MAP. Checks flags, domain, order, granule, ranges, reserved regions, overlap, room, and changes nothing if one fails.
    pub(crate) fn map(&mut self, domain: u32, mapping: Mapping) -> Outcome {
        let Mapping { virt_first, virt_last, flags, .. } = mapping;
        let mmio = if self.active(feature::MMIO) { flag::MAP_MMIO } else { 0 };
        if flags & !(flag::MAP_READ | flag::MAP_WRITE | mmio) != 0 {
            return Status::Inval.into();
        }
        if let Some(outcome) = self.check_domain(domain) {
            return outcome;
        }
        let quirks = self.config.quirks;
        let inverted = virt_last < virt_first;
        if (inverted && !quirks.inverted_accepted) || (virt_last == virt_first && !quirks.unchecked) {
            return if quirks.inverted_range { Status::Range } else { Status::Inval }.into();
        }
        if let Some(outcome) = self.check_last_address(virt_last) {
            return outcome;
        }
        if !quirks.unchecked
            && !inverted
            && let Err(status) = self.check_map(domain, &mapping)
        {
            return status.into();
        }
        let max_mappings = self.config.max_mappings;
        let Some(target) = self.domains.get_mut(&domain) else {
            return Status::NoEnt.into();
        };
        if target.overlap(virt_first, virt_last).is_some() {
            return Status::Inval.into();
        }
        if target.len() + target.inverted.len() >= max_mappings {
            return Status::NoMem.into();
        }
        if inverted {
            target.inverted.push((virt_first, virt_last));
        } else {
            target.insert(mapping);
        }
        Status::Ok.into()
    }

    /// Alignment, ranges and reserved regions of a MAP whose order is right.
    pub(super) fn check_map(&self, domain: u32, mapping: &Mapping) -> Result<(), Status> {
        let Mapping { virt_first, virt_last, phys_first, .. } = *mapping;
        let granule = self.config.granule().ok_or(Status::Range)?;
        let misaligned = (virt_first | phys_first | virt_last.wrapping_add(1)) & (granule - 1) != 0;
        let overflow = phys_first.checked_add(virt_last - virt_first).is_none();
        if misaligned || overflow || !self.input_in_range(virt_first, virt_last) {
            return Err(Status::Range);
        }
        if self.meets_reserved(domain, virt_first, virt_last) {
            return Err(Status::Inval);
        }
        Ok(())
    }

    /// UNMAP. Removes whole mappings, or nothing at all.
    pub(crate) fn unmap(&mut self, domain: u32, first: u64, last: u64, reserved: u32) -> Outcome {
        let quirks = self.config.quirks;
        if reserved != 0 && !quirks.reserved_ignored {
            return Status::Inval.into();
        }
        if let Some(outcome) = self.check_domain(domain) {
            return outcome;
        }
        if last < first {
            return self.unmap_inverted(domain, first, last);
        }
        if let Some(outcome) = self.check_last_address(last) {
            return outcome;
        }
        if !self.input_in_range(first, last) {
            return Status::Range.into();
        }
        let Some(target) = self.domains.get_mut(&domain) else {
            return Status::NoEnt.into();
        };
        if target.inverted.iter().any(|(start, end)| first <= *end && *start <= last) {
            return Outcome::Crash(Crash::EndlessLoop);
        }
        match target.unmap(first, last) {
            Err(_) => Status::Range.into(),
            Ok(0) if quirks.empty_unmap_unwritten => Outcome::Unwritten,
            Ok(_) => Status::Ok.into(),
        }
    }

    fn unmap_inverted(&self, domain: u32, first: u64, last: u64) -> Outcome {
        if !self.config.quirks.inverted_unmap_looked_up {
            return Status::Inval.into();
        }
        let meets = self.domains.get(&domain).is_some_and(|target| target.overlap(first, last).is_some());
        if meets { Status::Range } else { Status::Ok }.into()
    }

    fn check_domain(&self, domain: u32) -> Option<Outcome> {
        if !self.domain_in_range(domain) {
            return Some(Status::Range.into());
        }
        match self.domains.get(&domain) {
            None => Some(Status::NoEnt.into()),
            Some(target) if target.bypass || target.anonymous != Anonymous::Mapped => {
                Some(Status::Inval.into())
            }
            Some(_) => None,
        }
    }

    fn check_last_address(&self, last: u64) -> Option<Outcome> {
        match self.config.quirks.last_address {
            LastAddress::Range if last == u64::MAX => Some(Status::Range.into()),
            LastAddress::Abort if last == u64::MAX => Some(Outcome::Crash(Crash::Abort)),
            _ => None,
        }
    }
}
