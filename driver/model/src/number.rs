//! Numbers of the virtio-iommu and virtio standards: feature bits, device status bits, request and flag values.
//!
//! They are written here a second time on purpose: the model shares no constant with any driver.

/// Feature masks (not bit numbers), PROTOCOL 1.3.
pub mod feature {
    /// `input_range` in the configuration is valid.
    pub const INPUT_RANGE: u64 = 1 << 0;
    /// `domain_range` in the configuration is valid.
    pub const DOMAIN_RANGE: u64 = 1 << 1;
    /// MAP and UNMAP can be used.
    pub const MAP_UNMAP: u64 = 1 << 2;
    /// When negotiated, unattached endpoints bypass. Superseded by [`BYPASS_CONFIG`].
    pub const BYPASS: u64 = 1 << 3;
    /// PROBE can be used.
    pub const PROBE: u64 = 1 << 4;
    /// The MMIO flag of MAP can be used.
    pub const MMIO: u64 = 1 << 5;
    /// `bypass` in the configuration and the bypass flag of ATTACH can be used.
    pub const BYPASS_CONFIG: u64 = 1 << 6;
    /// The draft's contexts: ATTACH_TABLE and what goes with it (PROTOCOL 5.8). Never in the default.
    pub const ATTACH_TABLE: u64 = 1 << 8;
    /// Indirect descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Notification suppression by index.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// The device accesses memory through the platform's translation.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// Packed rings, which the model does not implement and never offers.
    pub const RING_PACKED: u64 = 1 << 34;
    /// The device needs barriers of hardware strength.
    pub const ORDER_PLATFORM: u64 = 1 << 36;
    /// A single queue can be reset.
    pub const RING_RESET: u64 = 1 << 40;
}

/// Bits of the virtio device status field.
pub mod device_status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready: the device works.
    pub const DRIVER_OK: u8 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met an error that only a reset cures.
    pub const NEEDS_RESET: u8 = 0x40;
    /// The guest has given up.
    pub const FAILED: u8 = 0x80;
}

/// Flag bits of requests.
pub mod flag {
    /// ATTACH: the domain bypasses.
    pub const ATTACH_BYPASS: u32 = 1;
    /// ATTACH, of the draft: bits 2:1 say what anonymous traffic meets.
    pub const ATTACH_ANONYMOUS: u32 = 3 << 1;
    /// ATTACH_TABLE, DETACH and PAGE_RESP, of the draft: the PASID is valid.
    pub const PASID_VALID: u32 = 1;
    /// MAP: reads are allowed.
    pub const MAP_READ: u32 = 1;
    /// MAP: writes are allowed.
    pub const MAP_WRITE: u32 = 2;
    /// MAP: device registers, not memory.
    pub const MAP_MMIO: u32 = 4;
}

/// Index of the request queue.
pub const REQUEST_QUEUE: u16 = 0;
/// Index of the event queue.
pub const EVENT_QUEUE: u16 = 1;

pub(crate) const TYPE_ATTACH: u8 = 1;
pub(crate) const TYPE_DETACH: u8 = 2;
pub(crate) const TYPE_MAP: u8 = 3;
pub(crate) const TYPE_UNMAP: u8 = 4;
pub(crate) const TYPE_PROBE: u8 = 5;
pub(crate) const TYPE_ATTACH_TABLE: u8 = 6;
pub(crate) const TYPE_INVALIDATE: u8 = 7;
pub(crate) const TYPE_PAGE_RESP: u8 = 8;
pub(crate) const TYPE_MAP_CONTEXT: u8 = 0x43;
pub(crate) const TYPE_UNMAP_CONTEXT: u8 = 0x44;

/// Bytes of the readable part of the longest request, ATTACH_TABLE.
pub(crate) const LONGEST_REQUEST: usize = 84;
/// Bytes of the head, and of the tail.
pub(crate) const HEAD_LEN: u64 = 4;
pub(crate) const TAIL_LEN: u64 = 4;

/// Offset of `bypass` in the configuration space.
pub(crate) const CONFIG_BYPASS: usize = 36;
/// The whole configuration space.
pub(crate) const CONFIG_LEN: usize = 40;

/// Status byte of a request's tail, PROTOCOL 1.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Success.
    Ok = 0,
    /// Virtio communication error.
    IoErr = 1,
    /// Unsupported request.
    Unsupp = 2,
    /// Internal device error.
    DevErr = 3,
    /// Invalid parameters.
    Inval = 4,
    /// Parameters out of range.
    Range = 5,
    /// Entry not found.
    NoEnt = 6,
    /// Bad address.
    Fault = 7,
    /// Insufficient resources.
    NoMem = 8,
}
