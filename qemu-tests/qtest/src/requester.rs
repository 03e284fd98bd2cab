//! Raw requests on a queue of the harness's own: what the driver never sends.
//!
//! It shares nothing with the driver's rings, and writes its requests byte by byte from the standard's tables.

use crate::peer::{Peer, QueuePlace};

const REQUESTS: u16 = 0;
const EVENTS: u16 = 1;
const SIZE: u16 = 64;

/// Descriptors, available ring, used ring.
const REQUEST_RING: QueuePlace = [0x10_0000, 0x10_1000, 0x10_2000];
const EVENT_RING: QueuePlace = [0x11_0000, 0x11_1000, 0x11_2000];
/// The readable and the writable part of the request under way.
const READABLE: u64 = 0x12_0000;
const WRITABLE: u64 = 0x12_1000;
const EVENT_BUFFERS: u64 = 0x13_0000;
const RECORD_LEN: usize = 24;

/// What writable memory is filled with before a request, so that what the device wrote is told apart.
const UNWRITTEN: u8 = 0xaa;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// INPUT_RANGE, DOMAIN_RANGE, MAP_UNMAP, PROBE, MMIO, BYPASS_CONFIG, VERSION_1.
const FEATURES: u64 = 0x1_0000_0077;
const TAIL_LEN: u32 = 4;

/// A request, well formed or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// ATTACH.
    Attach {
        /// Domain.
        domain: u32,
        /// Endpoint.
        endpoint: u32,
        /// Flags.
        flags: u32,
        /// Reserved bytes.
        reserved: u32,
    },
    /// DETACH.
    Detach {
        /// Domain.
        domain: u32,
        /// Endpoint.
        endpoint: u32,
        /// Reserved bytes.
        reserved: u64,
    },
    /// MAP.
    Map {
        /// Domain.
        domain: u32,
        /// First IOVA.
        first: u64,
        /// Last IOVA.
        last: u64,
        /// First guest-physical address.
        phys: u64,
        /// Flags.
        flags: u32,
    },
    /// UNMAP.
    Unmap {
        /// Domain.
        domain: u32,
        /// First IOVA.
        first: u64,
        /// Last IOVA.
        last: u64,
        /// Reserved bytes.
        reserved: u32,
    },
    /// PROBE.
    Probe {
        /// Endpoint.
        endpoint: u32,
    },
    /// Any bytes.
    Raw {
        /// The readable part.
        readable: Vec<u8>,
        /// The length of the writable part, at most 4096.
        writable: u32,
    },
}

impl Request {
    /// ATTACH without flags.
    pub fn attach(domain: u32, endpoint: u32) -> Self {
        Self::Attach { domain, endpoint, flags: 0, reserved: 0 }
    }

    /// DETACH.
    pub fn detach(domain: u32, endpoint: u32) -> Self {
        Self::Detach { domain, endpoint, reserved: 0 }
    }

    /// MAP of a range, both ends inclusive.
    pub fn map(domain: u32, (first, last): (u64, u64), phys: u64, flags: u32) -> Self {
        Self::Map { domain, first, last, phys, flags }
    }

    /// UNMAP of a range, both ends inclusive.
    pub fn unmap(domain: u32, (first, last): (u64, u64)) -> Self {
        Self::Unmap { domain, first, last, reserved: 0 }
    }

    /// The readable part.
    pub fn readable(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(72);
        let mut head = |kind: u8, word: u32| {
            bytes.extend([kind, 0, 0, 0]);
            bytes.extend(word.to_le_bytes());
        };
        match *self {
            Self::Attach { domain, endpoint, flags, reserved } => {
                head(1, domain);
                bytes.extend([endpoint, flags, reserved].iter().flat_map(|word| word.to_le_bytes()));
            }
            Self::Detach { domain, endpoint, reserved } => {
                head(2, domain);
                bytes.extend(endpoint.to_le_bytes());
                bytes.extend(reserved.to_le_bytes());
            }
            Self::Map { domain, first, last, phys, flags } => {
                head(3, domain);
                bytes.extend([first, last, phys].iter().flat_map(|long| long.to_le_bytes()));
                bytes.extend(flags.to_le_bytes());
            }
            Self::Unmap { domain, first, last, reserved } => {
                head(4, domain);
                bytes.extend([first, last].iter().flat_map(|long| long.to_le_bytes()));
                bytes.extend(reserved.to_le_bytes());
            }
            Self::Probe { endpoint } => {
                head(5, endpoint);
                bytes.extend([0; 64]);
            }
            Self::Raw { ref readable, .. } => bytes.extend(readable),
        }
        bytes
    }

