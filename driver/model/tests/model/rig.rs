//! A tiny driver's side: memory, rings, and requests as raw bytes.

use virtio_iommu_model::{
    Config, Device, EVENT_QUEUE, Endpoint, GuestMemory, REQUEST_QUEUE, VecMemory, device_status,
};

/// Where the tests' memory starts.
pub(crate) const BASE: u64 = 0x1000_0000;
/// Free memory for DMA.
pub(crate) const BUFFERS: u64 = BASE + 0x10_0000;
/// An endpoint that every rig has.
pub(crate) const EP: u32 = 8;
/// Another one.
pub(crate) const EP2: u32 = 9;

/// One descriptor: address, length, flags.
pub(crate) type Piece = (u64, u32, u16);
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Addresses of one queue, and how far the driver got.
pub(crate) struct Queue {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) next_avail: u16,
    pub(crate) seen_used: u16,
}

impl Queue {
    fn new(index: u16, size: u16, at: u64) -> Self {
        Self { index, size, desc: at, avail: at + 0x4000, used: at + 0x8000, next_avail: 0, seen_used: 0 }
    }
}

/// A device, its memory, and a driver that has brought it up.
pub(crate) struct Rig {
    pub(crate) device: Device,
    pub(crate) mem: VecMemory,
    pub(crate) requests: Queue,
    pub(crate) events: Queue,
}

impl Rig {
    pub(crate) fn new(config: Config) -> Self {
        let features = config.features;
        Self::with_features(config, features)
    }

    /// A rig with granule 1, as the standard's examples have.
    pub(crate) fn byte_granule() -> Self {
        Self::new(Config { page_size_mask: !0, ..Config::default() })
    }

    pub(crate) fn with_features(config: Config, features: u64) -> Self {
        let mut device = Device::new(config);
        device.add_endpoint(Endpoint::new(EP));
        device.add_endpoint(Endpoint::new(EP2));
        let mut rig = Self {
            device,
            mem: VecMemory::new(BASE, 0x20_0000),
            requests: Queue::new(REQUEST_QUEUE, 256, BASE),
            events: Queue::new(EVENT_QUEUE, 256, BASE + 0x1_0000),
        };
        rig.bring_up(features);
        rig
    }

    /// Negotiates and sets up both queues, with a zeroed memory for them.
    pub(crate) fn bring_up(&mut self, features: u64) {
        use device_status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
        self.mem.bytes_mut()[..0x2_0000].fill(0);
        self.device.set_status(ACKNOWLEDGE);
        self.device.set_status(ACKNOWLEDGE | DRIVER);
        self.device.set_driver_features(features);
        self.device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(self.device.status() & FEATURES_OK, 0);
        for queue in [&mut self.requests, &mut self.events] {
            (queue.next_avail, queue.seen_used) = (0, 0);
            self.device.set_queue(queue.index, queue.size, queue.desc, queue.avail, queue.used).unwrap();
        }
        self.device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    pub(crate) fn queue(&mut self, index: u16) -> &mut Queue {
        if index == REQUEST_QUEUE { &mut self.requests } else { &mut self.events }
    }

    pub(crate) fn poke(&mut self, addr: u64, bytes: &[u8]) {
        self.mem.write(addr, bytes).unwrap();
    }

    pub(crate) fn peek<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.mem.read(addr, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn peek_u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.peek(addr))
    }

    pub(crate) fn peek_u32(&self, addr: u64) -> u32 {
        u32::from_le_bytes(self.peek(addr))
    }

    pub(crate) fn write_desc(&mut self, table: u64, index: u16, (addr, len, flags): Piece, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.poke(table + 16 * u64::from(index), &bytes);
    }

    /// Puts a chain into descriptors from `head` on, NEXT flags added.
    pub(crate) fn write_chain(&mut self, queue: u16, head: u16, pieces: &[Piece]) {
        let table = self.queue(queue).desc;
        for (offset, (addr, len, flags)) in pieces.iter().enumerate() {
            let index = head + offset as u16;
            let next = if offset + 1 < pieces.len() { NEXT } else { 0 };
            self.write_desc(table, index, (*addr, *len, flags | next), index + 1);
        }
    }

    pub(crate) fn make_available(&mut self, queue: u16, head: u16) {
        let queue = self.queue(queue);
        let slot = queue.avail + 4 + 2 * u64::from(queue.next_avail % queue.size);
        queue.next_avail = queue.next_avail.wrapping_add(1);
        let (index, at) = (queue.next_avail, queue.avail + 2);
        self.poke(slot, &head.to_le_bytes());
        self.poke(at, &index.to_le_bytes());
    }

    pub(crate) fn kick(&mut self, queue: u16) {
        self.device.notify(queue, &mut self.mem);
    }

    /// Next used element (id, length) that was not seen.
    pub(crate) fn take_used(&mut self, queue: u16) -> Option<(u32, u32)> {
        let queue = self.queue(queue);
        let (used, seen, size) = (queue.used, queue.seen_used, queue.size);
        if self.peek_u16(used + 2) == seen {
            return None;
        }
        self.queue(queue_index(used)).seen_used = seen.wrapping_add(1);
        let at = used + 4 + 8 * u64::from(seen % size);
        Some((self.peek_u32(at), self.peek_u32(at + 4)))
    }

    /// Memory of the request in slot `slot`: readable bytes, and 0x400 later the writable ones.
    pub(crate) fn slot(&self, slot: u16) -> u64 {
        BASE + 0x4_0000 + 0x800 * u64::from(slot)
    }

