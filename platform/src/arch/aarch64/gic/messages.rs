//! Message-based interrupts (LPIs): their numbers, and the tables that say which of them may come.

use core::sync::atomic::{AtomicU32, Ordering};

use spin::Mutex;

use super::distributor::PRIORITY_VALUE;
use super::its::Its;
use super::redistributor::Redistributor;
use super::{GicError, Given, give};
use crate::memory::frames::FRAME_BYTES;
use crate::pci::message::Message;
use crate::range::PhysRange;

/// The first number of a message-based interrupt.
const FIRST: u32 = 8192;
/// As many bits as it takes to have 8192 of them; no table has to be larger.
const ID_BITS: u32 = 14;

/// A byte of the properties: priority, and that the interrupt may come.
const ENABLED: u8 = PRIORITY_VALUE | 1;

const PROPERTIES_FRAMES: usize = ((1 << ID_BITS) - FIRST as usize) / FRAME_BYTES as usize;
/// One bit for each number, those below [`FIRST`] too, at a multiple of 64 KiB.
const PENDING_FRAMES: usize = ((1 << ID_BITS) / 8_usize).div_ceil(FRAME_BYTES as usize);
const PENDING_ALIGN_FRAMES: usize = 16;

/// The way from a message to an interrupt.
#[derive(Debug)]
pub(super) struct Messages {
    its: Its,
    properties: Mutex<Given>,
    next: AtomicU32,
}

impl Messages {
    /// Sets the tables up, and starts the ITS whose registers are given. Its interrupts go to the CPU of `redistributor`.
    pub(super) fn start(
        id_bits: Option<u32>,
        its: Option<PhysRange>,
        redistributor: &Redistributor,
    ) -> Result<Self, GicError> {
        let its = its.ok_or(GicError::NoMessages)?;
        if id_bits.is_none_or(|bits| bits < ID_BITS) || !redistributor.has_messages() {
            return Err(GicError::NoMessages);
        }
        let properties = give(PROPERTIES_FRAMES, 1)?;
        let pending = give(PENDING_FRAMES, PENDING_ALIGN_FRAMES)?;
        redistributor.start_messages(properties.phys(), ID_BITS, pending.phys())?;
        let its = Its::start(its, redistributor)?;
        Ok(Self { its, properties: Mutex::new(properties), next: AtomicU32::new(FIRST) })
    }

    /// Gives a device's event an interrupt of its own, and says what the device has to write.
    pub(super) fn allocate(&self, device: u32, event: u32) -> Result<(u32, Message), GicError> {
        let take = |next| (next < 1 << ID_BITS).then_some(next + 1);
        let interrupt = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .map_err(|_| GicError::NoInterrupt { number: 1 << ID_BITS })?;
        self.properties.lock().write((interrupt - FIRST) as usize, &[ENABLED]);
        self.its.map(device, event, interrupt)?;
        Ok((interrupt, Message { address: self.its.doorbell, data: event }))
    }
}
