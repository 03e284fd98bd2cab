// From the boot loader to `kernel_entry`: at EL1, with the MMU and the caches on, on the kernel's own stack.
//
// The boot tables are constants, so that nothing is written before the caches are on: a store that goes around them
// could be hidden later by a stale line.

.section .text.boot, "ax"

// The header of a flat arm64 image (Linux, Documentation/arch/arm64/booting.rst).
.global _start
_start:
    b       start_first
    .long   0
    .quad   0x200000            // where to load it, from a multiple of 2 MiB near the start of RAM on
    .quad   __image_bytes       // memory that it needs, with what is zeroed
    .quad   2                   // little-endian, 4 KiB pages
    .quad   0, 0, 0
    .long   0x644d5241          // "ARM\x64"
    .long   0

// The first CPU, with the device tree's physical address in x0.
start_first:
    msr     daifset, #0xf
    mov     x20, x0

    // The image is linked to run at one address. Loaded elsewhere, it has nowhere to say so.
    adr     x1, _start
    ldr     x2, =_start
    cmp     x1, x2
    b.ne    stop

    bl      enter_el1
    bl      mmu_on

    // Loaders clear what follows the image's bytes. One that does not would leave locks taken and pointers wild.
    ldr     x1, =__bss_start
    ldr     x2, =__bss_end
2:  stp     xzr, xzr, [x1], #16
    cmp     x1, x2
    b.lo    2b

    // Exceptions switch to SP_EL1, the stack of their own, since the kernel itself runs on SP_EL0.
    ldr     x1, =__fault_stack_top
    ldr     x2, =__stack_top
    msr     spsel, #1
    mov     sp, x1
    msr     spsel, #0
    mov     sp, x2

    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x20
    bl      kernel_entry
stop:
    wfi
    b       stop

// Another CPU, with what `cpus::start` prepared in x0: memory that the boot tables reach. The kernel's own tables are used
// before any other memory, as stacks may lie anywhere.
.global start_other
start_other:
    msr     daifset, #0xf
    mov     x20, x0
    bl      enter_el1
    bl      mmu_on

    ldp     x1, x2, [x20]               // tables, SCTLR_EL1
    msr     ttbr0_el1, x1
    isb
    tlbi    vmalle1
    dsb     nsh
    msr     sctlr_el1, x2
    isb

    ldp     x1, x2, [x20, #16]          // stack, stack for exceptions
    msr     spsel, #1
    mov     sp, x2
    msr     spsel, #0
    mov     sp, x1

    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x20
    bl      cpu_entry
    b       stop

// Goes on at EL1, whether entered there or at EL2. Keeps x20. At EL3 it stops: no boot protocol enters there.
enter_el1:
    mrs     x1, CurrentEL
    cmp     x1, #(1 << 2)
    b.eq    3f
    cmp     x1, #(2 << 2)
    b.ne    stop

    mov     x1, #(1 << 31)              // HCR_EL2.RW: EL1 is 64-bit, nothing of it is trapped
    msr     hcr_el2, x1
    mov     x1, #3                      // EL1PCTEN, EL1PCEN: EL1 has the physical counter and timer
    msr     cnthctl_el2, x1
    msr     cntvoff_el2, xzr            // the virtual counter is the physical one
    mov     x1, #0x33ff                 // no trap of floating point; SVE, which is not used, stays trapped
    msr     cptr_el2, x1
    msr     hstr_el2, xzr
    mrs     x1, mdcr_el2                // no debug traps; HPMN, the number of event counters, stays
    and     x1, x1, #0x1f
    msr     mdcr_el2, x1
    mrs     x1, midr_el1                // EL1 sees the CPU's real numbers
    msr     vpidr_el2, x1
    mrs     x1, mpidr_el1
    msr     vmpidr_el2, x1
    msr     vttbr_el2, xzr

    mrs     x1, id_aa64pfr0_el1         // the GIC's system registers, where the CPU has them, are EL1's
    ubfx    x1, x1, #24, #4
    cbz     x1, 4f
    mrs     x1, S3_4_C12_C9_5           // ICC_SRE_EL2: SRE, and Enable for EL1
    orr     x1, x1, #1
    orr     x1, x1, #8
    msr     S3_4_C12_C9_5, x1
    isb
    msr     S3_4_C12_C11_0, xzr         // ICH_HCR_EL2: no virtual interrupts
4:
    ldr     x1, =0x30d00800             // as below, with MMU and caches off
    msr     sctlr_el1, x1
    mov     x1, #0x3c5                  // EL1h, all interrupts masked
    msr     spsr_el2, x1
    msr     elr_el2, x30
    eret
3:  ret

// Turns the MMU on with the boot tables, and the caches, and allows floating point. Keeps x20.
mmu_on:
    mov     x1, #(3 << 20)              // CPACR_EL1.FPEN
    msr     cpacr_el1, x1

    mov     x1, #0xff00                 // attributes 0: device nGnRnE, 1: memory, write-back
    msr     mair_el1, x1

    // 48-bit addresses by TTBR0 alone, 4 KiB granule, tables cached and inner shareable; physical size as the CPU's.
    ldr     x1, =0x00903510
    mrs     x2, id_aa64mmfr0_el1
    and     x2, x2, #0xf
    mov     x3, #5                      // 48 bits
    cmp     x2, x3
    csel    x2, x2, x3, lo
    orr     x1, x1, x2, lsl #32
    msr     tcr_el1, x1

    ldr     x1, =boot_level0
    msr     ttbr0_el1, x1
    tlbi    vmalle1
    ic      iallu
    dsb     nsh
    isb

    // The bits that are one in the first architecture version, M, C, I, and SA: the stack pointer is kept aligned.
    ldr     x1, =0x30d0180d
    msr     sctlr_el1, x1
    isb
    ret

.ltorg

// Each GiB of the first four at its physical address: device registers in the first, RAM in the others. The entries are
// not global, and belong to address space 0, so that the kernel's own tables, of address space 1, never meet one.
.section .rodata.boot, "a"
.balign 4096
boot_level0:
    .quad   boot_level1 + 3
    .fill   511, 8, 0
boot_level1:
    .quad   0x0060000000000c01         // device, never executed
    .quad   0x0040000040000f05         // memory, executed by EL1 only
    .quad   0x0040000080000f05
    .quad   0x00400000c0000f05
    .fill   508, 8, 0
.text
