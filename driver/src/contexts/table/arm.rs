//! Descriptors of VMSAv8-64, stage 1, and the registers that go with a table (Arm Architecture Reference Manual for
//! A-profile, VMSAv8-64 translation table format descriptors; TCR_EL1).

use super::TableError;
use super::format::{ArmGranule, Shape};
use crate::addr::PhysAddr;
use crate::prot::Prot;

const VALID: u64 = 1 << 0;
/// A table above the lowest level, a page at it; clear in a block.
const TABLE_OR_PAGE: u64 = 1 << 1;
/// The second entry of [`MAIR`].
const ATTRIBUTES_DEVICE: u64 = 1 << 2;
/// AP\[1\]: unprivileged accesses too, as those of devices are.
const UNPRIVILEGED: u64 = 1 << 6;
/// AP\[2\].
const READ_ONLY: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 3 << 8;
/// Set from the start, so that no access faults for it.
const ACCESS_FLAG: u64 = 1 << 10;
/// Cached under the table's ASID.
const NOT_GLOBAL: u64 = 1 << 11;
/// PXN and UXN: no instructions are fetched by devices.
const EXECUTE_NEVER: u64 = 3 << 53;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// Memory attributes: entry 0 is normal memory, written back, entry 1 a device's registers (nGnRE).
const MAIR: u64 = 0x04ff;

impl ArmGranule {
    fn page_bits(self) -> u32 {
        match self {
            Self::K4 => 12,
            Self::K16 => 14,
            Self::K64 => 16,
        }
    }

    /// TG0 of the translation control register.
    fn tg0(self) -> u64 {
        match self {
            Self::K4 => 0,
            Self::K64 => 1,
            Self::K16 => 2,
        }
    }
}

pub(super) fn shape(granule: ArmGranule, input_bits: u8) -> Result<Shape, TableError> {
    if !(25..=48).contains(&input_bits) {
        return Err(TableError::InputBits { bits: input_bits });
    }
    let page_bits = granule.page_bits();
    let index_bits = page_bits - 3;
    let levels = (u32::from(input_bits) - page_bits).div_ceil(index_bits);
    // The largest block: 1 GiB, 32 MiB, 512 MiB.
    let leaf_level = match granule {
        ArmGranule::K4 => 2,
        ArmGranule::K16 | ArmGranule::K64 => 1,
    };
    Ok(Shape {
        page_bits,
        index_bits,
        levels,
        input_bits: input_bits.into(),
        output_bits: 48,
        leaf_level: leaf_level.min(levels - 1),
    })
}

pub(super) fn leaf_bits(prot: Prot) -> u64 {
    let mut bits = VALID | UNPRIVILEGED | INNER_SHAREABLE | ACCESS_FLAG | NOT_GLOBAL | EXECUTE_NEVER;
    if !prot.contains(Prot::WRITE) {
        bits |= READ_ONLY;
    }
    if prot.contains(Prot::MMIO) {
        bits |= ATTRIBUTES_DEVICE;
    }
    bits
}

pub(super) fn leaf(level: u32, phys: u64, bits: u64) -> u64 {
    let page = if level == 0 { TABLE_OR_PAGE } else { 0 };
    phys & ADDRESS | bits | page
}

pub(super) fn table(phys: u64) -> u64 {
    phys & ADDRESS | VALID | TABLE_OR_PAGE
}

pub(super) fn leaf_phys(entry: u64) -> u64 {
    entry & ADDRESS
}

pub(super) fn leaf_prot(entry: u64) -> Prot {
    let mut prot = Prot::READ;
    prot.set(Prot::WRITE, entry & READ_ONLY == 0);
    prot.set(Prot::MMIO, entry & ATTRIBUTES_DEVICE != 0);
    prot
}

/// What an Arm IOMMU has to know of a table, as its registers or a context descriptor say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmRegisters {
    /// The translation control, in the layout of TCR_EL1: size, granule and attributes of the table, IPS, and TTBR1
    /// switched off.
    pub tcr: u64,
    /// Where the table starts.
    pub ttbr0: u64,
    /// The memory attributes that its entries name.
    pub mair: u64,
}

impl ArmRegisters {
    pub(super) fn new(granule: ArmGranule, input_bits: u8, output_bits: u32, root: PhysAddr) -> Self {
        let size = 64 - u64::from(input_bits);
        // Walks go through write-back caches, inner shareable.
        let (inner_cached, outer_cached, shareable) = (1 << 8, 1 << 10, 3 << 12);
        let output_size: u64 = match output_bits {
            ..=32 => 0,
            33..=36 => 1,
            37..=40 => 2,
            41..=42 => 3,
            43..=44 => 4,
            _ => 5,
        };
        // No walks by TTBR1 (EPD1); hierarchical permissions off, which the drafts' drivers always say (HPD0, HPD1).
        let second_half = 1 << 23 | 1 << 41 | 1 << 42;
        let tcr = size
            | inner_cached
            | outer_cached
            | shareable
            | granule.tg0() << 14
            | output_size << 32
            | second_half;
        Self { tcr, ttbr0: root.get(), mair: MAIR }
    }
}
