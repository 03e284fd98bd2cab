//! Entries of RISC-V's Sv39 and Sv48 (RISC-V privileged architecture, supervisor-level ISA; RISC-V IOMMU specification 1.0,
//! first-stage tables).

use super::format::Shape;
use crate::prot::Prot;

pub(super) const SV39: Shape =
    Shape { page_bits: 12, index_bits: 9, levels: 3, input_bits: 38, output_bits: 56, leaf_level: 2 };
pub(super) const SV48: Shape =
    Shape { page_bits: 12, index_bits: 9, levels: 4, input_bits: 47, output_bits: 56, leaf_level: 3 };

const VALID: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
/// Requests without the privileged bit are a user's.
const USER: u64 = 1 << 4;
/// Set from the start: an IOMMU that does not set them itself faults without.
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
/// The page number, from bit 10 on.
const PAGE_NUMBER: u64 = ((1 << 44) - 1) << 10;

/// MMIO has no bit: the physical memory attributes say what an address is, as long as Svpbmt is not in use.
pub(super) fn leaf_bits(prot: Prot) -> u64 {
    let mut bits = VALID | READ | USER | ACCESSED;
    if prot.contains(Prot::WRITE) {
        bits |= WRITE | DIRTY;
    }
    bits
}

pub(super) fn leaf(phys: u64, bits: u64) -> u64 {
    phys >> 12 << 10 & PAGE_NUMBER | bits
}

/// All permission bits clear is what makes it a table.
pub(super) fn table(phys: u64) -> u64 {
    phys >> 12 << 10 & PAGE_NUMBER | VALID
}

pub(super) fn leaf_phys(entry: u64) -> u64 {
    (entry & PAGE_NUMBER) >> 10 << 12
}

pub(super) fn leaf_prot(entry: u64) -> Prot {
    let mut prot = Prot::READ;
    prot.set(Prot::WRITE, entry & WRITE != 0);
    prot
}
