//! The interrupt translation service: a device's write to the doorbell becomes a message-based interrupt of a CPU.
//!
//! ```text
//! (device, event) --device's table--> interrupt, collection --collection--> CPU's redistributor
//! ```
//!
//! The device is known by the bus, the event is what it writes. There is one collection, which is the first CPU's. What
//! the ITS was given stays its own for good: tables of devices, collections and translations, and the ring of commands.
//! Its memory goes by no IOMMU.

mod command;

use alloc::vec::Vec;

use spin::Mutex;

use super::redistributor::Redistributor;
use super::{GicError, REGISTER_TIMEOUT_NS, give};
use crate::memory::frames::FRAME_BYTES;
use crate::memory::map_registers;
use crate::mmio::Mmio;
use crate::range::PhysRange;
use crate::time::Deadline;
use command::{Command, CommandQueue};

/// Registers.
const CONTROL: usize = 0x0000;
const TYPE: usize = 0x0008;
const TABLES: usize = 0x0100;
const TABLE_COUNT: usize = 8;
/// The doorbell, in the second frame of registers.
const DOORBELL: u64 = 0x1_0040;
/// Both frames.
const MIN_BYTES: u64 = 0x2_0000;

const CONTROL_ENABLED: u32 = 1;
const CONTROL_QUIESCENT: u32 = 1 << 31;

/// Tables and commands are cached, write-back, and inner shareable: the ITS sees what CPUs write.
const CACHED: u64 = 7 << 59 | SHAREABLE;
const SHAREABLE: u64 = 1 << 10;
const SHAREABILITY: u64 = 3 << 10;

/// A table's register.
const TABLE_VALID: u64 = 1 << 63;
const TABLE_OF_DEVICES: u64 = 1;
const TABLE_OF_COLLECTIONS: u64 = 4;
/// Its page size, as code and bytes, the largest first. An ITS may know one only.
const PAGE_SIZES: [(u64, u64); 3] = [(2, 64 << 10), (1, 16 << 10), (0, 4 << 10)];
const PAGE_SIZE_FIELD: u64 = 3 << 8;
const MAX_TABLE_PAGES: u64 = 256;

/// The devices that are planned for: all functions of a segment.
const DEVICE_BITS: u32 = 16;
/// The only collection.
const COLLECTION: u16 = 0;

fn check_coherent(value: u64, register: &'static str) -> Result<(), GicError> {
    if value & SHAREABILITY == SHAREABLE { Ok(()) } else { Err(GicError::NotCoherent { register }) }
}

/// The ITS, at work.
#[derive(Debug)]
pub(super) struct Its {
    /// Where devices write to, a physical address.
    pub(super) doorbell: u64,
    /// What its commands call the first CPU.
    target: u64,
    /// How many bits of a device's number there is a table for.
    device_bits: u32,
    /// The size of a translation, and how many bits an event can have.
    entry_bytes: u64,
    event_bits: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    queue: CommandQueue,
    /// The devices that have a table of translations.
    devices: Vec<u32>,
}

impl Its {
    /// Starts the ITS whose registers are here. Its interrupts go to the CPU of `redistributor`.
    pub(super) fn start(registers: PhysRange, redistributor: &Redistributor) -> Result<Self, GicError> {
        if registers.len_bytes() < MIN_BYTES {
            return Err(GicError::TooFewRegisters { range: registers });
        }
        let doorbell = registers.start() + DOORBELL;
        // SAFETY: the device tree says that these are the ITS's registers.
        let registers =
            unsafe { map_registers(registers.start(), registers.len_bytes()) }.map_err(GicError::Map)?;
        stop(registers)?;
        let kind = registers.read64(TYPE);
        let by_address = kind & (1 << 19) != 0;
        let device_bits = ((kind >> 13 & 0x1f) as u32 + 1).min(DEVICE_BITS);
        let target = if by_address { redistributor.phys } else { redistributor.number << 16 };

        for index in 0..TABLE_COUNT {
            let register = TABLES + 8 * index;
            let value = registers.read64(register);
            let entry_bytes = (value >> 48 & 0x1f) + 1;
            let entries = match value >> 56 & 7 {
                TABLE_OF_DEVICES => 1 << device_bits,
                TABLE_OF_COLLECTIONS => 1,
                _ => continue,
            };
            start_table(registers, register, entries * entry_bytes)?;
        }
        let mut queue = CommandQueue::start(registers, CACHED)?;
        registers.write32(CONTROL, CONTROL_ENABLED);
        queue.run(&[
            Command::MapCollection { collection: COLLECTION, target },
            Command::Synchronise { target },
        ])?;
        Ok(Self {
            doorbell,
            target,
            device_bits,
            entry_bytes: (kind >> 4 & 0xf) + 1,
            event_bits: (kind >> 8 & 0x1f) as u32 + 1,
            state: Mutex::new(State { queue, devices: Vec::new() }),
        })
    }

    /// Lets the device's event raise an interrupt.
    pub(super) fn map(&self, device: u32, event: u32, interrupt: u32) -> Result<(), GicError> {
        // One frame of translations for each device.
        let event_bits = (FRAME_BYTES / self.entry_bytes).ilog2().min(self.event_bits);
        if event >> event_bits != 0 || device >> self.device_bits != 0 {
            return Err(GicError::NoTranslation { device, event });
        }
        let mut state = self.state.lock();
        let State { queue, devices } = &mut *state;
        if !devices.contains(&device) {
            queue.run(&[Command::MapDevice { device, event_bits, table: give(1, 1)?.phys() }])?;
            devices.push(device);
        }
        queue.run(&[
            Command::MapEvent { device, event, interrupt, collection: COLLECTION },
            Command::Invalidate { device, event },
            Command::Synchronise { target: self.target },
        ])
    }
}

/// Turns the ITS off, in which state alone its tables can be set.
fn stop(registers: Mmio) -> Result<(), GicError> {
    registers.write32(CONTROL, registers.read32(CONTROL) & !CONTROL_ENABLED);
    let mut deadline = Deadline::after_ns(REGISTER_TIMEOUT_NS);
    while registers.read32(CONTROL) & CONTROL_QUIESCENT == 0 {
        if deadline.expired() {
            return Err(GicError::Stuck { register: "GITS_CTLR" });
        }
    }
    Ok(())
}

/// Gives the ITS a zeroed table of at least one page.
fn start_table(registers: Mmio, register: usize, len_bytes: u64) -> Result<(), GicError> {
    for (code, page_bytes) in PAGE_SIZES {
        let pages = len_bytes.div_ceil(page_bytes);
        if pages > MAX_TABLE_PAGES {
            continue;
        }
        registers.write64(register, code << 8);
        if registers.read64(register) & PAGE_SIZE_FIELD != code << 8 {
            continue;
        }
        let frames = (pages * page_bytes / FRAME_BYTES) as usize;
        let memory = give(frames, (page_bytes / FRAME_BYTES) as usize)?;
        registers.write64(register, TABLE_VALID | CACHED | memory.phys() | code << 8 | (pages - 1));
        return check_coherent(registers.read64(register), "GITS_BASER");
    }
    Err(GicError::TableSize { len_bytes })
}
