//! What a mapping allows, and which way data flows.

use bitflags::bitflags;

bitflags! {
    /// What an endpoint may do through a mapping.
    ///
    /// READ must be set where reads are intended: WRITE does not imply it (virtio 1.4, IOMMU device, MAP
    /// request, driver requirements).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Prot: u32 {
        /// The endpoint may read.
        #[doc(alias = "VIRTIO_IOMMU_MAP_F_READ")]
        const READ = 1 << 0;
        /// The endpoint may write.
        #[doc(alias = "VIRTIO_IOMMU_MAP_F_WRITE")]
        const WRITE = 1 << 1;
        /// The target is a device's registers, not memory. Needs the MMIO feature.
        #[doc(alias = "VIRTIO_IOMMU_MAP_F_MMIO")]
        const MMIO = 1 << 2;
    }
}

impl Prot {
    /// Whether it is for memory that may be read, written or both, and nothing else.
    #[inline]
    pub(crate) const fn is_plain(self) -> bool {
        !self.is_empty() && Self::READ.union(Self::WRITE).contains(self)
    }
}

/// Which way data flows through a mapping, seen from the driver of the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The endpoint only reads.
    ToDevice,
    /// The endpoint only writes.
    FromDevice,
    /// The endpoint reads and writes.
    Both,
}

impl Direction {
    /// The least that the endpoint must be allowed.
    pub const fn prot(self) -> Prot {
        match self {
            Self::ToDevice => Prot::READ,
            Self::FromDevice => Prot::WRITE,
            Self::Both => Prot::READ.union(Prot::WRITE),
        }
    }
}
