//! CPU exceptions: each prints what happened, the registers and the callers, and ends the machine. Interrupts go on to
//! [`interrupts`](super::interrupts).
//!
//! The kernel has no exception that it recovers from. The stubs are assembly since the `x86-interrupt` calling
//! convention is not in stable Rust.

use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, Ordering};

use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::tables::lidt;
use x86_64::registers::control::Cr2;
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::idt::{Entry, HandlerFunc};

use super::{backtrace, segments};
use crate::console::print_now;
use crate::image;
use crate::power::{self, ExitCode};

global_asm!(include_str!("exceptions.s"));

const VECTORS: usize = 32;
/// After the exceptions, interrupts.
const INTERRUPTS: usize = super::interrupts::COUNT;
const _: () = assert!(super::interrupts::FIRST_VECTOR as usize == VECTORS);
const STUB_BYTES: u64 = 16;
const DOUBLE_FAULT: usize = 8;
const PAGE_FAULT: u64 = 14;

const NAMES: [&str; VECTORS] = [
    "divide error",
    "debug",
    "non-maskable interrupt",
    "breakpoint",
    "overflow",
    "bound range exceeded",
    "invalid opcode",
    "device not available",
    "double fault",
    "coprocessor segment overrun",
    "invalid task state",
    "segment not present",
    "stack segment fault",
    "general protection fault",
    "page fault",
    "reserved",
    "x87 floating point",
    "alignment check",
    "machine check",
    "SIMD floating point",
    "virtualisation",
    "control protection",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "hypervisor injection",
    "VMM communication",
    "security",
    "reserved",
];

static TABLE: Once<[Entry<HandlerFunc>; VECTORS + INTERRUPTS]> = Once::new();

unsafe extern "C" {
    static exception_stubs: u8;
}

/// Loads the descriptors for segments and exceptions. From here on a fault is reported.
pub fn init() {
    segments::init();
    load_table();
}

/// The same on another CPU, whose stack for double faults ends at `fault_stack_top`.
pub(super) fn init_cpu(fault_stack_top: u64) {
    segments::init_cpu(fault_stack_top);
    load_table();
}

fn load_table() {
    let table = TABLE.call_once(|| {
        let mut table = [Entry::missing(); VECTORS + INTERRUPTS];
        let mut stub = (&raw const exception_stubs).addr() as u64;
        for (vector, entry) in table.iter_mut().enumerate() {
            // SAFETY: a stub of exceptions.s, made for this vector.
            let options = unsafe { entry.set_handler_addr(VirtAddr::new_truncate(stub)) };
            if vector == DOUBLE_FAULT {
                // SAFETY: `segments::init` filled this entry of the stack table, and nothing else uses that stack.
                unsafe { options.set_stack_index(segments::FAULT_STACK_INDEX) };
            }
            stub += STUB_BYTES;
        }
        table
    });
    let limit = (size_of_val(table) - 1) as u16;
    // SAFETY: the table is static, and each of its entries leads to a stub.
    unsafe { lidt(&DescriptorTablePointer { limit, base: VirtAddr::from_ptr(table) }) };
}

/// What the stub left on the stack, lowest address first.
#[repr(C)]
struct Frame {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rbp: u64,
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rbx: u64,
    rax: u64,
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Reports the exception and ends the machine, for the stubs.
#[unsafe(no_mangle)]
extern "C" fn exception_entry(frame: &Frame) -> ! {
    static REPORTING: AtomicBool = AtomicBool::new(false);
    if REPORTING.swap(true, Ordering::Relaxed) {
        print_now(format_args!("\nexception {} at {:#x} while reporting another\n", frame.vector, frame.rip));
        power::exit(ExitCode::Panic);
    }
    let name = NAMES.get(frame.vector as usize).copied().unwrap_or("unknown");
    print_now(format_args!(
        "\nexception {}: {name}, error code {:#x}, at {:#018x}\n",
        frame.vector, frame.error_code, frame.rip
    ));
    if frame.vector == PAGE_FAULT || frame.vector == DOUBLE_FAULT as u64 {
        report_page_fault(frame);
    }
    report_registers(frame);
    print_now(format_args!("  called from"));
    backtrace::from_frame(frame.rbp).for_each(|address| print_now(format_args!(" {address:#x}")));
    print_now(format_args!("\n"));
    power::exit(ExitCode::Panic)
}

fn report_page_fault(frame: &Frame) {
    let address = Cr2::read_raw();
    if frame.vector == PAGE_FAULT {
        let access = match frame.error_code {
            code if code & 16 != 0 => "execution",
            code if code & 2 != 0 => "write",
            _ => "read",
        };
        let reason = if frame.error_code & 1 != 0 { "not permitted" } else { "not mapped" };
        print_now(format_args!("  {access} at {address:#018x}, {reason}\n"));
    } else {
        print_now(format_args!("  last page fault at {address:#018x}\n"));
    }
    if let Some(guard) = image::guard_page_name(address) {
        print_now(format_args!("  that is {guard}\n"));
    }
}

fn report_registers(f: &Frame) {
    print_now(format_args!(
        "  rax {:016x}  rbx {:016x}  rcx {:016x}  rdx {:016x}\n  rsi {:016x}  rdi {:016x}  rbp {:016x}  rsp {:016x}\n",
        f.rax, f.rbx, f.rcx, f.rdx, f.rsi, f.rdi, f.rbp, f.rsp
    ));
    print_now(format_args!(
        "  r8  {:016x}  r9  {:016x}  r10 {:016x}  r11 {:016x}\n  r12 {:016x}  r13 {:016x}  r14 {:016x}  r15 {:016x}\n",
        f.r8, f.r9, f.r10, f.r11, f.r12, f.r13, f.r14, f.r15
    ));
    print_now(format_args!("  cs {:04x}  ss {:04x}  rflags {:016x}\n", f.cs, f.ss, f.rflags));
}
