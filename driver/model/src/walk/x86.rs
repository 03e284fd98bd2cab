//! x86-64 paging with four levels, as the first stage of VT-d walks it: 4 KiB, 2 MiB and 1 GiB, user accesses.

use super::{Allowed, Regime, Step, WalkFault};

/// Bits 51:12.
const FRAME: u64 = (1 << 52) - 0x1000;

pub(super) fn regime(root: u64, address: u64) -> Result<Regime, WalkFault> {
    // Canonical: bits 63:47 are all the same.
    let top = (address as i64) >> 47;
    if top != 0 && top != -1 {
        return Err(WalkFault::Address);
    }
    if root & !FRAME != 0 {
        return Err(WalkFault::Reserved { value: root });
    }
    Ok(Regime { root, page_bits: 12, index_bits: 9, top_level: 3 })
}

pub(super) fn decode(entry: u64, level: u32) -> Result<Step, WalkFault> {
    let bit = |number: u32| entry >> number & 1 != 0;
    if !bit(0) {
        return Err(WalkFault::NotPresent { level });
    }
    // Bit 1 is R/W, bit 2 U/S: both have to be set on every level.
    let allowed = Allowed { read: bit(2), write: bit(2) && bit(1) };
    let large = level > 0 && bit(7);
    if !large && level > 0 {
        return Ok(Step::Next { table: entry & FRAME, allowed });
    }
    if level == 3 {
        return Err(WalkFault::Reserved { value: entry });
    }
    let frame = match level {
        0 => FRAME,
        // Bit 12 is PAT in a large page, and what is between it and the frame is reserved.
        _ => FRAME & !((1 << (12 + 9 * level)) - 1),
    };
    let unused = FRAME & !frame & !(1 << 12);
    if level > 0 && entry & unused != 0 {
        return Err(WalkFault::Reserved { value: entry });
    }
    // PCD and PWT: uncached.
    Ok(Step::Leaf { phys: entry & frame, allowed, device: bit(3) && bit(4) })
}
