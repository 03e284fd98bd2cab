//! QEMU's `edu` device: a DMA engine that copies between memory and a buffer of its own, wherever it is told to.
//!
//! That makes it the attacker of the isolation tests: it reports nothing, and does not notice that an access was refused.
//!
//! ```text
//! 0x00  identification, 0x010000ed         0x80  source        (64 bits)
//! 0x04  liveness: reads as the inverse     0x88  destination   (64 bits)
//!       of what was written                0x90  length        (64 bits)
//! 0x24  causes of interrupts               0x98  command: bit 0 start, set until done; bit 1 direction
//! 0x60  adds causes    0x64  takes causes away
//! buffer: 4096 bytes at device address 0x40000
//! ```
//!
//! A transfer ends some 100 ms of the guest's time after its start. One past the buffer's end makes QEMU stop the whole
//! machine, so it is refused here.

use alloc::boxed::Box;
use core::fmt;

use crate::mmio::Registers;
use crate::time::Deadline;

/// The PCI vendor number.
pub const VENDOR: u16 = 0x1234;
/// The PCI device number.
pub const DEVICE: u16 = 0x11e8;
/// The bytes of the device's buffer that are used, and the longest transfer: one less than it has, since QEMU 7.2 stops
/// the machine at a transfer that reaches the last one.
pub const BUFFER_BYTES: usize = 4095;
/// The length of the registers that the driver uses; the BAR is longer.
pub const REGISTER_BYTES: u64 = 0x1000;

const IDENTIFICATION: u32 = 0x0100_00ed;
/// The highest eight bits of the identification are the version.
const IDENTIFICATION_MASK: u32 = 0x00ff_ffff;
const BUFFER_ADDRESS: u64 = 0x4_0000;

const REG_IDENTIFICATION: usize = 0x00;
const REG_LIVENESS: usize = 0x04;
const REG_INTERRUPT_STATUS: usize = 0x24;
const REG_INTERRUPT_RAISE: usize = 0x60;
const REG_INTERRUPT_ACKNOWLEDGE: usize = 0x64;
const REG_SOURCE: usize = 0x80;
const REG_DESTINATION: usize = 0x88;
const REG_LENGTH: usize = 0x90;
const REG_COMMAND: usize = 0x98;

const COMMAND_START: u64 = 1;
const COMMAND_FROM_DEVICE: u64 = 2;

/// How long a transfer may take: a hundred times of what it does, for hosts that have more to do.
const TRANSFER_TIMEOUT_NS: u64 = 10_000_000_000;

/// What went wrong with the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EduError {
    /// The identification is another device's.
    Identification {
        /// What was read.
        found: u32,
    },
    /// The liveness register does not invert.
    Liveness {
        /// What was written.
        wrote: u32,
        /// What was read.
        reads: u32,
    },
    /// A transfer that is empty or passes the end of the device's buffer. Nothing was started.
    Length {
        /// Where in the buffer it should begin.
        offset: usize,
        /// How long it should be.
        len_bytes: usize,
    },
    /// A transfer is running already. Nothing was started.
    Busy {
        /// The command register.
        command: u64,
    },
    /// A transfer did not end in time, and may still access memory.
    Timeout {
        /// The command register.
        command: u64,
    },
}

impl fmt::Display for EduError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Identification { found } => {
                write!(f, "edu: identification reads as {found:#x}, instead of {IDENTIFICATION:#x}")
            }
            Self::Liveness { wrote, reads } => {
                write!(f, "edu: liveness reads as {reads:#x} after {wrote:#x} was written")
            }
            Self::Length { offset, len_bytes } => {
                write!(
                    f,
                    "edu: a transfer of {len_bytes:#x} bytes at {offset:#x} does not fit its buffer of {BUFFER_BYTES:#x}"
                )
            }
            Self::Busy { command } => write!(f, "edu: a transfer is running, command register {command:#x}"),
            Self::Timeout { command } => {
                write!(
                    f,
                    "edu: a transfer did not end within {} ms, command register {command:#x}",
                    TRANSFER_TIMEOUT_NS / 1_000_000
                )
            }
        }
    }
}

impl core::error::Error for EduError {}

/// Has the device interrupt, for made-up causes.
pub fn interrupt(registers: &impl Registers, causes: u32) {
    registers.write32(REG_INTERRUPT_RAISE, causes);
}

/// Takes away what the device interrupts for, as its interrupt handler has to, and gives it; 0 when it did not.
pub fn acknowledge(registers: &impl Registers) -> u32 {
    let causes = registers.read32(REG_INTERRUPT_STATUS);
    registers.write32(REG_INTERRUPT_ACKNOWLEDGE, causes);
    causes
}

