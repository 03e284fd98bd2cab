//! Unmodified `virtio-drivers` devices behind the IOMMU.

pub mod console;
pub mod net;

use alloc::string::{String, ToString};
use core::fmt;
use core::mem::ManuallyDrop;

use virtio_drivers::device::blk::{BlkReq, BlkResp, RespStatus, SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::bus::PciRoot;
use virtio_drivers::transport::pci::{PciTransport, VirtioPciError};
use virtio_iommu::bridge::virtio_drivers::{IommuHal, PlatformTransport, Slot};
use virtio_iommu::transport as own;
use virtio_iommu::{Endpoint, dma_slot};

use crate::iommu::{self, BringUpError, KernelPlatform};
use crate::machine::Machine;
use crate::memory::virtio_hal::KernelHal;
use crate::pci::function::{BusMaster, Function, MemoryDecode};
use crate::pci::virtio_drivers::{SegmentAccess, device_function};
use crate::time::Deadline;

dma_slot!(
    /// The disk.
    pub DiskSlot
);
dma_slot!(
    /// The source of entropy.
    pub EntropySlot
);

/// The vendor of virtio devices.
pub const VENDOR: u16 = 0x1af4;
/// The PCI device number of a modern block device.
pub const BLOCK: u16 = 0x1040 + DeviceType::Block as u16;
/// The PCI device number of a modern entropy source.
pub const ENTROPY: u16 = 0x1040 + DeviceType::EntropySource as u16;

/// The PCI device number of a modern network card.
pub const NETWORK: u16 = 0x1040 + DeviceType::Network as u16;
/// The PCI device number of a modern console.
pub const CONSOLE: u16 = 0x1040 + DeviceType::Console as u16;

/// How long a request may take, and a reset.
pub(super) const TIMEOUT_NS: u64 = 2_000_000_000;

/// What went wrong with a virtio device.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum VirtioError {
    /// Its registers could not be had.
    Transport(VirtioPciError),
    /// Its registers are not as they must be.
    Registers(BringUpError),
    /// Its driver gave up.
    Driver(virtio_drivers::Error),
    /// The device answered for a buffer that it does not have.
    StrayAnswer {
        /// The number that it gave.
        token: u16,
    },
    /// More bytes than a buffer holds.
    Length {
        /// As the device, or our own sender, says.
        len: usize,
    },
    /// The device does not come out of its reset. What it was given stays with it.
    NoReset {
        /// What its status reads.
        status: u8,
    },
    /// A request was not answered in time. The device keeps its buffers, and is not used any more.
    Timeout {
        /// The first sector.
        sector: usize,
    },
    /// A request failed.
    Status {
        /// The first sector.
        sector: usize,
        /// What the device said.
        status: RespStatus,
    },
}

impl fmt::Display for VirtioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transport(error) => write!(f, "virtio registers: {error}"),
            Self::Registers(error) => write!(f, "virtio registers: {error}"),
            Self::Driver(error) => write!(f, "virtio driver: {error}"),
            Self::StrayAnswer { token } => {
                write!(f, "virtio device: an answer for buffer {token:#x}, which it does not have")
            }
            Self::Length { len } => write!(f, "virtio device: {len:#x} bytes do not fit a buffer"),
            Self::NoReset { status } => write!(f, "virtio device: status {status:#x} after a reset"),
            Self::Timeout { sector } => write!(f, "disk: no answer for sector {sector:#x}"),
            Self::Status { sector, status } => write!(f, "disk: sector {sector:#x}: {status:?}"),
        }
    }
}

impl core::error::Error for VirtioError {}

impl From<virtio_drivers::Error> for VirtioError {
    fn from(error: virtio_drivers::Error) -> Self {
        Self::Driver(error)
    }
}

type Wrapped<S> = PlatformTransport<PciTransport, S>;

/// The transport of a function, with ACCESS_PLATFORM. Turns its memory decoding on; bus mastering stays.
fn transport<S: Slot>(machine: &Machine, function: &Function) -> Result<Wrapped<S>, VirtioError> {
    machine.pci.set_memory_decode(function.address, MemoryDecode::On);
    let access = SegmentAccess::new(machine.pci.config(), function.address.segment());
    let mut root = PciRoot::new(access);
    let inner = PciTransport::new::<KernelHal, _>(&mut root, device_function(function.address));
    Ok(PlatformTransport::new(inner.map_err(VirtioError::Transport)?))
}

/// A driver of the crate, once its device is started. Dropped, it would wait without a bound for the device's reset, so
/// that one whose device failed stays for good, with its rings; [`close`] ends the others.
pub type Undroppable<D> = ManuallyDrop<D>;

/// Resets a device, and waits until it is done.
///
/// # Errors
///
/// [`VirtioError`].
pub(super) fn reset(registers: &impl own::Transport) -> Result<(), VirtioError> {
    registers.set_status(own::DeviceStatus::empty());
    let mut deadline = Deadline::after_ns(TIMEOUT_NS);
    while !registers.status().is_empty() {
        if deadline.expired() {
            return Err(VirtioError::NoReset { status: registers.status().bits() });
        }
        core::hint::spin_loop();
    }
    Ok(())
}