    /// Makes a request of two descriptors available, its writable part filled with 0xaa.
    pub(crate) fn submit(&mut self, slot: u16, readable: &[u8], writable: u32) {
        let at = self.slot(slot);
        self.poke(at, readable);
        self.poke(at + 0x400, &vec![0xaa; writable.min(0x400) as usize]);
        let mut pieces = Vec::new();
        if !readable.is_empty() {
            pieces.push((at, readable.len() as u32, 0));
        }
        if writable != 0 {
            pieces.push((at + 0x400, writable, WRITE));
        }
        self.write_chain(REQUEST_QUEUE, 2 * slot, &pieces);
        self.make_available(REQUEST_QUEUE, 2 * slot);
    }

    /// Sends one request; its used length and whole writable part, or `None` if it was not answered.
    pub(crate) fn try_send(&mut self, readable: &[u8], writable: u32) -> Option<(u32, Vec<u8>)> {
        self.submit(0, readable, writable);
        self.kick(REQUEST_QUEUE);
        let (id, len) = self.take_used(REQUEST_QUEUE)?;
        assert_eq!(id, 0);
        let mut bytes = vec![0; writable as usize];
        self.mem.read(self.slot(0) + 0x400, &mut bytes).unwrap();
        Some((len, bytes))
    }

    pub(crate) fn send(&mut self, readable: &[u8], writable: u32) -> (u32, Vec<u8>) {
        self.try_send(readable, writable).expect("the request was not answered")
    }

    /// Sends a request with a 4-byte tail and returns its status. Checks used length and reserved bytes.
    pub(crate) fn status(&mut self, readable: &[u8]) -> u8 {
        let (len, tail) = self.send(readable, 4);
        assert_eq!((len, &tail[1..]), (4, &[0, 0, 0][..]));
        tail[0]
    }

    pub(crate) fn attach(&mut self, domain: u32, endpoint: u32) -> u8 {
        self.status(&attach(domain, endpoint, 0, 0))
    }

    pub(crate) fn attach_bypass(&mut self, domain: u32, endpoint: u32) -> u8 {
        self.status(&attach(domain, endpoint, 1, 0))
    }

    pub(crate) fn detach(&mut self, domain: u32, endpoint: u32) -> u8 {
        self.status(&detach(domain, endpoint))
    }

    pub(crate) fn map(&mut self, domain: u32, first: u64, last: u64, phys: u64, flags: u32) -> u8 {
        self.status(&map(domain, first, last, phys, flags))
    }

    pub(crate) fn unmap(&mut self, domain: u32, first: u64, last: u64) -> u8 {
        self.status(&unmap(domain, first, last, 0))
    }

    /// (first, last) of every mapping of a domain.
    pub(crate) fn ranges(&self, domain: u32) -> Vec<(u64, u64)> {
        self.device.mappings(domain).map(|m| (m.virt_first, m.virt_last)).collect()
    }

    /// Posts `count` event buffers of `len` bytes and kicks.
    pub(crate) fn post_events(&mut self, count: u16, len: u32) {
        for index in 0..count {
            let at = self.event_buffer(index);
            self.write_chain(EVENT_QUEUE, index, &[(at, len, WRITE)]);
            self.make_available(EVENT_QUEUE, index);
        }
        self.kick(EVENT_QUEUE);
    }

    pub(crate) fn event_buffer(&self, index: u16) -> u64 {
        BASE + 0x3_0000 + 0x40 * u64::from(index)
    }

    /// Next event: used length and 24 bytes.
    pub(crate) fn take_event(&mut self) -> Option<(u32, [u8; 24])> {
        let (id, len) = self.take_used(EVENT_QUEUE)?;
        Some((len, self.peek(self.event_buffer(id as u16))))
    }

    pub(crate) fn rules_broken(&self) -> Vec<&'static str> {
        self.device.violations().map(|violation| violation.rule).collect()
    }
}

fn queue_index(used: u64) -> u16 {
    if used < BASE + 0x1_0000 { REQUEST_QUEUE } else { EVENT_QUEUE }
}

/// Concatenates the little-endian parts of a request.
pub(crate) fn bytes(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

pub(crate) fn attach(domain: u32, endpoint: u32, flags: u32, reserved: u32) -> Vec<u8> {
    let words = [1, domain, endpoint, flags, reserved];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(crate) fn detach(domain: u32, endpoint: u32) -> Vec<u8> {
    [2, domain, endpoint, 0, 0].iter().flat_map(|word: &u32| word.to_le_bytes()).collect()
}

pub(crate) fn map(domain: u32, first: u64, last: u64, phys: u64, flags: u32) -> Vec<u8> {
    bytes(&[
        &[3, 0, 0, 0],
        &domain.to_le_bytes(),
        &first.to_le_bytes(),
        &last.to_le_bytes(),
        &phys.to_le_bytes(),
        &flags.to_le_bytes(),
    ])
}

pub(crate) fn unmap(domain: u32, first: u64, last: u64, reserved: u32) -> Vec<u8> {
    bytes(&[
        &[4, 0, 0, 0],
        &domain.to_le_bytes(),
        &first.to_le_bytes(),
        &last.to_le_bytes(),
        &reserved.to_le_bytes(),
    ])
}

pub(crate) fn probe(endpoint: u32) -> Vec<u8> {
    bytes(&[&[5, 0, 0, 0], &endpoint.to_le_bytes(), &[0; 64]])
}

pub(crate) const OK: u8 = 0;
pub(crate) const UNSUPP: u8 = 2;
pub(crate) const DEVERR: u8 = 3;
pub(crate) const INVAL: u8 = 4;
pub(crate) const RANGE: u8 = 5;
pub(crate) const NOENT: u8 = 6;
pub(crate) const NOMEM: u8 = 8;

pub(crate) const READ: u32 = 1;
pub(crate) const RW: u32 = 3;
pub(crate) const MMIO: u32 = 4;

pub(crate) const PAGE: u64 = 0x1000;
