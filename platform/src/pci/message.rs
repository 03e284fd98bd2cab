//! Messages instead of lines: what a function writes, and where, when it wants something (MSI and MSI-X).
//!
//! ```text
//! MSI     one message, in the function's configuration space
//! MSI-X   a table of them in one of its BARs, each with a mask
//! ```
//!
//! A message is a write to memory: it needs bus mastering, and an IOMMU translates its address. A function that sends
//! messages does not pull its line.

use core::fmt;

use super::capability;
use super::config::ConfigSpace;
use super::{Pci, PciAddress};
use crate::machine::{BarError, Machine};
use crate::mmio::Mmio;
use crate::pci::function::Function;

/// The capabilities.
const MSI: u8 = 0x05;
const MSI_X: u8 = 0x11;

/// The control register of both, and bits of MSI's: on, how many messages (of which it gets one), 64-bit addresses.
const CONTROL: u16 = 2;
const MSI_ENABLE: u16 = 1;
const MSI_COUNT: u16 = 7 << 4;
const MSI_64_BIT: u16 = 1 << 7;
const MSI_ADDRESS: u16 = 4;

/// Bits of MSI-X's: on, all masked, the number of entries less one. Then offset and BAR of the table.
const MSI_X_ENABLE: u16 = 1 << 15;
const MSI_X_MASK_ALL: u16 = 1 << 14;
const MSI_X_LEN: u16 = 0x7ff;
const MSI_X_TABLE: u16 = 4;
const MSI_X_BAR: u32 = 7;

/// An entry of the table: address, data, mask.
const ENTRY_BYTES: usize = 16;
const ENTRY_DATA: usize = 8;
const ENTRY_CONTROL: usize = 12;
const ENTRY_MASKED: u32 = 1;

/// What a function writes. Made by the interrupt controller; the address may then go through an IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Where, as the function has to write it.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// Messages that a function cannot send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MessageError {
    /// It has no such capability.
    Absent {
        /// The function.
        function: PciAddress,
        /// The capability's number.
        capability: u8,
    },
    /// It can write such a message nowhere, or not such data.
    Unsendable {
        /// The function.
        function: PciAddress,
        /// The message.
        message: Message,
    },
    /// Its table is not inside of its BAR.
    TableOutside {
        /// The function.
        function: PciAddress,
        /// The BAR.
        bar: u8,
        /// Where in it the table is.
        offset: u32,
    },
    /// Its table has no such entry.
    NoEntry {
        /// The function.
        function: PciAddress,
        /// The entry.
        index: u16,
    },
    /// The BAR with the table cannot be reached.
    Bar(BarError),
}

