# 32 stubs of 16 bytes each, at exception_stubs + 16 * vector. Each brings the stack to the same shape, an error code
# (or 0) and the vector above the saved registers, and hands its address to `exception_entry`, which does not return.

.text
.balign 16
.global exception_stubs
exception_stubs:
.set vector, 0
.rept 32
    .balign 16
    # The vectors for which the CPU pushes an error code: 8, 10-14, 17, 21, 29, 30.
    .if ((0x60227d00 >> vector) & 1) == 0
    .byte 0x6a, 0               # push 0
    .endif
    .byte 0x6a, vector          # push vector
    jmp exception_common
    .set vector, vector + 1
.endr

# Directly behind them 48 more for interrupts. Each hands its number to `interrupt_entry` and returns. The kernel's code uses
# no registers but the general ones, and no memory below the stack pointer.
.set number, 0
.rept 48
    .balign 16
    .byte 0x6a, number          # push number
    jmp interrupt_common
    .set number, number + 1
.endr

.balign 16
interrupt_common:
    push rax
    push rcx
    push rdx
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    cld
    mov edi, [rsp + 72]
    # The CPU aligned the stack before it pushed five words, and the stub pushed ten.
    sub rsp, 8
    call interrupt_entry
    add rsp, 8
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rax
    add rsp, 8
    iretq

exception_common:
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    mov rdi, rsp
    and rsp, -16
    call exception_entry
6:  hlt
    jmp 6b
