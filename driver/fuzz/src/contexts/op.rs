//! What the kernel does with contexts, as data: small numbers that stand for whatever there is.

use arbitrary::Arbitrary;

/// One operation.
#[derive(Clone, Copy, Debug, Arbitrary)]
#[expect(
    missing_docs,
    reason = "each names the driver's method that it stands for, or what an endpoint does"
)]
pub enum Op {
    Create { anonymous: u8 },
    Attach { endpoint: u8, domain: u8 },
    Detach { endpoint: u8 },
    AddMapped { domain: u8, pasid: u8 },
    AddOwned { domain: u8, pasid: u8, format: u8 },
    Map { context: u8, at: u8, pages: u8, write: bool },
    Unmap { context: u8, at: u8, pages: u8 },
    UnmapLater { context: u8, at: u8, pages: u8 },
    Invalidate { context: u8 },
    InvalidateAll { domain: u8 },
    Remove { context: u8 },
    Forget { context: u8 },
    MapDefault { domain: u8, at: u8, pages: u8 },
    UnmapDefault { domain: u8, which: u8 },
    Ask { endpoint: u8, pasid: u8, at: u8, group: u8, last: bool },
    Answer { context: u8, code: u8 },
    Overdue { faults: u8 },
    Support { endpoint: u8 },
    Nest(Nested),
    Poll,
    Reclaim,
}

/// One operation on nested spaces, by level: the root is 0.
#[derive(Clone, Copy, Debug, Arbitrary)]
#[expect(missing_docs, reason = "each names the method that it stands for")]
pub enum Nested {
    Map { level: u8, page: u8, target: u8, pages: u8, write: bool },
    Unmap { level: u8, page: u8, pages: u8 },
    Attach { endpoint: u8, level: u8 },
    Detach { endpoint: u8 },
}