impl fmt::Display for MessageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent { function, capability } => {
                write!(f, "PCI function {function} has no capability {capability:#x}")
            }
            Self::Unsendable { function, message: Message { address, data } } => {
                write!(f, "PCI function {function} cannot write {data:#x} to {address:#x} as a message")
            }
            Self::TableOutside { function, bar, offset } => {
                write!(
                    f,
                    "PCI function {function} has its table of messages at {offset:#x}, outside of BAR {bar}"
                )
            }
            Self::NoEntry { function, index } => {
                write!(f, "PCI function {function} has no entry {index:#x} in its table of messages")
            }
            Self::Bar(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for MessageError {}

fn find<C: ConfigSpace>(pci: &Pci<C>, function: PciAddress, capability: u8) -> Result<u16, MessageError> {
    let all = capability::list(pci.config(), function);
    let found = all.into_iter().find(|one| one.id == capability);
    found.map(|one| one.offset).ok_or(MessageError::Absent { function, capability })
}

/// Lets a function send one message, by MSI.
///
/// # Errors
///
/// [`MessageError::Absent`] and [`MessageError::Unsendable`].
pub fn enable_msi<C: ConfigSpace>(
    pci: &Pci<C>,
    function: PciAddress,
    message: Message,
) -> Result<(), MessageError> {
    let (at, config) = (find(pci, function, MSI)?, pci.config());
    let control = config.read16(function, at + CONTROL) & !(MSI_ENABLE | MSI_COUNT);
    let wide = control & MSI_64_BIT != 0;
    let [low, high] = [message.address as u32, (message.address >> 32) as u32];
    let data = u16::try_from(message.data).ok().filter(|_| wide || high == 0);
    let data = data.ok_or(MessageError::Unsendable { function, message })?;
    config.write16(function, at + CONTROL, control);
    config.write32(function, at + MSI_ADDRESS, low);
    if wide {
        config.write32(function, at + MSI_ADDRESS + 4, high);
    }
    config.write16(function, at + MSI_ADDRESS + if wide { 8 } else { 4 }, data);
    config.write16(function, at + CONTROL, control | MSI_ENABLE);
    Ok(())
}

/// Stops it.
///
/// # Errors
///
/// [`MessageError::Absent`].
pub fn disable_msi<C: ConfigSpace>(pci: &Pci<C>, function: PciAddress) -> Result<(), MessageError> {
    let (at, config) = (find(pci, function, MSI)?, pci.config());
    let control = config.read16(function, at + CONTROL);
    config.write16(function, at + CONTROL, control & !MSI_ENABLE);
    Ok(())
}

/// A function's table of messages, each of which is sent for something else.
#[derive(Debug)]
pub struct MessageTable {
    function: PciAddress,
    entries: Mmio,
    /// Where in its BAR it begins.
    offset: usize,
    len: u16,
}

impl MessageTable {
    /// Turns MSI-X on, with every entry masked.
    ///
    /// # Errors
    ///
    /// [`MessageError`]; MSI-X stays as it was then.
    pub fn enable(machine: &Machine, function: &Function) -> Result<Self, MessageError> {
        let (address, config) = (function.address, machine.pci.config());
        let at = find(&machine.pci, address, MSI_X)?;
        let control = config.read16(address, at + CONTROL);
        let place = config.read32(address, at + MSI_X_TABLE);
        let (bar, offset) = ((place & MSI_X_BAR) as u8, place & !MSI_X_BAR);
        let entries = machine.map_bar(function, bar).map_err(MessageError::Bar)?;
        let len = (control & MSI_X_LEN) + 1;
        let end = usize::from(len) * ENTRY_BYTES + offset as usize;
        if end > entries.len_bytes() {
            return Err(MessageError::TableOutside { function: address, bar, offset });
        }
        let table = Self { function: address, entries, offset: offset as usize, len };
        // Masked as a whole until each one is.
        config.write16(address, at + CONTROL, control | MSI_X_ENABLE | MSI_X_MASK_ALL);
        (0..len).for_each(|index| table.write(index, ENTRY_CONTROL, ENTRY_MASKED));
        config.write16(address, at + CONTROL, (control | MSI_X_ENABLE) & !MSI_X_MASK_ALL);
        Ok(table)
    }

    /// Turns MSI-X off.
    ///
    /// # Errors
    ///
    /// [`MessageError::Absent`].
    pub fn disable(self, machine: &Machine) -> Result<(), MessageError> {
        let at = find(&machine.pci, self.function, MSI_X)?;
        let config = machine.pci.config();
        let control = config.read16(self.function, at + CONTROL);
        config.write16(self.function, at + CONTROL, control & !MSI_X_ENABLE);
        Ok(())
    }

    /// How many entries there are.
    pub fn entry_count(&self) -> u16 {
        self.len
    }

    /// Has an entry's message sent from now on.
    ///
    /// # Errors
    ///
    /// [`MessageError::NoEntry`].
    pub fn set(&self, index: u16, message: Message) -> Result<(), MessageError> {
        if index >= self.len {
            return Err(MessageError::NoEntry { function: self.function, index });
        }
        self.write(index, ENTRY_CONTROL, ENTRY_MASKED);
        self.write(index, 0, message.address as u32);
        self.write(index, 4, (message.address >> 32) as u32);
        self.write(index, ENTRY_DATA, message.data);
        self.write(index, ENTRY_CONTROL, 0);
        Ok(())
    }

    fn write(&self, index: u16, register: usize, value: u32) {
        self.entries.write32(self.offset + usize::from(index) * ENTRY_BYTES + register, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::config::offset;
    use crate::pci::fake::{FakeFunction, FakeSpace};

    const AT: u16 = 0x50;

    fn function() -> PciAddress {
        PciAddress::new(0, 0, 3, 0)
    }

    /// A function with an MSI capability whose control register holds `control`, and everything behind it can be written.
    fn space(control: u16) -> Pci<FakeSpace> {
        let registers = [0, 4, 8, 12].map(|register| AT + register);
        let function_with = FakeFunction::endpoint(1, 2)
            .with(offset::STATUS, &[0x10])
            .with(offset::CAPABILITIES, &[AT as u8])
            .with_register(registers[0], u32::from(MSI) | u32::from(control) << 16, 0x0071_0000)
            .with_register(registers[1], 0, u32::MAX)
            .with_register(registers[2], 0, u32::MAX)
            .with_register(registers[3], 0, u32::MAX);
        Pci::scan(FakeSpace::new([(function(), function_with)]))
    }

    fn words(pci: &Pci<FakeSpace>) -> [u32; 4] {
        [0, 4, 8, 12].map(|register| pci.config().read32(function(), AT + register))
    }

    #[test]
    fn a_wide_message_has_two_halves_and_one_count() {
        // It asks for eight messages, and was given two.
        let pci = space(MSI_64_BIT | 3 << 1 | 1 << 4);
        let message = Message { address: 0x1_0809_0040, data: 7 };
        assert_eq!(enable_msi(&pci, function(), message), Ok(()));
        assert_eq!(words(&pci), [0x0087_0005, 0x0809_0040, 1, 7]);
        assert_eq!(disable_msi(&pci, function()), Ok(()));
        assert_eq!(words(&pci)[0], 0x0086_0005);
    }

    #[test]
    fn what_a_function_cannot_write_is_refused() {
        let pci = space(0);
        let narrow = Message { address: 0xfee0_0000, data: 0x31 };
        assert_eq!(enable_msi(&pci, function(), narrow), Ok(()));
        assert_eq!(words(&pci), [0x0001_0005, 0xfee0_0000, 0x31, 0]);
        for message in [Message { address: 1 << 32, ..narrow }, Message { data: 0x1_0000, ..narrow }] {
            let refused = enable_msi(&pci, function(), message);
            assert_eq!(refused, Err(MessageError::Unsendable { function: function(), message }));
        }
        let other = PciAddress::new(0, 0, 4, 0);
        assert_eq!(
            enable_msi(&pci, other, narrow),
            Err(MessageError::Absent { function: other, capability: MSI })
        );
    }
}
