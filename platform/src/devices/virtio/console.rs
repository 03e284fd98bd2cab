//! A console: bytes out.

use virtio_drivers::device::console::VirtIOConsole;
use virtio_iommu::bridge::virtio_drivers::IommuHal;
use virtio_iommu::dma_slot;

use super::{VirtioError, Wrapped, transport};
use crate::machine::Machine;
use crate::memory::virtio_hal::KernelHal;
use crate::pci::function::Function;

dma_slot!(
    /// The console.
    pub ConsoleSlot
);

/// The bounce pages that the console needs: its receive buffer, and what is sent at a time.
pub const BOUNCE_BYTES: usize = 16 * 1024;

/// A console. Its waits have no bound of their own: the harness's deadline is the bound.
pub struct Console {
    driver: VirtIOConsole<IommuHal<KernelHal, ConsoleSlot>, Wrapped<ConsoleSlot>>,
}

impl Console {
    /// Resets the device and sets its rings up through [`ConsoleSlot`].
    ///
    /// # Errors
    ///
    /// [`VirtioError`].
    pub fn new(machine: &Machine, function: &Function) -> Result<Self, VirtioError> {
        Ok(Self { driver: VirtIOConsole::new(transport(machine, function)?)? })
    }

    /// Writes `bytes`, at most a page of them and not none, and waits until the device took them.
    ///
    /// # Errors
    ///
    /// [`VirtioError`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), VirtioError> {
        Ok(self.driver.send_bytes(bytes)?)
    }
}
