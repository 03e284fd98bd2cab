//! What the kernel does with the driver, as data: small numbers that stand for whatever there is.

use arbitrary::Arbitrary;

/// One operation. Numbers count through what there is when its turn comes; `pages` are granules, 1 to 4.
#[derive(Clone, Copy, Debug, Arbitrary)]
#[expect(missing_docs, reason = "each names the driver's method that it stands for")]
pub enum Op {
    Create { deferred: u8 },
    Drop { slot: u8 },
    Attach { endpoint: u8, slot: u8 },
    Detach { endpoint: u8 },
    Move { endpoint: u8, slot: u8 },
    Map { slot: u8, pages: u8, prot: u8, low: bool },
    MapAt { slot: u8, page: u8, pages: u8, prot: u8 },
    MapIdentity { slot: u8, pages: u8 },
    Unmap { which: u8, neighbours: u8 },
    UnmapOther { slot: u8, page: u8, pages: u8 },
    Open { endpoint: u8, slot: u8, bounce: u8, low: bool },
    Close { view: u8 },
    Forget { view: u8 },
    Adopt { view: u8, pages: u8 },
    Alloc { view: u8, pages: u8 },
    Scatter { view: u8, segments: [u8; 4], used: u8 },
    Release { which: u8 },
    Flush { slot: u8 },
    Share { view: u8, len: u16 },
    Reserve { slot: u8, mappings: u8 },
    Poll,
    Reclaim,
    Interrupt,
    Bypass,
    Shutdown { as_found: bool },
}
