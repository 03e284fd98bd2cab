//! The IOMMU's interrupt: the handler acknowledges it and leaves a note, and who sleeps calls
//! [`Viommu::poll`](virtio_iommu::Viommu::poll) for it.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_iommu::{Interrupt, Viommu};

use super::topology::Place;
use super::{Iommu, KernelPlatform};
use crate::interrupts::{self, Claim, InterruptError, Line};
use crate::machine::Machine;
use crate::pci::function::LineInterrupt;

/// What the handler leaves for who sleeps.
#[derive(Debug, Default)]
pub struct Signal {
    due: AtomicBool,
    taken: AtomicU64,
}

impl Signal {
    /// Whether [`poll`](virtio_iommu::Viommu::poll) is due since the last call of this.
    pub fn take(&self) -> bool {
        self.due.swap(false, Ordering::Acquire)
    }

    /// How many interrupts were the IOMMU's.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Asks the device whether it interrupts, and leaves a note.
    fn look_at(&self, viommu: &Viommu<KernelPlatform>) -> Claim {
        match viommu.on_interrupt() {
            Interrupt::NotOurs => Claim::NotMine,
            Interrupt::Handled | Interrupt::Wake => {
                self.taken.fetch_add(1, Ordering::Relaxed);
                self.due.store(true, Ordering::Release);
                Claim::Mine
            }
        }
    }
}

impl Iommu {
    /// Connects the IOMMU's line, which stays so, and gives it with what its handler leaves. The interrupt controller is up.
    ///
    /// # Errors
    ///
    /// [`InterruptError`].
    pub fn connect_interrupt(&self, machine: &Machine) -> Result<(Line, Arc<Signal>), InterruptError> {
        let line = match self.place {
            Place::Pci(address) => machine.line_of_function(address)?,
            Place::Mmio(base) => machine.line_of_registers(base)?,
        };
        let signal = Arc::new(Signal::default());
        let (viommu, noted) = (self.viommu.clone(), Arc::clone(&signal));
        interrupts::connect(line, move || noted.look_at(&viommu))?;
        if let Place::Pci(address) = self.place {
            machine.pci.set_line_interrupt(address, LineInterrupt::On);
        }
        // What came before the line was on: one that comes by its edges does not tell of it again.
        signal.look_at(&self.viommu);
        Ok((line, signal))
    }
}
