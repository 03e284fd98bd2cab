//! Bytes out of the 16550 that the device tree names, or through the firmware before it is known.
//!
//! Keeps no state but whether the port got stuck, so that a panic can write at any moment, in the middle of another
//! write too.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering};

use spin::Once;
use uart_16550::backend::MmioBackend;
use uart_16550::spec::registers::LSR;
use uart_16550::{Config, Uart16550};

use crate::firmware::device_tree::{DeviceTree, boot};
use crate::range::PhysRange;

/// How often the transmitter is asked before a byte is given up: seconds, where QEMU's reader takes its time.
const SEND_TRIES: u32 = 10_000_000;
/// The registers of a 16550.
const REGISTERS: u64 = 8;
const COMPATIBLE: [&str; 2] = ["ns16550a", "ns16550"];

/// Where the port is, and how far apart its registers are.
#[derive(Clone, Copy, Debug)]
struct Place {
    range: PhysRange,
    stride: u8,
}

static PLACE: Once<Place> = Once::new();
/// Set once the transmitter did not take a byte in time; each further byte then has a single try, so that a machine
/// without a reader is slowed down once and not by every byte.
static STUCK: AtomicBool = AtomicBool::new(false);

fn uart() -> Option<Uart16550<MmioBackend>> {
    let place = PLACE.get()?;
    let base = NonNull::new(place.range.start() as *mut u8)?;
    // SAFETY: firmware says that the port is there, reached without translation or by `mmu::init`'s mapping. Only this
    // module touches it.
    unsafe { Uart16550::new_mmio(base, place.stride) }.ok()
}

/// Takes the port that the tree names as the console's, and sets its line up: 115200 baud, 8 data bits, FIFO on, no
/// interrupts. Where it names none, the firmware goes on printing.
pub(super) fn find(tree: &DeviceTree<'_>) {
    let place = boot::console(tree).filter(|node| COMPATIBLE.iter().any(|name| node.is_compatible(name)));
    let place = place.and_then(|node| {
        let stride = 1u8.checked_shl(node.cell("reg-shift").unwrap_or(0))?;
        let registers = node.registers().ok()?.first().copied()?;
        let range = PhysRange::from_len(registers.start(), REGISTERS * u64::from(stride))?;
        registers.contains(range).then_some(Place { range, stride })
    });
    let Some(place) = place else { return };
    PLACE.call_once(|| place);
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

/// The port's registers, to be mapped.
pub(super) fn registers() -> Option<PhysRange> {
    PLACE.get().map(|place| place.range)
}

/// Writes bytes, waiting a bounded time for the transmitter; what it does not take is lost.
pub fn write_bytes(bytes: &[u8]) {
    let Some(mut uart) = uart() else { return write_by_firmware(bytes) };
    for byte in bytes {
        let tries = if STUCK.load(Ordering::Relaxed) { 1 } else { SEND_TRIES };
        let sent = (0..tries).any(|_| uart.try_send_byte(*byte).is_ok());
        STUCK.store(!sent, Ordering::Relaxed);
    }
}

/// By the oldest of the firmware's calls, which every firmware still has.
#[expect(deprecated, reason = "the call that replaces it is missing in firmware of a few years ago")]
fn write_by_firmware(bytes: &[u8]) {
    for byte in bytes {
        sbi_rt::legacy::console_putchar(usize::from(*byte));
    }
}
