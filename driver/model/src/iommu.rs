//! The IOMMU proper: endpoints, domains, bypass. No rings, no memory.
//!
//! `attach`, `map` and `translate` hold the operations; here is the
//! state, and what several of them ask.

mod attach;
pub(crate) mod context;
mod map;
pub(crate) mod translate;

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::config::Config;
use crate::domain::Domain;
use crate::endpoint::Endpoint;
use crate::number::{Status, feature};

pub(crate) use translate::{Denied, Target};

/// How the device's process would end on a request that no driver may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// It aborts.
    Abort,
    /// It loops for ever.
    EndlessLoop,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Answered with a status.
    Status(Status),
    /// Returned without a byte written.
    Unwritten,
    /// The device is gone.
    Crash(Crash),
}

impl From<Status> for Outcome {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

/// An endpoint and where it is attached.
#[derive(Clone, Debug)]
pub(crate) struct EndpointState {
    pub(crate) properties: Endpoint,
    pub(crate) domain: Option<u32>,
    /// Whether QEMU would have an entry for it.
    remembered: bool,
}

/// Endpoints, domains and bypass of one device.
#[derive(Clone, Debug)]
pub(crate) struct Iommu {
    pub(crate) config: Config,
    /// Features that the driver accepted, once FEATURES_OK is set; else 0.
    pub(crate) negotiated: u64,
    pub(crate) endpoints: BTreeMap<u32, EndpointState>,
    pub(crate) domains: BTreeMap<u32, Domain>,
    /// `bypass` of the configuration (R-05: 0 or 1).
    pub(crate) bypass: u8,
    /// Whether the driver ever wrote `bypass`.
    bypass_written: bool,
}

impl Iommu {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            negotiated: 0,
            endpoints: BTreeMap::new(),
            domains: BTreeMap::new(),
            bypass: u8::from(config.bypass),
            bypass_written: false,
            config,
        }
    }

    pub(crate) fn add_endpoint(&mut self, endpoint: Endpoint) {
        self.remove_endpoint(endpoint.id);
        let state = EndpointState { domain: None, remembered: false, properties: endpoint };
        self.endpoints.insert(state.properties.id, state);
    }

    /// Removes an endpoint, as a hot-unplug does.
    pub(crate) fn remove_endpoint(&mut self, endpoint: u32) {
        self.leave(endpoint);
        self.endpoints.remove(&endpoint);
    }

    /// Unattaches everything.
    pub(crate) fn clear_domains(&mut self) {
        self.domains.clear();
        for state in self.endpoints.values_mut() {
            state.domain = None;
            state.remembered = false;
        }
    }

    /// Restores what only a system reset restores.
    pub(crate) fn restore_bypass(&mut self) {
        self.bypass = u8::from(self.config.bypass);
        self.bypass_written = false;
    }

    pub(crate) fn write_bypass(&mut self, value: bool) {
        self.bypass = u8::from(value);
        self.bypass_written = true;
    }

    /// Whether a feature can be used: offered and negotiated.
    pub(crate) fn active(&self, features: u64) -> bool {
        let negotiated = self.config.quirks.ignore_negotiation || self.negotiated & features == features;
        self.config.offers(features) && negotiated
    }

    /// Whether an endpoint's accesses pass untranslated (R-12, PROTOCOL 1.8).
    pub(crate) fn bypasses(&self, endpoint: u32) -> bool {
        match self.endpoints.get(&endpoint).and_then(|state| state.domain) {
            Some(domain) => self.domains.get(&domain).is_some_and(|domain| domain.bypass),
            None => self.bypass_unattached(),
        }
    }

    fn bypass_unattached(&self) -> bool {
        let until_written = self.config.quirks.bypass_until_written && !self.bypass_written;
        let by_config = self.config.offers(feature::BYPASS_CONFIG) && (self.bypass == 1 || until_written);
        let by_feature =
            self.config.offers(feature::BYPASS) && self.negotiated & feature::BYPASS == feature::BYPASS;
        by_config || by_feature
    }

    fn domain_in_range(&self, domain: u32) -> bool {
        self.config.quirks.unchecked
            || !self.config.offers(feature::DOMAIN_RANGE)
            || self.config.domain_range.contains(&domain)
    }

    fn input_in_range(&self, first: u64, last: u64) -> bool {
        let range = &self.config.input_range;
        self.config.quirks.unchecked
            || !self.config.offers(feature::INPUT_RANGE)
            || (range.contains(&first) && range.contains(&last))
    }

    /// Whether a range meets a reserved region of an endpoint of the domain.
    pub(crate) fn meets_reserved(&self, domain: u32, first: u64, last: u64) -> bool {
        let members = self.endpoints.values().filter(|state| state.domain == Some(domain));
        members.flat_map(|state| &state.properties.reserved).any(|region| region.meets(first, last))
    }

    /// PROBE: the status and the property bytes.
    pub(crate) fn probe(&self, endpoint: u32) -> (Status, Vec<u8>) {
        let Some(state) = self.endpoints.get(&endpoint) else {
            return (Status::NoEnt, Vec::new());
        };
        let draft = self.active(feature::ATTACH_TABLE);
        match state.properties.properties(self.config.probe_size as usize, draft) {
            Some(bytes) => (Status::Ok, bytes),
            None => (Status::Inval, Vec::new()),
        }
    }
}
