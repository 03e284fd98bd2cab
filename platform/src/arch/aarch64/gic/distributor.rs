//! The distributor: shared interrupts, their trigger, and which CPU takes them.

use spin::Mutex;

use super::{GicError, REGISTER_TIMEOUT_NS};
use crate::interrupts::{Line, Trigger};
use crate::mmio::Mmio;
use crate::time::Deadline;

/// How many registers there are, and those that are used.
pub(super) const REGISTER_BYTES: u64 = 0x1_0000;
const CONTROL: usize = 0x0000;
const TYPE: usize = 0x0004;
const GROUP: usize = 0x0080;
const SET_ENABLE: usize = 0x0100;
const CLEAR_ENABLE: usize = 0x0180;
const CLEAR_PENDING: usize = 0x0280;
const PRIORITY: usize = 0x0400;
const CONFIGURATION: usize = 0x0c00;
const ROUTE: usize = 0x6000;

/// Controls: affinity routing, and non-secure group 1, which is ours; all that we see of the register is ours.
const AFFINITY_ROUTING: u32 = 1 << 4;
const ENABLE_GROUP_1: u32 = 1 << 1;
const WRITE_PENDING: u32 = 1 << 31;

/// The type register: message-based interrupts (LPIs), and the bits of an interrupt's number.
const HAS_LPIS: u32 = 1 << 17;

/// The first shared interrupt; those below are each CPU's own.
pub(super) const FIRST_SHARED: u32 = 32;
/// Numbers from here on are special.
const END_SHARED: u32 = 1020;

/// In the middle, as all have the same.
pub(super) const PRIORITY_VALUE: u8 = 0xa0;

/// The distributor's registers.
#[derive(Debug)]
pub(super) struct Distributor {
    registers: Mmio,
    /// One past the last shared interrupt.
    end_shared: u32,
    /// For registers that hold the bits of several interrupts and are read, changed and written.
    changing: Mutex<()>,
}

impl Distributor {
    /// Turns everything off, puts every shared interrupt into our group, level-triggered, and turns the distributor on.
    pub(super) fn start(registers: Mmio) -> Result<Self, GicError> {
        let lines = registers.read32(TYPE) & 0x1f;
        let end_shared = (32 * (lines + 1)).min(END_SHARED);
        let distributor = Self { registers, end_shared, changing: Mutex::new(()) };
        distributor.control(0)?;
        for number in (FIRST_SHARED..distributor.end_shared).step_by(32) {
            let at = number as usize / 8;
            registers.write32(CLEAR_ENABLE + at, u32::MAX);
            registers.write32(CLEAR_PENDING + at, u32::MAX);
            registers.write32(GROUP + at, u32::MAX);
            (0..2).for_each(|half| registers.write32(CONFIGURATION + 2 * at + 4 * half, 0));
            (0..8).for_each(|word| {
                registers.write32(PRIORITY + 8 * at + 4 * word, u32::from_ne_bytes([PRIORITY_VALUE; 4]));
            });
        }
        distributor.control(AFFINITY_ROUTING)?;
        distributor.control(AFFINITY_ROUTING | ENABLE_GROUP_1)?;
        Ok(distributor)
    }

    /// Whether this is a shared interrupt.
    pub(super) fn has(&self, number: u32) -> bool {
        (FIRST_SHARED..self.end_shared).contains(&number)
    }

    /// The bits of the number of a message-based interrupt; `None` when there are no such interrupts.
    pub(super) fn message_id_bits(&self) -> Option<u32> {
        let kind = self.registers.read32(TYPE);
        (kind & HAS_LPIS != 0).then_some((kind >> 19 & 0x1f) + 1)
    }

    /// Lets the CPU with this affinity take a shared interrupt.
    pub(super) fn enable(&self, line: Line, affinity: u64) {
        let number = line.number;
        let at = CONFIGURATION + number as usize / 16 * 4;
        let edge = 2 << (number % 16 * 2);
        let changing = self.changing.lock();
        let others = self.registers.read32(at) & !edge;
        self.registers.write32(at, if line.trigger == Trigger::Edge { others | edge } else { others });
        drop(changing);
        self.registers.write64(ROUTE + 8 * number as usize, affinity);
        self.registers.write32(SET_ENABLE + number as usize / 32 * 4, 1 << (number % 32));
    }

    /// Stops a shared interrupt.
    pub(super) fn disable(&self, number: u32) {
        self.registers.write32(CLEAR_ENABLE + number as usize / 32 * 4, 1 << (number % 32));
    }

    fn control(&self, value: u32) -> Result<(), GicError> {
        self.registers.write32(CONTROL, value);
        let mut deadline = Deadline::after_ns(REGISTER_TIMEOUT_NS);
        while self.registers.read32(CONTROL) & WRITE_PENDING != 0 {
            if deadline.expired() {
                return Err(GicError::Stuck { register: "GICD_CTLR" });
            }
        }
        Ok(())
    }
}
