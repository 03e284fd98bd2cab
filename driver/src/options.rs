//! What the embedder can choose.

use crate::addr::Iova;
use crate::id::EndpointId;

/// Choices for one IOMMU. [`Options::default`] fits a kernel on QEMU.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The most descriptors of either queue; rounded down to a power of two and to what the device has. A
    /// request takes two.
    pub queue_size: u16,
    /// How long the driver waits for an answer, in nanoseconds, where the platform has a clock.
    pub timeout_ns: u64,
    /// How often it polls for an answer at most: the only bound where there is no clock.
    pub max_polls: u64,
    /// Endpoints that the driver keeps records for, at most 65,536.
    pub max_endpoints: usize,
    /// Domains that can exist at a time, at most 4,096.
    pub max_domains: usize,
    /// Faults that are kept until they are fetched; more are counted and lost.
    pub fault_backlog: usize,
    /// Records of one endpoint that are kept in a while; more are only counted, so that one endpoint in a fault storm
    /// does not hide the others.
    pub fault_limit: FaultLimit,
    /// Suspends an endpoint that faults this often within the limit's window, as
    /// [`Viommu::suspend`](crate::Viommu::suspend) does, in [`Viommu::poll`](crate::Viommu::poll). `None` never does.
    pub suspend_after: Option<u32>,
    /// Accepts the BYPASS feature of devices before virtio 1.2, where BYPASS_CONFIG is not offered: endpoints that
    /// are not attached then reach all of memory, for good. Without it such a device blocks them.
    pub accept_legacy_bypass: bool,
    /// Accepts the feature bit of a draft, where it is offered: see [`contexts`](crate::contexts). The bit may mean something
    /// else to another device, so that it is accepted only of one that is known to be of the draft.
    #[cfg(feature = "contexts")]
    pub accept_contexts: bool,
    /// The endpoint number of the IOMMU itself, which topology tables often include: never attached.
    pub own_endpoint: Option<EndpointId>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queue_size: 256,
            timeout_ns: 1_000_000_000,
            max_polls: 100_000_000,
            max_endpoints: 256,
            max_domains: 256,
            fault_backlog: 256,
            fault_limit: FaultLimit::default(),
            suspend_after: None,
            accept_legacy_bypass: false,
            #[cfg(feature = "contexts")]
            accept_contexts: false,
            own_endpoint: None,
        }
    }
}

/// How many records of one endpoint are kept in a window of time. Endpoints that the driver does not know share one
/// limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultLimit {
    /// Records in a window.
    pub records: u32,
    /// The window in nanoseconds, from the first record in it. Without a clock it ends when all faults were fetched.
    pub window_ns: u64,
}

impl Default for FaultLimit {
    fn default() -> Self {
        Self { records: 128, window_ns: 100_000_000 }
    }
}

/// What a domain does with addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainKind {
    /// Endpoints reach what is mapped.
    Translated,
    /// Endpoints reach all of memory by its physical addresses: no protection at all (virtio 1.4, IOMMU device, the
    /// bypass flag of ATTACH). Needs BYPASS_CONFIG; where
    /// that is missing, [`Domain::map_identity`](crate::Domain::map_identity) does for the ranges that it is
    /// given.
    Identity,
    /// There is no default context to map in: contexts are added by PASID, and this says what accesses without one meet. Made
    /// by [`Viommu::create_contexts`](crate::Viommu::create_contexts).
    #[cfg(feature = "contexts")]
    Contexts(crate::contexts::Anonymous),
}

