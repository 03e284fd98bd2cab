//! A driver that is nothing but bytes in rings: one request, and what is wrong with it.

use vm_memory::{Bytes as _, GuestAddress};

use crate::front_end::{BASE, Ring, Vmm};

/// What the device does not work without.
pub(crate) const VERSION_1: u64 = 1 << 32;

const SIZE: u16 = 8;
const REQUESTS: Ring =
    Ring { size: SIZE, descriptors: BASE + 0x1000, available: BASE + 0x2000, used: BASE + 0x3000 };
const EVENTS: Ring =
    Ring { size: SIZE, descriptors: BASE + 0x4000, available: BASE + 0x5000, used: BASE + 0x6000 };
pub(crate) const RINGS: [Ring; 2] = [REQUESTS, EVENTS];
/// An ATTACH, and room for the answer.
pub(crate) const REQUEST: u64 = BASE + 0x7000;
pub(crate) const ANSWER: u64 = BASE + 0x7100;

/// A descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// An ATTACH of endpoint 8 to domain 1, as it should be.
pub(crate) const ATTACH: [Descriptor; 2] = [
    Descriptor { address: REQUEST, len: 20, flags: NEXT, next: 1 },
    Descriptor { address: ANSWER, len: 4, flags: WRITE, next: 0 },
];

impl Vmm {
    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Puts an ATTACH behind these descriptors, as so many available entries, of which the first has this head, and kicks.
    pub(crate) fn submit(&self, descriptors: &[Descriptor], head: u16, index: u16) {
        let mut request = [0; 20];
        request[0] = 1;
        request[4] = 1;
        request[8] = 8;
        self.put(REQUEST, &request);
        self.put(ANSWER, &[0xff; 4]);
        for (at, descriptor) in (0..).zip(descriptors) {
            let Descriptor { address, len, flags, next } = *descriptor;
            let bytes =
                [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
            self.put(REQUESTS.descriptors + 16 * at, &bytes.concat());
        }
        self.put(REQUESTS.available + 4, &head.to_le_bytes());
        self.put(REQUESTS.available + 2, &index.to_le_bytes());
        self.kicks[0].write(1).unwrap();
    }

    /// Whether one request was answered.
    pub(crate) fn is_answered(&self) -> bool {
        self.bytes(REQUESTS.used + 2, 2) == [1, 0]
    }
}
