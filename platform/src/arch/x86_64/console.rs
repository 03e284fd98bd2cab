//! Bytes out of the 16550 at port 0x3f8.
//!
//! Keeps no state but whether the port got stuck, so that a panic can write at any moment, in the middle of another
//! write too.

use core::sync::atomic::{AtomicBool, Ordering};

use uart_16550::backend::PioBackend;
use uart_16550::spec::registers::LSR;
use uart_16550::{Config, Uart16550};

const PORT: u16 = 0x3f8;

/// How often the transmitter is asked before a byte is given up: seconds, where QEMU's reader takes its time.
const SEND_TRIES: u32 = 10_000_000;

/// Set once the transmitter did not take a byte in time; each further byte then has a single try, so that a machine
/// without a reader is slowed down once and not by every byte.
static STUCK: AtomicBool = AtomicBool::new(false);

fn uart() -> Option<Uart16550<PioBackend>> {
    // SAFETY: 0x3f8 is the first serial port on every PC-like machine; where there is none, writes go nowhere. Only
    // this module touches it.
    unsafe { Uart16550::new_port(PORT) }.ok()
}

/// Sets the line up: 115200 baud, 8 data bits, FIFO on, no interrupts.
pub fn init() {
    let Some(mut uart) = uart() else { return };
    // `Uart16550::init` waits for the transmitter without a bound, so see first that it is empty.
    let empty = (0..SEND_TRIES).any(|_| uart.lsr().contains(LSR::TRANSMITTER_EMPTY));
    if empty {
        // A port that is absent cannot say so anywhere.
        let _ = uart.init(Config::default());
    } else {
        STUCK.store(true, Ordering::Relaxed);
    }
}

/// Writes bytes, waiting a bounded time for the transmitter; what it does not take is lost.
pub fn write_bytes(bytes: &[u8]) {
    let Some(mut uart) = uart() else { return };
    for byte in bytes {
        let tries = if STUCK.load(Ordering::Relaxed) { 1 } else { SEND_TRIES };
        let sent = (0..tries).any(|_| uart.try_send_byte(*byte).is_ok());
        STUCK.store(!sent, Ordering::Relaxed);
    }
}
