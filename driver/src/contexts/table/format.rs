//! The formats, as a shape that all of them share and the bits that are each one's own.

use super::{TableError, TableOptions, arm, riscv, x86};
use crate::addr::{Iova, IovaRange};
use crate::prot::Prot;

/// The format of a page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableFormat {
    /// x86-64 with four levels, which is the first stage of Intel's VT-d in scalable mode. 47 bits of input: the lower
    /// half of the canonical addresses.
    X86_64,
    /// Arm VMSAv8-64, stage 1, the half that TTBR0 translates.
    Arm {
        /// The smallest page.
        granule: ArmGranule,
        /// Bits of input, 25 to 48.
        input_bits: u8,
    },
    /// RISC-V with three levels. 38 bits of input: the lower half.
    Sv39,
    /// RISC-V with four levels. 47 bits of input: the lower half.
    Sv48,
}

/// The smallest page of Arm's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArmGranule {
    /// 4 KiB, with blocks of 2 MiB and 1 GiB.
    K4,
    /// 16 KiB, with blocks of 32 MiB.
    K16,
    /// 64 KiB, with blocks of 512 MiB.
    K64,
}

/// What the formats have in common. Level 0 is the one of the smallest pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub page_bits: u32,
    pub index_bits: u32,
    pub levels: u32,
    pub input_bits: u32,
    pub output_bits: u32,
    /// The highest level whose entries can be blocks.
    pub leaf_level: u32,
}

impl Shape {
    pub(super) fn page_len(&self) -> usize {
        1 << self.page_bits
    }

    /// Bytes that one entry of a level translates.
    pub(super) fn entry_len(&self, level: u32) -> u64 {
        1 << (self.page_bits + self.index_bits * level)
    }

    /// Which entry of a table at a level translates an address.
    pub(super) fn index(&self, level: u32, iova: u64) -> u16 {
        let number = iova >> (self.page_bits + self.index_bits * level);
        (number & ((1 << self.index_bits) - 1)) as u16
    }

    pub(super) fn input_range(&self) -> IovaRange {
        // Never the whole 64-bit space, so that the length is a number.
        IovaRange::from_len(Iova::new(0), 1 << self.input_bits).unwrap_or(IovaRange::WHOLE)
    }

    /// The last physical address that an entry can name.
    pub(super) fn last_output(&self) -> u64 {
        u64::MAX >> (64 - self.output_bits)
    }
}

impl TableFormat {
    pub(super) fn shape(self, options: &TableOptions) -> Result<Shape, TableError> {
        let mut shape = match self {
            Self::X86_64 => x86::SHAPE,
            Self::Arm { granule, input_bits } => arm::shape(granule, input_bits)?,
            Self::Sv39 => riscv::SV39,
            Self::Sv48 => riscv::SV48,
        };
        if options.output_bits < shape.page_bits {
            return Err(TableError::OutputBits { bits: options.output_bits });
        }
        shape.output_bits = shape.output_bits.min(options.output_bits);
        while shape.leaf_level > 0 && shape.entry_len(shape.leaf_level) > options.largest_leaf {
            shape.leaf_level -= 1;
        }
        Ok(shape)
    }

    /// The bits of a leaf that say what it allows, or `None` where the format has none for that.
    pub(super) fn leaf_bits(self, prot: Prot) -> Option<u64> {
        // No format has a page that can be written and not read.
        if !prot.contains(Prot::READ) || !Prot::all().contains(prot) {
            return None;
        }
        Some(match self {
            Self::X86_64 => x86::leaf_bits(prot),
            Self::Arm { .. } => arm::leaf_bits(prot),
            Self::Sv39 | Self::Sv48 => riscv::leaf_bits(prot),
        })
    }

    /// An entry that maps memory at `phys`, a page or a block.
    pub(super) fn leaf(self, level: u32, phys: u64, bits: u64) -> u64 {
        match self {
            Self::X86_64 => x86::leaf(level, phys, bits),
            Self::Arm { .. } => arm::leaf(level, phys, bits),
            Self::Sv39 | Self::Sv48 => riscv::leaf(phys, bits),
        }
    }

    /// An entry that leads to a table at `phys`.
    pub(super) fn table(self, phys: u64) -> u64 {
        match self {
            Self::X86_64 => x86::table(phys),
            Self::Arm { .. } => arm::table(phys),
            Self::Sv39 | Self::Sv48 => riscv::table(phys),
        }
    }

    /// Where a leaf's memory starts.
    pub(super) fn leaf_phys(self, entry: u64) -> u64 {
        match self {
            Self::X86_64 => x86::leaf_phys(entry),
            Self::Arm { .. } => arm::leaf_phys(entry),
            Self::Sv39 | Self::Sv48 => riscv::leaf_phys(entry),
        }
    }

    /// What a leaf allows. Of RISC-V's the memory type is not in the entry.
    pub(super) fn leaf_prot(self, entry: u64) -> Prot {
        match self {
            Self::X86_64 => x86::leaf_prot(entry),
            Self::Arm { .. } => arm::leaf_prot(entry),
            Self::Sv39 | Self::Sv48 => riscv::leaf_prot(entry),
        }
    }

    /// Whether a block has to be gone from all caches before a table takes its place: Arm's break-before-make.
    pub(super) fn breaks_before_make(self) -> bool {
        matches!(self, Self::Arm { .. })
    }
}
