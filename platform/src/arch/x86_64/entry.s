# Two ways in, both to 64-bit mode on the kernel's own stack, with the first 4 GiB identity-mapped by 2 MiB pages. The first
# is the PVH entry (32-bit protected mode, paging off, the address of the start info in ebx), to `kernel_entry`.

# Fills the boot page tables: level 4 -> level 3 -> four level 2 tables of 512 pages of 2 MiB. Uses rax, rcx and rdi.
.macro fill_boot_tables
    mov eax, offset boot_level3
    or eax, 3
    mov [boot_level4], eax
    mov eax, offset boot_level2
    or eax, 3
    mov edi, offset boot_level3
    mov ecx, 4
2:  mov [edi], eax
    add eax, 4096
    add edi, 8
    loop 2b
    mov eax, 0x83
    mov edi, offset boot_level2
    mov ecx, 2048
3:  mov [edi], eax
    add eax, 0x200000
    add edi, 8
    loop 3b
.endm

.section .text.boot, "ax"

.code32
.global pvh_start
pvh_start:
    cli
    cld
    # Loaders clear the .bss segment. One that does not would leave locks taken and pointers wild.
    mov edi, offset __bss_start
    mov ecx, offset __bss_end
    sub ecx, edi
    shr ecx, 2
    xor eax, eax
    rep stosd

    mov esp, offset __stack_top

    fill_boot_tables

    # CR4.PAE; EFER.LME; then paging and write protection.
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, offset boot_level4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80010000
    mov cr0, eax
    lgdt [boot_gdt_pointer]
    ljmp 8, offset pvh_start64

.code64
pvh_start64:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov rsp, offset __stack_top
    xor ebp, ebp
    mov edi, ebx
    call kernel_entry
4:  hlt
    jmp 4b

# The ELF entry point, where loaders without PVH jump to: 64-bit mode, the address of a Linux zero page in rsi, all that is
# used so far mapped at its physical address.
.global _start
_start:
    cli
    cld
    mov rbx, rsi
    mov edi, offset __bss_start
    mov ecx, offset __bss_end
    sub ecx, edi
    shr ecx, 2
    xor eax, eax
    rep stosd
    fill_boot_tables
    mov eax, offset boot_level4
    mov cr3, rax
    mov rax, cr0
    or eax, 0x10000
    mov cr0, rax
    lgdt [boot_gdt_pointer64]
    mov rsp, offset __stack_top
    push 8
    mov rax, offset start64
    push rax
    retfq
start64:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    xor ebp, ebp
    mov rdi, rbx
    call kernel_entry_by_zero_page
5:  hlt
    jmp 5b

.section .rodata.boot, "a"
.balign 8
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 64-bit code
    .quad 0x00cf93000000ffff    # data
boot_gdt_pointer:
    .word . - boot_gdt - 1
    .long boot_gdt
boot_gdt_pointer64:
    .word boot_gdt_pointer - boot_gdt - 1
    .quad boot_gdt

.section .bss.boot, "aw", @nobits
.balign 4096
.global boot_level4              # The trampoline has it in a part of its own.
boot_level4: .skip 4096
boot_level3: .skip 4096
boot_level2: .skip 4 * 4096
.text