/// The device.
pub struct Edu {
    registers: Box<dyn Registers + Send>,
    timeout_ns: u64,
}

impl fmt::Debug for Edu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Edu").finish_non_exhaustive()
    }
}

impl Edu {
    /// Takes over the device behind its registers, after a look at the identification.
    ///
    /// # Errors
    ///
    /// [`EduError::Identification`] when it is another device.
    pub fn new(registers: impl Registers + Send + 'static) -> Result<Self, EduError> {
        Self::with_timeout(registers, TRANSFER_TIMEOUT_NS)
    }

    fn with_timeout(registers: impl Registers + Send + 'static, timeout_ns: u64) -> Result<Self, EduError> {
        let edu = Self { registers: Box::new(registers), timeout_ns };
        let found = edu.identification();
        if found & IDENTIFICATION_MASK != IDENTIFICATION & IDENTIFICATION_MASK {
            return Err(EduError::Identification { found });
        }
        Ok(edu)
    }

    /// The identification register.
    pub fn identification(&self) -> u32 {
        self.registers.read32(REG_IDENTIFICATION)
    }

    /// Writes a word and sees that the device inverts it.
    ///
    /// # Errors
    ///
    /// [`EduError::Liveness`] when it does not.
    pub fn check_liveness(&mut self, word: u32) -> Result<(), EduError> {
        self.registers.write32(REG_LIVENESS, word);
        let reads = self.registers.read32(REG_LIVENESS);
        if reads == !word { Ok(()) } else { Err(EduError::Liveness { wrote: word, reads }) }
    }

    /// Copies from memory, at the address that the device uses, to `offset` in its buffer, and waits for the end.
    ///
    /// That it ended says nothing about whether the access was allowed.
    ///
    /// # Errors
    ///
    /// [`EduError`].
    pub fn copy_in(&mut self, bus_address: u64, offset: usize, len_bytes: usize) -> Result<(), EduError> {
        self.start_copy_in(bus_address, offset, len_bytes)?;
        self.wait()
    }

    /// Copies from `offset` in the device's buffer to memory, at the address that the device uses, and waits for the end.
    ///
    /// That it ended says nothing about whether the access was allowed.
    ///
    /// # Errors
    ///
    /// [`EduError`].
    pub fn copy_out(&mut self, offset: usize, bus_address: u64, len_bytes: usize) -> Result<(), EduError> {
        self.start_copy_out(offset, bus_address, len_bytes)?;
        self.wait()
    }

    /// Starts a copy from memory to the device's buffer.
    ///
    /// # Errors
    ///
    /// [`EduError::Length`] and [`EduError::Busy`]; nothing was started then.
    pub fn start_copy_in(
        &mut self,
        bus_address: u64,
        offset: usize,
        len_bytes: usize,
    ) -> Result<(), EduError> {
        let buffer = self.buffer_address(offset, len_bytes)?;
        self.start(bus_address, buffer, len_bytes, COMMAND_START)
    }

    /// Starts a copy from the device's buffer to memory.
    ///
    /// # Errors
    ///
    /// [`EduError::Length`] and [`EduError::Busy`]; nothing was started then.
    pub fn start_copy_out(
        &mut self,
        offset: usize,
        bus_address: u64,
        len_bytes: usize,
    ) -> Result<(), EduError> {
        let buffer = self.buffer_address(offset, len_bytes)?;
        self.start(buffer, bus_address, len_bytes, COMMAND_START | COMMAND_FROM_DEVICE)
    }

    /// Whether no transfer is running.
    pub fn is_idle(&self) -> bool {
        self.command() & COMMAND_START == 0
    }

    /// Waits until no transfer is running.
    ///
    /// # Errors
    ///
    /// [`EduError::Timeout`] after two seconds.
    pub fn wait(&mut self) -> Result<(), EduError> {
        let mut deadline = Deadline::after_ns(self.timeout_ns);
        loop {
            // Expired is asked first, so that a last look at the device comes after the deadline.
            let expired = deadline.expired();
            if self.is_idle() {
                return Ok(());
            }
            if expired {
                return Err(EduError::Timeout { command: self.command() });
            }
            core::hint::spin_loop();
        }
    }

    fn buffer_address(&self, offset: usize, len_bytes: usize) -> Result<u64, EduError> {
        let fits = len_bytes != 0 && offset.checked_add(len_bytes).is_some_and(|end| end <= BUFFER_BYTES);
        if fits { Ok(BUFFER_ADDRESS + offset as u64) } else { Err(EduError::Length { offset, len_bytes }) }
    }

