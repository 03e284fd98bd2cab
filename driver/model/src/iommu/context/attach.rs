//! ATTACH_TABLE, and DETACH of one PASID.

use super::{Anonymous, Context, Descriptors, Owned};
use crate::bytes::{array_at, u32_at, u64_at};
use crate::domain::Domain;
use crate::endpoint::FORMAT_SMMU_V3;
use crate::iommu::Iommu;
use crate::memory::GuestMemory;
use crate::number::{Status, feature, flag};
use crate::walk::{ArmTable, Cache, DescriptorTable, Table, WalkFault};

const FORMAT_MAPPED: u16 = 0;
const FORMAT_ARM: u16 = 1;
const FORMAT_X86: u16 = 3;
const FORMAT_VTD: u16 = 4;
const FORMAT_RISCV: u16 = 5;

/// The most contexts of a domain.
const MAX_CONTEXTS: usize = 1024;

/// Bytes of an ATTACH_TABLE from 18 on, by their place in the request.
struct Body<'a>(&'a [u8; 66]);

impl Body<'_> {
    fn byte(&self, at: usize) -> u8 {
        array_at::<1>(self.0, at - 18)[0]
    }

    fn half(&self, at: usize) -> u16 {
        u16::from_le_bytes(array_at(self.0, at - 18))
    }

    fn word(&self, at: usize) -> u32 {
        u32_at(self.0, at - 18)
    }

    fn long(&self, at: usize) -> u64 {
        u64_at(self.0, at - 18)
    }

    fn is_zero(&self, places: core::ops::Range<usize>) -> bool {
        self.0[places.start - 18..places.end - 18].iter().all(|byte| *byte == 0)
    }
}

impl Iommu {
    /// Checks format, flags and reserved bytes, endpoint and domain, PASID, and the table, and changes nothing if one fails.
    pub(crate) fn attach_table(
        &mut self,
        mem: &dyn GuestMemory,
        (domain, endpoint): (u32, u32),
        flags: u32,
        format: u16,
        body: &[u8; 66],
    ) -> Status {
        let body = Body(body);
        let result = match format {
            FORMAT_SMMU_V3 => self.attach_descriptors(mem, (domain, endpoint), flags, &body),
            FORMAT_MAPPED | FORMAT_ARM | FORMAT_X86 | FORMAT_VTD | FORMAT_RISCV => {
                self.attach_context(mem, (domain, endpoint), flags, format, &body)
            }
            _ => Err(Status::Unsupp),
        };
        result.err().unwrap_or(Status::Ok)
    }

    /// The domain that an endpoint is in, which has contexts.
    fn domain_of_contexts(&mut self, domain: u32, endpoint: u32) -> Result<&mut Domain, Status> {
        if !self.domain_in_range(domain) {
            return Err(Status::Range);
        }
        let state = self.endpoints.get(&endpoint).ok_or(Status::NoEnt)?;
        let target = self.domains.get_mut(&domain).ok_or(Status::NoEnt)?;
        if state.domain != Some(domain) || target.bypass {
            return Err(Status::Inval);
        }
        Ok(target)
    }

    fn offers_format(&self, endpoint: u32, format: u16) -> Result<(), Status> {
        let state = self.endpoints.get(&endpoint).ok_or(Status::NoEnt)?;
        let known = format == FORMAT_MAPPED || state.properties.contexts.formats.contains(&format);
        if known { Ok(()) } else { Err(Status::Unsupp) }
    }

    /// Whether every endpoint of the domain can send this PASID.
    fn check_pasid(&self, domain: u32, pasid: u32) -> Result<(), Status> {
        let members = self.endpoints.values().filter(|state| state.domain == Some(domain));
        let bits = members.map(|state| state.properties.contexts.pasid_bits).min().unwrap_or(0);
        if u64::from(pasid) >> bits.min(32) != 0 { Err(Status::Range) } else { Ok(()) }
    }

    fn attach_context(
        &mut self,
        mem: &dyn GuestMemory,
        (domain, endpoint): (u32, u32),
        flags: u32,
        format: u16,
        body: &Body<'_>,
    ) -> Result<(), Status> {
        if flags != flag::PASID_VALID {
            return Err(Status::Inval);
        }
        self.domain_of_contexts(domain, endpoint)?;
        self.offers_format(endpoint, format)?;
        let pasid = body.word(20);
        self.check_pasid(domain, pasid)?;
        let class = self.endpoints.get(&endpoint).map_or(0, |state| state.properties.class);
        let context = match format {
            FORMAT_MAPPED if body.is_zero(18..20) && body.is_zero(24..84) => {
                Context::Mapped(Domain::new(false, class, None))
            }
            FORMAT_MAPPED => return Err(Status::Inval),
            _ => {
                let (table, asid) = decode(format, body)?;
                check_table(mem, &table)?;
                Context::Owned(Owned { table, asid, cache: Cache::default() })
            }
        };
        let target = self.domain_of_contexts(domain, endpoint)?;
        if target.descriptors.is_some() || target.contexts.contains_key(&pasid) {
            return Err(Status::Inval);
        }
        if target.contexts.len() >= MAX_CONTEXTS {
            return Err(Status::NoMem);
        }
        target.contexts.insert(pasid, context);
        Ok(())
    }