/// Ends a device in order: resets it, turns its bus mastering off, drops its driver, which frees its rings, and detaches
/// its endpoint.
///
/// # Errors
///
/// What went wrong; driver and endpoint then stay as they are, for good.
///
/// # Safety
///
/// `driver` is the one of slot `S`, the only one, and drives `function`. The slot was filled with an endpoint of this
/// kernel.
pub unsafe fn close<D, S: Slot>(
    machine: &Machine,
    function: &Function,
    driver: Undroppable<D>,
) -> Result<(), String> {
    let registers = iommu::transport(machine, function).map_err(|error| error.to_string())?;
    reset(&registers).map_err(|error| error.to_string())?;
    machine.pci.set_bus_master(function.address, BusMaster::Off);
    drop(Undroppable::into_inner(driver));
    // SAFETY: of this type, by the caller's promise, and the driver is gone.
    let endpoint: Option<Endpoint<KernelPlatform>> = unsafe { S::cell().take() };
    endpoint.ok_or("its slot is empty")?.close().map_err(|error| error.to_string())
}

/// A disk. Requests have a deadline.
pub struct Disk {
    driver: VirtIOBlk<IommuHal<KernelHal, DiskSlot>, Wrapped<DiskSlot>>,
}

/// Bytes of one request: what the bounce pages take several of.
pub const REQUEST_BYTES: usize = 64 * 1024;

impl Disk {
    /// Resets the device and sets its ring up through [`DiskSlot`].
    ///
    /// # Errors
    ///
    /// [`VirtioError`].
    pub fn new(machine: &Machine, function: &Function) -> Result<Self, VirtioError> {
        Ok(Self { driver: VirtIOBlk::new(transport(machine, function)?)? })
    }

    /// The number of sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.driver.capacity()
    }

    /// Reads whole sectors.
    ///
    /// # Errors
    ///
    /// [`VirtioError`]; after a timeout the disk must be given up.
    pub fn read(&mut self, sector: usize, bytes: &mut [u8]) -> Result<(), VirtioError> {
        for (index, part) in bytes.chunks_mut(REQUEST_BYTES).enumerate() {
            let sector = sector + index * (REQUEST_BYTES / SECTOR_SIZE);
            let (mut request, mut answer) = (BlkReq::default(), BlkResp::default());
            // SAFETY: nobody touches the three before the request is completed; after a timeout they stay with
            // bounce pages, so that the device does not reach them, and the driver is not used any more.
            let token = unsafe { self.driver.read_blocks_nb(sector, &mut request, part, &mut answer) }?;
            self.wait(token, sector)?;
            // SAFETY: the same buffers.
            unsafe { self.driver.complete_read_blocks(token, &request, part, &mut answer) }?;
            check(sector, answer.status())?;
        }
        Ok(())
    }

    /// Writes whole sectors.
    ///
    /// # Errors
    ///
    /// [`VirtioError`]; after a timeout the disk must be given up.
    pub fn write(&mut self, sector: usize, bytes: &[u8]) -> Result<(), VirtioError> {
        for (index, part) in bytes.chunks(REQUEST_BYTES).enumerate() {
            let sector = sector + index * (REQUEST_BYTES / SECTOR_SIZE);
            let (mut request, mut answer) = (BlkReq::default(), BlkResp::default());
            // SAFETY: as in `read`.
            let token = unsafe { self.driver.write_blocks_nb(sector, &mut request, part, &mut answer) }?;
            self.wait(token, sector)?;
            // SAFETY: the same buffers.
            unsafe { self.driver.complete_write_blocks(token, &request, part, &mut answer) }?;
            check(sector, answer.status())?;
        }
        Ok(())
    }

    fn wait(&mut self, token: u16, sector: usize) -> Result<(), VirtioError> {
        let mut deadline = Deadline::after_ns(TIMEOUT_NS);
        while self.driver.peek_used() != Some(token) {
            if deadline.expired() {
                return Err(VirtioError::Timeout { sector });
            }
            core::hint::spin_loop();
        }
        Ok(())
    }
}

fn check(sector: usize, status: RespStatus) -> Result<(), VirtioError> {
    if status == RespStatus::OK { Ok(()) } else { Err(VirtioError::Status { sector, status }) }
}

/// A source of entropy. Its waits have no bound of their own: the harness's deadline is the bound.
pub struct Entropy {
    driver: VirtIORng<IommuHal<KernelHal, EntropySlot>, Wrapped<EntropySlot>>,
}

impl Entropy {
    /// Resets the device and sets its ring up through [`EntropySlot`].
    ///
    /// # Errors
    ///
    /// [`VirtioError`].
    pub fn new(machine: &Machine, function: &Function) -> Result<Self, VirtioError> {
        Ok(Self { driver: VirtIORng::new(transport(machine, function)?)? })
    }

    /// Fills some of `bytes` and says how many.
    ///
    /// # Errors
    ///
    /// [`VirtioError`].
    pub fn read(&mut self, bytes: &mut [u8]) -> Result<usize, VirtioError> {
        Ok(self.driver.request_entropy(bytes)?)
    }
}
