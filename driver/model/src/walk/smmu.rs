//! SMMUv3's context descriptors: from a substream, which is a PASID, to a stage-1 table.

use super::{ArmTable, WalkFault};
use crate::memory::GuestMemory;

/// A table of context descriptors, as a stream table entry describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DescriptorTable {
    /// 0 for an array; 1 and 2 for two levels, with 4 KiB and 64 KiB in the second.
    pub s1fmt: u8,
    /// Bits of a substream number.
    pub s1cdmax: u8,
    /// Where it starts.
    pub s1contextptr: u64,
}

/// What a context descriptor says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The table.
    pub table: ArmTable,
    /// What its translations are cached under.
    pub asid: u16,
}

const DESCRIPTOR: u64 = 64;

impl DescriptorTable {
    /// Finds the context of a substream.
    ///
    /// # Errors
    ///
    /// [`WalkFault`]: `Address` for a substream beyond the table, `NotPresent` for one without a context.
    pub fn find(&self, mem: &dyn GuestMemory, substream: u32) -> Result<Found, WalkFault> {
        if u64::from(substream) >> self.s1cdmax.min(32) != 0 {
            return Err(WalkFault::Address);
        }
        let substream = u64::from(substream);
        let at = match self.s1fmt {
            0 => self.base(DESCRIPTOR << self.s1cdmax.min(20))? + DESCRIPTOR * substream,
            1 => self.second(mem, substream, 6)?,
            2 => self.second(mem, substream, 10)?,
            _ => return Err(WalkFault::Reserved { value: self.s1fmt.into() }),
        };
        let mut words = [0; 8];
        for (number, word) in words.iter_mut().enumerate() {
            let mut bytes = [0; 8];
            mem.read(at + 8 * number as u64, &mut bytes)?;
            *word = u64::from_le_bytes(bytes);
        }
        decode(&words)
    }

    /// The start, which is aligned to the size of what is there, at least 64 bytes.
    fn base(&self, len: u64) -> Result<u64, WalkFault> {
        let value = self.s1contextptr;
        let good = value.is_multiple_of(len.max(64)) && value >> 52 == 0;
        if good { Ok(value) } else { Err(WalkFault::Reserved { value }) }
    }

    /// Where a descriptor lies in the second level, with so many bits of the number picking it there.
    fn second(&self, mem: &dyn GuestMemory, substream: u64, bits: u32) -> Result<u64, WalkFault> {
        let entries = 1u64 << u32::from(self.s1cdmax).saturating_sub(bits).min(20);
        let mut bytes = [0; 8];
        mem.read(self.base(8 * entries)? + 8 * (substream >> bits), &mut bytes)?;
        let entry = u64::from_le_bytes(bytes);
        if entry & 1 == 0 {
            return Err(WalkFault::NotPresent { level: 1 });
        }
        let len = DESCRIPTOR << bits;
        // Bits 51:12 or 51:16 are the address, the others are reserved.
        if !(entry & !1).is_multiple_of(len) || entry >> 52 != 0 {
            return Err(WalkFault::Reserved { value: entry });
        }
        Ok((entry & !1) + DESCRIPTOR * (substream % (1 << bits)))
    }
}

fn decode(words: &[u64; 8]) -> Result<Found, WalkFault> {
    let field = |word: usize, low: u32, high: u32| words[word] >> low & ((2u64 << (high - low)) - 1);
    let reserved = Err(WalkFault::Reserved { value: words[0] });
    // V.
    if field(0, 31, 31) == 0 {
        return Err(WalkFault::NotPresent { level: 0 });
    }
    // AA64, and A: a fault that is recorded must not be dropped with zeros read instead.
    if field(0, 41, 41) == 0 || field(0, 46, 46) == 0 {
        return reserved;
    }
    // Big-endian tables (ENDI) are not for this model; hardware updates (HA, HD) neither.
    if field(0, 15, 15) != 0 || field(0, 42, 43) != 0 {
        return reserved;
    }
    // TTB0 is bits 51:4 of its word, beside NSCFG0 and HAD0.
    let ttbr0 = words[1] & ((1 << 52) - 1) & !0xf;
    let table = ArmTable {
        t0sz: field(0, 0, 5) as u8,
        tg0: field(0, 6, 7) as u8,
        ips: field(0, 32, 34) as u8,
        epd0: field(0, 14, 14) == 1,
        epd1: field(0, 30, 30) == 1,
        hpd0: field(1, 1, 1) == 1,
        ttbr0,
        mair: words[3],
    };
    Ok(Found { table, asid: field(0, 48, 63) as u16 })
}
