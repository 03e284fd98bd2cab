//! What the figures are compared with.
//!
//! *Linux* is 6.12.95 as Debian builds it, with its own virtio-iommu driver and DMA API in strict mode, measured on the
//! same device of QEMU 10.0.2 with the same `-icount`, on one CPU. A target is ours.

/// A figure's line: what Linux needs, and what is good enough.
pub(super) struct Target {
    pub(super) name: &'static str,
    /// Instructions in Linux, strict.
    pub(super) linux: Option<u64>,
    /// At most this.
    pub(super) limit: Option<f64>,
    /// At most as many requests for one operation.
    pub(super) requests: Option<f64>,
    /// At most as many kicks.
    pub(super) kicks: Option<f64>,
}

const fn row(name: &'static str, linux: Option<u64>, limit: Option<f64>) -> Target {
    Target { name, linux, limit, requests: None, kicks: None }
}

/// Requests and kicks too.
const fn asking(
    name: &'static str,
    linux: Option<u64>,
    limit: Option<f64>,
    requests: f64,
    kicks: f64,
) -> Target {
    Target { requests: Some(requests), kicks: Some(kicks), ..row(name, linux, limit) }
}

/// How many kicks one buffer of a batch of 64 may take.
const ONE_OF_64: f64 = 1.0 / 64.0;

/// Instructions of one operation.
pub(super) const OPERATIONS: [Target; 31] = [
    asking("raw_request", None, Some(150.0), 1.0, 1.0),
    asking("map_unmap_4k_strict", Some(4_835), Some(480.0), 2.0, 2.0),
    asking("map_unmap_64k_strict", Some(4_858), None, 2.0, 2.0),
    asking("map_unmap_1m_strict", Some(5_308), Some(480.0), 2.0, 2.0),
    row("map_unmap_4k_deferred", Some(4_835), Some(300.0)),
    asking("map_unmap_4k_pool", Some(4_835), Some(90.0), 0.0, 0.0),
    asking("map_4k_strict", None, None, 1.0, 1.0),
    asking("unmap_4k_strict", None, None, 1.0, 1.0),
    asking("batch64_map_each", Some(2_617), Some(180.0), 1.0, ONE_OF_64),
    asking("batch64_unmap_each", Some(2_485), Some(150.0), 1.0, ONE_OF_64),
    asking("sg64_scattered_map", Some(147_875), Some(9_000.0), 64.0, 1.0),
    asking("sg64_scattered_unmap", Some(16_342), Some(1_500.0), 1.0, 1.0),
    asking("sg64_contiguous_map", Some(11_080), Some(700.0), 1.0, 1.0),
    asking("sg64_contiguous_unmap", None, None, 1.0, 1.0),
    asking("coherent_4k", Some(13_712), Some(1_500.0), 2.0, 2.0),
    asking("attach_detach", Some(3_733), Some(480.0), 2.0, 2.0),
    row("blk_added_4k_qd1_strict", Some(18_442), Some(500.0)),
    row("blk_added_4k_qd1_deferred", Some(18_442), Some(350.0)),
    row("blk_added_4k_qd1_pool", Some(18_442), Some(60.0)),
    row("blk_added_4k_qd32_strict", Some(19_904), Some(500.0)),
    row("blk_added_4k_qd32_deferred", Some(19_904), Some(350.0)),
    row("blk_added_4k_qd32_pool", Some(19_904), Some(60.0)),
    row("blk_added_128k_qd1_strict", Some(169_374), Some(7_000.0)),
    row("blk_added_128k_qd1_deferred", Some(169_374), Some(6_000.0)),
    row("blk_added_128k_qd1_pool", Some(169_374), Some(60.0)),
    asking("map_unmap_4k_strict_live_1", None, None, 2.0, 2.0),
    asking("map_unmap_4k_strict_live_1k", None, None, 2.0, 2.0),
    row("map_unmap_4k_strict_live_100k", None, None),
    row("map_unmap_4k_strict_live_1m", None, None),
    row("smp4_requests_per_op", None, None),
    row("smp4_kicks_per_op", None, None),
];

/// What is no number of instructions.
pub(super) const RATIOS: [Target; 3] = [
    // A million live mappings against a thousand.
    row("growth_live_1m_over_1k", None, Some(1.5)),
    row("driver_bytes_per_live_mapping", None, Some(96.0)),
    row("mmio_accesses_per_kick", None, Some(1.0)),
];
