//! Commands of 64 bytes, completions of 16.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(super) const COMMAND_BYTES: usize = 64;
pub(super) const COMPLETION_BYTES: usize = 16;

/// Admin commands.
pub(super) const CREATE_SUBMISSION_QUEUE: u8 = 0x01;
pub(super) const CREATE_COMPLETION_QUEUE: u8 = 0x05;
pub(super) const IDENTIFY: u8 = 0x06;
pub(super) const SET_FEATURES: u8 = 0x09;
/// Commands of I/O queues.
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;

/// What is identified.
pub(super) const IDENTIFY_NAMESPACE: u32 = 0;
pub(super) const IDENTIFY_CONTROLLER: u32 = 1;
const FEATURE_NUMBER_OF_QUEUES: u32 = 7;
const PHYSICALLY_CONTIGUOUS: u32 = 1;

/// A command, as the controller reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Command {
    pub(super) opcode: u8,
    flags: u8,
    pub(super) id: U16,
    namespace: U32,
    reserved: [U32; 2],
    metadata: U64,
    /// Where the data is: its first page, and its second or a list of all others.
    pub(super) prp: [U64; 2],
    /// Dwords 10 to 15.
    pub(super) arguments: [U32; 6],
}

impl Command {
    fn new(opcode: u8, namespace: u32, prp: [u64; 2], arguments: [u32; 3]) -> Self {
        let [first, second, third] = arguments.map(U32::new);
        Self {
            opcode,
            namespace: U32::new(namespace),
            prp: prp.map(U64::new),
            arguments: [first, second, third, U32::ZERO, U32::ZERO, U32::ZERO],
            ..Self::default()
        }
    }

    pub(super) fn identify(what: u32, namespace: u32, page: u64) -> Self {
        Self::new(IDENTIFY, namespace, [page, 0], [what, 0, 0])
    }

    /// Asks for as many pairs of I/O queues.
    pub(super) fn number_of_queues(pairs: u16) -> Self {
        let last = u32::from(pairs - 1);
        Self::new(SET_FEATURES, 0, [0; 2], [FEATURE_NUMBER_OF_QUEUES, last | last << 16, 0])
    }

    /// A completion queue that is polled: it interrupts nobody.
    pub(super) fn create_completion_queue(queue: u16, entries: u16, place: u64) -> Self {
        let size = u32::from(queue) | u32::from(entries - 1) << 16;
        Self::new(CREATE_COMPLETION_QUEUE, 0, [place, 0], [size, PHYSICALLY_CONTIGUOUS, 0])
    }

    /// A submission queue, whose commands are completed by the completion queue of the same number.
    pub(super) fn create_submission_queue(queue: u16, entries: u16, place: u64) -> Self {
        let size = u32::from(queue) | u32::from(entries - 1) << 16;
        let completions = PHYSICALLY_CONTIGUOUS | u32::from(queue) << 16;
        Self::new(CREATE_SUBMISSION_QUEUE, 0, [place, 0], [size, completions, 0])
    }

    /// A transfer of `blocks` blocks, at least one, from `first` on.
    pub(super) fn transfer(write: bool, namespace: u32, first: u64, blocks: u16, prp: [u64; 2]) -> Self {
        let opcode = if write { WRITE } else { READ };
        let count = u32::from(blocks) - 1;
        Self::new(opcode, namespace, prp, [first as u32, (first >> 32) as u32, count])
    }
}

/// A completion, as the controller wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, KnownLayout, IntoBytes)]
#[repr(C)]
pub(super) struct Completion {
    pub(super) result: U32,
    pub(super) reserved: U32,
    pub(super) submission_head: U16,
    pub(super) submission_queue: U16,
    pub(super) command: U16,
    /// Bit 0 is the phase.
    pub(super) status: U16,
}

/// Where the status with the phase is in a completion.
pub(super) const STATUS_OFFSET: usize = 14;

impl Completion {
    /// Status code type and status code, with what else the controller says about it; 0 is success.
    pub(super) fn status(self) -> u16 {
        self.status.get() >> 1
    }
}

const _: () = assert!(size_of::<Command>() == COMMAND_BYTES);
const _: () = assert!(size_of::<Completion>() == COMPLETION_BYTES);
