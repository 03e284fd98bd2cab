//! PCI: the functions of a machine, their registers and their BARs.
//!
//! [`Pci`] owns the access to configuration space and the list of functions that a scan found. It works over any
//! [`ConfigSpace`]: the machine's is [`Ecam`](ecam::Ecam), a test's is an array.
//!
//! ```text
//! scan          buses numbered where nobody did; every bus of every segment, multifunction bit honoured; BARs sized with
//!               decoding off
//! assign_bars   closed bridges get windows for what is behind them; BARs without a usable address get one from the
//!               host's or the bridge's window
//! quiesce_all   bus mastering off everywhere but on bridges
//! set_memory_decode, set_bus_master   per function, with the bridges above it
//! slot, look_again   what comes and goes while the machine runs
//! pin_at_root   where a function's interrupt comes out
//! ```
//!
//! Promises that no loop depends on what a device says: buses, devices, functions, capabilities have their bounds.
//! Leaves out: expansion ROMs, I/O ports, and hot-plug of bridges.

use alloc::vec::Vec;

pub mod assign;
pub mod bar;
pub mod capability;
pub mod config;
pub mod ecam;
pub mod function;
pub mod group;
pub mod message;
pub mod number;
mod requester;
pub mod scan;
pub mod slot;
pub mod virtio_drivers;
mod window;

pub use pci_types::PciAddress;

use assign::{AssignError, HostWindow};
use capability::{Capability, ExtendedCapability};
use config::ConfigSpace;
use function::{BusMaster, Function, LineInterrupt, MemoryDecode};
use group::Group;
use number::Numbering;

/// The interrupt pins of a bus.
const PINS: u8 = 4;

/// The functions of a machine, and the way to them.
#[derive(Debug)]
pub struct Pci<C: ConfigSpace> {
    config: C,
    functions: Vec<Function>,
    numbering: Numbering,
}

impl<C: ConfigSpace> Pci<C> {
    /// Numbers the buses, where nobody did, and finds every function. Their decoding is off while their BARs are sized, and
    /// then as it was.
    pub fn scan(config: C) -> Self {
        let numbering = number::number(&config);
        let functions = scan::scan(&config);
        Self { config, functions, numbering }
    }

    /// What became of the bus numbers.
    pub fn numbering(&self) -> &Numbering {
        &self.numbering
    }

    /// Opens closed bridges for what is behind them, and gives an address to each memory BAR that has none or that has one it cannot keep: outside of its window, or in
    /// use by an earlier BAR.
    ///
    /// Gives what could not be assigned; those BARs have no address afterwards.
    pub fn assign_bars(&mut self, host: &HostWindow) -> Vec<AssignError> {
        window::open(&self.config, &mut self.functions, host);
        assign::assign(&self.config, &mut self.functions, host)
    }

    /// Looks again at a bus whose devices may have come or gone. New ones have no addresses yet.
    pub fn look_again(&mut self, segment: u16, bus: u8) {
        let is_there =
            |function: &Function| (function.address.segment(), function.address.bus()) == (segment, bus);
        let found = scan::scan_bus(&self.config, segment, bus);
        let now = |function: &Function| found.iter().any(|found| found.address == function.address);
        self.functions.retain(|function| !is_there(function) || now(function));
        let known =
            |found: &Function| self.functions.iter().any(|function| function.address == found.address);
        let new: Vec<Function> = found.into_iter().filter(|found| !known(found)).collect();
        self.functions.extend(new);
        self.functions.sort_by_key(|function| function.address);
    }

    /// The way to configuration space.
    pub fn config(&self) -> &C {
        &self.config
    }

    /// All functions, by address.
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// The functions with a vendor and a device number.
    pub fn with_id(&self, vendor: u16, device: u16) -> impl Iterator<Item = &Function> {
        self.functions.iter().filter(move |function| (function.vendor, function.device) == (vendor, device))
    }

