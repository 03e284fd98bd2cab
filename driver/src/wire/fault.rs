//! Fault records, as they come in the event queue's buffers.

use crate::addr::Iova;
use crate::id::{DomainId, EndpointId};
use bitflags::bitflags;
use core::fmt;

/// The size of a record, and of the buffers that the driver posts for them.
pub(crate) const RECORD_LEN: usize = 24;

/// Why an access failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultReason {
    /// Not said. Some devices report endpoints this way that were never attached.
    #[doc(alias = "VIRTIO_IOMMU_FAULT_R_UNKNOWN")]
    Unknown,
    /// The endpoint is not attached to a domain.
    #[doc(alias = "VIRTIO_IOMMU_FAULT_R_DOMAIN")]
    Domain,
    /// Nothing is mapped at the address, or the mapping forbids the access.
    #[doc(alias = "VIRTIO_IOMMU_FAULT_R_MAPPING")]
    Mapping,
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Unknown => "unknown",
            Self::Domain => "no domain",
            Self::Mapping => "no mapping",
        })
    }
}

bitflags! {
    /// What the endpoint tried. Both clear when the device did not say, as QEMU does for unmapped addresses.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FaultAccess: u32 {
        /// A read.
        #[doc(alias = "VIRTIO_IOMMU_FAULT_F_READ")]
        const READ = 1 << 0;
        /// A write.
        #[doc(alias = "VIRTIO_IOMMU_FAULT_F_WRITE")]
        const WRITE = 1 << 1;
    }
}

const FLAG_ADDRESS: u32 = 1 << 8;

/// An access that the device blocked (virtio 1.4, IOMMU device, fault reporting).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "virtio_iommu_fault")]
pub struct Fault {
    /// Why.
    pub reason: FaultReason,
    /// What was tried, where the device said.
    pub access: FaultAccess,
    /// Who tried.
    pub endpoint: EndpointId,
    /// Where, if the device said.
    pub address: Option<Iova>,
    /// The domain that the endpoint was in when the record was taken in.
    pub domain: Option<DomainId>,
    /// What the embedder knows the endpoint by: [`EndpointOptions::tag`](crate::EndpointOptions::tag).
    pub tag: Option<usize>,
    /// The context, where the access had a PASID.
    #[cfg(feature = "contexts")]
    pub pasid: Option<crate::contexts::Pasid>,
    /// The group that waits for an answer, where the access can go on after one.
    #[cfg(feature = "contexts")]
    pub page_request: Option<crate::contexts::PageGroupId>,
}

impl Fault {
    /// Reads a record, or `None` where the standard says to ignore it: its first reserved bytes are not zero.
    /// An unknown reason reads as unknown; undefined flags and `reserved1` are ignored.
    pub(crate) fn decode(record: &[u8; RECORD_LEN]) -> Option<Self> {
        if record[1..4] != [0; 3] {
            return None;
        }
        let word =
            |at: usize| u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
        let flags = word(4);
        let address = u64::from(word(16)) | u64::from(word(20)) << 32;
        Some(Self {
            reason: match record[0] {
                1 => FaultReason::Domain,
                2 => FaultReason::Mapping,
                _ => FaultReason::Unknown,
            },
            access: FaultAccess::from_bits_truncate(flags),
            endpoint: EndpointId::new(word(8)),
            address: (flags & FLAG_ADDRESS != 0).then(|| Iova::new(address)),
            domain: None,
            tag: None,
            #[cfg(feature = "contexts")]
            pasid: None,
            #[cfg(feature = "contexts")]
            page_request: None,
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = match (self.access.contains(FaultAccess::READ), self.access.contains(FaultAccess::WRITE))
        {
            (true, true) => "read+write",
            (true, false) => "read",
            (false, true) => "write",
            (false, false) => "access",
        };
        write!(f, "endpoint {}: {access}", self.endpoint)?;
        if let Some(address) = self.address {
            write!(f, " at {address}")?;
        }
        write!(f, " blocked, {}", self.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A write to 0x0807060504030201 by endpoint 0x20, no mapping.
    const WRITE: [u8; 24] = [2, 0, 0, 0, 0x02, 0x01, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];

    #[test]
    fn a_hand_written_record_decodes() {
        let fault = Fault::decode(&WRITE).unwrap();
        assert_eq!(fault.reason, FaultReason::Mapping);
        assert_eq!(fault.access, FaultAccess::WRITE);
        assert_eq!(fault.endpoint, EndpointId::new(0x20));
        assert_eq!(fault.address, Some(Iova::new(0x0807_0605_0403_0201)));
        let text = alloc::format!("{fault}");
        assert_eq!(text, "endpoint 0x20: write at 0x807060504030201 blocked, no mapping");
    }

    #[test]
    fn a_record_with_reserved_bytes_is_ignored() {
        for at in 1..4 {
            let mut record = WRITE;
            record[at] = 1;
            assert_eq!(Fault::decode(&record), None);
        }
    }

    #[test]
    fn what_is_undefined_is_ignored() {
        let mut record = WRITE;
        record[0] = 77;
        record[4..8].fill(0xff);
        record[12..16].fill(0xff);
        let fault = Fault::decode(&record).unwrap();
        assert_eq!(fault.reason, FaultReason::Unknown);
        assert_eq!(fault.access, FaultAccess::all());
    }

    #[test]
    fn an_access_of_unknown_kind_is_still_a_fault() {
        // What QEMU sends for an unmapped address: only the ADDRESS flag.
        let mut record = WRITE;
        record[4] = 0;
        let fault = Fault::decode(&record).unwrap();
        assert_eq!(fault.access, FaultAccess::empty());
        assert!(fault.address.is_some());
        record[5] = 0;
        assert_eq!(Fault::decode(&record).unwrap().address, None);
    }
}
