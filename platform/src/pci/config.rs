//! Access to configuration space, and the offsets of the registers that the kernel uses.

use alloc::vec::Vec;

use pci_types::PciAddress;

/// The number of bytes of a function's configuration space.
pub const CONFIG_BYTES: u16 = 4096;

/// Offsets of registers.
pub mod offset {
    /// Vendor, 16 bits; all ones where there is no function.
    pub const VENDOR: u16 = 0x00;
    /// Device, 16 bits.
    pub const DEVICE: u16 = 0x02;
    /// Command, 16 bits.
    pub const COMMAND: u16 = 0x04;
    /// Status, 16 bits.
    pub const STATUS: u16 = 0x06;
    /// Revision, 8 bits; interface, subclass and class follow.
    pub const REVISION: u16 = 0x08;
    /// Header type, 8 bits; the highest one marks a device of several functions.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// The first BAR.
    pub const BAR0: u16 = 0x10;
    /// A bridge's primary bus, 8 bits.
    pub const PRIMARY_BUS: u16 = 0x18;
    /// A bridge's secondary bus, 8 bits.
    pub const SECONDARY_BUS: u16 = 0x19;
    /// A bridge's last bus, 8 bits.
    pub const SUBORDINATE_BUS: u16 = 0x1a;
    /// A bridge's memory window: base, 16 bits; limit follows.
    pub const MEMORY_BASE: u16 = 0x20;
    /// A bridge's prefetchable memory window: base, 16 bits; limit follows.
    pub const PREFETCH_BASE: u16 = 0x24;
    /// Its base, upper 32 bits.
    pub const PREFETCH_BASE_UPPER: u16 = 0x28;
    /// Its limit, upper 32 bits.
    pub const PREFETCH_LIMIT_UPPER: u16 = 0x2c;
    /// Subsystem vendor, 16 bits; subsystem follows.
    pub const SUBSYSTEM: u16 = 0x2c;
    /// Where the list of capabilities begins, 8 bits.
    pub const CAPABILITIES: u16 = 0x34;
    /// The interrupt line that firmware gave, 8 bits.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// The pin that pulls it, 8 bits: 1 to 4, or 0 for none.
    pub const INTERRUPT_PIN: u16 = 0x3d;
    /// Where the list of extended capabilities begins.
    pub const EXTENDED_CAPABILITIES: u16 = 0x100;
}

/// The width of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Word,
    /// 32 bits.
    DoubleWord,
}

impl Width {
    /// The number of bytes.
    pub const fn bytes(self) -> u16 {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::DoubleWord => 4,
        }
    }

    /// What a read gives where nothing answers.
    pub const fn all_ones(self) -> u32 {
        match self {
            Self::Byte => 0xff,
            Self::Word => 0xffff,
            Self::DoubleWord => u32::MAX,
        }
    }
}

/// The buses of a segment that can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusRange {
    /// The segment.
    pub segment: u16,
    /// The first bus.
    pub first: u8,
    /// The last bus.
    pub last: u8,
}

/// A machine's configuration space.
///
/// Where no function answers, or the address cannot be reached, a read gives all ones and a write is lost, as on the bus.
/// An access is of its own width, so that a write to the command register leaves the status next to it alone.
pub trait ConfigSpace {
    /// Reads the register at `offset`, a multiple of the width below [`CONFIG_BYTES`].
    fn read(&self, function: PciAddress, offset: u16, width: Width) -> u32;

    /// Writes the register at `offset`, a multiple of the width below [`CONFIG_BYTES`].
    fn write(&self, function: PciAddress, offset: u16, width: Width, value: u32);

    /// The buses in reach.
    fn buses(&self) -> Vec<BusRange>;

    /// Reads 8 bits.
    fn read8(&self, function: PciAddress, offset: u16) -> u8 {
        self.read(function, offset, Width::Byte) as u8
    }

    /// Reads 16 bits.
    fn read16(&self, function: PciAddress, offset: u16) -> u16 {
        self.read(function, offset, Width::Word) as u16
    }

    /// Reads 32 bits.
    fn read32(&self, function: PciAddress, offset: u16) -> u32 {
        self.read(function, offset, Width::DoubleWord)
    }

    /// Writes 8 bits.
    fn write8(&self, function: PciAddress, offset: u16, value: u8) {
        self.write(function, offset, Width::Byte, value.into());
    }

    /// Writes 16 bits.
    fn write16(&self, function: PciAddress, offset: u16, value: u16) {
        self.write(function, offset, Width::Word, value.into());
    }

    /// Writes 32 bits.
    fn write32(&self, function: PciAddress, offset: u16, value: u32) {
        self.write(function, offset, Width::DoubleWord, value);
    }
}

impl<C: ConfigSpace + ?Sized> ConfigSpace for &C {
    fn read(&self, function: PciAddress, offset: u16, width: Width) -> u32 {
        (**self).read(function, offset, width)
    }

    fn write(&self, function: PciAddress, offset: u16, width: Width, value: u32) {
        (**self).write(function, offset, width, value);
    }

    fn buses(&self) -> Vec<BusRange> {
        (**self).buses()
    }
}
