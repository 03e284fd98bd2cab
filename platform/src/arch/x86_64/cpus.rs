//! The other CPUs, which wait for a command of the first, one after the other.
//!
//! ```text
//! start ---INIT, SIPI---> trampoline.s: real mode, boot tables, kernel's tables, stack ---> cpu_entry ---> main
//! ```

use core::arch::global_asm;
use core::fmt;
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use spin::Mutex;
use x86_64::registers::control::{Efer, EferFlags};

use super::apic::Apic;
use super::{exceptions, mmu};
use crate::interrupts::InterruptError;
use crate::memory::phys_to_virt;
use crate::time::{self, Deadline};

global_asm!(include_str!("trampoline.s"));

/// Where the trampoline runs: a page below 1 MiB, which the frame allocator never has. trampoline.s says the same.
const TRAMPOLINE: u64 = 0x8000;
const TRAMPOLINE_BYTES: usize = 4096;
/// How long a CPU takes to reset; how long the first start is waited for, before there is a second; and that one.
const INIT_NS: u64 = 10_000_000;
const FIRST_START_NS: u64 = 1_000_000;
const ARRIVAL_TIMEOUT_NS: u64 = 5_000_000_000;
/// What of EFER is to be the same: system calls, long mode, no-execute pages.
const SAME_EFER: EferFlags =
    EferFlags::SYSTEM_CALL_EXTENSIONS.union(EferFlags::LONG_MODE_ENABLE).union(EferFlags::NO_EXECUTE_ENABLE);

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
}

/// Where a CPU's stacks end, which it has for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stacks {
    /// One past the stack's last byte, a multiple of 16.
    pub top: u64,
    /// The same of the stack for double faults.
    pub fault_top: u64,
}

/// What a CPU does once it arrived; it gets its index.
pub type Main = fn(usize) -> !;

/// A CPU that could not be started.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartError {
    /// This CPU's interrupt controller cannot send commands.
    Controller(InterruptError),
    /// A number that a command has no room for.
    Id {
        /// What it is known by.
        id: u64,
    },
    /// The command was not taken.
    NotSent {
        /// What it is known by.
        id: u64,
    },
    /// No RAM is where the trampoline has to be.
    NoTrampoline {
        /// Where that is.
        phys: u64,
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
            Self::Controller(error) => error.fmt(f),
            Self::Id { id } => write!(f, "CPU {id:#x} has a number of more than 8 bits"),
            Self::NotSent { id } => write!(f, "CPU {id:#x} does not take commands"),
            Self::NoTrampoline { phys } => write!(f, "no RAM is at {phys:#x}, where CPUs start"),
            Self::Lost { id } => write!(f, "CPU {id:#x} was started, and did not arrive"),
            Self::NoTables => f.write_str("page tables are not set up yet"),
        }
    }
}

impl core::error::Error for StartError {}

/// What trampoline.s and [`cpu_entry`] read about the CPU that is on its way. The order of the first three is
/// trampoline.s's.
#[repr(C)]
struct Arriving {
    tables: AtomicU64,
    efer: AtomicU64,
    stack_top: AtomicU64,
    fault_stack_top: AtomicU64,
    /// A [`Main`].
    main: AtomicPtr<()>,
    index: AtomicUsize,
    arrived: AtomicBool,
}

#[unsafe(export_name = "arriving_cpu")]
static ARRIVING: Arriving = Arriving {
    tables: AtomicU64::new(0),
    efer: AtomicU64::new(0),
    stack_top: AtomicU64::new(0),
    fault_stack_top: AtomicU64::new(0),
    main: AtomicPtr::new(ptr::null_mut()),
    index: AtomicUsize::new(0),
    arrived: AtomicBool::new(false),
};

/// Who has it starts a CPU. The value is the one that did not arrive.
static STARTING: Mutex<Option<u64>> = Mutex::new(None);

/// What this CPU is known by: to commands, and in the MADT.
pub fn own_id() -> u64 {
    Apic::find().map_or(0, |apic| apic.id().into())
}

/// Starts a CPU that waits to be, and waits until it arrived. It then runs `main` with interrupts off.
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
    let apic = Apic::find().map_err(StartError::Controller)?;
    let target = u8::try_from(id).map_err(|_| StartError::Id { id })?;
    let tables = mmu::in_use().ok_or(StartError::NoTables)?;
    if !mmu::is_ram(TRAMPOLINE) {
        return Err(StartError::NoTrampoline { phys: TRAMPOLINE });
    }
    ARRIVING.tables.store(tables, Ordering::Relaxed);
    ARRIVING.efer.store(Efer::read().intersection(SAME_EFER).bits(), Ordering::Relaxed);
    ARRIVING.stack_top.store(stacks.top, Ordering::Relaxed);
    ARRIVING.fault_stack_top.store(stacks.fault_top, Ordering::Relaxed);
    ARRIVING.main.store(main as *mut (), Ordering::Relaxed);
    ARRIVING.index.store(index, Ordering::Relaxed);
    ARRIVING.arrived.store(false, Ordering::SeqCst);
    // SAFETY: nobody but CPUs that start uses the page, and `STARTING` lets one at a time.
    unsafe { put_trampoline() };

    if !apic.send_init(target) {
        return Err(StartError::NotSent { id });
    }
    time::busy_wait_ns(INIT_NS);
    for timeout_ns in [FIRST_START_NS, ARRIVAL_TIMEOUT_NS] {
        if !apic.send_start(target, (TRAMPOLINE >> 12) as u8) {
            return Err(StartError::NotSent { id });
        }
        if arrives_within(timeout_ns) {
            return Ok(());
        }
    }
    *starting = Some(id);
    Err(StartError::Lost { id })
}

fn arrives_within(timeout_ns: u64) -> bool {
    let mut deadline = Deadline::after_ns(timeout_ns);
    while !ARRIVING.arrived.load(Ordering::Acquire) {
        if deadline.expired() {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Copies the trampoline to where CPUs start.
///
/// # Safety
///
/// The page must be mapped RAM, and no CPU may be running in it.
unsafe fn put_trampoline() {
    let (from, end) = (&raw const trampoline_start, &raw const trampoline_end);
    let len_bytes = (end.addr() - from.addr()).min(TRAMPOLINE_BYTES);
    // SAFETY: between two symbols of the image, and inside of a page that the caller vouches for.
    unsafe { ptr::copy_nonoverlapping(from, phys_to_virt(TRAMPOLINE), len_bytes) };
}

/// The first Rust code of another CPU, called by trampoline.s.
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
