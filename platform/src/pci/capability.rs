//! The two lists of capabilities. Both are linked lists that a device writes: a loop or a pointer to nowhere ends them.

use alloc::vec::Vec;

use pci_types::{PciAddress, StatusRegister};

use super::config::{CONFIG_BYTES, ConfigSpace, offset};

/// The most capabilities that fit: each has 4 bytes at least, behind the header of 64.
const MAX_CAPABILITIES: usize = (256 - 64) / 4;
const MAX_EXTENDED: usize = (CONFIG_BYTES as usize - 256) / 4;
const FIRST_OFFSET: u16 = 0x40;

/// A capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// What it is: 0x05 MSI, 0x09 vendor-specific (virtio), 0x10 PCI Express, 0x11 MSI-X.
    pub id: u8,
    /// Where it begins.
    pub offset: u16,
}

/// An extended capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedCapability {
    /// What it is: 0x0d ACS, 0x0f ATS, 0x1b PASID.
    pub id: u16,
    /// The version of its layout.
    pub version: u8,
    /// Where it begins.
    pub offset: u16,
}

/// Reads the list of capabilities.
pub(super) fn list(config: &impl ConfigSpace, address: PciAddress) -> Vec<Capability> {
    let mut found: Vec<Capability> = Vec::new();
    let status = StatusRegister::new(config.read16(address, offset::STATUS));
    if !status.has_capability_list() {
        return found;
    }
    // The two lowest bits of a pointer are reserved.
    let pointer = |offset| u16::from(config.read8(address, offset) & !3);
    let mut next = pointer(offset::CAPABILITIES);
    while next >= FIRST_OFFSET && found.len() < MAX_CAPABILITIES && found.iter().all(|c| c.offset != next) {
        let id = config.read8(address, next);
        if id == 0xff {
            break;
        }
        found.push(Capability { id, offset: next });
        next = pointer(next + 1);
    }
    found
}

/// Reads the list of extended capabilities.
pub(super) fn list_extended(config: &impl ConfigSpace, address: PciAddress) -> Vec<ExtendedCapability> {
    let mut found: Vec<ExtendedCapability> = Vec::new();
    let mut next = offset::EXTENDED_CAPABILITIES;
    while next >= offset::EXTENDED_CAPABILITIES
        && found.len() < MAX_EXTENDED
        && found.iter().all(|c| c.offset != next)
    {
        let header = config.read32(address, next);
        // No extended space at all reads as ones, an empty one as zeros.
        if header == u32::MAX || header == 0 {
            break;
        }
        found.push(ExtendedCapability {
            id: header as u16,
            version: (header >> 16 & 0xf) as u8,
            offset: next,
        });
        next = (header >> 20) as u16 & !3;
    }
    found
}
