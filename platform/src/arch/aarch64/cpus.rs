//! The other CPUs, which firmware turns on, one after the other.
//!
//! ```text
//! start ---PSCI CPU_ON---> entry.s: EL1, boot tables, kernel's tables, stacks ---> cpu_entry ---> main
//! ```

use core::arch::asm;
use core::fmt;
use core::mem;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use spin::Mutex;

use super::psci::{self, PsciError};
use super::{exceptions, mmu};
use crate::time::Deadline;

/// How long a CPU may take to arrive.
const ARRIVAL_TIMEOUT_NS: u64 = 5_000_000_000;

unsafe extern "C" {
    /// Where entry.s takes another CPU over.
    static start_other: u8;
}

/// Where a CPU's stacks end, which it has for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stacks {
    /// One past the stack's last byte, a multiple of 16.
    pub top: u64,
    /// The same of the stack for exceptions and interrupts.
    pub fault_top: u64,
}

/// What a CPU does once it arrived; it gets its index.
pub type Main = fn(usize) -> !;

/// A CPU that could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartError {
    /// The firmware did not turn it on.
    Firmware {
        /// What it is known by.
        id: u64,
        /// Why.
        error: PsciError,
    },
    /// It was turned on, and did not arrive. It may still, so no other can be started.
    Lost {
        /// What it is known by.
        id: u64,
    },
    /// The kernel's own page tables are not there yet.
    NoTables,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Firmware { id, error } => write!(f, "CPU {id:#x}: {error}"),
            Self::Lost { id } => write!(f, "CPU {id:#x} was turned on, and did not arrive"),
            Self::NoTables => f.write_str("page tables are not set up yet"),
        }
    }
}

impl core::error::Error for StartError {}

/// What entry.s and [`cpu_entry`] read about the CPU that is on its way. The order of the first four is entry.s's.
#[repr(C)]
struct Arriving {
    tables: AtomicU64,
    control: AtomicU64,
    stack_top: AtomicU64,
    fault_stack_top: AtomicU64,
    /// A [`Main`].
    main: AtomicPtr<()>,
    index: AtomicUsize,
    arrived: AtomicBool,
}

static ARRIVING: Arriving = Arriving {
    tables: AtomicU64::new(0),
    control: AtomicU64::new(0),
    stack_top: AtomicU64::new(0),
    fault_stack_top: AtomicU64::new(0),
    main: AtomicPtr::new(core::ptr::null_mut()),
    index: AtomicUsize::new(0),
    arrived: AtomicBool::new(false),
};

/// Who has it starts a CPU. The value is the one that did not arrive.
static STARTING: Mutex<Option<u64>> = Mutex::new(None);

/// What this CPU is known by: to the firmware, and in the device tree's `reg`.
pub fn own_id() -> u64 {
    let value: u64;
    // SAFETY: reads a register that every CPU has.
    unsafe { asm!("mrs {}, mpidr_el1", out(reg) value, options(nomem, nostack, preserves_flags)) };
    // Affinity, without the bits that say how CPUs share their parts.
    value & 0xff_00ff_ffff
}

/// Starts a CPU that is off, and waits until it arrived. It then runs `main` with interrupts off.
///
/// # Errors
///
/// [`StartError`]. After [`StartError::Lost`] the stacks must stay as they are.
///
/// # Safety
///
/// The stacks must be mapped memory that nothing else uses, now or later.
pub unsafe fn start(id: u64, index: usize, stacks: Stacks, main: Main) -> Result<(), StartError> {
    let mut starting = STARTING.lock();
    if let Some(id) = *starting {
        return Err(StartError::Lost { id });
    }
    let (tables, control) = mmu::in_use().ok_or(StartError::NoTables)?;
    ARRIVING.tables.store(tables, Ordering::Relaxed);
    ARRIVING.control.store(control, Ordering::Relaxed);
    ARRIVING.stack_top.store(stacks.top, Ordering::Relaxed);
    ARRIVING.fault_stack_top.store(stacks.fault_top, Ordering::Relaxed);
    ARRIVING.main.store(main as *mut (), Ordering::Relaxed);
    ARRIVING.index.store(index, Ordering::Relaxed);
    ARRIVING.arrived.store(false, Ordering::Relaxed);

    let entry = (&raw const start_other).addr() as u64;
    let argument = (&raw const ARRIVING).addr() as u64;
    // SAFETY: entry.s is made for this, finds what it reads in the image, which the boot tables map, and gets stacks by the
    // caller's promise. The barrier is for what was written just now.
    let asked = unsafe {
        asm!("dsb ishst", options(nostack, preserves_flags));
        psci::cpu_on(id, entry, argument)
    };
    asked.map_err(|error| StartError::Firmware { id, error })?;

    let mut deadline = Deadline::after_ns(ARRIVAL_TIMEOUT_NS);
    while !ARRIVING.arrived.load(Ordering::Acquire) {
        if deadline.expired() {
            *starting = Some(id);
            return Err(StartError::Lost { id });
        }
        core::hint::spin_loop();
    }
    Ok(())
}

/// The first Rust code of another CPU, called by entry.s.
#[unsafe(no_mangle)]
extern "C" fn cpu_entry(arriving: &'static Arriving) -> ! {
    exceptions::init_cpu(arriving.fault_stack_top.load(Ordering::Relaxed));
    let main = arriving.main.load(Ordering::Relaxed);
    let index = arriving.index.load(Ordering::Relaxed);
    // SAFETY: `start` put a `Main` there.
    let main: Main = unsafe { mem::transmute(main) };
    arriving.arrived.store(true, Ordering::Release);
    main(index)
}
