//! Walks of page tables in guest memory, as an IOMMU does them: x86-64 with four levels, VMSAv8-64 stage 1, RISC-V's Sv39,
//! Sv48 and Sv57, and SMMUv3's context descriptors.
//!
//! Written from the architectures' own rules. What they call reserved faults here, so that a table which only some
//! hardware would accept is noticed. Levels are counted from the pages up: 0 is the lowest table. Accesses are a user's, as
//! those of devices without the privileged attribute are.

mod arm;
mod cache;
mod riscv;
mod smmu;
mod x86;

pub use arm::ArmTable;
pub use cache::Cache;
pub use smmu::{DescriptorTable, Found};

use crate::fault::AccessKind;
use crate::memory::{GuestMemory, OutOfMemoryRange};

/// A page table, and how to walk it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// x86-64, four levels.
    X86 {
        /// Address of the PML4 table.
        root: u64,
    },
    /// VMSAv8-64, stage 1, by TTBR0.
    Arm(ArmTable),
    /// RISC-V.
    Riscv {
        /// 8, 9 or 10 for Sv39, Sv48 and Sv57.
        mode: u8,
        /// Page number of the root.
        root_page: u64,
    },
}

/// Where a run of addresses goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// First address of the page or block.
    pub first: u64,
    /// Last address.
    pub last: u64,
    /// Where the first one goes.
    pub phys: u64,
    /// Whether it may be read.
    pub readable: bool,
    /// Whether it may be written.
    pub writable: bool,
    /// Whether it is a device's registers, where the table says.
    pub device: bool,
}

impl Translation {
    /// Where an address of the page or block goes.
    pub fn phys_of(&self, address: u64) -> u64 {
        self.phys + (address - self.first)
    }

    fn permits(&self, kind: AccessKind) -> bool {
        match kind {
            AccessKind::Read => self.readable,
            AccessKind::Write => self.writable,
        }
    }
}

/// Why a walk ended without a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkFault {
    /// The table does not translate such addresses.
    Address,
    /// The entry at this level is not valid.
    NotPresent {
        /// Counted from the pages up.
        level: u32,
    },
    /// It is mapped, and the access is not allowed.
    Permission,
    /// An entry, or a register, that the architecture reserves.
    Reserved {
        /// The entry or the register.
        value: u64,
    },
    /// A table is not in guest memory.
    Memory(OutOfMemoryRange),
}

impl From<OutOfMemoryRange> for WalkFault {
    fn from(error: OutOfMemoryRange) -> Self {
        Self::Memory(error)
    }
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The next table, and what is still allowed below it.
    Next { table: u64, allowed: Allowed },
    /// A page or block.
    Leaf { phys: u64, allowed: Allowed, device: bool },
}

/// What the entries so far allow a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allowed {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl Allowed {
    const ALL: Self = Self { read: true, write: true };

    fn and(self, other: Self) -> Self {
        Self { read: self.read && other.read, write: self.write && other.write }
    }
}

/// A table on the way, and what the entries up to it allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    table: u64,
    level: u32,
    allowed: Allowed,
}

/// How a table is walked.
struct Regime {
    root: u64,
    page_bits: u32,
    index_bits: u32,
    top_level: u32,
}

impl Regime {
    /// Addresses below an entry of a level, less one.
    fn span(&self, level: u32) -> u64 {
        (1u64 << (self.page_bits + self.index_bits * level)) - 1
    }
}

impl Table {
    /// Translates one address for one kind of access, without a cache.
    ///
    /// # Errors
    ///
    /// [`WalkFault`].
    pub fn walk(
        &self,
        mem: &dyn GuestMemory,
        address: u64,
        kind: AccessKind,
    ) -> Result<Translation, WalkFault> {
        Cache::default().translate(self, mem, address, kind)
    }

    /// Whether the table can be walked at all: its registers are right, and its first entry is in memory.
    pub(crate) fn check_root(&self, mem: &dyn GuestMemory) -> Result<(), WalkFault> {
        let regime = self.regime(0)?;
        mem.read(regime.root, &mut [0; 8])?;
        Ok(())
    }

    /// The regime, for an address that it translates.
    fn regime(&self, address: u64) -> Result<Regime, WalkFault> {
        match *self {
            Self::X86 { root } => x86::regime(root, address),
            Self::Arm(table) => table.regime(address),
            Self::Riscv { mode, root_page } => riscv::regime(mode, root_page, address),
        }
    }

    fn decode(&self, entry: u64, level: u32) -> Result<Step, WalkFault> {
        match *self {
            Self::X86 { .. } => x86::decode(entry, level),
            Self::Arm(table) => table.decode(entry, level),
            Self::Riscv { .. } => riscv::decode(entry, level),
        }
    }

    /// Walks from a place on; hands over each table on the way.
    fn walk_from(
        &self,
        mem: &dyn GuestMemory,
        regime: &Regime,
        mut place: Place,
        address: u64,
        mut visit: impl FnMut(Place),
    ) -> Result<Translation, WalkFault> {
        // Bounded: each step goes a level down, and at level 0 `decode` gives no table.
        loop {
            let shift = regime.page_bits + regime.index_bits * place.level;
            // The sign extension of a canonical address is no part of the index.
            let mask = (1u64 << regime.index_bits) - 1;
            let mut bytes = [0; 8];
            mem.read(place.table + 8 * (address >> shift & mask), &mut bytes)?;
            match self.decode(u64::from_le_bytes(bytes), place.level)? {
                Step::Next { table, allowed } => {
                    let Some(level) = place.level.checked_sub(1) else {
                        return Err(WalkFault::Reserved { value: table });
                    };
                    place = Place { table, level, allowed: place.allowed.and(allowed) };
                    visit(place);
                }
                Step::Leaf { phys, allowed, device } => {
                    let span = regime.span(place.level);
                    let allowed = place.allowed.and(allowed);
                    return Ok(Translation {
                        first: address & !span,
                        last: address | span,
                        phys,
                        readable: allowed.read,
                        writable: allowed.write,
                        device,
                    });
                }
            }
        }
    }
}
