//! PCI functions: what firmware would have done, by the two ports of configuration space.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use virtio_iommu::transport::pci::{Region, Regions, Structure, VirtioCapabilities};

use crate::mmio::Window;
use crate::wire::Wire;

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const COMMAND: u16 = 0x04;
const BAR0: u16 = 0x10;
const BARS: u8 = 6;

const MEMORY_DECODING: u32 = 1 << 1;
const BUS_MASTERING: u32 = 1 << 2;
/// Windows are whole pages of this process.
const PAGE: u64 = 0x1000;

/// A function on bus 0, with its BARs placed and decoding on. Its bus mastering starts off.
#[derive(Debug)]
pub struct Function {
    wire: Arc<Wire>,
    bdf: u16,
    bars: Vec<Bar>,
}

#[derive(Debug)]
struct Bar {
    index: u8,
    phys: u64,
    window: Window,
}

impl Function {
    /// Places the memory BARs of the function `bdf` from `next` on, which moves.
    pub(crate) fn set_up(wire: &Arc<Wire>, bdf: u16, next: &mut u64) -> Result<Self> {
        let mut function = Self { wire: Arc::clone(wire), bdf, bars: Vec::new() };
        let id = function.read(0);
        if id == u32::MAX {
            bail!("no PCI function {bdf:#x}");
        }
        function.write(COMMAND, 0);
        let mut index = 0;
        while index < BARS {
            index += function.place(index, next)?;
        }
        function.write(COMMAND, MEMORY_DECODING);
        Ok(function)
    }

    /// Places one BAR, and returns how many registers it takes.
    fn place(&mut self, index: u8, next: &mut u64) -> Result<u8> {
        let register = BAR0 + 4 * u16::from(index);
        let kind = self.read(register) & 0xf;
        if kind & 1 != 0 {
            return Ok(1);
        }
        let registers = if kind & 6 == 4 { 2 } else { 1 };
        self.write(register, u32::MAX);
        let mask = self.read(register) & !0xf;
        if mask == 0 {
            return Ok(registers);
        }
        let len = u64::from(mask.wrapping_neg());
        let phys = next.next_multiple_of(len.max(PAGE));
        self.write(register, phys as u32);
        if registers == 2 {
            self.write(register + 4, (phys >> 32) as u32);
        }
        *next = phys + len;
        let window = Window::new(Arc::clone(&self.wire), phys, len.max(PAGE) as usize)?;
        self.bars.push(Bar { index, phys, window });
        Ok(registers)
    }

    /// Reads a word of configuration space.
    pub fn read(&self, offset: u16) -> u32 {
        self.wire.read_selected((CONFIG_ADDRESS, self.select(offset)), CONFIG_DATA)
    }

    fn write(&self, offset: u16, value: u32) {
        self.wire.write_selected((CONFIG_ADDRESS, self.select(offset)), CONFIG_DATA, value);
    }

    fn select(&self, offset: u16) -> u32 {
        1 << 31 | u32::from(self.bdf) << 8 | u32::from(offset & 0xfc)
    }

    /// Lets the function do DMA.
    pub fn enable_bus_mastering(&self) {
        self.write(COMMAND, MEMORY_DECODING | BUS_MASTERING);
    }

    /// Keeps the function from doing DMA.
    pub fn disable_bus_mastering(&self) {
        self.write(COMMAND, MEMORY_DECODING);
    }

    /// Guest-physical address of a memory BAR.
    pub(crate) fn bar(&self, index: u8) -> Result<u64> {
        let bar = self.bars.iter().find(|bar| bar.index == index);
        Ok(bar.with_context(|| format!("function {:#x} has no memory BAR {index}", self.bdf))?.phys)
    }

    /// The structures of a virtio function, as the driver's transport wants them.
    pub(crate) fn virtio_regions(&self) -> Result<Regions> {
        let capabilities = VirtioCapabilities::read(|offset| self.read(offset));
        let capabilities = capabilities.map_err(|error| anyhow::anyhow!("{error}"))?;
        let device = capabilities.device.context("the IOMMU has no configuration of its own")?;
        Ok(Regions {
            common: self.region(capabilities.common)?,
            notify: self.region(capabilities.notify)?,
            notify_multiplier: capabilities.notify_multiplier,
            isr: self.region(capabilities.isr)?,
            device: self.region(device)?,
        })
    }

    fn region(&self, structure: Structure) -> Result<Region> {
        let bar = self.bars.iter().find(|bar| bar.index == structure.bar);
        let bar = bar.with_context(|| format!("no BAR {} for a virtio structure", structure.bar))?;
        let (offset, len) = (structure.offset as usize, structure.len as usize);
        let last = offset.checked_add(len).and_then(|end| bar.window.at(end.checked_sub(1)?));
        let start = bar.window.at(offset).filter(|_| last.is_some());
        let ptr = start.with_context(|| format!("{structure:?} does not lie in its BAR"))?;
        Ok(Region { ptr, len })
    }
}
