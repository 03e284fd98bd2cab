//! The interrupt controller of each CPU (local APIC, Intel SDM volume 3, chapter 11), in its first mode, with registers in
//! memory: starting other CPUs, and messages of devices.

use core::arch::x86_64::_mm_pause;

use spin::Once;
use x86_64::registers::model_specific::Msr;

use crate::interrupts::InterruptError;
use crate::memory::map_registers;
use crate::mmio::Mmio;
use crate::time::Deadline;

/// The register that says where the others are, and in which mode.
const BASE_MSR: u32 = 0x1b;
const BASE_ADDRESS: u64 = 0xf_ffff_f000;
const BASE_ENABLED: u64 = 1 << 11;
const BASE_X2APIC: u64 = 1 << 10;

const REGISTER_BYTES: u64 = 0x1000;
const ID: usize = 0x20;
const END_OF_INTERRUPT: usize = 0xb0;
const SPURIOUS: usize = 0xf0;
/// The input that the 8259s are connected to, and its mode in which they give the vector.
const FIRST_INPUT: usize = 0x350;
const BY_8259: u32 = 0x700;
const COMMAND_LOW: usize = 0x300;
const COMMAND_HIGH: usize = 0x310;

/// The bit of the spurious vector's register that turns the controller on.
const SPURIOUS_ENABLE: u32 = 1 << 8;
/// The commands, and the bit that says that the last one is on its way still.
const COMMAND_INIT: u32 = 0x4500;
const COMMAND_START: u32 = 0x4600;
const COMMAND_PENDING: u32 = 1 << 12;
/// How long a command may be on its way.
const COMMAND_TIMEOUT_NS: u64 = 10_000_000;

/// Where messages go: this, with the number of the CPU from bit 12 on.
const MESSAGES: u64 = 0xfee0_0000;

static REGISTERS: Once<Mmio> = Once::new();

/// This CPU's controller.
#[derive(Clone, Copy, Debug)]
pub(super) struct Apic {
    registers: Mmio,
}

impl Apic {
    /// Finds the controller. Every CPU has its own at the same address.
    ///
    /// # Errors
    ///
    /// [`InterruptError`], where it is off, or in its second mode, in which it has no registers in memory.
    pub(super) fn find() -> Result<Self, InterruptError> {
        let none = |reason: &str| InterruptError::NoController { reason: reason.into() };
        let registers = REGISTERS.try_call_once(|| {
            // SAFETY: every CPU of 64 bits has the register.
            let base = unsafe { Msr::new(BASE_MSR).read() };
            if base & BASE_ENABLED == 0 {
                return Err(none("the CPU's own one is off"));
            }
            if base & BASE_X2APIC != 0 {
                return Err(none("the CPU's own one is in x2APIC mode"));
            }
            // SAFETY: the CPU says that the controller's registers are there.
            unsafe { map_registers(base & BASE_ADDRESS, REGISTER_BYTES) }.map_err(InterruptError::Registers)
        })?;
        Ok(Self { registers: *registers })
    }

    /// The number by which commands and messages name this CPU.
    pub(super) fn id(self) -> u32 {
        self.registers.read32(ID) >> 24
    }

    /// Lets messages come, and the vector `spurious` where there is none after all. The 8259s go on reaching the CPU.
    pub(super) fn enable(self, spurious: u8) {
        let was_on = self.registers.read32(SPURIOUS) & SPURIOUS_ENABLE != 0;
        self.registers.write32(SPURIOUS, SPURIOUS_ENABLE | u32::from(spurious));
        if !was_on {
            self.registers.write32(FIRST_INPUT, BY_8259);
        }
    }

    /// The address of a message to this CPU, whose data is the vector.
    pub(super) fn message_address(self) -> u64 {
        MESSAGES | u64::from(self.id()) << 12
    }

    /// Resets another CPU, which then waits to be started.
    pub(super) fn send_init(self, id: u8) -> bool {
        self.send(id, COMMAND_INIT)
    }

    /// Starts another CPU that waits for it, in real mode, at a page below 1 MiB.
    pub(super) fn send_start(self, id: u8, page: u8) -> bool {
        self.send(id, COMMAND_START | u32::from(page))
    }

    /// Sends a command, and says whether it arrived in time.
    fn send(self, id: u8, command: u32) -> bool {
        self.registers.write32(COMMAND_HIGH, u32::from(id) << 24);
        self.registers.write32(COMMAND_LOW, command);
        let mut deadline = Deadline::after_ns(COMMAND_TIMEOUT_NS);
        while self.registers.read32(COMMAND_LOW) & COMMAND_PENDING != 0 {
            if deadline.expired() {
                return false;
            }
            _mm_pause();
        }
        true
    }
}

/// Says that a message was served. To be called once for each.
pub(super) fn end_of_message() {
    if let Some(registers) = REGISTERS.get() {
        registers.write32(END_OF_INTERRUPT, 0);
    }
}
