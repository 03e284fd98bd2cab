//! The modern virtio-pci transport: one store per doorbell.
//!
//! A kernel either lets [`VirtioCapabilities::read`] find the structures in configuration space and maps the
//! BARs that they name, or parses the capabilities itself; both give [`Regions`], and those a [`PciTransport`].
//! The kernel's own PCI code stays in charge of BARs, decoding and bus mastering.

use super::register::Register;
use super::{DeviceStatus, Doorbell, InterruptCause, QueueAddresses, Transport, TransportError};
use core::fmt;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, Ordering};

/// The vendor of all virtio devices on PCI.
pub const VENDOR_ID: u16 = 0x1af4;
/// The virtio-iommu's PCI device ID.
pub const DEVICE_ID: u16 = 0x1057;

/// A structure that a virtio capability points at: some bytes inside a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Structure {
    /// The BAR's number, 0..=5.
    pub bar: u8,
    /// Where it starts in the BAR, in bytes.
    pub offset: u32,
    /// How long it is, in bytes.
    pub len: u32,
}

/// The structures of a virtio-pci function (virtio 1.4, virtio structure PCI capabilities).
///
/// The device's own numbers: whoever maps them checks that they lie inside the BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioCapabilities {
    /// Common configuration.
    pub common: Structure,
    /// Doorbells.
    pub notify: Structure,
    /// Bytes between the doorbells of neighbouring notify offsets.
    pub notify_multiplier: u32,
    /// Interrupt status.
    pub isr: Structure,
    /// The device's configuration. Absent on devices that have none.
    pub device: Option<Structure>,
}

/// The function is not a modern virtio device that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CapabilityError {
    /// The list of capabilities loops or is longer than configuration space can hold.
    Endless,
    /// A structure that every modern device has is missing: its `cfg_type`.
    Missing(u8),
}

impl fmt::Display for CapabilityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endless => f.write_str("the PCI capability list does not end"),
            Self::Missing(kind) => {
                write!(f, "virtio capability {kind} is missing: not a modern virtio device")
            }
        }
    }
}

impl core::error::Error for CapabilityError {}

const CAPABILITIES_POINTER: u16 = 0x34;
const VENDOR_SPECIFIC: u8 = 0x09;
/// Capabilities are at least four bytes in the 192 bytes after the header.
const MAX_CAPABILITIES: usize = 48;

const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;

impl VirtioCapabilities {
    /// Finds the structures by reading configuration space: `read(offset)` gives the aligned 32-bit word there,
    /// for offsets below 0x100. The first of each kind counts, as the device's preferred one.
    ///
    /// # Errors
    /// [`CapabilityError`], when the list does not end or something is missing.
    pub fn read(mut read: impl FnMut(u16) -> u32) -> Result<Self, CapabilityError> {
        let (mut common, mut notify, mut isr, mut device) = (None, None, None, None);
        let mut at = read(CAPABILITIES_POINTER) as u8 & !3;
        for _ in 0..MAX_CAPABILITIES {
            if at < 0x40 {
                let missing = |kind| CapabilityError::Missing(kind);
                let (notify, notify_multiplier) = notify.ok_or(missing(CFG_NOTIFY))?;
                return Ok(Self {
                    common: common.ok_or(missing(CFG_COMMON))?,
                    notify,
                    notify_multiplier,
                    isr: isr.ok_or(missing(CFG_ISR))?,
                    device,
                });
            }
            let at16 = u16::from(at);
            let [id, next, len, kind] = read(at16).to_le_bytes();
            if id == VENDOR_SPECIFIC && at16 + 16 <= 0x100 {
                let structure =
                    Structure { bar: read(at16 + 4) as u8, offset: read(at16 + 8), len: read(at16 + 12) };
                match kind {
                    // Reserved BAR numbers are for later versions: such a structure is to be passed over.
                    _ if structure.bar > 5 => {}
                    CFG_COMMON if common.is_none() => common = Some(structure),
                    CFG_NOTIFY if notify.is_none() && len >= 20 && at16 + 20 <= 0x100 => {
                        notify = Some((structure, read(at16 + 16)));
                    }
                    CFG_ISR if isr.is_none() => isr = Some(structure),
                    CFG_DEVICE if device.is_none() => device = Some(structure),
                    _ => {}
                }
            }
            at = next & !3;
        }
        Err(CapabilityError::Endless)
    }
}

