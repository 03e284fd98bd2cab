//! Operations, as data: small numbers, which stand for whatever there is when the operation's turn comes.
//!
//! An operation is made of one word, so that many are made fast, and shrinks with it: the first byte says what it is,
//! the others are its parts, and a word of 0 is [`Op::Nothing`].

use virtio_iommu_model::{Execute, Inject, Release};

/// One operation. `slot` and `endpoint` are one of four, `view` and `which` count through what there is, `pages` and
/// `place` are in granules.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    /// What other operations shrink to.
    Nothing,
    Create {
        identity: bool,
    },
    Drop {
        slot: u8,
    },
    Attach {
        endpoint: u8,
        slot: u8,
    },
    Detach {
        endpoint: u8,
    },
    Move {
        endpoint: u8,
        slot: u8,
    },
    /// The endpoint goes away, and the driver is told. It comes back with the next driver.
    Unplug {
        endpoint: u8,
    },
    Map {
        slot: u8,
        pages: u8,
        phys: u8,
        prot: u8,
        low: bool,
    },
    MapAt {
        slot: u8,
        place: Place,
        pages: u8,
        phys: u8,
        prot: u8,
    },
    MapIdentity {
        slot: u8,
        place: Place,
        pages: u8,
    },
    Unmap {
        slot: u8,
        which: u8,
        neighbours: u8,
    },
    UnmapOther {
        slot: u8,
        which: u8,
        skip: u8,
        pages: u8,
    },
    Open {
        endpoint: u8,
        slot: u8,
        bounce: u8,
        low: bool,
    },
    Close {
        view: u8,
    },
    /// A view is dropped and not closed.
    Forget {
        view: u8,
    },
    Scatter {
        view: u8,
        segments: [Segment; 4],
        used: u8,
        direction: u8,
    },
    Adopt {
        view: u8,
        pages: u8,
        direction: u8,
    },
    /// Ends a [`Op::Scatter`] or [`Op::Adopt`].
    UnmapOne {
        which: u8,
    },
    Alloc {
        view: u8,
        pages: u8,
    },
    Free {
        which: u8,
    },
    Share {
        view: u8,
        len: u16,
        direction: u8,
    },
    Unshare {
        which: u8,
    },
    Bypass {
        open: bool,
    },
    Poll,
    Reclaim,
    Restart {
        orderly: bool,
        as_found: bool,
    },
    /// The device will do something else than it should with the next request but so many.
    Misbehave {
        after: u8,
        what: Inject,
    },
    /// The next request is answered while the driver waits, but not at once.
    Delay {
        polls: u8,
    },
    /// Late answers.
    Release(Release),
    /// All late answers, and what a kernel does then: it finds out where its endpoints are, and reclaims.
    Settle {
        attach: bool,
    },
}

/// Where [`Op::MapAt`] maps.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// In granules from the first address that can be mapped.
    Low(u8),
    /// In granules around the start of the MSI window, which is the 8th.
    Msi(u8),
    /// In granules down from the last that can be mapped; 0 is beyond.
    High(u8),
    /// One byte off.
    Odd(u8),
}

/// Part of a scatter list: a granule of memory, and 16ths of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) phys: u8,
    pub(super) start: u8,
    pub(super) len: u8,
}

fn place(byte: u8) -> Place {
    let part = byte / 16;
    match byte % 16 {
        0..=9 => Place::Low(part + byte % 5),
        10..=12 => Place::Msi(4 + part % 8),
        13..=14 => Place::High(part % 6),
        _ => Place::Odd(part),
    }
}

fn segment(byte: u8) -> Segment {
    Segment { phys: byte % 8, start: byte / 8 % 4 * 5, len: 1 + byte / 32 * 5 }
}

/// READ, WRITE and MMIO, and now and then none of them.
fn prot(byte: u8) -> u8 {
    match byte % 16 {
        0 => 0,
        1 => 4,
        2..=4 => 5 + byte / 16 % 3,
        _ => 1 + byte / 16 % 3,
    }
}

