//! RISC-V Sv39, Sv48 and Sv57, without Svnapot, Svpbmt and hardware updates of A and D; user accesses.

use super::{Allowed, Regime, Step, WalkFault};

pub(super) fn regime(mode: u8, root_page: u64, address: u64) -> Result<Regime, WalkFault> {
    let levels = match mode {
        8 => 3,
        9 => 4,
        10 => 5,
        _ => return Err(WalkFault::Reserved { value: mode.into() }),
    };
    // The bits above the highest index are copies of it.
    let sign = 12 + 9 * levels - 1;
    let top = (address as i64) >> sign;
    if top != 0 && top != -1 {
        return Err(WalkFault::Address);
    }
    if root_page >> 44 != 0 {
        return Err(WalkFault::Reserved { value: root_page });
    }
    Ok(Regime { root: root_page * 4096, page_bits: 12, index_bits: 9, top_level: levels - 1 })
}

pub(super) fn decode(entry: u64, level: u32) -> Result<Step, WalkFault> {
    let bit = |number: u32| entry >> number & 1 != 0;
    let (valid, read, write, execute) = (bit(0), bit(1), bit(2), bit(3));
    let (user, accessed, dirty) = (bit(4), bit(6), bit(7));
    if !valid {
        return Err(WalkFault::NotPresent { level });
    }
    // N, PBMT and what is reserved; writable and not readable.
    if entry >> 54 != 0 || (write && !read) {
        return Err(WalkFault::Reserved { value: entry });
    }
    let page = entry >> 10 & 0xfff_ffff_ffff;
    if !read && !write && !execute {
        // D, A and U are reserved in a pointer.
        if user || accessed || dirty || level == 0 {
            return Err(WalkFault::Reserved { value: entry });
        }
        return Ok(Step::Next { table: page * 4096, allowed: Allowed::ALL });
    }
    if !page.is_multiple_of(512u64.pow(level)) {
        return Err(WalkFault::Reserved { value: entry });
    }
    // Without A nothing is allowed, without D no write: nobody sets them.
    let allowed = Allowed { read: user && accessed && read, write: user && accessed && dirty && write };
    Ok(Step::Leaf { phys: page * 4096, allowed, device: false })
}
