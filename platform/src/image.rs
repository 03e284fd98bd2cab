//! Where the kernel's own code and data lie, by the symbols that each architecture's linker script defines.

use crate::range::PhysRange;

unsafe extern "C" {
    static __kernel_start: u8;
    static __kernel_end: u8;
    static __text_start: u8;
    static __text_end: u8;
    static __rodata_start: u8;
    static __rodata_end: u8;
    static __data_start: u8;
    static __fault_stack_guard: u8;
    static __fault_stack_top: u8;
    static __stack_guard: u8;
    static __stack_top: u8;
}

/// The size of a guard page below a stack.
const GUARD_BYTES: u64 = 4096;

macro_rules! between {
    ($start:ident, $end:ident) => {
        symbols_range((&raw const $start).addr(), (&raw const $end).addr())
    };
}

/// The range from one symbol up to the next. The linker script makes none of them empty; were one so, its first byte
/// would stand for it.
fn symbols_range(start: usize, end: usize) -> PhysRange {
    let (start, last) = (start as u64, (end as u64).saturating_sub(1));
    PhysRange::new(start, last.max(start)).unwrap_or_else(|| unreachable!("last is at least start"))
}

/// The whole image with its zeroed data and its stacks.
pub fn whole() -> PhysRange {
    between!(__kernel_start, __kernel_end)
}

/// The code.
pub fn text() -> PhysRange {
    between!(__text_start, __text_end)
}

/// The constants.
pub fn rodata() -> PhysRange {
    between!(__rodata_start, __rodata_end)
}

/// The variables and stacks, without the two guard pages: three ranges.
pub fn writable() -> [PhysRange; 3] {
    let after = |guard: usize| guard + GUARD_BYTES as usize;
    [
        between!(__data_start, __fault_stack_guard),
        symbols_range(after((&raw const __fault_stack_guard).addr()), (&raw const __stack_guard).addr()),
        symbols_range(after((&raw const __stack_guard).addr()), (&raw const __stack_top).addr()),
    ]
}

/// The two stacks, the one for faults first.
pub fn stacks() -> [PhysRange; 2] {
    let [_, fault, normal] = writable();
    [fault, normal]
}

/// One past the last byte of the stack for faults.
pub fn fault_stack_top() -> u64 {
    (&raw const __fault_stack_top).addr() as u64
}

/// What lies at `address` when that is a guard page.
pub fn guard_page_name(address: u64) -> Option<&'static str> {
    let guards = [
        ((&raw const __fault_stack_guard).addr() as u64, "the guard page below the stack for faults"),
        ((&raw const __stack_guard).addr() as u64, "the guard page below the stack: it overflowed"),
    ];
    guards
        .into_iter()
        .find(|(start, _)| (*start..*start + GUARD_BYTES).contains(&address))
        .map(|(_, name)| name)
}