/// Mapped registers: `len` bytes from `ptr`.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Where they are mapped.
    pub ptr: NonNull<u8>,
    /// How many bytes.
    pub len: usize,
}

impl Region {
    /// The address of an aligned register of `len` bytes at `offset`, if it lies inside.
    fn register(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        let address = self.ptr.addr().get().checked_add(offset)?;
        // SAFETY: inside the region, which is one mapping.
        (inside && address.is_multiple_of(len)).then(|| unsafe { self.ptr.add(offset) })
    }
}

/// The mapped structures of a function.
#[derive(Clone, Copy, Debug)]
pub struct Regions {
    /// Common configuration.
    pub common: Region,
    /// Doorbells.
    pub notify: Region,
    /// Bytes between the doorbells of neighbouring notify offsets.
    pub notify_multiplier: u32,
    /// Interrupt status.
    pub isr: Region,
    /// The device's configuration, 36 or 40 bytes.
    pub device: Region,
}

/// A region is too small for its registers, or not aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionError {
    /// Which region.
    pub region: &'static str,
    /// Its length in bytes.
    pub len: usize,
}

impl fmt::Display for RegionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the {} region of {:#x} bytes is too small or not aligned", self.region, self.len)
    }
}

impl core::error::Error for RegionError {}

/// The common configuration structure (virtio 1.4, common configuration structure layout).
struct Common {
    device_feature_select: Register<u32>,
    device_feature: Register<u32>,
    driver_feature_select: Register<u32>,
    driver_feature: Register<u32>,
    config_msix_vector: Register<u16>,
    device_status: Register<u8>,
    config_generation: Register<u8>,
    queue_select: Register<u16>,
    queue_size: Register<u16>,
    queue_msix_vector: Register<u16>,
    queue_enable: Register<u16>,
    queue_notify_off: Register<u16>,
    /// Low words; the high ones are the next four bytes.
    queue_desc: [Register<u32>; 2],
    queue_driver: [Register<u32>; 2],
    queue_device: [Register<u32>; 2],
    /// Devices without RING_RESET may end before it.
    queue_reset: Option<Register<u16>>,
}

/// The length without what later features added.
const COMMON_LEN: usize = 56;
const QUEUE_RESET: usize = 58;
/// What a vector register holds when nothing is routed.
const NO_VECTOR: u16 = 0xffff;
/// Requests and events.
const QUEUES: usize = 2;

impl Common {
    fn new(region: Region) -> Option<Self> {
        region.register(COMMON_LEN - 4, 4)?;
        macro_rules! at {
            ($offset:expr, $len:expr) => {
                // SAFETY: inside the region, which its maker promised to keep mapped.
                unsafe { Register::new(region.register($offset, $len)?) }
            };
        }
        Some(Self {
            device_feature_select: at!(0, 4),
            device_feature: at!(4, 4),
            driver_feature_select: at!(8, 4),
            driver_feature: at!(12, 4),
            config_msix_vector: at!(16, 2),
            device_status: at!(20, 1),
            config_generation: at!(21, 1),
            queue_select: at!(22, 2),
            queue_size: at!(24, 2),
            queue_msix_vector: at!(26, 2),
            queue_enable: at!(28, 2),
            queue_notify_off: at!(30, 2),
            queue_desc: [at!(32, 4), at!(36, 4)],
            queue_driver: [at!(40, 4), at!(44, 4)],
            queue_device: [at!(48, 4), at!(52, 4)],
            queue_reset: region.register(QUEUE_RESET, 2).map(|at| {
                // SAFETY: inside the region, which its maker promised to keep mapped.
                unsafe { Register::new(at) }
            }),
        })
    }
}

/// A modern virtio-iommu on PCI. But for its two queues nothing here is particular to that device: the first two queues
/// of any other modern function work too.
///
/// It routes no MSI-X vector: the device interrupts by its line. MSI-X of the function must stay disabled.
pub struct PciTransport {
    common: Common,
    notify: Region,
    notify_multiplier: u32,
    isr: Register<u8>,
    device: Region,
    /// Found when a queue is enabled, so that ringing is one store. Null before.
    doorbells: [AtomicPtr<u8>; QUEUES],
}

