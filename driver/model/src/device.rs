//! The device as a test holds it: made, given endpoints, looked into.
//!
//! `transport` and `queues` have what a driver reaches, `process` and `execute` the request queue, `dma` accesses of
//! endpoints and the event queue.

use alloc::collections::{BTreeSet, VecDeque};
use alloc::vec::Vec;

use crate::backend::Behind;
use crate::chain::Chain;
use crate::config::Config;
use crate::domain::Mapping;
use crate::endpoint::Endpoint;
use crate::fault::{AccessKind, Doorbell, FaultReason};
use crate::inject::Injection;
use crate::iommu::{Crash, Iommu, Target};
use crate::memory::GuestMemory;
use crate::number::device_status;
use crate::page::PageRequests;
use crate::process::HeldRequest;
use crate::record::{ConfigWrite, Counters, LIST_LIMIT, LogEntry, Violation, push_bounded};
use crate::ring::{Ring, RingError};

/// A software virtio-iommu.
///
/// It does nothing by itself: a transport adapter calls the methods that stand for registers, and a test calls
/// [`access`](Self::access) for the DMA of endpoints. Guest memory is lent to each call that needs it.
#[derive(Clone, Debug)]
pub struct Device {
    /// Misbehaviour to come.
    pub inject: Injection,
    pub(crate) iommu: Iommu,
    pub(crate) status: u8,
    pub(crate) driver_features: u64,
    pub(crate) generation: u32,
    pub(crate) rings: [Option<Ring>; 2],
    /// Requests that were popped and not answered, with what is to become of them.
    pub(crate) held: Vec<HeldRequest>,
    /// Requests that will never be answered.
    pub(crate) dropped: Vec<Chain>,
    pub(crate) held_events: VecDeque<Vec<u8>>,
    pub(crate) pending_interrupts: [bool; 2],
    pub(crate) pending_config_interrupt: bool,
    pub(crate) lived_before: bool,
    pub(crate) probed: BTreeSet<u32>,
    pub(crate) crash: Option<Crash>,
    pub(crate) ring_error: Option<RingError>,
    pub(crate) requests: u64,
    pub(crate) log: VecDeque<LogEntry>,
    pub(crate) counters: Counters,
    pub(crate) violations: VecDeque<Violation>,
    pub(crate) config_writes: VecDeque<ConfigWrite>,
    pub(crate) doorbells: VecDeque<Doorbell>,
    pub(crate) pages: PageRequests,
    pub(crate) behind: Behind,
}

impl Device {
    /// Makes a device as it is after power-on, without endpoints.
    pub fn new(config: Config) -> Self {
        Self {
            inject: Injection::default(),
            iommu: Iommu::new(config),
            status: 0,
            driver_features: 0,
            generation: 0,
            rings: [None, None],
            held: Vec::new(),
            dropped: Vec::new(),
            held_events: VecDeque::new(),
            pending_interrupts: [false; 2],
            pending_config_interrupt: false,
            lived_before: false,
            probed: BTreeSet::new(),
            crash: None,
            ring_error: None,
            requests: 0,
            log: VecDeque::new(),
            counters: Counters::default(),
            violations: VecDeque::new(),
            config_writes: VecDeque::new(),
            doorbells: VecDeque::new(),
            pages: PageRequests::default(),
            behind: Behind::default(),
        }
    }

    /// Adds an endpoint, or replaces the one with the same ID, which is then unattached.
    pub fn add_endpoint(&mut self, endpoint: Endpoint) {
        self.probed.remove(&endpoint.id);
        self.iommu.add_endpoint(endpoint);
    }

    /// Takes an endpoint away, as a hot-unplug does; it leaves its domain.
    pub fn remove_endpoint(&mut self, endpoint: u32) {
        self.iommu.remove_endpoint(endpoint);
        self.drop_orphaned_groups();
    }

    /// What the device was made with, and what [`change_config`](Self::change_config) made of it.
    pub fn config(&self) -> &Config {
        &self.iommu.config
    }

    /// Changes the configuration: the generation moves on and a configuration interrupt is raised.
    pub fn change_config(&mut self, change: impl FnOnce(&mut Config)) {
        change(&mut self.iommu.config);
        self.generation = self.generation.wrapping_add(1);
        self.raise_config_interrupt();
    }

    /// Resets as the whole machine does: as a device reset does, and domains go and `bypass` is restored whatever the
    /// quirks.
    pub fn system_reset(&mut self) {
        self.device_reset();
        self.iommu.clear_domains();
        self.iommu.restore_bypass();
        self.crash = None;
        self.lived_before = false;
    }

