//! A driver that sends what it likes: rings that are in order, and requests that need not be.

use virtio_iommu_model::{
    Config, Device, Endpoint, GuestMemory, REQUEST_QUEUE, ReservedRegion, VecMemory, device_status,
};

use crate::session::ENDPOINTS;

/// Where memory begins.
pub const BASE: u64 = 0x1000_0000;
const BYTES: usize = 1 << 20;
/// Pages that tables may be in.
pub const TABLES: u64 = BASE + 0x8_0000;
/// How many they are.
pub const TABLE_PAGES: u64 = 16;

const PAGE: u64 = 4096;
const QUEUE_SIZE: u16 = 8;
const DESCRIPTORS: u64 = BASE;
const AVAILABLE: u64 = BASE + PAGE;
const USED: u64 = BASE + 2 * PAGE;
const REQUEST: u64 = BASE + 4 * PAGE;
const ANSWER: u64 = BASE + 8 * PAGE;
/// The longest readable part of a request.
pub const MAX_REQUEST: usize = 4 * PAGE as usize;
/// The longest writable part.
const MAX_ANSWER: usize = 0x2_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// What an answer's place holds before.
const UNWRITTEN: u8 = 0xee;

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What the used ring says.
    pub used_len: u32,
    /// The writable part.
    pub bytes: Vec<u8>,
}

impl Answer {
    /// The status, where the part is long enough for one and was written.
    pub fn status(&self) -> Option<u8> {
        let at = self.bytes.len().checked_sub(4)?;
        (self.used_len > 0).then(|| self.bytes[at])
    }

    /// Whether nothing was written.
    pub fn is_untouched(&self) -> bool {
        self.used_len == 0 && self.bytes.iter().all(|byte| *byte == UNWRITTEN)
    }
}

/// A device and its driver.
pub struct Guest {
    /// The device.
    pub device: Device,
    /// The memory of both.
    pub memory: VecMemory,
    sent: u16,
}

impl Guest {
    /// A device that is up, with these features of those that it offers.
    pub fn new(config: Config, features: u64) -> Self {
        let mut device = Device::new(config);
        for endpoint in ENDPOINTS {
            let reserved = [ReservedRegion::msi(0xfee0_0000, 0xfeef_ffff)].into();
            device.add_endpoint(Endpoint { reserved, ..Endpoint::new(endpoint.get()) });
        }
        let mut guest = Self { device, memory: VecMemory::new(BASE, BYTES), sent: 0 };
        guest.bring_up(features);
        guest
    }

    /// Resets the machine, and brings the device up again.
    pub fn restart(&mut self, features: u64) {
        self.device.system_reset();
        self.bring_up(features);
    }

    fn bring_up(&mut self, features: u64) {
        use device_status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
        self.sent = 0;
        self.put(AVAILABLE, &[0; 64]);
        self.put(USED, &[0; 128]);
        self.device.set_status(ACKNOWLEDGE | DRIVER);
        self.device.set_driver_features(features);
        self.device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let set = self.device.set_queue(REQUEST_QUEUE, QUEUE_SIZE, DESCRIPTORS, AVAILABLE, USED);
        assert_eq!(set, Ok(()));
        self.device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert!(self.device.is_running());
    }

    /// Writes memory; what is outside of it is passed over.
    pub fn put(&mut self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write(address, bytes);
    }

    fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let _ = self.memory.read(address, &mut bytes);
        bytes
    }

    /// Sends a request whose readable part is in two pieces, cut at `cut`, and whose writable part has `room` bytes.
    ///
    /// # Panics
    /// When it is not answered at once, or the device stops.
    pub fn send(&mut self, request: &[u8], cut: usize, room: usize) -> Answer {
        let request = &request[..request.len().min(MAX_REQUEST)];
        let room = room.min(MAX_ANSWER);
        self.put(REQUEST, request);
        self.put(ANSWER, &vec![UNWRITTEN; room]);
        let cut = cut.min(request.len());
        let pieces =
            [(REQUEST, cut, 0), (REQUEST + cut as u64, request.len() - cut, 0), (ANSWER, room, WRITE)];
        let pieces: Vec<_> = pieces.into_iter().filter(|(_, len, _)| *len > 0).collect();
        // A chain has a piece.
        if pieces.is_empty() {
            return Answer { used_len: 0, bytes: Vec::new() };
        }
        for (at, (address, len, flags)) in pieces.iter().enumerate() {
            let next = if at + 1 < pieces.len() { NEXT } else { 0 };
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&address.to_le_bytes());
            descriptor[8..12].copy_from_slice(&(*len as u32).to_le_bytes());
            descriptor[12..14].copy_from_slice(&(flags | next).to_le_bytes());
            descriptor[14..].copy_from_slice(&(at as u16 + 1).to_le_bytes());
            self.put(DESCRIPTORS + 16 * at as u64, &descriptor);
        }
        self.put(AVAILABLE + 4 + 2 * u64::from(self.sent % QUEUE_SIZE), &0u16.to_le_bytes());
        let entry = USED + 4 + 8 * u64::from(self.sent % QUEUE_SIZE);
        self.sent = self.sent.wrapping_add(1);
        self.put(AVAILABLE + 2, &self.sent.to_le_bytes());
        self.device.notify(REQUEST_QUEUE, &mut self.memory);
        assert!(self.device.is_running(), "the device stopped: {:?}", self.device.ring_error());
        assert_eq!(u16::from_le_bytes(self.get(USED + 2)), self.sent, "requests that were answered");
        assert_eq!(u32::from_le_bytes(self.get(entry)), 0, "the chain that was answered");
        let mut bytes = vec![0; room];
        let _ = self.memory.read(ANSWER, &mut bytes);
        Answer { used_len: u32::from_le_bytes(self.get(entry + 4)), bytes }
    }
}
