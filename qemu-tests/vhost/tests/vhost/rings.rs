//! The guest: our driver, whose transport is the front end, and whose memory is the shared one.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use virtio_iommu::transport::{DeviceStatus, InterruptCause, QueueAddresses, Transport, TransportError};
use virtio_iommu::{DmaMemory, PhysAddr, Platform, SpinNotInInterrupts};
use virtio_iommu_vhost::CONFIG_LEN;
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

use crate::front_end::{Ring, Vmm};

/// The device's own configuration; the driver is not told of more.
const OWN_CONFIG: usize = 40;

/// A guest's kernel: its memory, and a clock.
#[derive(Clone)]
pub(crate) struct Guest {
    vmm: Arc<Vmm>,
    started: Instant,
}

impl Guest {
    pub(crate) fn new(vmm: &Arc<Vmm>) -> Self {
        Self { vmm: Arc::clone(vmm), started: Instant::now() }
    }
}

// SAFETY: zeroed memory that is mapped as long as the guest is, given out once: none comes back.
unsafe impl Platform for Guest {
    type Lock = SpinNotInInterrupts;

    fn dma_alloc(&self, len: usize, align: usize) -> Option<DmaMemory> {
        let phys = self.vmm.allocate(len as u64, align as u64)?;
        let ptr = NonNull::new(self.vmm.memory.get_host_address(GuestAddress(phys)).ok()?)?;
        Some(DmaMemory { phys: PhysAddr::new(phys), ptr, len })
    }

    unsafe fn dma_free(&self, _memory: DmaMemory, _align: usize) {}

    fn now_ns(&self) -> Option<u64> {
        u64::try_from(self.started.elapsed().as_nanos()).ok()
    }

    fn relax(&self) {
        thread::yield_now();
    }
}

/// The VMM's device, as its guest has it. It passes the configuration on as QEMU does: writes as the whole space, out
/// of a copy.
pub(crate) struct Bus {
    vmm: Arc<Vmm>,
    status: AtomicU8,
    features: AtomicU64,
    rings: Mutex<[Option<Ring>; 2]>,
    config: Mutex<Vec<u8>>,
}

impl Bus {
    pub(crate) fn new(vmm: &Arc<Vmm>) -> Self {
        Self {
            vmm: Arc::clone(vmm),
            status: AtomicU8::new(0),
            features: AtomicU64::new(0),
            rings: Mutex::new([None; 2]),
            config: Mutex::new(vec![0; CONFIG_LEN]),
        }
    }

    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], TransportError> {
        let needed = offset + N;
        if needed > OWN_CONFIG {
            return Err(TransportError::ConfigTooShort { needed });
        }
        let mut config = self.config.lock().unwrap();
        *config = self.vmm.read_config(0, CONFIG_LEN).unwrap();
        Ok(config[offset..needed].try_into().unwrap())
    }
}

impl Transport for Bus {
    fn device_features(&self) -> u64 {
        self.vmm.features()
    }

    fn set_driver_features(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.status.load(Ordering::Relaxed))
    }

    fn set_status(&self, status: DeviceStatus) {
        let before = DeviceStatus::from_bits_retain(self.status.swap(status.bits(), Ordering::Relaxed));
        let runs = |status: DeviceStatus| status.contains(DeviceStatus::DRIVER_OK);
        let mut rings = self.rings.lock().unwrap();
        match (runs(before), runs(status), *rings) {
            (false, true, [Some(requests), Some(events)]) => {
                self.vmm.start(self.features.load(Ordering::Relaxed), [requests, events]).unwrap();
            }
            (true, false, _) => {
                self.vmm.stop();
                *rings = [None; 2];
            }
            _ => {}
        }
    }

    fn config_generation(&self) -> u32 {
        0
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        self.read(offset).map(|[byte]| byte)
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        self.read(offset).map(u32::from_le_bytes)
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        let mut config = self.config.lock().unwrap();
        config[offset] = value;
        self.vmm.write_config(0, &config).unwrap();
        Ok(())
    }

    fn max_queue_size(&self, _queue: u16) -> u16 {
        256
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        let QueueAddresses { descriptors, driver_area, device_area } = addresses;
        let (available, used) = (driver_area.get(), device_area.get());
        let ring = Ring { size, descriptors: descriptors.get(), available, used };
        self.rings.lock().unwrap()[usize::from(queue)] = Some(ring);
        Ok(())
    }

    fn notify(&self, queue: u16) {
        self.vmm.kicks[usize::from(queue)].write(1).unwrap();
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        let called = self.vmm.calls.each_ref().map(|call| call.read().is_ok());
        InterruptCause { queue: called.contains(&true), config: false }
    }
}
