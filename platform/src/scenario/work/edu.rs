//! `edu`. A round: random bytes out of fresh memory into the device, and back into other fresh memory.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec;

use fastrand::Rng;
use virtio_iommu::{CoherentMemory, DmaDevice, Endpoint};

use super::{Bench, Done, Work};
use crate::devices::edu::{self, BUFFER_BYTES, Edu};
use crate::iommu::KernelPlatform;
use crate::pci::PciAddress;
use crate::pci::function::BusMaster;
use crate::scenario::default::text;
use crate::scenario::setup::Opened;
use crate::scenario::show::Worker;
use crate::time::Deadline;

/// A transfer takes a tenth of a second of the machine's time.
const TIMEOUT_NS: u64 = 2_000_000_000;

struct EduWork {
    worker: Worker,
    address: PciAddress,
    endpoint: Endpoint<KernelPlatform>,
    edu: Edu,
    rng: Rng,
    transfer: Option<Transfer>,
    done: Done,
}

/// What a transfer is between.
struct Transfer {
    from: CoherentMemory,
    to: CoherentMemory,
    way: Way,
    due: Deadline,
}

/// Which half of a round is under way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

pub(super) fn open(bench: &Bench<'_>) -> Result<Box<dyn Work>, String> {
    let function = bench.find(edu::VENDOR, edu::DEVICE, "edu device")?;
    let Opened { id, domain, endpoint } = bench.open(function, 0, "edu")?;
    let registers = bench.machine.map_bar(function, 0).map_err(text)?;
    let edu = Edu::new(registers).map_err(text)?;
    bench.machine.pci.set_bus_master(function.address, BusMaster::On);
    Ok(Box::new(EduWork {
        worker: Worker { id, address: function.address, name: "edu", domain },
        address: function.address,
        endpoint,
        edu,
        rng: Rng::with_seed(bench.seed),
        transfer: None,
        done: Done::default(),
    }))
}

impl EduWork {
    fn begin(&mut self) -> Result<(), String> {
        let from = self.endpoint.alloc_coherent(BUFFER_BYTES).map_err(text)?;
        let to = self.endpoint.alloc_coherent(BUFFER_BYTES).map_err(text)?;
        let mut bytes = vec![0; BUFFER_BYTES];
        self.rng.fill(&mut bytes);
        for (index, byte) in bytes.into_iter().enumerate() {
            // SAFETY: inside the memory, which the device does not know of yet.
            unsafe { from.ptr().add(index).write_volatile(byte) };
        }
        self.edu.start_copy_in(from.iova().get(), 0, BUFFER_BYTES).map_err(text)?;
        self.transfer = Some(Transfer { from, to, way: Way::In, due: Deadline::after_ns(TIMEOUT_NS) });
        Ok(())
    }

    fn end(&mut self, from: CoherentMemory, to: CoherentMemory) -> Result<(), String> {
        // SAFETY: inside the memory, and the device is idle.
        let at = |memory: &CoherentMemory, index| unsafe { memory.ptr().add(index).read_volatile() };
        if let Some(index) = (0..BUFFER_BYTES).find(|index| at(&from, *index) != at(&to, *index)) {
            return Err(format!("byte {index:#x} did not come back"));
        }
        self.endpoint.free_coherent(from).map_err(text)?;
        self.endpoint.free_coherent(to).map_err(text)?;
        self.done.rounds += 1;
        Ok(())
    }
}

impl Work for EduWork {
    fn worker(&self) -> &Worker {
        &self.worker
    }

    fn done(&self) -> Done {
        self.done
    }

    fn detail(&self) -> String {
        format!("{BUFFER_BYTES} bytes out and in, every byte checked")
    }

    fn step(&mut self) -> Result<(), String> {
        let Some(mut transfer) = self.transfer.take() else { return self.begin() };
        let expired = transfer.due.expired();
        match (self.edu.is_idle(), transfer.way) {
            (true, Way::In) => {
                self.done.to_device += BUFFER_BYTES as u64;
                self.edu.start_copy_out(0, transfer.to.iova().get(), BUFFER_BYTES).map_err(text)?;
                transfer = Transfer { way: Way::Out, due: Deadline::after_ns(TIMEOUT_NS), ..transfer };
                self.transfer = Some(transfer);
                Ok(())
            }
            (true, Way::Out) => {
                self.done.from_device += BUFFER_BYTES as u64;
                self.end(transfer.from, transfer.to)
            }
            (false, _) if expired => Err("edu: a transfer does not end".into()),
            (false, _) => {
                self.transfer = Some(transfer);
                Ok(())
            }
        }
    }

    fn close(mut self: Box<Self>, bench: &Bench<'_>) -> Result<(), String> {
        // What the device still does, it may.
        self.edu.wait().map_err(text)?;
        bench.machine.pci.set_bus_master(self.address, BusMaster::Off);
        if let Some(Transfer { from, to, .. }) = self.transfer.take() {
            self.endpoint.free_coherent(from).map_err(text)?;
            self.endpoint.free_coherent(to).map_err(text)?;
        }
        self.endpoint.close().map_err(text)
    }
}