    /// Asks for a reset, as on an error that no endpoint caused.
    pub fn fail(&mut self) {
        if self.status & device_status::NEEDS_RESET == 0 {
            self.status |= device_status::NEEDS_RESET;
            self.raise_config_interrupt();
        }
    }

    /// Whether requests are handled: DRIVER_OK, no reset asked for, not crashed.
    pub fn is_running(&self) -> bool {
        let bits = device_status::DRIVER_OK | device_status::NEEDS_RESET;
        self.status & bits == device_status::DRIVER_OK && self.crash.is_none()
    }

    /// How the device ended, if the driver sent what ends it.
    pub fn crash(&self) -> Option<Crash> {
        self.crash
    }

    /// What was wrong with a ring, when that was why the device asked for a reset.
    pub fn ring_error(&self) -> Option<RingError> {
        self.ring_error
    }

    /// IDs of all domains, ascending.
    pub fn domains(&self) -> impl Iterator<Item = u32> {
        self.iommu.domains.keys().copied()
    }

    /// Mappings of a domain, ascending; none if there is no such domain.
    pub fn mappings(&self, domain: u32) -> impl Iterator<Item = Mapping> {
        self.iommu.domains.get(&domain).into_iter().flat_map(|domain| domain.mappings().copied())
    }

    /// Domain that an endpoint is attached to.
    pub fn domain_of(&self, endpoint: u32) -> Option<u32> {
        self.iommu.endpoints.get(&endpoint).and_then(|state| state.domain)
    }

    /// Whether a domain exists and bypasses.
    pub fn is_bypass_domain(&self, domain: u32) -> bool {
        self.iommu.domains.get(&domain).is_some_and(|domain| domain.bypass)
    }

    /// Whether an endpoint's accesses pass untranslated.
    pub fn bypasses(&self, endpoint: u32) -> bool {
        self.iommu.bypasses(endpoint)
    }

    /// Translates one IOVA for one kind of access, without side effects.
    ///
    /// A doorbell write translates to its own IOVA.
    ///
    /// # Errors
    ///
    /// The reason that a fault would have.
    pub fn translate(&self, endpoint: u32, iova: u64, kind: AccessKind) -> Result<u64, FaultReason> {
        match self.iommu.resolve(endpoint, iova, kind) {
            Ok(run) => Ok(match run.target {
                Target::Memory(phys) => phys,
                Target::Doorbell => iova,
            }),
            Err(denied) => Err(denied.reason),
        }
    }

    /// The same through a context, on a device of the draft. Tables are read, and what is found is cached, as by an access;
    /// nothing is reported.
    ///
    /// # Errors
    ///
    /// The reason that a fault would have.
    pub fn translate_context(
        &mut self,
        mem: &dyn GuestMemory,
        (endpoint, pasid): (u32, Option<u32>),
        iova: u64,
        kind: AccessKind,
    ) -> Result<u64, FaultReason> {
        match self.iommu.resolve_context(mem, (endpoint, pasid), iova, kind) {
            Ok(run) => Ok(match run.target {
                Target::Memory(phys) => phys,
                Target::Doorbell => iova,
            }),
            Err(denied) => Err(denied.reason),
        }
    }

    /// Requests in the order of their execution, oldest first, at most the configured number.
    pub fn log(&self) -> impl DoubleEndedIterator<Item = &LogEntry> + ExactSizeIterator {
        self.log.iter()
    }

    /// Empties the log.
    pub fn clear_log(&mut self) {
        self.log.clear();
    }

    /// Running counts.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Running counts, which start again from 0.
    pub fn take_counters(&mut self) -> Counters {
        core::mem::take(&mut self.counters)
    }

    /// Rules that the driver broke, oldest first.
    pub fn violations(&self) -> impl ExactSizeIterator<Item = &Violation> {
        self.violations.iter()
    }

    /// Forgets the rules that the driver broke.
    pub fn clear_violations(&mut self) {
        self.violations.clear();
    }

    /// Writes into the configuration space, oldest first.
    pub fn config_writes(&self) -> impl ExactSizeIterator<Item = &ConfigWrite> {
        self.config_writes.iter()
    }

    /// Writes into MSI windows since the last call, oldest first.
    pub fn take_doorbells(&mut self) -> Vec<Doorbell> {
        self.doorbells.drain(..).collect()
    }

    /// Requests that are held back, oldest first, waiting for [`release`](Self::release).
    pub fn held(&self) -> usize {
        self.held.len()
    }

    pub(crate) fn violate(&mut self, rule: &'static str, what: &'static str, request: Option<u64>) {
        push_bounded(&mut self.violations, Violation { rule, what, request }, LIST_LIMIT);
    }

    pub(crate) fn raise_config_interrupt(&mut self) {
        self.pending_config_interrupt = true;
        self.counters.config_interrupts += 1;
    }
}
