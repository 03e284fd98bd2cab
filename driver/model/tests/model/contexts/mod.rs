//! The draft's contexts, by raw bytes at the offsets of PROTOCOL 5.

mod access;
mod descriptors;
mod forms;
mod invalidate;
mod pages;
mod requests;

use virtio_iommu_model::{Access, AccessError, Config, Fault, FaultReason};

use crate::rig::{BUFFERS, EP, OK, Rig};

pub(super) const FAULT: u8 = 7;

/// Where tests build tables.
pub(super) const TABLES: u64 = BUFFERS + 0x4_0000;

pub(super) fn rig() -> Rig {
    Rig::new(Config { bypass: false, ..Config::contexts() })
}

/// [`EP`] in domain 1, whose anonymous accesses do as the flags say.
pub(super) fn attached(flags: u32) -> Rig {
    let mut rig = rig();
    assert_eq!(rig.status(&crate::rig::attach(1, EP, flags, 0)), OK);
    rig
}

/// A request of `len` bytes with fields at offsets.
pub(super) fn request(kind: u8, len: usize, fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes[0] = kind;
    for (at, field) in fields {
        bytes[*at..*at + field.len()].copy_from_slice(field);
    }
    bytes
}

/// ATTACH_TABLE of endpoint 8 in domain 1.
pub(super) fn attach_table(format: u16, pasid: u32, fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = request(6, 84, &[(4, &[1]), (8, &[EP as u8]), (12, &[1])]);
    bytes[16..18].copy_from_slice(&format.to_le_bytes());
    bytes[20..24].copy_from_slice(&pasid.to_le_bytes());
    for (at, field) in fields {
        bytes[*at..*at + field.len()].copy_from_slice(field);
    }
    bytes
}

/// ATTACH_TABLE of a context that is mapped.
pub(super) fn mapped(pasid: u32) -> Vec<u8> {
    attach_table(0, pasid, &[])
}

/// ATTACH_TABLE of VT-d's first stage.
pub(super) fn vtd(pasid: u32, root: u64) -> Vec<u8> {
    attach_table(4, pasid, &[(24, &root.to_le_bytes()), (40, &48u32.to_le_bytes())])
}

pub(super) fn detach_pasid(pasid: u32) -> Vec<u8> {
    request(2, 20, &[(4, &[1]), (8, &[EP as u8]), (12, &[1]), (16, &pasid.to_le_bytes())])
}

pub(super) fn map_context(pasid: u32, first: u64, last: u64, phys: u64, flags: u32) -> Vec<u8> {
    let (pasid, flags) = (pasid.to_le_bytes(), flags.to_le_bytes());
    let (first, last, phys) = (first.to_le_bytes(), last.to_le_bytes(), phys.to_le_bytes());
    request(0x43, 40, &[(4, &[1]), (8, &pasid), (12, &flags), (16, &first), (24, &last), (32, &phys)])
}

pub(super) fn unmap_context(pasid: u32, first: u64, last: u64) -> Vec<u8> {
    let fields = (pasid.to_le_bytes(), first.to_le_bytes(), last.to_le_bytes());
    request(0x44, 32, &[(4, &[1]), (8, &fields.0), (16, &fields.1), (24, &fields.2)])
}

/// INVALIDATE of pages in a context.
pub(super) fn invalidate(pasid: u32, start: u64, pages: u64, flags: u8) -> Vec<u8> {
    let (pasid, start, pages) = (pasid.to_le_bytes(), start.to_le_bytes(), pages.to_le_bytes());
    let flags = [flags | 1, 0];
    request(
        7,
        60,
        &[
            (4, &[4]),
            (6, &[1]),
            (8, &flags),
            (12, &[1]),
            (16, &pasid),
            (32, &start),
            (40, &pages),
            (48, &[12]),
        ],
    )
}

pub(super) fn write(rig: &mut Rig, pasid: Option<u32>, iova: u64, data: &[u8]) -> Result<(), AccessError> {
    rig.device.access_context(&mut rig.mem, EP, pasid, iova, Access::Write(data))
}

/// Why a write of one byte is refused.
pub(super) fn refused(rig: &mut Rig, pasid: Option<u32>, iova: u64) -> FaultReason {
    match write(rig, pasid, iova, &[1]) {
        Err(AccessError::Fault(Fault { reason, pasid: said, .. })) => {
            assert_eq!(said, pasid);
            reason
        }
        other => panic!("{other:?}"),
    }
}

/// An x86-64 table at [`TABLES`] that maps 0x1000 and 0x2000 to pages of [`BUFFERS`], both writable.
pub(super) fn x86_table(rig: &mut Rig) -> u64 {
    let entry = |rig: &mut Rig, at: u64, value: u64| rig.poke(at, &value.to_le_bytes());
    entry(rig, TABLES, TABLES + 0x1007);
    entry(rig, TABLES + 0x1000, TABLES + 0x2007);
    entry(rig, TABLES + 0x2000, TABLES + 0x3007);
    entry(rig, TABLES + 0x3008, BUFFERS + 0x67);
    entry(rig, TABLES + 0x3010, BUFFERS + 0x1067);
    TABLES
}
