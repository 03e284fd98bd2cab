//! The other CPUs (harts), which the firmware starts, one after the other.
//!
//! ```text
//! start ---SBI hart_start---> entry.s: page tables, stack ---> cpu_entry ---> main
//! ```

use core::arch::asm;
use core::fmt;
use core::mem;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use spin::Mutex;

use super::{exceptions, interrupts, mmu};
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
    /// The same of the stack for exceptions.
    pub fault_top: u64,
}

/// What a CPU does once it arrived; it gets its index.
pub type Main = fn(usize) -> !;

/// A CPU that could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartError {
    /// The firmware did not start it.
    Firmware {
        /// What it is known by.
        id: u64,
        /// The firmware's code: -1 failed, -2 not supported, -3 there is none, -6 it runs already.
        error: isize,
    },
    /// It was started, and did not arrive. It may still, so no other can be started.
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
            Self::Firmware { id, error } => write!(f, "CPU {id:#x}: the SBI firmware answers {error}"),
            Self::Lost { id } => write!(f, "CPU {id:#x} was started, and did not arrive"),
            Self::NoTables => f.write_str("page tables are not set up yet"),
        }
    }
}

impl core::error::Error for StartError {}

/// What entry.s and [`cpu_entry`] read about the CPU that is on its way. The order of the first two is entry.s's.
#[repr(C)]
struct Arriving {
    satp: AtomicU64,
    stack_top: AtomicU64,
    fault_stack_top: AtomicU64,
    /// A [`Main`].
    main: AtomicPtr<()>,
    index: AtomicUsize,
    arrived: AtomicBool,
}

static ARRIVING: Arriving = Arriving {
    satp: AtomicU64::new(0),
    stack_top: AtomicU64::new(0),
    fault_stack_top: AtomicU64::new(0),
    main: AtomicPtr::new(core::ptr::null_mut()),
    index: AtomicUsize::new(0),
    arrived: AtomicBool::new(false),
};

/// Who has it starts a CPU. The value is the one that did not arrive.
static STARTING: Mutex<Option<u64>> = Mutex::new(None);

/// What this CPU is known by: to the firmware, and in the device tree's `reg`. entry.s put it where it stays.
pub fn own_id() -> u64 {
    let id: u64;
    // SAFETY: copies a register.
    unsafe { asm!("mv {}, tp", out(reg) id, options(nomem, nostack, preserves_flags)) };
    id
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
    let satp = mmu::in_use().ok_or(StartError::NoTables)?;
    ARRIVING.satp.store(satp, Ordering::Relaxed);
    ARRIVING.stack_top.store(stacks.top, Ordering::Relaxed);
    ARRIVING.fault_stack_top.store(stacks.fault_top, Ordering::Relaxed);
    ARRIVING.main.store(main as *mut (), Ordering::Relaxed);
    ARRIVING.index.store(index, Ordering::Relaxed);
    // What the CPU reads is there before it is started.
    ARRIVING.arrived.store(false, Ordering::SeqCst);

    let entry = (&raw const start_other).addr();
    let argument = (&raw const ARRIVING).addr();
    let asked = sbi_rt::hart_start(id as usize, entry, argument);
    if asked.is_err() {
        return Err(StartError::Firmware { id, error: asked.error.cast_signed() });
    }
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
    interrupts::mask_all();
    exceptions::init_cpu(arriving.fault_stack_top.load(Ordering::Relaxed));
    let main = arriving.main.load(Ordering::Relaxed);
    let index = arriving.index.load(Ordering::Relaxed);
    // SAFETY: `start` put a `Main` there.
    let main: Main = unsafe { mem::transmute(main) };
    arriving.arrived.store(true, Ordering::Release);
    main(index)
}
