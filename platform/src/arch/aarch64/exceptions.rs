//! CPU exceptions: each prints what happened, the registers and the callers, and ends the machine.
//!
//! The kernel has no exception that it recovers from. Interrupts, which come by the same vectors, are in
//! [`interrupts`](super::interrupts).

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, Ordering};

use super::{backtrace, power};
use crate::console::print_now;
use crate::image;
use crate::power::ExitCode;

global_asm!(include_str!("exceptions.s"));

/// By the vector's number modulo 4.
const KINDS: [&str; 4] = ["synchronous exception", "interrupt", "fast interrupt", "system error"];
/// By the vector's number divided by 4.
const ORIGINS: [&str; 4] = ["the kernel", "an exception handler", "EL0", "EL0, 32-bit"];

/// Exception classes (ESR_EL1.EC) of accesses to memory at EL1.
const INSTRUCTION_ABORT: u64 = 0x21;
const DATA_ABORT: u64 = 0x25;

unsafe extern "C" {
    static exception_vectors: u8;
}

/// Sets the vectors of the first CPU. From here on a fault is reported.
pub fn init() {
    init_cpu(image::fault_stack_top());
}

/// Sets the vectors of this CPU, whose stack for exceptions ends at `fault_stack_top`.
pub(super) fn init_cpu(fault_stack_top: u64) {
    let vectors = (&raw const exception_vectors).addr();
    // SAFETY: the table of exceptions.s, which is aligned as it has to be, and whose every entry leads somewhere. The
    // kernel uses TPIDR_EL1 for nothing else.
    unsafe {
        asm!(
            "msr tpidr_el1, {stack}",
            "msr vbar_el1, {vectors}",
            "isb",
            stack = in(reg) fault_stack_top,
            vectors = in(reg) vectors,
            options(nomem, nostack, preserves_flags),
        );
    }
}

/// What exceptions.s left on the stack, lowest address first.
#[repr(C)]
struct Frame {
    x: [u64; 31],
    sp: u64,
    elr: u64,
    spsr: u64,
    esr: u64,
    far: u64,
    vector: u64,
}

/// Reports the exception and ends the machine, for the vectors.
#[unsafe(no_mangle)]
extern "C" fn exception_entry(frame: &Frame) -> ! {
    static REPORTING: AtomicBool = AtomicBool::new(false);
    if power::is_semihosting_trap(frame.elr) {
        power::off();
    }
    if REPORTING.swap(true, Ordering::Relaxed) {
        print_now(format_args!("\nexception at {:#x} while reporting another\n", frame.elr));
        power::exit(ExitCode::Panic);
    }
    let vector = frame.vector as usize;
    let class = frame.esr >> 26 & 0x3f;
    let name = KINDS[vector % 4];
    let origin = ORIGINS.get(vector / 4).copied().unwrap_or("nowhere");
    print_now(format_args!(
        "\nexception {vector}: {name} in {origin}, {}, syndrome {:#x}, at {:#018x}\n",
        class_name(class),
        frame.esr,
        frame.elr
    ));
    if vector.is_multiple_of(4) && (class == DATA_ABORT || class == INSTRUCTION_ABORT) {
        report_abort(frame, class);
    }
    report_registers(frame);
    print_now(format_args!("  called from"));
    backtrace::from_frame(frame.x[29]).for_each(|address| print_now(format_args!(" {address:#x}")));
    print_now(format_args!("\n"));
    power::exit(ExitCode::Panic)
}

fn class_name(class: u64) -> &'static str {
    match class {
        0x00 => "undefined instruction",
        0x07 => "floating point not allowed",
        0x0e => "illegal execution state",
        0x15 => "supervisor call",
        0x18 => "system register not allowed",
        INSTRUCTION_ABORT => "instruction abort",
        0x22 => "unaligned program counter",
        DATA_ABORT => "data abort",
        0x26 => "unaligned stack pointer",
        0x2c => "floating point",
        0x2f => "system error",
        0x3c => "breakpoint",
        _ => "another class",
    }
}

fn report_abort(frame: &Frame, class: u64) {
    let access = match frame.esr {
        _ if class == INSTRUCTION_ABORT => "execution",
        esr if esr & (1 << 6) != 0 => "write",
        _ => "read",
    };
    let reason = match frame.esr & 0x3f {
        0x04..=0x07 => "not mapped",
        0x0d..=0x0f => "not permitted",
        0x10 => "no device answered",
        0x21 => "not aligned",
        _ => "for another reason",
    };
    print_now(format_args!("  {access} at {:#018x}, {reason}\n", frame.far));
    if let Some(guard) = image::guard_page_name(frame.far) {
        print_now(format_args!("  that is {guard}\n"));
    }
}

fn report_registers(frame: &Frame) {
    for (index, value) in frame.x.iter().enumerate() {
        let end = if index % 4 == 3 { "\n" } else { "" };
        print_now(format_args!("  x{index:<2} {value:016x}{end}"));
    }
    print_now(format_args!("  sp  {:016x}\n  spsr {:016x}\n", frame.sp, frame.spsr));
}
