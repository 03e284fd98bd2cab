//! The controller's registers: what it can do, switching it on and off, doorbells.
//!
//! ```text
//! 0x00  CAP   64  0..16 largest queue less 1, 24..32 time-out in 500 ms, 32..36 doorbell stride, 37 NVM commands,
//!                 48..52 smallest page as a power of two above 4096
//! 0x14  CC    32  0 enable, 7..11 page, 14..16 shutdown, 16..20 and 20..24 entries as powers of two
//! 0x1c  CSTS  32  0 ready, 1 fatal, 2..4 shutdown: 2 is complete
//! 0x24  AQA   32  admin queue sizes less 1: submission 0..12, completion 16..28
//! 0x28  ASQ   64  where they are
//! 0x30  ACQ   64
//! 0x1000 on       doorbells: submission tail and completion head of each queue in turn
//! ```

use alloc::boxed::Box;

use virtio_iommu::Iova;

use super::NvmeError;
use crate::mmio::{self, Registers};
use crate::time::Deadline;

const REG_CAP: usize = 0x00;
const REG_CC: usize = 0x14;
const REG_CSTS: usize = 0x1c;
const REG_AQA: usize = 0x24;
const REG_ASQ: usize = 0x28;
const REG_ACQ: usize = 0x30;
const DOORBELLS: u64 = 0x1000;

const CAP_NVM_COMMANDS: u64 = 1 << 37;
const CC_ENABLE: u32 = 1;
const CC_SHUTDOWN_NORMAL: u32 = 1 << 14;
/// 64 bytes of a command, 16 of a completion, pages of 4096 bytes, the NVM command set.
const CC_LAYOUT: u32 = 6 << 16 | 4 << 20;
const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 1 << 1;
const CSTS_SHUTDOWN: u32 = 3 << 2;
const CSTS_SHUTDOWN_DONE: u32 = 2 << 2;
const TIMEOUT_UNIT_NS: u64 = 500_000_000;

pub(super) struct Controller {
    registers: Box<dyn Registers + Send>,
    doorbell_stride: usize,
    timeout_ns: u64,
    max_entries: u16,
}

/// A queue's doorbells, which are inside of the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Doorbells {
    tail: usize,
    head: usize,
}

impl Controller {
    /// Looks at what the controller can do. `len_bytes` is the length of its registers.
    pub(super) fn new(registers: Box<dyn Registers + Send>, len_bytes: u64) -> Result<Self, NvmeError> {
        let unsupported = |what, value| NvmeError::Unsupported { what, value };
        if len_bytes <= DOORBELLS {
            return Err(unsupported("the length of its registers", len_bytes));
        }
        let cap = registers.read64(REG_CAP);
        let smallest_page = cap >> 48 & 0xf;
        if cap == u64::MAX || cap & CAP_NVM_COMMANDS == 0 || smallest_page != 0 {
            return Err(unsupported("its capability register", cap));
        }
        let max_entries = (cap as u16).saturating_add(1);
        if max_entries < 2 {
            return Err(unsupported("its largest queue", max_entries.into()));
        }
        // No controller can be asked to be ready within no time at all.
        let timeout_ns = (cap >> 24 & 0xff).max(1) * TIMEOUT_UNIT_NS;
        Ok(Self { registers, doorbell_stride: 4 << (cap >> 32 & 0xf), timeout_ns, max_entries })
    }

    /// The most entries of a queue.
    pub(super) fn max_entries(&self) -> u16 {
        self.max_entries
    }

    /// The doorbells of a queue, which must lie in the first `len_bytes` bytes.
    pub(super) fn doorbells(&self, queue: u16, len_bytes: u64) -> Result<Doorbells, NvmeError> {
        let tail = DOORBELLS as usize + 2 * usize::from(queue) * self.doorbell_stride;
        let head = tail + self.doorbell_stride;
        if head as u64 + 4 > len_bytes {
            return Err(NvmeError::Unsupported { what: "the place of a doorbell", value: head as u64 });
        }
        Ok(Doorbells { tail, head })
    }

    /// Tells the controller of commands.
    #[inline]
    pub(super) fn ring_tail(&self, doorbells: Doorbells, tail: u16) {
        mmio::memory_before_doorbell();
        self.registers.write32(doorbells.tail, tail.into());
    }

    /// Tells the controller that completions were taken.
    #[inline]
    pub(super) fn ring_head(&self, doorbells: Doorbells, head: u16) {
        mmio::memory_before_doorbell();
        self.registers.write32(doorbells.head, head.into());
    }

    pub(super) fn status(&self) -> u32 {
        self.registers.read32(REG_CSTS)
    }

    /// Whether the controller is on, and has not failed. A function that is gone reads as ones, which is a failure.
    pub(super) fn check(&self) -> Result<(), NvmeError> {
        let csts = self.status();
        let well = csts & (CSTS_READY | CSTS_FATAL) == CSTS_READY;
        if well { Ok(()) } else { Err(NvmeError::Fatal { csts }) }
    }

    /// Switches the controller off: it forgets its queues and accesses memory no more.
    pub(super) fn disable(&self) -> Result<(), NvmeError> {
        let cc = self.registers.read32(REG_CC);
        // It may not be switched off on its way to being ready, unless it never gets there.
        if cc & CC_ENABLE != 0 && self.status() & (CSTS_READY | CSTS_FATAL) == 0 {
            let _ = self.wait("being ready before a reset", CSTS_READY, CSTS_READY);
        }
        self.registers.write32(REG_CC, cc & !CC_ENABLE);
        self.wait("being off", CSTS_READY, 0)
    }

    /// Switches the controller on, with admin queues of `entries` each.
    pub(super) fn enable(&self, entries: u16, submission: Iova, completion: Iova) -> Result<(), NvmeError> {
        let last = u32::from(entries - 1);
        self.registers.write32(REG_AQA, last | last << 16);
        self.registers.write64(REG_ASQ, submission.get());
        self.registers.write64(REG_ACQ, completion.get());
        mmio::memory_before_doorbell();
        self.registers.write32(REG_CC, CC_LAYOUT | CC_ENABLE);
        self.wait("being ready", CSTS_READY | CSTS_FATAL, CSTS_READY)
    }

    /// Has the controller finish what it has in its caches, and switches it off. Being off is what counts.
    pub(super) fn shut_down(&self) -> Result<(), NvmeError> {
        if self.check().is_ok() {
            let cc = self.registers.read32(REG_CC);
            self.registers.write32(REG_CC, cc | CC_SHUTDOWN_NORMAL);
            if let Err(error) = self.wait("shutting down", CSTS_SHUTDOWN, CSTS_SHUTDOWN_DONE) {
                log::warn!("{error}");
            }
        }
        self.disable()
    }

    fn wait(&self, what: &'static str, mask: u32, wanted: u32) -> Result<(), NvmeError> {
        let mut deadline = Deadline::after_ns(self.timeout_ns);
        loop {
            // Expired is asked first, so that a last look at the device comes after the deadline.
            let expired = deadline.expired();
            let csts = self.status();
            if csts & mask == wanted {
                return Ok(());
            }
            // The end of a reset is waited for also where the reset is because of a failure.
            if csts & CSTS_FATAL != 0 && wanted != 0 {
                return Err(NvmeError::Fatal { csts });
            }
            if expired {
                return Err(NvmeError::Timeout { what, timeout_ns: self.timeout_ns, csts });
            }
            core::hint::spin_loop();
        }
    }
}