// SAFETY: the regions are device memory, which belongs to no thread; every access is one volatile load or
// store. Sequences that go wrong when interleaved give wrong values, not wrong memory.
unsafe impl Send for PciTransport {}
// SAFETY: as above.
unsafe impl Sync for PciTransport {}

impl PciTransport {
    /// A transport over mapped structures.
    ///
    /// # Errors
    /// [`RegionError`], when a region is too small for its registers.
    ///
    /// # Safety
    /// The regions are the mapped structures of one modern virtio function with memory decoding on, stay mapped
    /// as device memory while this exists, and nothing else accesses them.
    pub unsafe fn new(regions: Regions) -> Result<Self, RegionError> {
        let error = |region, len| RegionError { region, len };
        let common = Common::new(regions.common).ok_or(error("common configuration", regions.common.len))?;
        let isr = regions.isr.register(0, 1).ok_or(error("interrupt status", regions.isr.len))?;
        Ok(Self {
            common,
            notify: regions.notify,
            notify_multiplier: regions.notify_multiplier,
            // SAFETY: inside the region, which the caller keeps mapped.
            isr: unsafe { Register::new(isr) },
            device: regions.device,
            doorbells: [const { AtomicPtr::new(ptr::null_mut()) }; QUEUES],
        })
    }

    fn config<T>(&self, offset: usize, len: usize) -> Result<Register<T>, TransportError> {
        let needed = offset.saturating_add(len);
        let address = self.device.register(offset, len).ok_or(TransportError::ConfigTooShort { needed })?;
        // SAFETY: inside the device region, which the maker keeps mapped.
        Ok(unsafe { Register::new(address) })
    }

    /// The doorbell of the selected queue, checked against the notification region.
    fn doorbell(&self, queue: u16) -> Result<NonNull<u8>, TransportError> {
        let offset = u64::from(self.common.queue_notify_off.read()) * u64::from(self.notify_multiplier);
        let address = usize::try_from(offset).ok().and_then(|offset| self.notify.register(offset, 2));
        address.ok_or(TransportError::DoorbellOutside { queue, offset })
    }
}

fn write_u64(register: &[Register<u32>; 2], value: u64) {
    register[0].write(value as u32);
    register[1].write((value >> 32) as u32);
}

impl Transport for PciTransport {
    fn device_features(&self) -> u64 {
        let half = |select| {
            self.common.device_feature_select.write(select);
            u64::from(self.common.device_feature.read())
        };
        half(0) | half(1) << 32
    }

