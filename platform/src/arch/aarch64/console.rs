//! Bytes out of a PL011.
//!
//! Keeps no state but where the port is and whether it got stuck, so that a panic can write at any moment, in the middle
//! of another write too. Until the device tree was read, the port is where QEMU's `virt` has it.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::firmware::device_tree::{self, DeviceTree};
use crate::mmio::Mmio;
use crate::range::PhysRange;

/// QEMU's `virt`.
const DEFAULT: u64 = 0x0900_0000;
const LEN_BYTES: u64 = 0x1000;
/// Where the boot tables have device registers.
const REACHED_AT_BOOT: u64 = 1 << 30;
const COMPATIBLE: &str = "arm,pl011";

/// Registers.
const DATA: usize = 0x00;
const FLAGS: usize = 0x18;
const CONTROL: usize = 0x30;

/// The flag that the transmit FIFO is full.
const TRANSMIT_FULL: u32 = 1 << 5;
/// Controls: the port and its transmitter.
const ENABLE: u32 = 1;
const TRANSMIT_ENABLE: u32 = 1 << 8;

/// How often the transmitter is asked before a byte is given up: seconds, where QEMU's reader takes its time.
const SEND_TRIES: u32 = 10_000_000;

/// Where the port is.
static PHYS: AtomicU64 = AtomicU64::new(DEFAULT);

/// Set once the transmitter did not take a byte in time; each further byte then has a single try, so that a machine
/// without a reader is slowed down once and not by every byte.
static STUCK: AtomicBool = AtomicBool::new(false);

/// The port's registers, which the page tables have to map before they are used.
pub(super) fn registers() -> PhysRange {
    PhysRange::from_len(PHYS.load(Ordering::Relaxed), LEN_BYTES)
        .unwrap_or_else(|| unreachable!("the address was checked, and the default is one"))
}

fn port() -> Option<Mmio> {
    let base = NonNull::new(registers().start() as *mut u8)?;
    // SAFETY: both the boot tables and the kernel's own map the port as device memory, for good; it is aligned, and only
    // this module touches it.
    Some(unsafe { Mmio::new(base, LEN_BYTES as usize) })
}

/// Moves to the port that the device tree names: its `stdout-path`, or else the first one, as long as the boot tables
/// reach it. Where it names none, the port stays where it was.
pub(super) fn find(tree: &DeviceTree<'_>) {
    let named = device_tree::boot::console(tree).filter(|node| node.is_compatible(COMPATIBLE));
    let port = named.or_else(|| tree.compatible(COMPATIBLE).next());
    let registers = port.and_then(|node| node.registers().ok()?.first().copied());
    let Some(registers) = registers else { return };
    let start = registers.start();
    if start.is_multiple_of(LEN_BYTES) && (LEN_BYTES..REACHED_AT_BOOT).contains(&start) {
        PHYS.store(start, Ordering::Relaxed);
        init();
    } else {
        log::warn!("console: the PL011 at {start:#x} cannot be reached at boot, and is not used");
    }
}

/// Turns the transmitter on. The rate stays as firmware set it; QEMU has none.
pub fn init() {
    let Some(port) = port() else { return };
    let control = port.read32(CONTROL);
    port.write32(CONTROL, control | ENABLE | TRANSMIT_ENABLE);
}

/// Writes bytes, waiting a bounded time for the transmitter; what it does not take is lost.
pub fn write_bytes(bytes: &[u8]) {
    let Some(port) = port() else { return };
    for byte in bytes {
        let tries = if STUCK.load(Ordering::Relaxed) { 1 } else { SEND_TRIES };
        let ready = (0..tries).any(|_| port.read32(FLAGS) & TRANSMIT_FULL == 0);
        STUCK.store(!ready, Ordering::Relaxed);
        if ready {
            port.write32(DATA, (*byte).into());
        }
    }
}
