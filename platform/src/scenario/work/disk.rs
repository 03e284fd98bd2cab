//! The disk by `virtio-drivers`. A round: its first half read and digested, a part of its second half written and read
//! back.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use fastrand::Rng;
use sha2::{Digest, Sha256};

use super::{Bench, Done, Work};
use crate::devices::virtio::{self, BLOCK, Disk, DiskSlot, REQUEST_BYTES, Undroppable, VENDOR};
use crate::pci::function::{BusMaster, Function};
use crate::scenario::default::{
    DISK_BOUNCE_BYTES, DISK_HALF_BYTES, WRITTEN_BYTES, WRITTEN_SECTOR, WRITTEN_SEED, text,
};
use crate::scenario::setup::Opened;
use crate::scenario::show::{Worker, hex};
use crate::scenario::word;

const SECTOR_BYTES: usize = 512;

struct DiskWork {
    worker: Worker,
    function: Function,
    disk: Undroppable<Disk>,
    /// SHA-256 that the first half must have.
    expected: String,
    digest: Sha256,
    /// How much of the first half was read in this round.
    read_bytes: usize,
    written: Vec<u8>,
    buffer: Vec<u8>,
    done: Done,
}

pub(in crate::scenario) fn open(bench: &Bench<'_>) -> Result<Box<dyn Work>, String> {
    let function = bench.find(VENDOR, BLOCK, "disk")?;
    let expected = word(bench.info, "disk.sha256")?.to_string();
    let Opened { id, domain, endpoint } = bench.open(function, DISK_BOUNCE_BYTES, "disk")?;
    DiskSlot::fill(endpoint).map_err(|_| "its slot is filled already")?;
    let disk = Disk::new(bench.machine, function).map_err(text)?;
    bench.machine.pci.set_bus_master(function.address, BusMaster::On);
    let mut written = vec![0; WRITTEN_BYTES];
    Rng::with_seed(bench.seed ^ WRITTEN_SEED).fill(&mut written);
    Ok(Box::new(DiskWork {
        worker: Worker { id, address: function.address, name: "virtio-blk", domain },
        function: function.clone(),
        disk: Undroppable::new(disk),
        expected,
        digest: Sha256::new(),
        read_bytes: 0,
        written,
        buffer: vec![0; REQUEST_BYTES],
        done: Done::default(),
    }))
}

impl DiskWork {
    fn end_round(&mut self) -> Result<(), String> {
        self.read_bytes = 0;
        let digest = hex(&self.digest.finalize_reset());
        if digest != self.expected {
            return Err(format!("its first half has SHA-256 {digest} instead of {}", self.expected));
        }
        self.disk.write(WRITTEN_SECTOR, &self.written).map_err(text)?;
        self.done.to_device += self.written.len() as u64;
        self.buffer.fill(0);
        let back = &mut self.buffer[..WRITTEN_BYTES];
        self.disk.read(WRITTEN_SECTOR, back).map_err(text)?;
        self.done.from_device += back.len() as u64;
        if back != self.written {
            return Err(format!("what was written at sector {WRITTEN_SECTOR} does not read back"));
        }
        self.done.rounds += 1;
        Ok(())
    }
}

impl Work for DiskWork {
    fn worker(&self) -> &Worker {
        &self.worker
    }

    fn done(&self) -> Done {
        self.done
    }

    fn detail(&self) -> String {
        format!("SHA-256 {}", self.expected)
    }

    fn step(&mut self) -> Result<(), String> {
        if self.read_bytes == DISK_HALF_BYTES {
            return self.end_round();
        }
        self.disk.read(self.read_bytes / SECTOR_BYTES, &mut self.buffer).map_err(text)?;
        self.digest.update(&self.buffer);
        self.read_bytes += self.buffer.len();
        self.done.from_device += self.buffer.len() as u64;
        Ok(())
    }

    fn close(self: Box<Self>, bench: &Bench<'_>) -> Result<(), String> {
        let Self { function, disk, .. } = *self;
        // SAFETY: the slot's only driver, of this function; the slot was filled when it was opened.
        unsafe { virtio::close::<_, DiskSlot>(bench.machine, &function, disk) }
    }
}

// Each read is whole, and what is written fits one.
const _: () = assert!(DISK_HALF_BYTES.is_multiple_of(REQUEST_BYTES) && WRITTEN_BYTES <= REQUEST_BYTES);
