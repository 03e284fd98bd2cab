//! The interrupt controller: a GICv3, with its ITS where there is one.
//!
//! ```text
//! shared interrupts (SPI)     PCI's INTx lines, the lines of virtio-mmio   distributor
//! own interrupts (PPI, SGI)   each CPU's                                   redistributor
//! messages (LPI)              what endpoints write: MSI, MSI-X             ITS, redistributor, tables in memory
//! ```
//!
//! Everything has one priority and comes to the first CPU, at EL1, in non-secure group 1.

mod cpu_interface;
mod distributor;
mod error;
mod its;
mod messages;
mod redistributor;

use alloc::vec::Vec;
use core::mem::ManuallyDrop;

use virtio_iommu::topology::fdt::{IommuMap, Phandle};

use super::cpus;
use crate::firmware::device_tree::pci::HostBridge;
use crate::firmware::device_tree::{DeviceTree, DeviceTreeError};
use crate::interrupts::Line;
use crate::memory::dma::DmaPages;
use crate::memory::map_registers;
use crate::pci::message::Message;
use crate::range::PhysRange;
use distributor::Distributor;
pub use error::GicError;
use messages::Messages;
use redistributor::Redistributor;

pub(crate) use cpu_interface::{acknowledge, end};

/// How long a register may take to follow.
const REGISTER_TIMEOUT_NS: u64 = 1_000_000_000;

const COMPATIBLE: &str = "arm,gic-v3";
const ITS_COMPATIBLE: &str = "arm,gic-v3-its";
/// What a PCI host bridge says about the messages of its functions, in the form of `iommu-map`: which ITS takes them, and
/// by which numbers it knows the functions.
const MESSAGE_MAP: &str = "msi-map";
const MESSAGE_MASK: &str = "msi-map-mask";

/// Memory that the controller was given. It is never freed: a controller that could not be started may have begun to use it.
type Given = ManuallyDrop<DmaPages>;

/// Takes zeroed frames for the controller, at a multiple of `align` frames.
fn give(count: usize, align: usize) -> Result<Given, GicError> {
    DmaPages::allocate_aligned(count, align).map(ManuallyDrop::new).map_err(GicError::Memory)
}

/// The controller, at work.
#[derive(Debug)]
pub struct Gic {
    distributor: Distributor,
    redistributors: Vec<PhysRange>,
    /// The CPU that takes everything: the first one.
    affinity: u64,
    /// Why there are no messages, where there are none.
    messages: Result<Messages, GicError>,
    /// The ITS's node.
    its: Option<Phandle>,
    /// For each segment, where the messages of its functions go.
    routes: Vec<(u16, IommuMap<'static>)>,
}

impl Gic {
    /// Starts the controller that the device tree names, with everything off. This CPU is the one that takes interrupts.
    ///
    /// # Errors
    ///
    /// [`GicError`]. Without an ITS, or with one that cannot be used, there are no messages, and that is no error.
    pub fn start(tree: &DeviceTree<'_>, bridges: &[HostBridge<'static>]) -> Result<Self, GicError> {
        let node = tree.compatible(COMPATIBLE).next();
        let node = node.ok_or(GicError::Tree(DeviceTreeError::Absent { compatible: COMPATIBLE }))?;
        let registers = node.registers().map_err(GicError::Tree)?;
        let regions = node.cell("#redistributor-regions").unwrap_or(1) as usize;
        let Some((distributor, redistributors)) =
            registers.split_first().filter(|(_, rest)| rest.len() >= regions)
        else {
            return Err(GicError::Tree(node.wrong("reg", "names no distributor and redistributors")));
        };
        let redistributors = redistributors[..regions].to_vec();
        let affinity = cpus::own_id();

        if distributor.len_bytes() < distributor::REGISTER_BYTES {
            return Err(GicError::TooFewRegisters { range: *distributor });
        }
        // SAFETY: the device tree says that these are the distributor's registers.
        let registers =
            unsafe { map_registers(distributor.start(), distributor.len_bytes()) }.map_err(GicError::Map)?;
        let distributor = Distributor::start(registers)?;
        let redistributor = Redistributor::find(&redistributors, affinity)?;
        redistributor.start()?;
        cpu_interface::init();

        let its = tree.compatible(ITS_COMPATIBLE).next();
        let place = its.as_ref().and_then(|node| node.registers().ok()?.first().copied());
        let messages = Messages::start(distributor.message_id_bits(), place, &redistributor);
        let its = its.and_then(|node| node.phandle()).map(Phandle::new);
        let routes = bridges.iter().filter_map(route).collect();
        Ok(Self { distributor, redistributors, affinity, messages, its, routes })
    }

    /// Whether this CPU is the one that takes interrupts.
    pub fn is_own_cpu(&self) -> bool {
        cpus::own_id() == self.affinity
    }

    /// Lets an interrupt come, to the CPU that takes them: a shared one, or one of its own. Not to be called by handlers.
    ///
    /// # Errors
    ///
    /// [`GicError`].
    pub fn enable(&self, line: Line) -> Result<(), GicError> {
        if line.number < distributor::FIRST_SHARED {
            Redistributor::find(&self.redistributors, self.affinity)?.enable_own(line.number);
            return Ok(());
        }
        if !self.distributor.has(line.number) {
            return Err(GicError::NoInterrupt { number: line.number });
        }
        self.distributor.enable(line, self.affinity);
        Ok(())
    }

    /// Stops a shared interrupt.
    pub fn disable(&self, number: u32) {
        if self.distributor.has(number) {
            self.distributor.disable(number);
        }
    }

    /// The message by which a function says that one of its events happened, and the interrupt that it raises.
    ///
    /// # Errors
    ///
    /// [`GicError`], also the one for which there are no messages at all.
    pub fn message(&self, segment: u16, requester: u16, event: u32) -> Result<(u32, Message), GicError> {
        let messages = self.messages.as_ref().map_err(GicError::clone)?;
        let route = self.routes.iter().find(|(of, _)| *of == segment);
        let device = route
            .and_then(|(_, map)| map.endpoint_of(requester.into()))
            .filter(|(its, _)| Some(*its) == self.its)
            .ok_or(GicError::NoRoute { segment, requester })?;
        messages.allocate(device.1.get(), event)
    }
}

/// What a bridge says about messages. One that is broken says nothing.
fn route(bridge: &HostBridge<'static>) -> Option<(u16, IommuMap<'static>)> {
    let (map, mask) = (bridge.node.bytes(MESSAGE_MAP)?, bridge.node.bytes(MESSAGE_MASK));
    match IommuMap::new(map, mask) {
        Ok(map) => Some((bridge.area.segment, map)),
        Err(error) => {
            log::warn!("{}: {MESSAGE_MAP} is broken: {error}", bridge.node.name());
            None
        }
    }
}