    fn attach_descriptors(
        &mut self,
        mem: &dyn GuestMemory,
        (domain, endpoint): (u32, u32),
        flags: u32,
        body: &Body<'_>,
    ) -> Result<(), Status> {
        if flags != 0 || !body.is_zero(32..84) {
            return Err(Status::Inval);
        }
        self.domain_of_contexts(domain, endpoint)?;
        self.offers_format(endpoint, FORMAT_SMMU_V3)?;
        let (s1fmt, s1dss, s1cdmax, pointer) = (body.byte(18), body.byte(19), body.word(20), body.long(24));
        let bits = u8::try_from(s1cdmax).map_err(|_| Status::Range)?;
        // The last PASID that the table holds has to be one.
        self.check_pasid(domain, ((1u64 << bits.min(32)) - 1) as u32)?;
        let table = DescriptorTable { s1fmt, s1cdmax: bits, s1contextptr: pointer };
        match table.find(mem, 0) {
            Err(WalkFault::Memory(_)) => return Err(Status::Fault),
            // That of PASID 0 may be anything: it is read when it is used. But the table has to be one.
            Err(WalkFault::Reserved { value }) if value == pointer || value == u64::from(s1fmt) => {
                return Err(Status::Inval);
            }
            _ => {}
        }
        let target = self.domain_of_contexts(domain, endpoint)?;
        let unsuited = target.anonymous.s1dss() != Some(s1dss);
        if unsuited || target.descriptors.is_some() || !target.contexts.is_empty() {
            return Err(Status::Inval);
        }
        target.descriptors = Some(Descriptors::new(table));
        Ok(())
    }

    /// DETACH with a PASID: takes one context out of the domain, and what was cached of it. `None` where the request is
    /// the standard's.
    pub(crate) fn detach_pasid(&mut self, domain: u32, endpoint: u32, reserved: u64) -> Option<Status> {
        let (flags, pasid) = (reserved as u32, (reserved >> 32) as u32);
        if !self.active(feature::ATTACH_TABLE) || (flags, pasid) == (0, 0) {
            return None;
        }
        if flags != flag::PASID_VALID {
            return Some(Status::Inval);
        }
        let target = match self.domain_of_contexts(domain, endpoint) {
            Ok(target) => target,
            Err(status) => return Some(status),
        };
        // Where the guest has a table of descriptors, it takes them out there.
        if target.descriptors.is_some() {
            return Some(Status::Inval);
        }
        Some(match target.contexts.remove(&pasid) {
            Some(_) => Status::Ok,
            None => Status::NoEnt,
        })
    }

    /// Whether a context of this PASID can still be there for an endpoint.
    pub(crate) fn has_context(&self, endpoint: u32, pasid: Option<u32>) -> bool {
        let domain = self.endpoints.get(&endpoint).and_then(|state| state.domain);
        let Some(target) = domain.and_then(|id| self.domains.get(&id)) else { return false };
        match (pasid, target.anonymous) {
            (None, Anonymous::Blocked | Anonymous::Bypass) => false,
            (None, Anonymous::Mapped) => true,
            (None, Anonymous::Zero) => target.descriptors.is_some() || target.contexts.contains_key(&0),
            (Some(pasid), _) => target.descriptors.is_some() || target.contexts.contains_key(&pasid),
        }
    }
}

/// The table that a body describes, and the ASID of Arm's.
fn decode(format: u16, body: &Body<'_>) -> Result<(Table, Option<u16>), Status> {
    let good = |good: bool| if good { Ok(()) } else { Err(Status::Inval) };
    match format {
        FORMAT_ARM => {
            // No table by TTBR1.
            good(body.is_zero(56..84) && body.long(32) != 0 && body.long(40) == 0)?;
            let table = ArmTable::from_registers(body.long(24), body.long(32), body.long(48));
            good(table.epd1)?;
            Ok((Table::Arm(table), Some(body.half(18))))
        }
        FORMAT_VTD => {
            // No flags of the first stage are known, and the width is that of four levels.
            good(body.is_zero(18..20) && body.is_zero(44..84) && body.long(32) == 0 && body.word(40) == 48)?;
            Ok((Table::X86 { root: body.long(24) }, None))
        }
        FORMAT_X86 => {
            good(body.is_zero(18..20) && body.is_zero(32..84))?;
            Ok((Table::X86 { root: body.long(24) }, None))
        }
        _ => {
            good(body.byte(19) == 0 && body.is_zero(32..84))?;
            Ok((Table::Riscv { mode: body.byte(18), root_page: body.long(24) }, None))
        }
    }
}

/// Whether the table can be walked at all.
fn check_table(mem: &dyn GuestMemory, table: &Table) -> Result<(), Status> {
    match table.check_root(mem) {
        Ok(()) => Ok(()),
        Err(WalkFault::Memory(_)) => Err(Status::Fault),
        Err(_) => Err(Status::Inval),
    }
}
