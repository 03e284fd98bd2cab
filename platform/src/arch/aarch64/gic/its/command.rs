//! What the ITS is told: 32 bytes each, in a ring.

use super::super::{GicError, Given, REGISTER_TIMEOUT_NS, give};
use crate::memory::frames::FRAME_BYTES;
use crate::mmio::{Mmio, memory_before_doorbell};
use crate::time::Deadline;

/// Registers.
const BASE: usize = 0x0080;
const WRITER: usize = 0x0088;
const READER: usize = 0x0090;

const BASE_VALID: u64 = 1 << 63;
const READER_STALLED: u64 = 1;

const COMMAND_BYTES: usize = 32;
/// One frame of commands, at an address that every ITS takes.
const ALIGN_FRAMES: usize = 16;

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Interrupts of the collection go to this target.
    MapCollection { collection: u16, target: u64 },
    /// The device's events are translated by this table, of 2^`event_bits` entries.
    MapDevice { device: u32, event_bits: u32, table: u64 },
    /// The device's event raises this interrupt, on the target of the collection.
    MapEvent { device: u32, event: u32, interrupt: u32, collection: u16 },
    /// The event's interrupt has other properties now.
    Invalidate { device: u32, event: u32 },
    /// All before has to be done for this target.
    Synchronise { target: u64 },
}

impl Command {
    const fn words(self) -> [u64; 4] {
        const VALID: u64 = 1 << 63;
        match self {
            Self::MapCollection { collection, target } => [0x09, 0, VALID | target | collection as u64, 0],
            Self::MapDevice { device, event_bits, table } => {
                [0x08 | (device as u64) << 32, event_bits as u64 - 1, VALID | table, 0]
            }
            Self::MapEvent { device, event, interrupt, collection } => {
                [0x0a | (device as u64) << 32, event as u64 | (interrupt as u64) << 32, collection as u64, 0]
            }
            Self::Invalidate { device, event } => [0x0c | (device as u64) << 32, event as u64, 0, 0],
            Self::Synchronise { target } => [0x05, 0, target, 0],
        }
    }
}

/// The ring of commands.
#[derive(Debug)]
pub(super) struct CommandQueue {
    registers: Mmio,
    memory: Given,
    /// Where the next command goes, in bytes.
    next: usize,
}

impl CommandQueue {
    /// Gives the ITS, which is off, an empty ring.
    pub(super) fn start(registers: Mmio, cached: u64) -> Result<Self, GicError> {
        let memory = give(1, ALIGN_FRAMES)?;
        registers.write64(BASE, BASE_VALID | cached | memory.phys());
        super::check_coherent(registers.read64(BASE), "GITS_CBASER")?;
        registers.write64(WRITER, 0);
        Ok(Self { registers, memory, next: 0 })
    }

    /// Has commands carried out, one after the other, and waits for the last.
    ///
    /// The queue is empty before and, unless this fails, after; so fewer commands than it has places always fit.
    pub(super) fn run(&mut self, commands: &[Command]) -> Result<(), GicError> {
        debug_assert!(commands.len() * COMMAND_BYTES < FRAME_BYTES as usize, "one pass of the ring");
        for command in commands {
            for (index, word) in command.words().into_iter().enumerate() {
                self.memory.write(self.next + 8 * index, &word.to_le_bytes());
            }
            self.next = (self.next + COMMAND_BYTES) % FRAME_BYTES as usize;
        }
        memory_before_doorbell();
        self.registers.write64(WRITER, self.next as u64);
        let mut deadline = Deadline::after_ns(REGISTER_TIMEOUT_NS);
        loop {
            let reader = self.registers.read64(READER);
            if reader & READER_STALLED != 0 {
                return Err(GicError::CommandRefused { at: reader & !READER_STALLED });
            }
            if reader == self.next as u64 {
                return Ok(());
            }
            if deadline.expired() {
                return Err(GicError::Stuck { register: "GITS_CREADR" });
            }
        }
    }
}