/// Misbehaviour that a driver cannot do better than survive. An answer that lies, such as OK for what was not done, is
/// none of it: nobody can tell.
fn misbehaviour(byte: u8) -> Inject {
    let which = usize::from(byte / 16);
    match byte % 16 {
        0 | 1 => Inject::Hold(Execute::Now),
        2..=4 => Inject::Hold(Execute::AtRelease),
        5 => Inject::Drop(if which.is_multiple_of(2) { Execute::Now } else { Execute::AtRelease }),
        // UNSUPP, INVAL, RANGE, FAULT and NOMEM are clear; IOERR, DEVERR and what nobody defined are not.
        // Not INVAL and NOENT: a DETACH that is answered so says where the endpoint is not, and devices do not lie here.
        6..=8 => Inject::Refuse([2, 5, 7, 8, 1, 3, 0x77][which % 7]),
        9 | 10 => Inject::Status([1, 3, 0x77][which % 3]),
        11 => Inject::UsedLen(which as u32 % 4),
        12 => Inject::Unwritten,
        13 => Inject::Defer,
        _ => Inject::TailReserved([1, 2, 3]),
    }
}

fn release(byte: u8) -> Release {
    match byte % 4 {
        0 => Release::Oldest,
        1 => Release::Newest,
        2 => Release::Nth(usize::from(byte / 4 % 4)),
        _ => Release::AllReversed,
    }
}

impl Op {
    /// Makes an operation of a word, those that make things more often than those that end them.
    pub(super) fn decode(word: u64) -> Self {
        let [what, a, b, c, d, e, f, g] = word.to_be_bytes();
        let (endpoint, slot, pages) = (a % 4, b % 4, 1 + c % 4);
        match what {
            0..=2 => Op::Nothing,
            3..=16 => Op::Create { identity: a.is_multiple_of(8) },
            17..=20 => Op::Drop { slot },
            21..=40 => Op::Attach { endpoint, slot },
            41..=47 => Op::Detach { endpoint },
            48..=54 => Op::Move { endpoint, slot },
            55 => Op::Unplug { endpoint },
            56..=81 => Op::Map { slot, pages, phys: d % 16, prot: prot(e), low: f.is_multiple_of(2) },
            82..=108 => Op::MapAt { slot, place: place(f), pages, phys: d % 16, prot: prot(e) },
            109..=112 => Op::MapIdentity { slot, place: place(f), pages: c % 8 },
            113..=138 => Op::Unmap { slot, which: c, neighbours: d % 4 },
            139..=142 => Op::UnmapOther { slot, which: c, skip: d % 3, pages: e % 6 },
            143..=152 => Op::Open { endpoint, slot, bounce: c % 3, low: d.is_multiple_of(2) },
            153..=156 => Op::Close { view: a },
            157..=158 => Op::Forget { view: a },
            159..=168 => {
                let segments = [segment(d), segment(e), segment(f), segment(g)];
                Op::Scatter { view: a, segments, used: 1 + b % 4, direction: c % 3 }
            }
            169..=178 => Op::Adopt { view: a, pages, direction: b % 3 },
            179..=192 => Op::UnmapOne { which: a },
            193..=200 => Op::Alloc { view: a, pages },
            201..=207 => Op::Free { which: a },
            208..=213 => Op::Share { view: a, len: 1 + u16::from_be_bytes([b, c]) % 9000, direction: d % 3 },
            214..=217 => Op::Unshare { which: a },
            218..=221 => Op::Bypass { open: a.is_multiple_of(2) },
            222..=226 => Op::Poll,
            227..=231 => Op::Reclaim,
            232..=233 => Op::Restart { orderly: a.is_multiple_of(2), as_found: b.is_multiple_of(2) },
            234..=243 => Op::Misbehave { after: a % 4, what: misbehaviour(b) },
            244..=245 => Op::Delay { polls: 1 + a % 8 },
            246..=248 => Op::Release(release(a)),
            _ => Op::Settle { attach: a.is_multiple_of(2) },
        }
    }

    /// Whether it makes the device misbehave in a way that the driver has to notice.
    pub(super) fn is_trouble(&self) -> bool {
        matches!(self, Op::Misbehave { what, .. } if !is_harmless(*what))
    }
}

/// Misbehaviour that changes nothing for a driver that does as it should.
pub(super) fn is_harmless(what: Inject) -> bool {
    matches!(what, Inject::Pass | Inject::Defer | Inject::TailReserved(_))
}
