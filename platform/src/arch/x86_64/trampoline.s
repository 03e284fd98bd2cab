# From where another CPU starts, in real mode at 0x8000, to `start_other` in 64-bit mode. `cpus.rs` copies what is between
# `trampoline_start` and `trampoline_end` there. The boot page tables of entry.s map it, and the kernel.

.set trampoline, 0x8000

.section .rodata.trampoline, "a"
.balign 16
.global trampoline_start
.global trampoline_end
.code16
trampoline_start:
    cli
    cld
    mov ax, cs
    mov ds, ax
    lgdt [trampoline_gdt_offset]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    # A far jump to 32-bit code, written out: 66 ea offset selector.
    .byte 0x66, 0xea
    .long trampoline + trampoline_32 - trampoline_start
    .word 8

.code32
trampoline_32:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    # CR4.PAE; EFER as the first CPU has it, without what the CPU sets itself; then paging and write protection.
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, offset boot_level4
    mov cr3, eax
    mov ecx, 0xc0000080
    mov eax, [arriving_cpu + 8]
    xor edx, edx
    wrmsr
    mov eax, cr0
    or eax, 0x80010000
    mov cr0, eax
    ljmp 24, offset start_other

.balign 8
trampoline_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # 32-bit code
    .quad 0x00cf93000000ffff    # data
    .quad 0x00af9b000000ffff    # 64-bit code
trampoline_gdt_pointer:
    .word . - trampoline_gdt - 1
    .long trampoline + trampoline_gdt - trampoline_start
trampoline_end:
.set trampoline_gdt_offset, trampoline_gdt_pointer - trampoline_start

.section .text.boot, "ax"
.code64
start_other:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov rdi, offset arriving_cpu
    mov rax, [rdi]
    mov cr3, rax
    mov rsp, [rdi + 16]
    xor ebp, ebp
    call cpu_entry
7:  hlt
    jmp 7b
.text
