//! CPU exceptions: each prints what happened, the registers and the callers, and ends the machine.
//!
//! The kernel has no exception that it recovers from.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, Ordering};

use super::backtrace;
use crate::console::print_now;
use crate::image;
use crate::power::{self, ExitCode};

global_asm!(include_str!("exceptions.s"));

/// The lowest bits of `stvec`: each interrupt has an entry of its own.
const VECTORED: usize = 1;
/// The highest bit of the cause: an interrupt, which no source is enabled for.
const INTERRUPT: u64 = 1 << 63;

const NAMES: [&str; 16] = [
    "instruction address misaligned",
    "instruction access fault",
    "illegal instruction",
    "breakpoint",
    "load address misaligned",
    "load access fault",
    "store address misaligned",
    "store access fault",
    "environment call from U-mode",
    "environment call from S-mode",
    "reserved",
    "reserved",
    "instruction page fault",
    "load page fault",
    "reserved",
    "store page fault",
];
/// The causes that come with an address.
const WITH_ADDRESS: [u64; 9] = [0, 1, 4, 5, 6, 7, 12, 13, 15];

unsafe extern "C" {
    static trap_vectors: u8;
}

/// Sets the vectors and the stack for faults. From here on a fault is reported.
pub fn init() {
    init_cpu(image::fault_stack_top());
}

/// Sets the vectors of this CPU, whose stack for faults ends at `stack`.
pub(super) fn init_cpu(stack: u64) {
    let vectors = (&raw const trap_vectors).addr() | VECTORED;
    // SAFETY: the vectors lead to the stubs of exceptions.s, which use `sscratch` as the stack that it names here, and
    // nobody else does.
    unsafe { asm!("csrw sscratch, {}", "csrw stvec, {}", in(reg) stack, in(reg) vectors, options(nostack)) };
}

/// What the stub left on the stack, lowest address first. The registers are in the order of their numbers, with the
/// program counter in the place of x0.
#[repr(C)]
struct Frame {
    registers: [u64; 32],
    sstatus: u64,
    cause: u64,
    value: u64,
}

/// The names of the registers, by number.
const REGISTERS: [&str; 32] = [
    "pc", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", "a0", "a1", "a2", "a3", "a4", "a5", "a6",
    "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4", "t5", "t6",
];
const FRAME_POINTER: usize = 8;

/// Reports the exception and ends the machine, for the stub.
#[unsafe(no_mangle)]
extern "C" fn exception_entry(frame: &Frame) -> ! {
    static REPORTING: AtomicBool = AtomicBool::new(false);
    let pc = frame.registers[0];
    if REPORTING.swap(true, Ordering::Relaxed) {
        print_now(format_args!("\nexception {:#x} at {pc:#x} while reporting another\n", frame.cause));
        power::exit(ExitCode::Panic);
    }
    let name = match NAMES.get(frame.cause as usize) {
        Some(name) => *name,
        None if frame.cause & INTERRUPT != 0 => "an interrupt that nobody enabled",
        None => "unknown",
    };
    print_now(format_args!("\nexception {:#x}: {name}, at {pc:#018x}\n", frame.cause));
    if WITH_ADDRESS.contains(&frame.cause) {
        print_now(format_args!("  address {:#018x}\n", frame.value));
    }
    if let Some(guard) = image::guard_page_name(frame.value) {
        print_now(format_args!("  that is {guard}\n"));
    }
    for (index, (name, value)) in REGISTERS.iter().zip(frame.registers).enumerate() {
        let end = if index % 4 == 3 { "\n" } else { "" };
        print_now(format_args!("  {name:<3} {value:016x}{end}"));
    }
    print_now(format_args!("  sstatus {:x}\n  called from", frame.sstatus));
    let callers =
        core::iter::once(frame.registers[1]).chain(backtrace::from_frame(frame.registers[FRAME_POINTER]));
    callers.for_each(|address| print_now(format_args!(" {address:#x}")));
    print_now(format_args!("\n"));
    power::exit(ExitCode::Panic)
}
