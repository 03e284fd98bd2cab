//! Agents that do DMA, and the registers by which a guest tells them what.
//!
//! They are little-endian, of four bytes each, behind the device's own configuration at [`WINDOW`]:
//!
//! ```text
//!   0x00  signature    reads "AGNT"
//!   0x04  endpoint     whose access it is
//!   0x08  PASID        0xffffffff for none
//!   0x0c  group        of the page request that the access may become
//!   0x10  IOVA         eight bytes
//!   0x18  data         sixteen bytes: what is written, or what was read
//!   0x28  command      what to do, which is done when the write ends; reads 0
//!   0x2c  outcome      of the last command
//!   0x30  answer       to the oldest page request that `TAKE_ANSWER` took: group, code << 16
//!   0x34  violations   rules that the guest's driver broke
//! ```
//!
//! Whoever writes a command reads its outcome before the next one: QEMU passes on what changes in its copy, and there a
//! command is 0 again only after a look.

use std::collections::VecDeque;

use virtio_iommu_model::{Access, AccessError, Device, GuestMemory, PageAnswer, PageError};

/// Where the window begins in the configuration space.
pub const WINDOW: usize = 64;
/// Its length in bytes.
pub const WINDOW_LEN: usize = 64;

/// Offset of the endpoint.
pub const ENDPOINT: usize = 0x04;
/// Offset of the PASID.
pub const PASID: usize = 0x08;
/// Offset of the group.
pub const GROUP: usize = 0x0c;
/// Offset of the IOVA.
pub const IOVA: usize = 0x10;
/// Offset of the data.
pub const DATA: usize = 0x18;
/// Offset of the command.
pub const COMMAND: usize = 0x28;
/// Offset of the outcome.
pub const OUTCOME: usize = 0x2c;
/// Offset of the answer.
pub const ANSWER: usize = 0x30;
/// Offset of the number of violations.
pub const VIOLATIONS: usize = 0x34;

/// Bytes of an access.
pub const DATA_LEN: usize = 16;

/// No PASID.
pub const NO_PASID: u32 = 0xffff_ffff;
/// What the window begins with.
pub const SIGNATURE: u32 = u32::from_le_bytes(*b"AGNT");

/// What an agent can be told to do.
pub mod command {
    /// Reads memory into the data.
    pub const READ: u32 = 1;
    /// Writes the data to memory.
    pub const WRITE: u32 = 2;
    /// Writes the data, or asks for the page where nothing is mapped.
    pub const WRITE_OR_ASK: u32 = 3;
    /// Takes the oldest answer to a page request.
    pub const TAKE_ANSWER: u32 = 4;
}

/// What can come of that.
pub mod outcome {
    /// Nothing yet; of `TAKE_ANSWER`, that there is none.
    pub const NONE: u32 = 0;
    /// It is done.
    pub const DONE: u32 = 1;
    /// The IOMMU refused the access.
    pub const BLOCKED: u32 = 2;
    /// The access asked for a page, and is to be tried again when that is answered.
    pub const WAITING: u32 = 3;
    /// The IOMMU let the access through to where no memory is.
    pub const NOT_MEMORY: u32 = 4;
    /// As many page requests wait as can.
    pub const NO_ROOM: u32 = 5;
    /// There is no such command.
    pub const UNKNOWN: u32 = 6;
}

/// The registers, and the answers that nobody took yet.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    registers: [u8; WINDOW_LEN],
    answers: VecDeque<PageAnswer>,
}

impl Window {
    pub(crate) fn new() -> Self {
        let mut window = Self { registers: [0; WINDOW_LEN], answers: VecDeque::new() };
        window.set(0, SIGNATURE);
        window
    }

    /// The registers as they read.
    pub(crate) fn registers(&self) -> [u8; WINDOW_LEN] {
        self.registers
    }

    /// Writes a byte; not where a guest can only read.
    pub(crate) fn write(&mut self, at: usize, byte: u8) {
        if (ENDPOINT..OUTCOME).contains(&at) {
            self.registers[at] = byte;
        }
    }

    /// Does what the command register says, if that is anything.
    pub(crate) fn run(&mut self, device: &mut Device, memory: &mut dyn GuestMemory) {
        let command = self.get(COMMAND);
        if command == 0 {
            return;
        }
        let (endpoint, pasid) =
            (self.get(ENDPOINT), Some(self.get(PASID)).filter(|pasid| *pasid != NO_PASID));
        let iova = u64::from(self.get(IOVA)) | u64::from(self.get(IOVA + 4)) << 32;
        let mut data = [0; DATA_LEN];
        data.copy_from_slice(&self.registers[DATA..DATA + DATA_LEN]);
        let outcome = match command {
            command::READ => {
                let read = device.access_context(memory, endpoint, pasid, iova, Access::Read(&mut data));
                self.registers[DATA..DATA + DATA_LEN].copy_from_slice(&data);
                of_access(read)
            }
            command::WRITE => {
                of_access(device.access_context(memory, endpoint, pasid, iova, Access::Write(&data)))
            }
            command::WRITE_OR_ASK => {
                let group = self.get(GROUP) as u16;
                let access = Access::Write(&data);
                of_page(device.access_or_request(memory, (endpoint, pasid), iova, access, group))
            }
            command::TAKE_ANSWER => self.take_answer(device),
            _ => outcome::UNKNOWN,
        };
        self.set(COMMAND, 0);
        self.set(OUTCOME, outcome);
        self.set(VIOLATIONS, u32::try_from(device.violations().len()).unwrap_or(u32::MAX));
    }

    fn take_answer(&mut self, device: &mut Device) -> u32 {
        // The model keeps a bounded number, and so does this: they move here only when there are none.
        if self.answers.is_empty() {
            self.answers.extend(device.take_page_answers());
        }
        let Some(answer) = self.answers.pop_front() else { return outcome::NONE };
        self.set(ANSWER, u32::from(answer.group) | u32::from(answer.code) << 16);
        outcome::DONE
    }

    fn get(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.registers[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    fn set(&mut self, at: usize, value: u32) {
        self.registers[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

fn of_access(result: Result<(), AccessError>) -> u32 {
    match result {
        Ok(()) => outcome::DONE,
        Err(AccessError::Fault(_)) => outcome::BLOCKED,
        Err(AccessError::NotMemory(_)) => outcome::NOT_MEMORY,
    }
}

fn of_page(result: Result<(), PageError>) -> u32 {
    match result {
        Ok(()) => outcome::DONE,
        Err(PageError::Waiting) => outcome::WAITING,
        Err(PageError::NoRoom) => outcome::NO_ROOM,
        Err(PageError::Access(error)) => of_access(Err(error)),
    }
}