    /// What the readable part of a request says, with bytes that follow ignored. `None` if it is too short or
    /// of no known type.
    pub fn decode(readable: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_le_bytes(readable.get(at..at + 4)?.try_into().ok()?));
        let long = |at: usize| Some(u64::from_le_bytes(readable.get(at..at + 8)?.try_into().ok()?));
        Some(match readable.first()? {
            1 => Self::Attach { domain: word(4)?, endpoint: word(8)?, flags: word(12)?, reserved: word(16)? },
            2 => Self::Detach { domain: word(4)?, endpoint: word(8)?, reserved: long(12)? },
            3 => Self::Map {
                domain: word(4)?,
                first: long(8)?,
                last: long(16)?,
                phys: long(24)?,
                flags: word(32)?,
            },
            4 => Self::Unmap { domain: word(4)?, first: long(8)?, last: long(16)?, reserved: word(24)? },
            5 if readable.len() >= 72 => Self::Probe { endpoint: word(4)? },
            _ => return None,
        })
    }

    /// The length of the writable part, where PROBE has `probe_size` bytes of properties.
    fn writable(&self, probe_size: u32) -> u32 {
        match self {
            Self::Raw { writable, .. } => *writable,
            Self::Probe { .. } => probe_size + TAIL_LEN,
            _ => TAIL_LEN,
        }
    }
}

/// What the device did with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It gave the request back.
    Used {
        /// The used length.
        len: u32,
        /// The whole writable part, whatever the used length.
        written: Vec<u8>,
    },
    /// It did not.
    Unanswered {
        /// Its status register after that.
        status: u8,
    },
}

impl Answer {
    /// The status in the tail, or `None` for a request that came back unwritten or not at all.
    pub fn status(&self) -> Option<u8> {
        let Self::Used { len, written } = self else { return None };
        let tail = len.checked_sub(TAIL_LEN)?;
        written.get(tail as usize).copied()
    }
}

/// A request queue and an event queue, driven by hand.
///
/// Everything is at fixed addresses below the heap of a machine's memory, so that two devices see the same
/// bytes.
#[derive(Debug)]
pub struct Requester {
    probe_size: u32,
    sent: u16,
    events: u16,
}

impl Requester {
    /// Resets the device and brings it up, with 64 event buffers posted. Nothing is written to `bypass`.
    ///
    /// # Panics
    /// When the device does not come up.
    pub fn start(peer: &mut impl Peer) -> Self {
        peer.set_status(0);
        assert_eq!(peer.status(), 0, "the device does not reset");
        peer.set_status(ACKNOWLEDGE);
        peer.set_status(ACKNOWLEDGE | DRIVER);
        let offered = peer.features();
        peer.accept_features(offered & FEATURES);
        peer.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(peer.status() & FEATURES_OK, 0, "the device refused features");
        let config = peer.config();
        let probe_size = u32::from_le_bytes([config[32], config[33], config[34], config[35]]);
        for (queue, place) in [(REQUESTS, REQUEST_RING), (EVENTS, EVENT_RING)] {
            place.iter().for_each(|part| peer.write(*part, &[0; 0x1000]));
            peer.enable_queue(queue, SIZE, place);
        }
        peer.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        let mut requester = Self { probe_size, sent: 0, events: 0 };
        for index in 0..SIZE {
            let buffer = EVENT_BUFFERS + 32 * u64::from(index);
            describe(peer, EVENT_RING, index, (buffer, RECORD_LEN as u32, WRITE), 0);
            offer(peer, EVENT_RING, index, index);
        }
        peer.notify(EVENTS);
        requester.events = 0;
        requester
    }

