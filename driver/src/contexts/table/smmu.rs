//! SMMUv3's table of context descriptors: PASID to page table (Arm SMMUv3 architecture specification, IHI 0070, context
//! descriptor and context descriptor table formats).
//!
//! ```text
//!   linear      two-level
//!   CD 0        L1 0 ---> CD 0 .. 63 (or 1023)
//!   CD 1        L1 1      (nothing there: invalid)
//!   ...         L1 2 ---> CD 128 ..
//! ```

use super::memory::TablePage;
use super::{ArmRegisters, ContextTableError, TableMemory};
use crate::addr::PhysAddr;
use alloc::collections::{BTreeMap, BTreeSet};
use core::fmt;

/// How the descriptors are arranged. PASIDs of a device have up to 20 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "s1fmt")]
pub enum ContextDescriptors {
    /// One array, of up to 10 bits here: 64 KiB.
    Linear,
    /// Two levels, with 64 descriptors, 4 KiB, in each table of the second.
    TwoLevel4K,
    /// Two levels, with 1024 descriptors, 64 KiB, in each table of the second.
    TwoLevel64K,
}

impl ContextDescriptors {
    /// As ATTACH_TABLE says it, and STE.S1Fmt.
    pub fn s1fmt(self) -> u8 {
        match self {
            Self::Linear => 0,
            Self::TwoLevel4K => 1,
            Self::TwoLevel64K => 2,
        }
    }

    /// Bits of a PASID that pick a descriptor in a table of the second level.
    fn leaf_bits(self) -> u32 {
        match self {
            Self::Linear => 0,
            Self::TwoLevel4K => 6,
            Self::TwoLevel64K => 10,
        }
    }
}

/// Bytes and words of a descriptor.
const DESCRIPTOR_LEN: usize = 64;
const DESCRIPTOR_WORDS: usize = DESCRIPTOR_LEN / 8;
/// The least that an array is aligned to.
const MIN_LEN: usize = 64;
const LINEAR_BITS: u32 = 10;
const MAX_BITS: u32 = 20;

/// The valid bit of a first-level descriptor.
const LEVEL_ONE_VALID: u64 = 1;

/// CD.V.
const VALID: u64 = 1 << 31;
/// CD.EPD1: no walks by TTB1.
const NO_SECOND_TABLE: u64 = 1 << 30;
/// CD.AA64.
const AARCH64: u64 = 1 << 41;
/// CD.R and CD.A: faults are recorded, and end the access.
const RECORD_AND_ABORT: u64 = 1 << 45 | 1 << 46;
/// CD.ASET: the ASID is not shared with the CPUs.
const OWN_ASID: u64 = 1 << 47;
const ASID_SHIFT: u32 = 48;

/// A table of context descriptors in memory from `M`.
///
/// A device caches descriptors, also that there is none: after each change the configuration of that PASID has to be
/// invalidated. Tables of the second level stay until [`free`](Self::free). Dropping it gives no memory back.
pub struct ContextTable<M: TableMemory> {
    memory: M,
    arrangement: ContextDescriptors,
    bits: u32,
    /// The array, or the first level.
    top: TablePage,
    leaves: BTreeMap<u32, TablePage>,
    present: BTreeSet<u32>,
}

impl<M: TableMemory> ContextTable<M> {
    /// An empty table for PASIDs of `bits` bits. Allocates.
    ///
    /// # Errors
    /// [`ContextTableError`], for more bits than can be, and without memory.
    pub fn new(arrangement: ContextDescriptors, bits: u32, memory: M) -> Result<Self, ContextTableError> {
        let limit = if arrangement == ContextDescriptors::Linear { LINEAR_BITS } else { MAX_BITS };
        if bits > limit {
            return Err(ContextTableError::PasidBits { bits, limit });
        }
        let len = match arrangement {
            ContextDescriptors::Linear => DESCRIPTOR_LEN << bits,
            _ => (8usize << bits.saturating_sub(arrangement.leaf_bits())).max(MIN_LEN),
        };
        let top = TablePage::allocate(&memory, len).ok_or(ContextTableError::NoMemory { len })?;
        Ok(Self { memory, arrangement, bits, top, leaves: BTreeMap::new(), present: BTreeSet::new() })
    }

    /// Where the device begins: S1ContextPtr.
    #[doc(alias = "s1contextptr")]
    pub fn root(&self) -> PhysAddr {
        self.top.phys()
    }

    /// How the descriptors are arranged.
    pub fn arrangement(&self) -> ContextDescriptors {
        self.arrangement
    }

    /// Bits of PASID: S1CDMax.
    #[doc(alias = "s1cdmax")]
    pub fn pasid_bits(&self) -> u32 {
        self.bits
    }

