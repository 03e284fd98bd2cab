//! What the figures are compared with.
//!
//! *Linux* is 6.12.95 as Debian builds it, with its own virtio-iommu driver and DMA API, measured on the same device of
//! QEMU 10.0.2 with the same `-icount`, on one CPU; lazy mode is what Debian has unless it is told otherwise. Of a disk's
//! requests it is what these modes add to the whole request without an IOMMU. A target is ours.

/// Instructions that Linux needs.
#[derive(Clone, Copy)]
pub(super) struct Linux {
    /// Where there is no IOMMU, by the same call.
    pub(super) direct: Option<u64>,
    /// In strict mode: what is unmapped is out of reach.
    pub(super) strict: u64,
    /// In lazy mode: it is, at a flush.
    pub(super) lazy: Option<u64>,
}

/// A figure's line: what Linux needs, and what is good enough.
pub(super) struct Target {
    pub(super) name: &'static str,
    /// What Linux needs for it.
    pub(super) linux: Option<Linux>,
    /// At most this.
    pub(super) limit: Option<f64>,
    /// At most as many requests for one operation.
    pub(super) requests: Option<f64>,
    /// At most as many kicks.
    pub(super) kicks: Option<f64>,
}

const fn linux(direct: u64, strict: u64, lazy: u64) -> Option<Linux> {
    Some(Linux { direct: Some(direct), strict, lazy: Some(lazy) })
}

const fn linux_strict(strict: u64) -> Option<Linux> {
    Some(Linux { direct: None, strict, lazy: None })
}

const fn row(name: &'static str, linux: Option<Linux>, limit: Option<f64>) -> Target {
    Target { name, linux, limit, requests: None, kicks: None }
}

/// Requests and kicks too.
const fn asking(
    name: &'static str,
    linux: Option<Linux>,
    limit: Option<f64>,
    requests: f64,
    kicks: f64,
) -> Target {
    Target { requests: Some(requests), kicks: Some(kicks), ..row(name, linux, limit) }
}

/// How many kicks one buffer of a batch of 64 may take.
const ONE_OF_64: f64 = 1.0 / 64.0;

/// Instructions of one operation.
pub(super) const OPERATIONS: [Target; 30] = [
    asking("raw_request", None, Some(150.0), 1.0, 1.0),
    asking("map_unmap_4k_strict", linux(179, 4_835, 4_812), Some(480.0), 2.0, 2.0),
    asking("map_unmap_64k_strict", linux(179, 4_858, 4_837), None, 2.0, 2.0),
    asking("map_unmap_1m_strict", linux(179, 5_308, 5_486), Some(480.0), 2.0, 2.0),
    row("map_unmap_4k_deferred", linux(179, 4_835, 4_812), Some(300.0)),
    row("map_unmap_4k_deferred_other", None, None),
    asking("map_unmap_4k_pool", linux(179, 4_835, 4_812), Some(90.0), 0.0, 0.0),
    asking("map_4k_strict", None, None, 1.0, 1.0),
    asking("unmap_4k_strict", None, None, 1.0, 1.0),
    asking("batch64_map_each", linux(86, 2_617, 2_915), Some(180.0), 1.0, ONE_OF_64),
    asking("batch64_unmap_each", linux(67, 2_485, 2_208), Some(150.0), 1.0, ONE_OF_64),
    asking("sg64_scattered_map", linux(3_719, 147_875, 149_224), Some(9_000.0), 64.0, 1.0),
    asking("sg64_scattered_unmap", linux(3_067, 16_342, 18_723), Some(1_500.0), 1.0, 1.0),
    asking("sg64_contiguous_map", linux(3_719, 11_080, 11_482), Some(700.0), 1.0, 1.0),
    asking("sg64_contiguous_unmap", None, None, 1.0, 1.0),
    asking("coherent_4k", linux(9_760, 13_712, 13_703), Some(1_500.0), 2.0, 2.0),
    asking("attach_detach", linux_strict(3_733), Some(480.0), 2.0, 2.0),
    row("blk_added_4k_qd1_strict", linux(0, 18_442, 18_341), Some(500.0)),
    row("blk_added_4k_qd1_deferred", linux(0, 18_442, 18_341), Some(350.0)),
    asking("blk_added_4k_qd1_pool", linux(0, 18_442, 18_341), Some(60.0), 0.0, 0.0),
    row("blk_added_4k_qd32_strict", linux(0, 19_904, 20_270), Some(500.0)),
    row("blk_added_4k_qd32_deferred", linux(0, 19_904, 20_270), Some(350.0)),
    asking("blk_added_4k_qd32_pool", linux(0, 19_904, 20_270), Some(60.0), 0.0, 0.0),
    row("blk_added_128k_qd1_strict", linux(0, 169_374, 169_790), Some(7_000.0)),
    row("blk_added_128k_qd1_deferred", linux(0, 169_374, 169_790), Some(6_000.0)),
    asking("blk_added_128k_qd1_pool", linux(0, 169_374, 169_790), Some(60.0), 0.0, 0.0),
    asking("map_unmap_4k_strict_live_1", None, None, 2.0, 2.0),
    asking("map_unmap_4k_strict_live_1k", None, None, 2.0, 2.0),
    row("map_unmap_4k_strict_live_100k", None, None),
    row("map_unmap_4k_strict_live_1m", None, None),
];

/// What is no number of instructions.
pub(super) const RATIOS: [Target; 5] = [
    // Four CPUs, each in a domain of its own, may take no more than one does.
    row("smp4_requests_per_op", None, Some(2.0)),
    row("smp4_kicks_per_op", None, Some(2.0)),
    // A million live mappings against a thousand.
    row("growth", None, Some(1.5)),
    row("driver_bytes_per_live_mapping", None, Some(96.0)),
    row("mmio_accesses_per_kick", None, Some(1.0)),
];

/// Instructions of one operation of the draft, or of nested spaces, without those of devices in software. There is nothing
/// to compare them with, and no target.
pub(super) const DRAFT: [Target; 7] = [
    row("context_map_unmap", None, None),
    row("context_table_map_page", None, None),
    row("context_table_unmap_page", None, None),
    row("context_invalidate_page", None, None),
    row("nested_map_unmap_depth1", None, None),
    row("nested_map_unmap_depth2", None, None),
    row("nested_map_unmap_depth3", None, None),
];

/// Whether a row of the kernel's is one that only a kernel with contexts has.
pub(super) fn is_of_the_draft(row: &str) -> bool {
    row.starts_with("context_") || row.starts_with("nested_")
}
