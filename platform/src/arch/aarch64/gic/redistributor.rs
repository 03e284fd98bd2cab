//! The redistributors: for each CPU one, with its own interrupts, and the memory for message-based ones.

use super::distributor::PRIORITY_VALUE;
use super::{GicError, REGISTER_TIMEOUT_NS};
use crate::memory::map_registers;
use crate::mmio::Mmio;
use crate::range::PhysRange;
use crate::time::Deadline;

/// Registers of the first frame.
const CONTROL: usize = 0x0000;
const TYPE: usize = 0x0008;
const WAKER: usize = 0x0014;
const PROPERTIES: usize = 0x0070;
const PENDING: usize = 0x0078;
/// Registers of the second frame, for the CPU's own interrupts.
const OWN: usize = 0x1_0000;
const GROUP: usize = OWN + 0x0080;
const CLEAR_ENABLE: usize = OWN + 0x0180;
const SET_ENABLE: usize = OWN + 0x0100;
const PRIORITY: usize = OWN + 0x0400;

const FRAME_PAIR_BYTES: u64 = 0x2_0000;
/// A CPU's registers where there are virtual interrupts too.
const FRAME_QUAD_BYTES: u64 = 0x4_0000;
/// The most CPUs that are looked at in one region.
const MAX_CPUS: usize = 4096;

/// The type register.
const TYPE_MESSAGES: u64 = 1;
const TYPE_VIRTUAL: u64 = 1 << 1;
const TYPE_LAST: u64 = 1 << 4;

const WAKER_SLEEP: u32 = 1 << 1;
const WAKER_ASLEEP: u32 = 1 << 2;
const CONTROL_MESSAGES: u32 = 1;
const CONTROL_PENDING: u32 = 1 << 3;

/// Tables are cached, write-back, and inner shareable: the redistributor sees what CPUs write.
const PROPERTIES_CACHED: u64 = 7 << 7 | SHAREABLE;
const PENDING_CACHED: u64 = 7 << 7 | SHAREABLE;
const SHAREABLE: u64 = 1 << 10;
const SHAREABILITY: u64 = 3 << 10;
/// The table of pending interrupts is empty.
const PENDING_ZERO: u64 = 1 << 62;

/// One CPU's redistributor.
#[derive(Debug)]
pub(super) struct Redistributor {
    registers: Mmio,
    /// What its CPU is called in the ITS's commands, by number.
    pub(super) number: u64,
    /// Where its registers are, by which other ITSs call it.
    pub(super) phys: u64,
}

impl Redistributor {
    /// Finds the redistributor of the CPU with this affinity in the regions that the device tree names.
    pub(super) fn find(regions: &[PhysRange], affinity: u64) -> Result<Self, GicError> {
        // Affinity as the type register has it: level 3 right above the others.
        let wanted = (affinity >> 32 & 0xff) << 24 | affinity & 0xff_ffff;
        regions
            .iter()
            .find_map(|region| Self::find_in(*region, wanted).transpose())
            .unwrap_or(Err(GicError::NoRedistributor { affinity }))
    }

    fn find_in(region: PhysRange, wanted: u64) -> Result<Option<Self>, GicError> {
        let mut at = region.start();
        for _ in 0..MAX_CPUS {
            let Some(frames) =
                PhysRange::from_len(at, FRAME_PAIR_BYTES).filter(|pair| region.contains(*pair))
            else {
                break;
            };
            // SAFETY: the device tree says that these are a redistributor's registers.
            let registers =
                unsafe { map_registers(frames.start(), frames.len_bytes()) }.map_err(GicError::Map)?;
            let kind = registers.read64(TYPE);
            if kind >> 32 == wanted {
                return Ok(Some(Self { registers, number: kind >> 8 & 0xffff, phys: at }));
            }
            if kind & TYPE_LAST != 0 {
                break;
            }
            at += if kind & TYPE_VIRTUAL != 0 { FRAME_QUAD_BYTES } else { FRAME_PAIR_BYTES };
        }
        Ok(None)
    }

    /// Wakes it up, and puts the CPU's own interrupts into our group, all of them off.
    pub(super) fn start(&self) -> Result<(), GicError> {
        let waker = self.registers.read32(WAKER);
        self.registers.write32(WAKER, waker & !WAKER_SLEEP);
        self.wait(WAKER, WAKER_ASLEEP, "GICR_WAKER")?;
        self.registers.write32(CLEAR_ENABLE, u32::MAX);
        self.registers.write32(GROUP, u32::MAX);
        (0..8).for_each(|word| {
            self.registers.write32(PRIORITY + 4 * word, u32::from_ne_bytes([PRIORITY_VALUE; 4]));
        });
        self.wait(CONTROL, CONTROL_PENDING, "GICR_CTLR")
    }

    /// Lets the CPU take one of its own interrupts.
    pub(super) fn enable_own(&self, number: u32) {
        self.registers.write32(SET_ENABLE, 1 << (number % 32));
    }

    /// Whether it takes message-based interrupts.
    pub(super) fn has_messages(&self) -> bool {
        self.registers.read64(TYPE) & TYPE_MESSAGES != 0
    }

    /// Gives it the table of all message-based interrupts' properties and the one of those that are pending here, which
    /// is zeroed, and turns them on. Both stay its own for good.
    pub(super) fn start_messages(&self, properties: u64, id_bits: u32, pending: u64) -> Result<(), GicError> {
        if self.registers.read32(CONTROL) & CONTROL_MESSAGES != 0 {
            // Firmware did, with tables of its own, and it cannot be undone everywhere.
            return Err(GicError::MessagesInUse);
        }
        self.registers.write64(PROPERTIES, properties | PROPERTIES_CACHED | u64::from(id_bits - 1));
        self.registers.write64(PENDING, pending | PENDING_CACHED | PENDING_ZERO);
        for (register, name) in [(PROPERTIES, "GICR_PROPBASER"), (PENDING, "GICR_PENDBASER")] {
            if self.registers.read64(register) & SHAREABILITY != SHAREABLE {
                return Err(GicError::NotCoherent { register: name });
            }
        }
        let control = self.registers.read32(CONTROL);
        self.registers.write32(CONTROL, control | CONTROL_MESSAGES);
        self.wait(CONTROL, CONTROL_PENDING, "GICR_CTLR")
    }

    fn wait(&self, register: usize, bits: u32, name: &'static str) -> Result<(), GicError> {
        let mut deadline = Deadline::after_ns(REGISTER_TIMEOUT_NS);
        while self.registers.read32(register) & bits != 0 {
            if deadline.expired() {
                return Err(GicError::Stuck { register: name });
            }
        }
        Ok(())
    }
}
