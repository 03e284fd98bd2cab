//! Calls to the firmware that turns CPUs and the machine on and off (Arm DEN 0022, PSCI).

use core::arch::asm;
use core::fmt;
use core::sync::atomic::{AtomicU8, Ordering};

use crate::firmware::device_tree::DeviceTree;

/// Versions of the firmware whose function numbers are the standard's.
const COMPATIBLE: [&str; 2] = ["arm,psci-1.0", "arm,psci-0.2"];

/// Functions, in the 64-bit calling convention where there is one.
const SYSTEM_OFF: u64 = 0x8400_0008;
const CPU_ON: u64 = 0xc400_0003;

/// By which instruction the firmware is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Conduit {
    /// A hypervisor at EL2.
    Hvc = 1,
    /// Firmware at EL3.
    Smc = 2,
}

/// The conduit as a number; 0 for none.
static CONDUIT: AtomicU8 = AtomicU8::new(0);

/// Reads in the device tree how the firmware is called. Without such a node, or with another word in it, it is not.
pub(super) fn find(tree: &DeviceTree<'_>) {
    let node = COMPATIBLE.into_iter().find_map(|name| tree.compatible(name).next());
    let conduit = match node.as_ref().and_then(|node| node.text("method")) {
        Some("hvc") => Conduit::Hvc,
        Some("smc") => Conduit::Smc,
        _ => return,
    };
    CONDUIT.store(conduit as u8, Ordering::Relaxed);
}

/// Turns the machine off. Returns where there is no such firmware, or when it refused.
pub fn system_off() {
    call(SYSTEM_OFF, [0; 3]);
}

/// Turns a CPU on, by its affinity: it begins at the physical address `entry`, with MMU and caches off, and `argument` in
/// x0.
///
/// # Errors
///
/// [`PsciError`].
///
/// # Safety
///
/// What begins at `entry` must be able to run so, with this argument.
pub(super) unsafe fn cpu_on(affinity: u64, entry: u64, argument: u64) -> Result<(), PsciError> {
    match call(CPU_ON, [affinity, entry, argument]) {
        Some(0) => Ok(()),
        Some(code) => Err(PsciError::Refused { code }),
        None => Err(PsciError::NoFirmware),
    }
}

/// A call that did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PsciError {
    /// The device tree names no firmware that can be called.
    NoFirmware,
    /// The firmware refused.
    Refused {
        /// Its reason: -1 not supported, -2 invalid parameters, -4 already on, -5 on pending, -6 internal failure.
        code: i32,
    },
}

impl fmt::Display for PsciError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFirmware => f.write_str("the device tree names no PSCI firmware"),
            Self::Refused { code } => write!(f, "PSCI answers {code}"),
        }
    }
}

impl core::error::Error for PsciError {}

/// Makes a call; `None` without a conduit.
fn call(function: u64, arguments: [u64; 3]) -> Option<i32> {
    let [a, b, c] = arguments;
    let result: i64;
    macro_rules! conduit {
        ($instruction:literal) => {
            // SAFETY: the device tree says that firmware takes calls by this instruction. It keeps x18 to x30 and the
            // stack; the functions called here do not touch the kernel's memory.
            unsafe {
                asm!(
                    $instruction,
                    inout("x0") function => result, inout("x1") a => _, inout("x2") b => _, inout("x3") c => _,
                    out("x4") _, out("x5") _, out("x6") _, out("x7") _, out("x8") _, out("x9") _, out("x10") _,
                    out("x11") _, out("x12") _, out("x13") _, out("x14") _, out("x15") _, out("x16") _, out("x17") _,
                    options(nostack),
                )
            }
        };
    }
    match CONDUIT.load(Ordering::Relaxed) {
        1 => conduit!("hvc #0"),
        2 => conduit!("smc #0"),
        _ => return None,
    }
    // Results are 32 bits wide; the upper half may be anything.
    Some(result as i32)
}