    /// Sends one request and takes the answer. The device works while it is notified, so that there is
    /// nothing to wait for.
    ///
    /// # Panics
    /// When the used ring makes no sense.
    pub fn send(&mut self, peer: &mut impl Peer, request: &Request) -> Answer {
        let readable = request.readable();
        let writable = request.writable(self.probe_size);
        assert!(readable.len() <= 0x1000 && writable <= 0x1000, "a request that is too long");
        peer.write(READABLE, &readable);
        peer.write(WRITABLE, &vec![UNWRITTEN; writable as usize]);
        let mut parts = Vec::new();
        if !readable.is_empty() {
            parts.push((READABLE, readable.len() as u32, 0));
        }
        if writable != 0 {
            parts.push((WRITABLE, writable, WRITE));
        }
        for (index, part) in parts.iter().enumerate() {
            let index = index as u16;
            let last = usize::from(index) + 1 == parts.len();
            let next = if last { 0 } else { NEXT };
            describe(peer, REQUEST_RING, index, (part.0, part.1, part.2 | next), index + 1);
        }
        offer(peer, REQUEST_RING, self.sent, 0);
        peer.notify(REQUESTS);
        let used_index = read_u16(peer, REQUEST_RING[2] + 2);
        if used_index == self.sent {
            return Answer::Unanswered { status: peer.status() };
        }
        let (id, len) = used(peer, REQUEST_RING, self.sent);
        self.sent = self.sent.wrapping_add(1);
        assert_eq!((used_index, id), (self.sent, 0), "the used ring");
        let mut written = vec![0; writable as usize];
        peer.read(WRITABLE, &mut written);
        Answer::Used { len, written }
    }

    /// Sends one request, and returns the status that it was answered with.
    pub fn status(&mut self, peer: &mut impl Peer, request: &Request) -> Option<u8> {
        self.send(peer, request).status()
    }

    /// The next fault record, with the used length it came with. Its buffer is posted again.
    pub fn next_event(&mut self, peer: &mut impl Peer) -> Option<(u32, [u8; RECORD_LEN])> {
        if read_u16(peer, EVENT_RING[2] + 2) == self.events {
            return None;
        }
        let (id, len) = used(peer, EVENT_RING, self.events);
        let mut record = [0; RECORD_LEN];
        peer.read(EVENT_BUFFERS + 32 * u64::from(id), &mut record);
        let posted = self.events.wrapping_add(SIZE);
        offer(peer, EVENT_RING, posted, id as u16);
        self.events = self.events.wrapping_add(1);
        Some((len, record))
    }
}

/// Writes a descriptor.
fn describe(peer: &mut impl Peer, ring: QueuePlace, index: u16, part: (u64, u32, u16), next: u16) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&part.0.to_le_bytes());
    bytes[8..12].copy_from_slice(&part.1.to_le_bytes());
    bytes[12..14].copy_from_slice(&part.2.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    peer.write(ring[0] + 16 * u64::from(index), &bytes);
}

/// Makes the chain that begins at `head` the one with the running number `number`.
fn offer(peer: &mut impl Peer, ring: QueuePlace, number: u16, head: u16) {
    peer.write(ring[1] + 4 + 2 * u64::from(number % SIZE), &head.to_le_bytes());
    peer.write(ring[1] + 2, &number.wrapping_add(1).to_le_bytes());
}

/// Head and length of the used entry with this running number.
fn used(peer: &impl Peer, ring: QueuePlace, number: u16) -> (u32, u32) {
    let mut bytes = [0; 8];
    peer.read(ring[2] + 4 + 8 * u64::from(number % SIZE), &mut bytes);
    let [a, b, c, d, e, f, g, h] = bytes;
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

fn read_u16(peer: &impl Peer, phys: u64) -> u16 {
    let mut bytes = [0; 2];
    peer.read(phys, &mut bytes);
    u16::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_their_lengths_and_are_read_back() {
        let requests = [
            (Request::Attach { domain: 1, endpoint: 2, flags: 3, reserved: 4 }, 20),
            (Request::Detach { domain: 1, endpoint: 2, reserved: 3 }, 20),
            (Request::map(1, (2, 3), 4, 5), 36),
            (Request::Unmap { domain: 1, first: 2, last: 3, reserved: 4 }, 28),
            (Request::Probe { endpoint: 1 }, 72),
        ];
        for (kind, (request, len)) in (1..).zip(requests) {
            let bytes = request.readable();
            assert_eq!((bytes[0], bytes.len()), (kind, len));
            assert_eq!(Request::decode(&bytes[..len - 1]), None);
            assert_eq!(Request::decode(&bytes), Some(request));
        }
    }

    #[test]
    fn the_tail_ends_where_the_used_length_does() {
        let written = vec![1, 2, 3, 4, 5, 6, 7, 8, 9];
        assert_eq!(Answer::Used { len: 8, written: written.clone() }.status(), Some(5));
        assert_eq!(Answer::Used { len: 0, written: written.clone() }.status(), None);
        assert_eq!(Answer::Used { len: 40, written }.status(), None);
    }
}
