//! A configuration space in an array: registers with writable bits, as real functions have them.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::{Cell, RefCell};

use pci_types::PciAddress;

use super::config::{BusRange, CONFIG_BYTES, ConfigSpace, Width, offset};

pub(crate) const MEMORY_ENABLE: u16 = 2;
pub(crate) const BUS_MASTER: u16 = 4;

/// One function's registers.
#[derive(Clone)]
pub(crate) struct FakeFunction {
    bytes: Vec<u8>,
    writable: Vec<u8>,
}

impl FakeFunction {
    /// An endpoint whose command register can be written, and nothing else.
    pub(crate) fn endpoint(vendor: u16, device: u16) -> Self {
        let zeros = || vec![0; usize::from(CONFIG_BYTES)];
        let mut function = Self { bytes: zeros(), writable: zeros() };
        function.set(offset::VENDOR, &vendor.to_le_bytes());
        function.set(offset::DEVICE, &device.to_le_bytes());
        function.writable[usize::from(offset::COMMAND)] = 7;
        function
    }

    /// A bridge with bus numbers and a memory window in units of 1 MiB, as the registers hold it.
    pub(crate) fn bridge(secondary: u8, subordinate: u8, memory_base: u16, memory_limit: u16) -> Self {
        let mut function = Self::endpoint(0x1b36, 0x000c);
        function.set(offset::REVISION + 2, &[4, 6]);
        function.set(offset::HEADER_TYPE, &[1]);
        function.set(offset::SECONDARY_BUS, &[secondary, subordinate]);
        function.set(offset::MEMORY_BASE, &memory_base.to_le_bytes());
        function.set(offset::MEMORY_BASE + 2, &memory_limit.to_le_bytes());
        // A closed prefetchable window: the base is above the limit.
        function.set(offset::PREFETCH_BASE, &[0xf1, 0xff, 1, 0]);
        function
    }

    /// Sets bytes, writable or not.
    pub(crate) fn set(&mut self, at: u16, bytes: &[u8]) {
        self.bytes[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn with(mut self, at: u16, bytes: &[u8]) -> Self {
        self.set(at, bytes);
        self
    }

    /// A register of 32 bits with a value and writable bits.
    pub(crate) fn with_register(mut self, at: u16, value: u32, writable: u32) -> Self {
        self.set(at, &value.to_le_bytes());
        self.writable[usize::from(at)..][..4].copy_from_slice(&writable.to_le_bytes());
        self
    }

    pub(crate) fn with_bar32(self, index: u16, address: u32, len_bytes: u32) -> Self {
        self.with_register(offset::BAR0 + 4 * index, address, !(len_bytes - 1))
    }

    pub(crate) fn with_bar64(self, index: u16, address: u64, len_bytes: u64) -> Self {
        let (at, mask) = (offset::BAR0 + 4 * index, !(len_bytes - 1));
        self.with_register(at, address as u32 | 0xc, mask as u32).with_register(
            at + 4,
            (address >> 32) as u32,
            (mask >> 32) as u32,
        )
    }

    pub(crate) fn with_command(self, command: u16) -> Self {
        self.with(offset::COMMAND, &command.to_le_bytes())
    }

    fn read(&self, at: u16, width: Width) -> u32 {
        let bytes = &self.bytes[usize::from(at)..][..usize::from(width.bytes())];
        bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
    }
}

/// Some buses with functions.
pub(crate) struct FakeSpace {
    functions: RefCell<BTreeMap<PciAddress, FakeFunction>>,
    buses: Vec<BusRange>,
    /// Writes to BARs of functions that were decoding meanwhile.
    pub(crate) careless_writes: Cell<u32>,
}

impl FakeSpace {
    /// Segment 0 with all its buses.
    pub(crate) fn new(functions: impl IntoIterator<Item = (PciAddress, FakeFunction)>) -> Self {
        Self::with_buses(functions, &[BusRange { segment: 0, first: 0, last: 255 }])
    }

    pub(crate) fn with_buses(
        functions: impl IntoIterator<Item = (PciAddress, FakeFunction)>,
        buses: &[BusRange],
    ) -> Self {
        let functions = RefCell::new(functions.into_iter().collect());
        Self { functions, buses: buses.to_vec(), careless_writes: Cell::new(0) }
    }
}

impl ConfigSpace for FakeSpace {
    fn read(&self, function: PciAddress, at: u16, width: Width) -> u32 {
        self.functions.borrow().get(&function).map_or(width.all_ones(), |f| f.read(at, width))
    }

    fn write(&self, function: PciAddress, at: u16, width: Width, value: u32) {
        let mut functions = self.functions.borrow_mut();
        let Some(f) = functions.get_mut(&function) else { return };
        let is_bar = (offset::BAR0..offset::BAR0 + 24).contains(&at);
        if is_bar && f.read(offset::COMMAND, Width::Word) as u16 & MEMORY_ENABLE != 0 {
            self.careless_writes.set(self.careless_writes.get() + 1);
        }
        for (index, byte) in value.to_le_bytes().into_iter().take(usize::from(width.bytes())).enumerate() {
            let at = usize::from(at) + index;
            f.bytes[at] = f.bytes[at] & !f.writable[at] | byte & f.writable[at];
        }
    }

    fn buses(&self) -> Vec<BusRange> {
        self.buses.clone()
    }
}
