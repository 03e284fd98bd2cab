//! The entropy source by this kernel's own driver. A round: one buffer of random bytes.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;

use virtio_iommu::Endpoint;
use virtio_iommu::transport::pci::PciTransport;

use super::{Bench, Done, Work};
use crate::devices::entropy::{BUFFER_BYTES, Entropy};
use crate::devices::virtio::{ENTROPY, VENDOR};
use crate::iommu::{self, KernelPlatform};
use crate::pci::PciAddress;
use crate::pci::function::BusMaster;
use crate::scenario::default::text;
use crate::scenario::setup::Opened;
use crate::scenario::show::{Worker, hex};

struct EntropyWork {
    worker: Worker,
    address: PciAddress,
    endpoint: Endpoint<KernelPlatform>,
    source: Entropy<PciTransport>,
    /// Whether the device has the buffer.
    asked: bool,
    last: [u8; BUFFER_BYTES],
    done: Done,
}

pub(super) fn open(bench: &Bench<'_>) -> Result<Box<dyn Work>, String> {
    let function = bench.find(VENDOR, ENTROPY, "entropy source")?;
    let Opened { id, domain, endpoint } = bench.open(function, 0, "entropy")?;
    let registers = iommu::transport(bench.machine, function).map_err(text)?;
    let source = Entropy::new(&endpoint, registers).map_err(text)?;
    bench.machine.pci.set_bus_master(function.address, BusMaster::On);
    Ok(Box::new(EntropyWork {
        worker: Worker { id, address: function.address, name: "virtio-rng", domain },
        address: function.address,
        endpoint,
        source,
        asked: false,
        last: [0; BUFFER_BYTES],
        done: Done::default(),
    }))
}

impl Work for EntropyWork {
    fn worker(&self) -> &Worker {
        &self.worker
    }

    fn done(&self) -> Done {
        self.done
    }

    fn detail(&self) -> String {
        format!("the last bytes begin {}", hex(&self.last[..8]))
    }

    fn step(&mut self) -> Result<(), String> {
        if !self.asked {
            self.asked = true;
            return self.source.start().map_err(text);
        }
        let mut bytes = [0; BUFFER_BYTES];
        let Some(len) = self.source.finish(&mut bytes).map_err(text)? else { return Ok(()) };
        self.asked = false;
        // Sixteen random bytes are neither zero nor what they were, but once in 2^127 times.
        let (new, old) = (&bytes[..len], &self.last[..len]);
        if len >= 16 && (new == old || new.iter().all(|byte| *byte == 0)) {
            return Err(format!("{len} bytes that are not random"));
        }
        self.last = bytes;
        self.done.rounds += 1;
        self.done.from_device += len as u64;
        Ok(())
    }

    fn close(self: Box<Self>, bench: &Bench<'_>) -> Result<(), String> {
        let Self { address, endpoint, source, .. } = *self;
        source.close(&endpoint).map_err(text)?;
        bench.machine.pci.set_bus_master(address, BusMaster::Off);
        endpoint.close().map_err(text)
    }
}