    fn set_driver_features(&self, features: u64) {
        for select in [0, 1] {
            self.common.driver_feature_select.write(select);
            self.common.driver_feature.write((features >> (32 * select)) as u32);
        }
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.common.device_status.read())
    }

    fn set_status(&self, status: DeviceStatus) {
        self.common.device_status.write(status.bits());
    }

    fn config_generation(&self) -> u32 {
        u32::from(self.common.config_generation.read())
    }

    fn read_config_u8(&self, offset: usize) -> Result<u8, TransportError> {
        Ok(self.config::<u8>(offset, 1)?.read())
    }

    fn read_config_u32(&self, offset: usize) -> Result<u32, TransportError> {
        Ok(self.config::<u32>(offset, 4)?.read())
    }

    fn write_config_u8(&self, offset: usize, value: u8) -> Result<(), TransportError> {
        self.config::<u8>(offset, 1)?.write(value);
        Ok(())
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.common.queue_select.write(queue);
        self.common.queue_size.read()
    }

    fn enable_queue(&self, queue: u16, size: u16, addresses: QueueAddresses) -> Result<(), TransportError> {
        let slot = usize::from(queue);
        if slot >= QUEUES {
            return Err(TransportError::NoQueue { queue });
        }
        self.common.queue_select.write(queue);
        let doorbell = self.doorbell(queue)?;
        self.common.queue_size.write(size);
        // No vector is routed to the device here: it interrupts by its line, if at all.
        self.common.config_msix_vector.write(NO_VECTOR);
        self.common.queue_msix_vector.write(NO_VECTOR);
        write_u64(&self.common.queue_desc, addresses.descriptors.get());
        write_u64(&self.common.queue_driver, addresses.driver_area.get());
        write_u64(&self.common.queue_device, addresses.device_area.get());
        self.common.queue_enable.write(1);
        self.doorbells[slot].store(doorbell.as_ptr(), Ordering::Release);
        Ok(())
    }

    fn can_reset_queues(&self) -> bool {
        self.common.queue_reset.is_some()
    }

    fn reset_queue(&self, queue: u16) -> Result<(), TransportError> {
        let register = self.common.queue_reset.as_ref().ok_or(TransportError::Unsupported)?;
        self.common.queue_select.write(queue);
        register.write(1);
        Ok(())
    }

    fn queue_is_reset(&self, queue: u16) -> Result<bool, TransportError> {
        let register = self.common.queue_reset.as_ref().ok_or(TransportError::Unsupported)?;
        self.common.queue_select.write(queue);
        // The device shows 1 until it is done, and the queue is disabled then.
        Ok(register.read() == 0 && self.common.queue_enable.read() == 0)
    }

    #[inline]
    fn notify(&self, queue: u16) {
        let doorbell =
            self.doorbells.get(usize::from(queue)).map(|doorbell| doorbell.load(Ordering::Acquire));
        if let Some(doorbell) = doorbell.and_then(NonNull::new) {
            // SAFETY: checked to be inside the notification region, which the maker keeps mapped.
            unsafe { Register::<u16>::new(doorbell) }.write(queue);
        }
    }

    fn doorbell(&self, queue: u16) -> Option<Doorbell> {
        let doorbell = self.doorbells.get(usize::from(queue))?.load(Ordering::Acquire);
        // SAFETY: checked to be inside the notification region, which the maker keeps mapped.
        NonNull::new(doorbell).map(|doorbell| unsafe { Doorbell::new(doorbell) })
    }

    fn acknowledge_interrupt(&self) -> InterruptCause {
        let isr = self.isr.read();
        InterruptCause { queue: isr & 1 != 0, config: isr & 2 != 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_memory::TestMemory;

    /// A configuration space with the capabilities of a virtio-pci function, in words.
    fn space(entries: &[(u8, [u32; 5])]) -> [u32; 64] {
        let mut words = [0; 64];
        words[0x34 / 4] = 0x40;
        for (index, (next, body)) in entries.iter().enumerate() {
            let at = (0x40 + 0x14 * index) / 4;
            words[at..at + 5].copy_from_slice(body);
            words[at] |= u32::from(*next) << 8;
        }
        words
    }

    fn read(words: &[u32; 64]) -> Result<VirtioCapabilities, CapabilityError> {
        VirtioCapabilities::read(|offset| words[usize::from(offset) / 4])
    }

    fn vendor(kind: u8, len: u8) -> u32 {
        u32::from_le_bytes([0x09, 0, len, kind])
    }

    #[test]
    fn structures_are_found() {
        let words = space(&[
            (0x54, [vendor(1, 16), 4, 0, 0x1000, 0]),
            (0x68, [vendor(3, 16), 4, 0x1000, 0x1000, 0]),
            (0x7c, [vendor(4, 16), 4, 0x2000, 0x1000, 0]),
            (0, [vendor(2, 20), 4, 0x3000, 0x1000, 4]),
        ]);
        let found = read(&words).unwrap();
        assert_eq!(found.common, Structure { bar: 4, offset: 0, len: 0x1000 });
        assert_eq!(found.device, Some(Structure { bar: 4, offset: 0x2000, len: 0x1000 }));
        assert_eq!((found.notify.offset, found.notify_multiplier), (0x3000, 4));
    }

    #[test]
    fn a_looping_list_ends() {
        let words = space(&[(0x40, [vendor(1, 16), 0, 0, 0x1000, 0])]);
        assert_eq!(read(&words), Err(CapabilityError::Endless));
    }

    #[test]
    fn what_is_missing_is_named() {
        let words = space(&[(0, [vendor(1, 16), 0, 0, 0x1000, 0])]);
        assert_eq!(read(&words), Err(CapabilityError::Missing(2)));
        assert_eq!(read(&[0; 64]), Err(CapabilityError::Missing(2)));
        let bad = space(&[(0, [vendor(1, 16), 7, 0, 0x1000, 0])]);
        assert_eq!(read(&bad), Err(CapabilityError::Missing(2)), "a reserved BAR is passed over");
    }

    #[test]
    fn a_capability_at_the_end_of_the_space_is_not_read_past_it() {
        let mut words = [0; 64];
        words[0x34 / 4] = 0xfc;
        words[0xfc / 4] = vendor(1, 16);
        assert_eq!(read(&words), Err(CapabilityError::Missing(2)));
    }

    fn region(len: usize) -> Region {
        let memory = TestMemory::leak(len);
        Region { ptr: memory.ptr, len: memory.len }
    }

    fn regions(notify_len: usize) -> Regions {
        Regions {
            common: region(56),
            notify: region(notify_len),
            notify_multiplier: 4,
            isr: region(1),
            device: region(40),
        }
    }

    #[test]
    fn a_doorbell_outside_its_region_is_refused() {
        let regions = regions(8);
        // SAFETY: plain memory that stays.
        let transport = unsafe { PciTransport::new(regions) }.unwrap();
        // SAFETY: inside the common region.
        unsafe { regions.common.ptr.add(30).cast::<u16>().write(2) };
        let zero = PhysAddr::new(0);
        let addresses = QueueAddresses { descriptors: zero, driver_area: zero, device_area: zero };
        let error = transport.enable_queue(0, 64, addresses).unwrap_err();
        assert_eq!(error, TransportError::DoorbellOutside { queue: 0, offset: 8 });
        let error = transport.enable_queue(2, 64, addresses).unwrap_err();
        assert_eq!(error, TransportError::NoQueue { queue: 2 });
    }

    /// Fails when a queue's reset is offered where its register is missing, written to another queue, or taken for done
    /// before the device says so in both registers.
    #[test]
    fn a_queue_is_reset_by_its_register() {
        let mut regions = regions(8);
        // SAFETY: plain memory that stays.
        let transport = unsafe { PciTransport::new(regions) }.unwrap();
        assert!(!transport.can_reset_queues(), "56 bytes, as before virtio 1.2");
        assert_eq!(transport.reset_queue(0), Err(TransportError::Unsupported));
        assert_eq!(transport.queue_is_reset(0), Err(TransportError::Unsupported));

        regions.common = region(64);
        // SAFETY: plain memory that stays.
        let transport = unsafe { PciTransport::new(regions) }.unwrap();
        // SAFETY: inside the common region.
        let register = |offset| unsafe { regions.common.ptr.add(offset) }.cast::<u16>();
        let (select, enable, reset) = (register(22), register(28), register(58));
        // SAFETY: aligned, and nothing else accesses it.
        let write = |register: NonNull<u16>, value: u16| unsafe { register.write_volatile(value) };
        // SAFETY: as above.
        let read = |register: NonNull<u16>| unsafe { register.read_volatile() };
        assert!(transport.can_reset_queues());
        write(enable, 1);
        transport.reset_queue(1).unwrap();
        assert_eq!((read(select), read(reset), read(enable)), (1, 1, 1));
        assert_eq!(transport.queue_is_reset(1), Ok(false), "under way");
        write(reset, 0);
        assert_eq!(transport.queue_is_reset(1), Ok(false), "not disabled yet");
        write(enable, 0);
        write(select, 0);
        assert_eq!((transport.queue_is_reset(1), read(select)), (Ok(true), 1));
    }

    #[test]
    fn config_is_bounded_by_its_region() {
        // SAFETY: plain memory that stays.
        let transport = unsafe { PciTransport::new(regions(8)) }.unwrap();
        assert_eq!(transport.read_config_u32(36), Ok(0));
        assert_eq!(transport.read_config_u32(40), Err(TransportError::ConfigTooShort { needed: 44 }));
        assert!(transport.read_config_u8(usize::MAX).is_err());
    }

    #[test]
    fn regions_that_are_too_small_are_refused() {
        let mut small = regions(8);
        small.common.len = 52;
        // SAFETY: plain memory that stays.
        let error = unsafe { PciTransport::new(small) }.err().unwrap();
        assert_eq!(error, RegionError { region: "common configuration", len: 52 });
    }

    use crate::addr::PhysAddr;
}
