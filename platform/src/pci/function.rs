//! One function: what it is, and its command register.

use alloc::vec::Vec;
use core::fmt;

use pci_types::{CommandRegister, HeaderType, PciAddress};

use super::bar::Bar;
use super::config::{ConfigSpace, offset};
use crate::range::PhysRange;

/// What kind of device a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// The class.
    pub base: u8,
    /// The subclass.
    pub sub: u8,
    /// The programming interface.
    pub interface: u8,
}

impl Class {
    const BRIDGE: u8 = 0x06;
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}{:02x}{:02x}", self.base, self.sub, self.interface)
    }
}

/// What a bridge passes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// The bus behind it; 0 when nobody numbered it.
    pub secondary_bus: u8,
    /// The last bus behind it.
    pub subordinate_bus: u8,
    /// The memory that it passes on.
    pub memory: Option<PhysRange>,
    /// The prefetchable memory that it passes on.
    pub prefetchable: Option<PhysRange>,
}

impl Bridge {
    /// Whether a bus is behind it.
    pub fn leads_to(&self, bus: u8) -> bool {
        self.secondary_bus != 0 && (self.secondary_bus..=self.subordinate_bus).contains(&bus)
    }
}

/// One function, as the scan found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Segment, bus, device and function number.
    pub address: PciAddress,
    /// The vendor's number.
    pub vendor: u16,
    /// The vendor's number for the device.
    pub device: u16,
    /// The revision.
    pub revision: u8,
    /// The class.
    pub class: Class,
    /// The layout of its configuration space.
    pub header: HeaderType,
    /// Subsystem vendor and subsystem; functions that are no bridges have them.
    pub subsystem: Option<(u16, u16)>,
    /// What it passes on, if it is a bridge to another bus.
    pub bridge: Option<Bridge>,
    /// Its BARs, those that are implemented.
    pub bars: Vec<Bar>,
}

impl Function {
    /// The BAR with an index, 0 to 5. The upper half of a 64-bit one has none of its own.
    pub fn bar(&self, index: u8) -> Option<&Bar> {
        self.bars.iter().find(|bar| bar.index == index)
    }

    /// Whether it is a bridge of any kind: to another bus, or of the host.
    pub fn is_bridge(&self) -> bool {
        self.class.base == Class::BRIDGE || self.bridge.is_some()
    }

    /// The number by which VIOT and requests of its bus name it: bus, device and function in 16 bits.
    pub fn bdf(&self) -> u16 {
        u16::from(self.address.bus()) << 8
            | u16::from(self.address.device()) << 3
            | u16::from(self.address.function())
    }
}

/// Whether a function answers accesses to its memory BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryDecode {
    /// It answers.
    On,
    /// It does not.
    Off,
}

/// Whether a function may read and write memory by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusMaster {
    /// It may.
    On,
    /// It may not.
    Off,
}

/// Whether a function pulls its interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineInterrupt {
    /// It may.
    On,
    /// It may not.
    Off,
}

/// The innermost bridge that leads to a function's bus.
pub(super) fn bridge_above(functions: &[Function], address: PciAddress) -> Option<&Function> {
    let leading = functions.iter().filter(|function| {
        let leads = function.bridge.is_some_and(|bridge| bridge.leads_to(address.bus()));
        leads && function.address.segment() == address.segment() && function.address.bus() != address.bus()
    });
    leading.max_by_key(|function| function.bridge.map(|bridge| bridge.secondary_bus))
}

/// Sets the memory decoding of one function.
pub(super) fn set_memory_decode(config: &impl ConfigSpace, address: PciAddress, state: MemoryDecode) {
    update_command(config, address, |command| {
        command.set(CommandRegister::MEMORY_ENABLE, state == MemoryDecode::On)
    });
}

/// Sets the bus mastering of one function.
pub(super) fn set_bus_master(config: &impl ConfigSpace, address: PciAddress, state: BusMaster) {
    update_command(config, address, |command| {
        command.set(CommandRegister::BUS_MASTER_ENABLE, state == BusMaster::On)
    });
}

/// Lets one function pull its interrupt line, or not.
pub(super) fn set_line_interrupt(config: &impl ConfigSpace, address: PciAddress, state: LineInterrupt) {
    update_command(config, address, |command| {
        command.set(CommandRegister::INTERRUPT_DISABLE, state == LineInterrupt::Off)
    });
}

/// The bus mastering of one function.
pub(super) fn bus_master(config: &impl ConfigSpace, address: PciAddress) -> BusMaster {
    if command(config, address).contains(CommandRegister::BUS_MASTER_ENABLE) {
        BusMaster::On
    } else {
        BusMaster::Off
    }
}

/// The command register.
pub(super) fn command(config: &impl ConfigSpace, address: PciAddress) -> CommandRegister {
    CommandRegister::from_bits_retain(config.read16(address, offset::COMMAND))
}

/// Writes the command register.
pub(super) fn set_command(config: &impl ConfigSpace, address: PciAddress, command: CommandRegister) {
    config.write16(address, offset::COMMAND, command.bits());
}

fn update_command(config: &impl ConfigSpace, address: PciAddress, change: impl FnOnce(&mut CommandRegister)) {
    let mut new = command(config, address);
    change(&mut new);
    set_command(config, address, new);
}

/// Runs `act` with the decoding of memory and I/O off, and puts the command register back.
pub(super) fn with_decode_off<T>(
    config: &impl ConfigSpace,
    address: PciAddress,
    act: impl FnOnce() -> T,
) -> T {
    let before = command(config, address);
    set_command(
        config,
        address,
        before.difference(CommandRegister::MEMORY_ENABLE | CommandRegister::IO_ENABLE),
    );
    let result = act();
    set_command(config, address, before);
    result
}
