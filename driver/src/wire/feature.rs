//! Feature bits of the IOMMU device and of the ring.

use bitflags::bitflags;
use core::fmt;

bitflags! {
    /// Feature bits that the driver knows (virtio 1.4, IOMMU device, feature bits; reserved feature bits).
    /// Unknown bits of a device are ignored.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// `input_range` is valid.
        #[doc(alias = "VIRTIO_IOMMU_F_INPUT_RANGE")]
        const INPUT_RANGE = 1 << 0;
        /// `domain_range` is valid.
        #[doc(alias = "VIRTIO_IOMMU_F_DOMAIN_RANGE")]
        const DOMAIN_RANGE = 1 << 1;
        /// MAP and UNMAP are there. The only feature that the driver requires.
        #[doc(alias = "VIRTIO_IOMMU_F_MAP_UNMAP")]
        const MAP_UNMAP = 1 << 2;
        /// Unattached endpoints bypass when negotiated. Accepted only if the embedder asks for it, and BYPASS_CONFIG,
        /// which supersedes it, is not there.
        #[doc(alias = "VIRTIO_IOMMU_F_BYPASS")]
        const BYPASS = 1 << 3;
        /// PROBE is there and `probe_size` is valid.
        #[doc(alias = "VIRTIO_IOMMU_F_PROBE")]
        const PROBE = 1 << 4;
        /// MAP takes the MMIO flag.
        #[doc(alias = "VIRTIO_IOMMU_F_MMIO")]
        const MMIO = 1 << 5;
        /// `bypass` can be written, and ATTACH takes the bypass flag.
        #[doc(alias = "VIRTIO_IOMMU_F_BYPASS_CONFIG")]
        const BYPASS_CONFIG = 1 << 6;
        /// Contexts, of a draft: see [`contexts`](crate::contexts). Accepted only if the embedder asks for it.
        #[cfg(feature = "contexts")]
        #[doc(alias = "VIRTIO_IOMMU_F_ATTACH_TABLE")]
        const CONTEXTS = 1 << 8;
        /// Notifications are suppressed by index.
        #[doc(alias = "VIRTIO_F_EVENT_IDX")]
        const EVENT_IDX = 1 << 29;
        /// The modern interface. Required.
        #[doc(alias = "VIRTIO_F_VERSION_1")]
        const VERSION_1 = 1 << 32;
        /// The device reaches memory the way the platform says.
        #[doc(alias = "VIRTIO_F_ACCESS_PLATFORM")]
        const ACCESS_PLATFORM = 1 << 33;
        /// A queue can be reset by itself. Accepted where the transport can do it.
        #[doc(alias = "VIRTIO_F_RING_RESET")]
        const RING_RESET = 1 << 40;
        /// The device needs barriers fit for real hardware.
        #[doc(alias = "VIRTIO_F_ORDER_PLATFORM")]
        const ORDER_PLATFORM = 1 << 36;
    }
}

impl fmt::Display for Features {
    /// The names, with ` | ` between them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        bitflags::parser::to_writer(self, f)
    }
}

impl Features {
    /// Without these the driver does not start.
    pub(crate) const REQUIRED: Self = Self::VERSION_1.union(Self::MAP_UNMAP);

    /// What the driver accepts when offered. Legacy `BYPASS` is left out: accepting it opens the window that the
    /// driver is there to close, so that only the embedder can want it.
    pub(crate) const ACCEPTED: Self = Self::REQUIRED
        .union(Self::INPUT_RANGE)
        .union(Self::DOMAIN_RANGE)
        .union(Self::PROBE)
        .union(Self::MMIO)
        .union(Self::BYPASS_CONFIG)
        .union(Self::EVENT_IDX)
        .union(Self::ACCESS_PLATFORM)
        .union(Self::RING_RESET)
        .union(Self::ORDER_PLATFORM);
}
