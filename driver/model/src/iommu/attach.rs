//! ATTACH and DETACH.

use super::context::Anonymous;
use super::{EndpointState, Iommu};
use crate::domain::Domain;
use crate::endpoint::Endpoint;
use crate::met::MetOrder;
use crate::number::{Status, feature, flag};
use crate::quirks::Detach;

/// Endpoints that a driver can make by ATTACH, on a device with that quirk.
const MAX_ENDPOINTS: usize = 65_536;

impl Iommu {
    /// ATTACH. Checks flags, reserved, endpoint, domain range, then the domain. A rejected one changes nothing (strict).
    pub(crate) fn attach(&mut self, domain: u32, endpoint: u32, flags: u32, reserved: u32) -> Status {
        let quirks = self.config.quirks;
        let bypass_flag = if self.active(feature::BYPASS_CONFIG) { flag::ATTACH_BYPASS } else { 0 };
        let draft_flags = if self.active(feature::ATTACH_TABLE) { flag::ATTACH_ANONYMOUS } else { 0 };
        if flags & !bypass_flag & !draft_flags != 0 {
            return Status::Inval;
        }
        let anonymous = Anonymous::from_flags(flags);
        if flags & flag::ATTACH_BYPASS != 0 && anonymous != Anonymous::Mapped {
            return Status::Inval;
        }
        if reserved != 0 && !quirks.reserved_ignored {
            return Status::Inval;
        }
        if !self.endpoints.contains_key(&endpoint) && !quirks.attach_unknown_endpoint {
            return Status::NoEnt;
        }
        if !self.domain_in_range(domain) {
            return Status::Range;
        }
        if !self.endpoints.contains_key(&endpoint) && self.endpoints.len() >= MAX_ENDPOINTS {
            return Status::NoMem;
        }
        let state = self.endpoints.entry(endpoint).or_insert_with(|| EndpointState {
            properties: Endpoint::new(endpoint),
            domain: None,
            remembered: false,
        });
        state.remembered = true;
        if state.domain.is_some() && quirks.move_unsupported {
            return Status::Unsupp;
        }
        if quirks.attach_detaches_first {
            self.leave(endpoint);
        }
        let bypass = flags & flag::ATTACH_BYPASS != 0;
        if let Err(status) = self.check_join(domain, endpoint, (bypass, anonymous)) {
            return status;
        }
        self.join(domain, endpoint, (bypass, anonymous));
        Status::Ok
    }

    fn check_join(&self, domain: u32, endpoint: u32, kind: (bool, Anonymous)) -> Result<(), Status> {
        let Some(state) = self.endpoints.get(&endpoint) else {
            return Err(Status::NoEnt);
        };
        let Some(target) = self.domains.get(&domain) else {
            let own = state.domain.and_then(|own| self.domains.get(&own));
            let frees_one = own.is_some_and(|own| own.endpoints == 1);
            let full = self.domains.len() - usize::from(frees_one) >= self.config.max_domains;
            return if full { Err(Status::NoMem) } else { Ok(()) };
        };
        if (target.bypass, target.anonymous) != kind {
            return Err(Status::Inval);
        }
        if state.domain == Some(domain) {
            return Ok(());
        }
        let reserved = &state.properties.reserved;
        let over_reserved =
            target.mappings().any(|m| reserved.iter().any(|region| region.meets(m.virt_first, m.virt_last)));
        let unsuitable = !self.config.shared_domains
            || target.class != state.properties.class
            || (over_reserved && !self.config.quirks.unchecked);
        if unsuitable { Err(Status::Unsupp) } else { Ok(()) }
    }

    /// Enters a domain, which is made if need be; leaves the old one first. Nothing to do in its own domain.
    fn join(&mut self, domain: u32, endpoint: u32, (bypass, anonymous): (bool, Anonymous)) {
        if self.endpoints.get(&endpoint).is_some_and(|state| state.domain == Some(domain)) {
            return;
        }
        self.leave(endpoint);
        let Some(state) = self.endpoints.get_mut(&endpoint) else {
            return;
        };
        state.domain = Some(domain);
        let class = state.properties.class;
        let met = self.config.quirks.partial_unmap.then(MetOrder::default);
        let new = || Domain::with_anonymous(anonymous, Domain::new(bypass, class, met));
        let target = self.domains.entry(domain).or_insert_with(new);
        target.endpoints += 1;
    }

    /// Leaves the domain, if in one; the last endpoint takes it along with its mappings.
    pub(super) fn leave(&mut self, endpoint: u32) {
        let Some(id) = self.endpoints.get_mut(&endpoint).and_then(|state| state.domain.take()) else {
            return;
        };
        if let Some(domain) = self.domains.get_mut(&id) {
            domain.endpoints -= 1;
            if domain.endpoints == 0 {
                self.domains.remove(&id);
            }
        }
    }

    /// DETACH. Its reserved bytes are ignored.
    pub(crate) fn detach(&mut self, domain: u32, endpoint: u32) -> Status {
        let style = self.config.quirks.detach;
        match style {
            Detach::Unsupported => return Status::Unsupp,
            Detach::AlwaysOk => {
                self.leave(endpoint);
                return Status::Ok;
            }
            Detach::Strict | Detach::QemuKeepsEndpoint | Detach::QemuForgetsEndpoint => {}
        }
        let Some(state) = self.endpoints.get(&endpoint) else {
            return Status::NoEnt;
        };
        if style != Detach::Strict && !state.remembered {
            return Status::NoEnt;
        }
        if !self.domain_in_range(domain) {
            return Status::Range;
        }
        if state.domain != Some(domain) {
            return Status::Inval;
        }
        self.leave(endpoint);
        if style == Detach::QemuForgetsEndpoint
            && let Some(state) = self.endpoints.get_mut(&endpoint)
        {
            state.remembered = false;
        }
        Status::Ok
    }
}