/// When a domain's endpoints lose what is unmapped through [`DmaDevice`](crate::DmaDevice). The raw layer, such as
/// [`Domain::unmap`](crate::Domain::unmap), is always strict.
///
/// There is a third policy, which is no option: to unmap nothing, by buffers of a [`DmaPool`](crate::DmaPool). It costs
/// no request at all, and the endpoint reaches all of the pool's buffers all the time, whoever has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnmapPolicy {
    /// When `unmap` returns. One request, and one wait, for each call.
    #[default]
    Strict,
    /// At the next flush, which unmaps what was deferred by few requests and one wait. Until then the endpoint reads and
    /// writes the memory as before: data that it must not see has to be gone *before* `unmap`, and what it writes may
    /// change later.
    ///
    /// What this promises: addresses, and memory that the driver holds, are given to nobody before the device confirmed
    /// that they are unmapped. Memory that was mapped on the caller's word, by the `unsafe` methods, is not held: it
    /// must not be reused before [`DmaDevice::flush`](crate::DmaDevice::flush) returned `Ok`.
    ///
    /// Mapping it again is no reuse: as long as a buffer, or a whole list, waits for a flush, mapping the same granules for
    /// the same direction gets the same mapping again, at the same addresses, and takes no request. So
    /// [`DmaDevice::map`](crate::DmaDevice::map) and [`map_scatter`](crate::DmaDevice::map_scatter) do, not what holds
    /// memory, is mapped by [`map_each`](crate::DmaDevice::map_each), or belongs to the raw layer. It is then mapped as
    /// anything is, until it is unmapped and flushed once more. Nothing is promised about when this happens.
    Deferred(DeferredBounds),
}

/// When a domain flushes what it deferred by itself: when any of these is reached, when addresses or records run out,
/// and before an endpoint leaves where that is not the end of what it reaches.
///
/// The call that reaches a bound flushes, and waits. Where a flush fails, what it was to unmap is in quarantine, as
/// after a strict unmapping that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeferredBounds {
    /// Mappings. 0 is as good as 1, and no more than 65,536 unmappings wait in any case.
    pub mappings: usize,
    /// Bytes.
    pub bytes: u64,
    /// The age of the oldest in nanoseconds, where the platform has a clock: looked at in map, unmap and
    /// [`Viommu::poll`](crate::Viommu::poll), but not in a map that takes no request. What is mapped again and unmapped
    /// again is as old as after the first time, or younger.
    pub age_ns: u64,
}

impl Default for DeferredBounds {
    fn default() -> Self {
        Self { mappings: 256, bytes: 64 << 20, age_ns: 10_000_000 }
    }
}

/// Choices for one domain.
#[derive(Clone, Copy, Debug)]
pub struct DomainOptions {
    /// What it does with addresses.
    pub kind: DomainKind,
    /// Mappings that it has records for at first; [`Domain::reserve`](crate::Domain::reserve) makes more.
    pub mappings: usize,
    /// When what is unmapped through [`DmaDevice`](crate::DmaDevice) is out of its endpoints' reach.
    pub unmap: UnmapPolicy,
}

impl Default for DomainOptions {
    fn default() -> Self {
        Self { kind: DomainKind::Translated, mappings: 256, unmap: UnmapPolicy::Strict }
    }
}

/// Choices for one endpoint's view of its domain.
#[derive(Clone, Copy, Debug)]
pub struct EndpointOptions {
    /// The highest IOVA that the endpoint can put on the bus: [`Iova::mask`] of its address bits.
    pub limit: Iova,
    /// The most bytes of one segment, not 0: longer ones are split, see
    /// [`DmaDevice::segments`](crate::DmaDevice::segments).
    pub max_segment: u64,
    /// A power of two whose multiples no segment may cross, in bytes. What fits between two of them is mapped
    /// between two of them; what does not is split into segments.
    pub boundary: Option<u64>,
    /// What the embedder knows the endpoint by, for instance its driver's place in a table: its faults carry it.
    pub tag: Option<usize>,
    /// Bytes of bounce pages, rounded up to granules; 0 for none. They are mapped once, when the endpoint is
    /// attached, and serve buffers that cannot be mapped in place.
    pub bounce_bytes: usize,
}

impl Default for EndpointOptions {
    fn default() -> Self {
        Self { limit: Iova::mask(64), max_segment: u64::MAX, boundary: None, tag: None, bounce_bytes: 0 }
    }
}
