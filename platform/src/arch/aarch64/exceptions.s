// The exception vectors. The kernel runs on SP_EL0, so that an exception finds a stack of its own in SP_EL1.
//
// Interrupts save what a Rust function may change, and go on where they came from. All else is fatal: every register is
// saved for the report.

.equ FATAL_BYTES, 304
.equ CALLER_SAVED_BYTES, 720

.macro fatal kind
.balign 128
    sub     sp, sp, #FATAL_BYTES
    stp     x0, x1, [sp]
    mov     x0, #\kind
    b       fatal_exception
.endm

// While an exception is handled, its stack may be what overflowed: the report starts over at the top.
.macro fatal_nested kind
.balign 128
    msr     tpidr_el0, x0
    mov     x0, sp
    msr     tpidrro_el0, x0
    mrs     x0, tpidr_el1
    mov     sp, x0
    mrs     x0, tpidr_el0
    sub     sp, sp, #FATAL_BYTES
    stp     x0, x1, [sp]
    mov     x0, #\kind
    b       fatal_exception
.endm

.section .text.exceptions, "ax"
.balign 2048
.global exception_vectors
exception_vectors:
    // EL1 on SP_EL0: the kernel.
    fatal 0
.balign 128
    b       interrupt
    fatal 2
    fatal 3
    // EL1 on SP_EL1: while an exception is handled.
    fatal_nested 4
    fatal_nested 5
    fatal_nested 6
    fatal_nested 7
    // EL0, 64-bit and 32-bit: nothing runs there.
    fatal 8
    fatal 9
    fatal 10
    fatal 11
    fatal 12
    fatal 13
    fatal 14
    fatal 15
.balign 128

fatal_exception:
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x19, [sp, #144]
    stp     x20, x21, [sp, #160]
    stp     x22, x23, [sp, #176]
    stp     x24, x25, [sp, #192]
    stp     x26, x27, [sp, #208]
    stp     x28, x29, [sp, #224]
    mrs     x1, sp_el0
    mrs     x2, tpidrro_el0
    and     x3, x0, #12
    cmp     x3, #4
    csel    x1, x2, x1, eq
    stp     x30, x1, [sp, #240]
    mrs     x1, elr_el1
    mrs     x2, spsr_el1
    stp     x1, x2, [sp, #256]
    mrs     x1, esr_el1
    mrs     x2, far_el1
    stp     x1, x2, [sp, #272]
    str     x0, [sp, #288]
    mov     x0, sp
    mov     x29, xzr
    bl      exception_entry
1:  wfi
    b       1b

interrupt:
    sub     sp, sp, #CALLER_SAVED_BYTES
    stp     x0, x1, [sp]
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x29, [sp, #144]
    mrs     x0, elr_el1
    mrs     x1, spsr_el1
    stp     x30, x0, [sp, #160]
    mrs     x0, fpcr
    mrs     x2, fpsr
    stp     x1, x0, [sp, #176]
    str     x2, [sp, #192]
    stp     q0, q1, [sp, #208]
    stp     q2, q3, [sp, #240]
    stp     q4, q5, [sp, #272]
    stp     q6, q7, [sp, #304]
    stp     q8, q9, [sp, #336]
    stp     q10, q11, [sp, #368]
    stp     q12, q13, [sp, #400]
    stp     q14, q15, [sp, #432]
    stp     q16, q17, [sp, #464]
    stp     q18, q19, [sp, #496]
    stp     q20, q21, [sp, #528]
    stp     q22, q23, [sp, #560]
    stp     q24, q25, [sp, #592]
    stp     q26, q27, [sp, #624]
    stp     q28, q29, [sp, #656]
    stp     q30, q31, [sp, #688]
    bl      interrupt_entry
    ldp     q0, q1, [sp, #208]
    ldp     q2, q3, [sp, #240]
    ldp     q4, q5, [sp, #272]
    ldp     q6, q7, [sp, #304]
    ldp     q8, q9, [sp, #336]
    ldp     q10, q11, [sp, #368]
    ldp     q12, q13, [sp, #400]
    ldp     q14, q15, [sp, #432]
    ldp     q16, q17, [sp, #464]
    ldp     q18, q19, [sp, #496]
    ldp     q20, q21, [sp, #528]
    ldp     q22, q23, [sp, #560]
    ldp     q24, q25, [sp, #592]
    ldp     q26, q27, [sp, #624]
    ldp     q28, q29, [sp, #656]
    ldp     q30, q31, [sp, #688]
    ldr     x2, [sp, #192]
    ldp     x1, x0, [sp, #176]
    msr     fpsr, x2
    msr     fpcr, x0
    ldp     x30, x0, [sp, #160]
    msr     spsr_el1, x1
    msr     elr_el1, x0
    ldp     x18, x29, [sp, #144]
    ldp     x16, x17, [sp, #128]
    ldp     x14, x15, [sp, #112]
    ldp     x12, x13, [sp, #96]
    ldp     x10, x11, [sp, #80]
    ldp     x8, x9, [sp, #64]
    ldp     x6, x7, [sp, #48]
    ldp     x4, x5, [sp, #32]
    ldp     x2, x3, [sp, #16]
    ldp     x0, x1, [sp]
    add     sp, sp, #CALLER_SAVED_BYTES
    eret

// The end of the machine by semihosting: returns where nothing listens, as exceptions.rs then steps over the hlt.
// w0: operation; x1: its parameters.
.global semihosting_call
.global semihosting_trap
semihosting_call:
semihosting_trap:
    hlt     #0xf000
    ret
.text
