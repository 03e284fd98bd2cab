//! Faults, and their records on the event queue (PROTOCOL 1.7).

use crate::memory::OutOfMemoryRange;

const FLAG_READ: u32 = 1;
const FLAG_WRITE: u32 = 1 << 1;
const FLAG_ADDRESS: u32 = 1 << 8;

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// The endpoint reads memory.
    Read,
    /// The endpoint writes memory.
    Write,
}

/// One access by an endpoint.
#[derive(Debug, PartialEq, Eq)]
pub enum Access<'a> {
    /// Memory is read into the buffer.
    Read(&'a mut [u8]),
    /// The bytes are written to memory.
    Write(&'a [u8]),
}

/// Why an access was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FaultReason {
    /// The device cannot say.
    Unknown = 0,
    /// The endpoint is not attached.
    Domain = 1,
    /// There is no mapping, or it lacks the permission.
    Mapping = 2,
}

/// One refused access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Why.
    pub reason: FaultReason,
    /// What was wanted, if the record says so.
    pub kind: Option<AccessKind>,
    /// Whose access it was.
    pub endpoint: u32,
    /// First IOVA that was refused, if the record says so.
    pub address: Option<u64>,
    /// The context's PASID, if the access had one. Only the draft's records say it.
    pub pasid: Option<u32>,
}

impl Fault {
    /// The record, with reserved fields and undefined flags 0.
    pub fn record(&self) -> [u8; 24] {
        let kind = match self.kind {
            Some(AccessKind::Read) => FLAG_READ,
            Some(AccessKind::Write) => FLAG_WRITE,
            None => 0,
        };
        let flags = kind | if self.address.is_some() { FLAG_ADDRESS } else { 0 };
        let mut bytes = [0; 24];
        bytes[0] = self.reason as u8;
        bytes[4..8].copy_from_slice(&flags.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.endpoint.to_le_bytes());
        bytes[16..].copy_from_slice(&self.address.unwrap_or(0).to_le_bytes());
        bytes
    }
}

const FLAG_LAST: u32 = 1 << 4;
const FLAG_PAGE_REQUEST: u32 = 1 << 5;
const FLAG_PASID: u32 = 1 << 9;
const FLAG_GROUP: u32 = 1 << 10;

/// Bytes of the draft's record.
pub(crate) const LONG_RECORD: usize = 48;

impl Fault {
    /// The record of the draft: 48 bytes, of which the first 24 are the standard's (PROTOCOL 5.5). A page request has a
    /// group, and says whether it is the last one of it.
    pub fn long_record(&self, page: Option<(u16, bool)>) -> [u8; LONG_RECORD] {
        let mut bytes = [0; LONG_RECORD];
        bytes[..24].copy_from_slice(&self.record());
        let mut flags = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        if let Some(pasid) = self.pasid {
            flags |= FLAG_PASID;
            bytes[12..16].copy_from_slice(&pasid.to_le_bytes());
        }
        if let Some((group, last)) = page {
            flags |= FLAG_PAGE_REQUEST | FLAG_GROUP | if last { FLAG_LAST } else { 0 };
            bytes[24..26].copy_from_slice(&group.to_le_bytes());
        }
        bytes[4..8].copy_from_slice(&flags.to_le_bytes());
        bytes
    }
}

/// The first 24 bytes of a record, without what the standard does not define.
pub(crate) fn short_form(record: &[u8]) -> [u8; 24] {
    let mut bytes = [0; 24];
    let len = record.len().min(24);
    bytes[..len].copy_from_slice(&record[..len]);
    let known = FLAG_READ | FLAG_WRITE | FLAG_ADDRESS;
    let flags = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) & known;
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[12..16].fill(0);
    bytes
}

/// Why a DMA access did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessError {
    /// The IOMMU refused it. Bytes before the refused one were transferred.
    Fault(Fault),
    /// It was translated to an address that is not guest memory.
    NotMemory(OutOfMemoryRange),
}

impl From<OutOfMemoryRange> for AccessError {
    fn from(error: OutOfMemoryRange) -> Self {
        Self::NotMemory(error)
    }
}

/// One write into an endpoint's MSI window, which the device keeps instead of writing memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Whose write it was.
    pub endpoint: u32,
    /// IOVA of the first byte.
    pub address: u64,
    /// The first four bytes, zero-filled.
    pub data: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_has_fields_at_their_offsets() {
        let fault = Fault {
            reason: FaultReason::Mapping,
            kind: Some(AccessKind::Write),
            endpoint: 0x0a0b_0c0d,
            address: Some(0x1122_3344_5566_7788),
            pasid: None,
        };
        let expected = [
            2, 0, 0, 0, 2, 1, 0, 0, 0x0d, 0x0c, 0x0b, 0x0a, 0, 0, 0, 0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33,
            0x22, 0x11,
        ];
        assert_eq!(fault.record(), expected);
    }
}
