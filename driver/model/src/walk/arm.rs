//! VMSAv8-64 stage 1 by TTBR0, up to 48 bits each way, without hardware updates of the access flag; unprivileged accesses.

use super::{Allowed, Regime, Step, WalkFault};

/// Bits 47:0.
const LOW_48: u64 = (1 << 48) - 1;

/// One stage-1 table and the fields that rule its walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmTable {
    /// Bits that are not translated, at the top.
    pub t0sz: u8,
    /// Granule: 0 for 4 KiB, 1 for 64 KiB, 2 for 16 KiB.
    pub tg0: u8,
    /// Size of output addresses, 0 to 5 for 32 to 48 bits.
    pub ips: u8,
    /// Whether TTBR0 is not walked.
    pub epd0: bool,
    /// Whether TTBR1 is not walked.
    pub epd1: bool,
    /// Whether permissions in table descriptors count for nothing.
    pub hpd0: bool,
    /// Where the table starts.
    pub ttbr0: u64,
    /// Memory attributes.
    pub mair: u64,
}

impl ArmTable {
    /// The table that registers describe, TCR in the layout of TCR_EL1.
    pub fn from_registers(tcr: u64, ttbr0: u64, mair: u64) -> Self {
        let field = |low: u32, high: u32| (tcr >> low & ((2 << (high - low)) - 1)) as u8;
        Self {
            t0sz: field(0, 5),
            tg0: field(14, 15),
            ips: field(32, 34),
            epd0: field(7, 7) == 1,
            epd1: field(23, 23) == 1,
            hpd0: field(41, 41) == 1,
            ttbr0,
            mair,
        }
    }

    /// Page size of the granule, as a shift.
    fn granule(&self) -> Result<u32, WalkFault> {
        match self.tg0 {
            0 => Ok(12),
            1 => Ok(16),
            2 => Ok(14),
            _ => Err(WalkFault::Reserved { value: self.tg0.into() }),
        }
    }

    pub(super) fn regime(&self, address: u64) -> Result<Regime, WalkFault> {
        let page_bits = self.granule()?;
        if !(16..=39).contains(&self.t0sz) {
            return Err(WalkFault::Reserved { value: self.t0sz.into() });
        }
        let input_bits = 64 - u32::from(self.t0sz);
        // Bit 55 picks TTBR1, which this model has not.
        if self.epd0 || address >> input_bits != 0 {
            return Err(WalkFault::Address);
        }
        let index_bits = page_bits - 3;
        let mut top_level = 0;
        while page_bits + index_bits * (top_level + 1) < input_bits {
            top_level += 1;
        }
        let top_entries = 1u64 << (input_bits - page_bits - index_bits * top_level);
        let align = (8 * top_entries).max(64);
        // Bit 0 is CnP, bits 63:48 the ASID.
        let root = self.ttbr0 & LOW_48 & !1;
        if !root.is_multiple_of(align) {
            return Err(WalkFault::Reserved { value: self.ttbr0 });
        }
        Ok(Regime { root, page_bits, index_bits, top_level })
    }

    pub(super) fn decode(&self, entry: u64, level: u32) -> Result<Step, WalkFault> {
        let bit = |number: u32| entry >> number & 1 != 0;
        let page_bits = self.granule()?;
        let not_present = WalkFault::NotPresent { level };
        if !bit(0) || (level == 0 && !bit(1)) {
            return Err(not_present);
        }
        if level > 0 && bit(1) {
            let table = entry & LOW_48 & !((1 << page_bits) - 1);
            // APTable: bit 61 takes unprivileged accesses away, bit 62 writes.
            let (no_user, no_write) = (!self.hpd0 && bit(61), !self.hpd0 && bit(62));
            let allowed = Allowed { read: !no_user, write: !no_user && !no_write };
            return Ok(Step::Next { table: self.sized(table)?, allowed });
        }
        let blocks = match page_bits {
            12 => 2,
            _ => 1,
        };
        if level > blocks {
            return Err(not_present);
        }
        let low = (1u64 << (page_bits + (page_bits - 3) * level)) - 1;
        // Between the attributes and the address nothing is to be set.
        if entry & LOW_48 & low & !0xfff != 0 {
            return Err(WalkFault::Reserved { value: entry });
        }
        // The access flag; AP[1] for unprivileged accesses, AP[2] against writes.
        let (accessed, user, read_only) = (bit(10), bit(6), bit(7));
        let read = accessed && user;
        let attributes = self.mair >> (8 * (entry >> 2 & 7)) & 0xff;
        Ok(Step::Leaf {
            phys: self.sized(entry & LOW_48 & !low)?,
            allowed: Allowed { read, write: read && !read_only },
            device: attributes & 0xf0 == 0,
        })
    }

    /// An output address that fits its size.
    fn sized(&self, address: u64) -> Result<u64, WalkFault> {
        let bits = match self.ips {
            0 => 32,
            1 => 36,
            2 => 40,
            3 => 42,
            4 => 44,
            5 => 48,
            _ => return Err(WalkFault::Reserved { value: self.ips.into() }),
        };
        if address >> bits != 0 { Err(WalkFault::Reserved { value: address }) } else { Ok(address) }
    }
}
