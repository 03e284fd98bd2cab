//! QEMU's `edu` device, used as an endpoint that does the accesses it is told to.

use std::sync::Arc;

use anyhow::Result;

use crate::function::Function;
use crate::wire::{Width, Wire};

const ID: u64 = 0x00;
const DMA_SOURCE: u64 = 0x80;
const DMA_DESTINATION: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;

/// Where the device has its own buffer, in its own addresses.
const BUFFER: u64 = 0x4_0000;
/// The device's mark, with its version in the upper half.
const MARK: u64 = 0xed;

const START: u64 = 1;
const TO_MEMORY: u64 = 2;

/// How often a transfer is looked at. With QEMU's clock going by the processor, which sleeps, it takes a few
/// looks.
const LOOKS: u32 = 20_000;

/// What a transfer was told to do. What became of it shows in memory and in fault records: the device does
/// not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// Memory at an IOVA is read into the device's buffer.
    FromMemory,
    /// The device's buffer is written to memory at an IOVA.
    ToMemory,
}

/// An endpoint.
#[derive(Debug)]
pub struct Edu {
    wire: Arc<Wire>,
    registers: u64,
    /// Its configuration space.
    pub function: Function,
}

impl Edu {
    /// Bytes of the device's buffer that can be used: QEMU 7.2 takes the last one for out of bounds.
    pub const BUFFER_LEN: usize = 4095;

    pub(crate) fn new(wire: &Arc<Wire>, function: Function) -> Result<Self> {
        let edu = Self { wire: Arc::clone(wire), registers: function.bar(0)?, function };
        let id = edu.wire.read(edu.registers + ID, Width::Long);
        anyhow::ensure!(id & 0xffff == MARK, "this is not edu: its ID reads {id:#x}");
        edu.function.enable_bus_mastering();
        Ok(edu)
    }

    /// Moves `len` bytes between memory at `iova` and the device's buffer at `offset`, and waits until it is
    /// done.
    ///
    /// # Panics
    /// When the bytes are not in the buffer, or the transfer does not end.
    pub fn transfer(&self, transfer: Transfer, iova: u64, offset: usize, len: usize) {
        assert!(len > 0 && offset + len <= Self::BUFFER_LEN, "outside of edu's buffer");
        let own = BUFFER + offset as u64;
        let (source, destination, command) = match transfer {
            Transfer::FromMemory => (iova, own, START),
            Transfer::ToMemory => (own, iova, START | TO_MEMORY),
        };
        self.wire.write(self.registers + DMA_SOURCE, Width::Quad, source);
        self.wire.write(self.registers + DMA_DESTINATION, Width::Quad, destination);
        self.wire.write(self.registers + DMA_COUNT, Width::Quad, len as u64);
        self.wire.write(self.registers + DMA_COMMAND, Width::Quad, command);
        for _ in 0..LOOKS {
            if self.wire.read(self.registers + DMA_COMMAND, Width::Quad) & START == 0 {
                return;
            }
            assert_eq!(self.wire.failure(), None);
        }
        panic!("edu does not finish a transfer of {len} bytes at {iova:#x}");
    }
}
