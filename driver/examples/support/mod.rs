//! A machine for the examples: memory, two devices, and the software IOMMU of the tests in front of them.
//!
//! A kernel has all this already, and writes the [`Platform`] only. Addresses in memory begin at [`MEMORY`], so that they
//! are not taken for those of this process.

mod transport;

use std::alloc::{Layout, alloc_zeroed};
use std::error::Error;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use virtio_iommu::{DmaMemory, EndpointId, Options, PhysAddr, Platform, SpinNotInInterrupts, Viommu};
use virtio_iommu_model::{
    Access, AccessError, Config, Device, Endpoint, GuestMemory, OutOfMemoryRange, Release,
};

/// The devices.
pub(crate) const DISK: EndpointId = EndpointId::pci(0, 0, 2, 0);
pub(crate) const NETWORK: EndpointId = EndpointId::pci(0, 0, 3, 0);

/// Where memory starts, and how much there is.
pub(crate) const MEMORY: u64 = 0x4000_0000;
const LEN: usize = 8 << 20;
const PAGE: usize = 4096;

/// The machine. Clones are handles to the same.
#[derive(Clone)]
pub(crate) struct Machine(Arc<Inner>);

struct Inner {
    device: Mutex<Device>,
    memory: Memory,
    used: AtomicUsize,
    started: Instant,
}

/// All of memory, for good.
#[derive(Clone, Copy)]
struct Memory(NonNull<u8>);

// SAFETY: the examples have a single thread.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn at(self, addr: u64, len: usize) -> Result<*mut u8, OutOfMemoryRange> {
        let outside = OutOfMemoryRange { addr, len_bytes: len as u64 };
        let offset =
            addr.checked_sub(MEMORY).and_then(|offset| usize::try_from(offset).ok()).ok_or(outside)?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= LEN);
        // SAFETY: inside of memory.
        if inside { Ok(unsafe { self.0.add(offset) }.as_ptr()) } else { Err(outside) }
    }
}

impl GuestMemory for Memory {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), OutOfMemoryRange> {
        let from = self.at(addr, buf.len())?;
        // SAFETY: inside of memory, and nobody else runs.
        unsafe { from.copy_to_nonoverlapping(buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    fn write(&mut self, addr: u64, data: &[u8]) -> Result<(), OutOfMemoryRange> {
        let to = self.at(addr, data.len())?;
        // SAFETY: as in `read`.
        unsafe { to.copy_from_nonoverlapping(data.as_ptr(), data.len()) };
        Ok(())
    }
}

impl Machine {
    /// A machine whose IOMMU has no driver yet, and the driver, up, with both devices known and in no domain.
    pub(crate) fn start() -> Result<(Self, Viommu<Self>), Box<dyn Error>> {
        Self::start_as(Config::default(), Options::default())
    }

    /// The same with another IOMMU, and other choices for its driver.
    pub(crate) fn start_as(config: Config, options: Options) -> Result<(Self, Viommu<Self>), Box<dyn Error>> {
        let mut device = Device::new(config);
        for endpoint in [DISK, NETWORK] {
            device.add_endpoint(Endpoint::x86(endpoint.get()));
        }
        // SAFETY: not empty.
        let memory = NonNull::new(unsafe { alloc_zeroed(Layout::from_size_align(LEN, PAGE)?) });
        let memory = Memory(memory.ok_or("no memory")?);
        let (used, started) = (AtomicUsize::new(0), Instant::now());
        let machine = Self(Arc::new(Inner { device: Mutex::new(device), memory, used, started }));
        let staged = Viommu::start(machine.clone(), machine.clone(), options)?;
        for endpoint in [DISK, NETWORK] {
            staged.introduce(endpoint)?;
        }
        Ok((machine, staged.go_live()?))
    }

    /// The IOMMU, as the other side of the bus.
    pub(crate) fn iommu(&self) -> MutexGuard<'_, Device> {
        self.0.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device reads memory.
    pub(crate) fn device_reads(
        &self,
        device: EndpointId,
        iova: u64,
        len: usize,
    ) -> Result<Vec<u8>, AccessError> {
        let mut bytes = vec![0; len];
        self.iommu().access(&mut self.0.memory.clone(), device.get(), iova, Access::Read(&mut bytes))?;
        Ok(bytes)
    }

    /// The IOMMU answers what it was made to hold back. Returns how many requests.
    pub(crate) fn answer(&self) -> usize {
        self.iommu().release(Release::All, &mut self.0.memory.clone())
    }

    /// A device writes memory.
    pub(crate) fn device_writes(
        &self,
        device: EndpointId,
        iova: u64,
        bytes: &[u8],
    ) -> Result<(), AccessError> {
        self.device_writes_in(device, None, iova, bytes)
    }

    /// A device writes memory through one of its contexts, if it has any.
    pub(crate) fn device_writes_in(
        &self,
        device: EndpointId,
        pasid: Option<u32>,
        iova: u64,
        bytes: &[u8],
    ) -> Result<(), AccessError> {
        let mut memory = self.0.memory;
        self.iommu().access_context(&mut memory, device.get(), pasid, iova, Access::Write(bytes))
    }
}

// SAFETY: pages of memory, zeroed, given out once: none come back.
unsafe impl Platform for Machine {
    type Lock = SpinNotInInterrupts;

    fn dma_alloc(&self, len: usize, align: usize) -> Option<DmaMemory> {
        let len = len.checked_next_multiple_of(align.max(PAGE))?;
        let offset = self.0.used.fetch_add(len, Ordering::Relaxed);
        let phys = MEMORY.checked_add(offset as u64)?;
        let ptr = NonNull::new(self.0.memory.at(phys, len).ok()?)?;
        (align <= PAGE).then_some(DmaMemory { phys: PhysAddr::new(phys), ptr, len })
    }

    unsafe fn dma_free(&self, _memory: DmaMemory, _align: usize) {}

    fn now_ns(&self) -> Option<u64> {
        Some(self.0.started.elapsed().as_nanos() as u64)
    }
}