    fn start(
        &mut self,
        source: u64,
        destination: u64,
        len_bytes: usize,
        command: u64,
    ) -> Result<(), EduError> {
        // The device ignores writes while a transfer runs.
        if !self.is_idle() {
            return Err(EduError::Busy { command: self.command() });
        }
        self.registers.write64(REG_SOURCE, source);
        self.registers.write64(REG_DESTINATION, destination);
        self.registers.write64(REG_LENGTH, len_bytes as u64);
        self.registers.write64(REG_COMMAND, command);
        Ok(())
    }

    fn command(&self) -> u64 {
        self.registers.read64(REG_COMMAND)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeMap;
    use std::rc::Rc;

    use super::*;

    /// A device that copies nothing, and is busy for a number of looks at its command register after each start.
    #[derive(Clone)]
    struct Fake(Rc<State>);

    struct State {
        words: RefCell<BTreeMap<usize, u64>>,
        busy_looks: u32,
        looks_left: Cell<u32>,
        identification: u32,
    }

    // SAFETY: each test uses its fake on one thread only.
    unsafe impl Send for Fake {}

    impl Fake {
        fn new(busy_looks: u32) -> Self {
            Self::with_identification(busy_looks, IDENTIFICATION)
        }

        fn with_identification(busy_looks: u32, identification: u32) -> Self {
            let words = RefCell::default();
            Self(Rc::new(State { words, busy_looks, looks_left: Cell::new(0), identification }))
        }

        fn word(&self, offset: usize) -> Option<u64> {
            self.0.words.borrow().get(&offset).copied()
        }
    }

    impl Registers for Fake {
        fn read32(&self, offset: usize) -> u32 {
            match offset {
                REG_IDENTIFICATION => self.0.identification,
                REG_LIVENESS => !(self.word(offset).unwrap_or(0) as u32),
                _ => u32::MAX,
            }
        }

        fn write32(&self, offset: usize, value: u32) {
            self.0.words.borrow_mut().insert(offset, value.into());
        }

        fn read64(&self, offset: usize) -> u64 {
            let left = self.0.looks_left.get();
            self.0.looks_left.set(left.saturating_sub(1));
            self.word(offset).unwrap_or(0) & !u64::from(left == 0)
        }

        fn write64(&self, offset: usize, value: u64) {
            self.0.words.borrow_mut().insert(offset, value);
            if offset == REG_COMMAND {
                self.0.looks_left.set(self.0.busy_looks);
            }
        }
    }

    #[test]
    fn both_directions_are_programmed_as_documented() {
        let fake = Fake::new(3);
        let mut edu = Edu::new(fake.clone()).expect("an edu");
        edu.copy_in(0x1234_5678_9000, 16, 100).expect("a transfer that ends");
        let programmed =
            |fake: &Fake| [REG_SOURCE, REG_DESTINATION, REG_LENGTH, REG_COMMAND].map(|r| fake.word(r));
        assert_eq!(programmed(&fake), [0x1234_5678_9000, 0x4_0010, 100, 1].map(Some));
        edu.copy_out(0, 0x8000, BUFFER_BYTES).expect("a transfer that ends");
        assert_eq!(programmed(&fake), [0x4_0000, 0x8000, BUFFER_BYTES as u64, 3].map(Some));
    }

    #[test]
    fn nothing_leaves_the_buffer() {
        let fake = Fake::new(0);
        let mut edu = Edu::new(fake.clone()).expect("an edu");
        for (offset, len_bytes) in [(0, 0), (0, 4096), (1, 4095), (4095, 1), (usize::MAX, 2)] {
            assert_eq!(edu.copy_in(0, offset, len_bytes), Err(EduError::Length { offset, len_bytes }));
            assert_eq!(edu.copy_out(offset, 0, len_bytes), Err(EduError::Length { offset, len_bytes }));
        }
        assert_eq!(fake.word(REG_COMMAND), None, "nothing was started");
    }

    #[test]
    fn a_device_that_never_ends_is_given_up_and_stays_busy() {
        let mut edu = Edu::with_timeout(Fake::new(u32::MAX), 1_000_000).expect("an edu");
        assert_eq!(edu.copy_in(0, 0, 1), Err(EduError::Timeout { command: 1 }));
        assert_eq!(edu.start_copy_out(0, 0, 1), Err(EduError::Busy { command: 1 }));
    }

    #[test]
    fn other_devices_are_refused() {
        assert_eq!(
            Edu::new(Fake::with_identification(0, u32::MAX)).err(),
            Some(EduError::Identification { found: u32::MAX })
        );
        let mut newer = Edu::new(Fake::with_identification(0, 0x0200_00ed)).expect("a later version");
        assert_eq!(newer.check_liveness(0x5555_0000), Ok(()));
    }
}
