//! What can be chosen for a page table.

/// Choices for one page table. The default uses all that its format has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableOptions {
    /// Blocks larger than this are not made, as for IOMMUs without pages of 1 GiB. Bytes.
    pub largest_leaf: u64,
    /// The bits of a physical address that the device can put out, where it says less than the format has.
    pub output_bits: u32,
    /// Whether the device caches that nothing is mapped.
    pub not_present: NotPresent,
}

/// Whether a device caches entries that are not present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotPresent {
    /// Never: a new mapping needs no invalidation.
    NeverCached,
    /// Perhaps, as VT-d says of itself in caching mode: a new mapping is stale until it was invalidated.
    MayBeCached,
}

impl Default for TableOptions {
    fn default() -> Self {
        Self { largest_leaf: u64::MAX, output_bits: 64, not_present: NotPresent::NeverCached }
    }
}
