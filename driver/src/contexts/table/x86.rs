//! Entries of x86-64 paging as VT-d's first stage reads them (Intel VT-d specification 4.1, first-stage paging entries).

use super::format::Shape;
use crate::prot::Prot;

pub(super) const SHAPE: Shape =
    Shape { page_bits: 12, index_bits: 9, levels: 4, input_bits: 47, output_bits: 52, leaf_level: 2 };

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
/// Requests without the privileged bit are a user's.
const USER: u64 = 1 << 2;
/// Write-through and cache-disable: together the uncached entry of the page attribute table as it is after a reset.
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
/// Set from the start, so that no walk has to.
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// A block, above the lowest level.
const PAGE_SIZE: u64 = 1 << 7;
/// No instructions are fetched by devices.
const EXECUTE_DISABLE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

pub(super) fn leaf_bits(prot: Prot) -> u64 {
    let mut bits = PRESENT | USER | ACCESSED | EXECUTE_DISABLE;
    if prot.contains(Prot::WRITE) {
        bits |= WRITE | DIRTY;
    }
    if prot.contains(Prot::MMIO) {
        bits |= WRITE_THROUGH | CACHE_DISABLE;
    }
    bits
}

pub(super) fn leaf(level: u32, phys: u64, bits: u64) -> u64 {
    let block = if level > 0 { PAGE_SIZE } else { 0 };
    phys & ADDRESS | bits | block
}

pub(super) fn table(phys: u64) -> u64 {
    phys & ADDRESS | PRESENT | WRITE | USER | ACCESSED
}

pub(super) fn leaf_phys(entry: u64) -> u64 {
    entry & ADDRESS
}

pub(super) fn leaf_prot(entry: u64) -> Prot {
    let mut prot = Prot::READ;
    prot.set(Prot::WRITE, entry & WRITE != 0);
    prot.set(Prot::MMIO, entry & CACHE_DISABLE != 0);
    prot
}