    /// Whether a PASID has a context.
    pub fn contains(&self, pasid: u32) -> bool {
        self.present.contains(&pasid)
    }

    /// Gives a PASID a page table, cached under `asid`. The device may use it from now on, and at the latest after the
    /// PASID's configuration was invalidated. May allocate.
    ///
    /// # Errors
    /// [`ContextTableError`]. Nothing was changed.
    pub fn set(&mut self, pasid: u32, table: ArmRegisters, asid: u16) -> Result<(), ContextTableError> {
        self.check(pasid)?;
        if self.present.contains(&pasid) {
            return Err(ContextTableError::Present { pasid });
        }
        self.make_leaf(pasid)?;
        let words = descriptor(table, asid);
        let (page, first) = self.place(pasid).ok_or(ContextTableError::Absent { pasid })?;
        // The valid bit is in the first word, which goes last: a device that sees it sees the others.
        for (index, word) in words.iter().enumerate().rev() {
            page.write(first + index, *word);
        }
        self.present.insert(pasid);
        Ok(())
    }

    /// Takes a PASID's page table away. The device may use it until the PASID's configuration, and what it cached of the
    /// table, was invalidated.
    ///
    /// # Errors
    /// [`ContextTableError::Absent`] and [`ContextTableError::OutsideTable`].
    pub fn clear(&mut self, pasid: u32) -> Result<(), ContextTableError> {
        self.check(pasid)?;
        let known = self.present.contains(&pasid);
        let Some((page, first)) = self.place(pasid).filter(|_| known) else {
            return Err(ContextTableError::Absent { pasid });
        };
        for index in 0..DESCRIPTOR_WORDS {
            page.write(first + index, 0);
        }
        self.present.remove(&pasid);
        Ok(())
    }

    /// Gives all memory of the table back.
    ///
    /// # Safety
    /// No device uses the table any more, and nothing that any device cached of it is left.
    pub unsafe fn free(self) {
        let Self { memory, top, leaves, .. } = self;
        for page in leaves.into_values().chain([top]) {
            // SAFETY: the caller's promise.
            unsafe { page.free(&memory) };
        }
    }

    fn check(&self, pasid: u32) -> Result<(), ContextTableError> {
        match u64::from(pasid) >> self.bits {
            0 => Ok(()),
            _ => Err(ContextTableError::OutsideTable { pasid, bits: self.bits }),
        }
    }

    /// Makes sure of the second-level table of a PASID.
    fn make_leaf(&mut self, pasid: u32) -> Result<(), ContextTableError> {
        let leaf_bits = self.arrangement.leaf_bits();
        let number = pasid >> leaf_bits;
        if self.arrangement == ContextDescriptors::Linear || self.leaves.contains_key(&number) {
            return Ok(());
        }
        let len = DESCRIPTOR_LEN << leaf_bits;
        let page = TablePage::allocate(&self.memory, len).ok_or(ContextTableError::NoMemory { len })?;
        self.top.write(number as usize, page.phys().get() | LEVEL_ONE_VALID);
        self.leaves.insert(number, page);
        Ok(())
    }

    /// The page of a PASID's descriptor, and its first word there.
    fn place(&mut self, pasid: u32) -> Option<(&mut TablePage, usize)> {
        if self.arrangement == ContextDescriptors::Linear {
            return Some((&mut self.top, DESCRIPTOR_WORDS * pasid as usize));
        }
        let leaf_bits = self.arrangement.leaf_bits();
        let index = pasid & ((1 << leaf_bits) - 1);
        let page = self.leaves.get_mut(&(pasid >> leaf_bits))?;
        Some((page, DESCRIPTOR_WORDS * index as usize))
    }
}

/// A context descriptor. Its fields T0SZ to SH0 lie as in TCR_EL1, but the granule's and IPS.
fn descriptor(table: ArmRegisters, asid: u16) -> [u64; DESCRIPTOR_WORDS] {
    let field = |shift: u32, bits: u32| table.tcr >> shift & ((1 << bits) - 1);
    let (size, inner, outer, shareable) = (field(0, 6), field(8, 2), field(10, 2), field(12, 2));
    let (granule, output_size) = (field(14, 2), field(32, 3));
    let first = size
        | granule << 6
        | inner << 8
        | outer << 10
        | shareable << 12
        | NO_SECOND_TABLE
        | VALID
        | output_size << 32
        | AARCH64
        | RECORD_AND_ABORT
        | OWN_ASID
        | u64::from(asid) << ASID_SHIFT;
    [first, table.ttbr0, 0, table.mair, 0, 0, 0, 0]
}

impl<M: TableMemory> fmt::Debug for ContextTable<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ContextTable")
            .field("arrangement", &self.arrangement)
            .field("root", &self.root())
            .field("present", &self.present)
            .finish_non_exhaustive()
    }
}