    /// The function at an address.
    pub fn at(&self, address: PciAddress) -> Option<&Function> {
        self.functions.iter().find(|function| function.address == address)
    }

    /// The bridge whose secondary bus a function is on; `None` on a root bus.
    pub fn bridge_above(&self, address: PciAddress) -> Option<&Function> {
        function::bridge_above(&self.functions, address)
    }

    /// The number that a function's DMA carries where an IOMMU sees it: bus, device and function in 16 bits. Functions
    /// behind a bridge to conventional PCI share one.
    pub fn requester(&self, address: PciAddress) -> u16 {
        requester::requester(&self.config, &self.functions, address)
    }

    /// Turns on, wherever it can be, what keeps functions apart below the IOMMU, and off what goes past it; see [`group`].
    pub fn isolate(&self) {
        group::isolate(&self.config, &self.functions);
    }

    /// The functions that are no bridges, by what can be kept apart.
    pub fn groups(&self) -> Vec<Group> {
        group::groups(&self.config, &self.functions)
    }

    /// Turns a function's memory decoding on or off. On turns it on for the bridges above too.
    pub fn set_memory_decode(&self, address: PciAddress, state: MemoryDecode) {
        function::set_memory_decode(&self.config, address, state);
        if state == MemoryDecode::On {
            self.for_bridges_above(address, |bridge| {
                function::set_memory_decode(&self.config, bridge, state)
            });
        }
    }

    /// Turns a function's bus mastering on or off. On turns it on for the bridges above too.
    pub fn set_bus_master(&self, address: PciAddress, state: BusMaster) {
        function::set_bus_master(&self.config, address, state);
        if state == BusMaster::On {
            self.for_bridges_above(address, |bridge| function::set_bus_master(&self.config, bridge, state));
        }
    }

    /// Lets a function pull its interrupt line, or not.
    pub fn set_line_interrupt(&self, address: PciAddress, state: LineInterrupt) {
        function::set_line_interrupt(&self.config, address, state);
    }

    /// The pin of a root bus that a function's interrupt comes out at: each bridge on the way takes its devices' pins in
    /// turn (PCI-to-PCI Bridge Specification 1.2, 9.1). `None` for a function that has no pin.
    pub fn pin_at_root(&self, address: PciAddress) -> Option<(PciAddress, u8)> {
        let mut pin = self.config.read8(address, config::offset::INTERRUPT_PIN);
        if !(1..=PINS).contains(&pin) {
            return None;
        }
        let mut at = address;
        self.for_bridges_above(address, |bridge| {
            pin = (pin - 1 + at.device()) % PINS + 1;
            at = bridge;
        });
        Some((at, pin))
    }

    /// Whether a function may read and write memory.
    pub fn bus_master(&self, address: PciAddress) -> BusMaster {
        function::bus_master(&self.config, address)
    }

    /// Turns bus mastering off for every function but bridges, so that no device does DMA, and gives how many had it on.
    pub fn quiesce_all(&self) -> usize {
        let masters = self.functions.iter().filter(|function| {
            !function.is_bridge() && function::bus_master(&self.config, function.address) == BusMaster::On
        });
        masters
            .map(|function| function::set_bus_master(&self.config, function.address, BusMaster::Off))
            .count()
    }

    /// A function's capabilities.
    pub fn capabilities(&self, address: PciAddress) -> Vec<Capability> {
        capability::list(&self.config, address)
    }

    /// A function's extended capabilities.
    pub fn extended_capabilities(&self, address: PciAddress) -> Vec<ExtendedCapability> {
        capability::list_extended(&self.config, address)
    }

    fn for_bridges_above(&self, mut address: PciAddress, mut act: impl FnMut(PciAddress)) {
        // A path crosses each bus once at most, whatever bus numbers the bridges claim.
        for _ in 0..=u8::MAX {
            let Some(bridge) = self.bridge_above(address) else { return };
            act(bridge.address);
            address = bridge.address;
        }
    }
}

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
