# From the SBI firmware (S-mode, translation off, the hart's number in a0, the address of the device tree in a1) to
# `kernel_entry` on the kernel's own stack.

.section .text.boot, "ax"
.global _start
_start:
    csrw sie, zero
    csrci sstatus, 2
    # Loaders clear the .bss segment. One that does not would leave locks taken and pointers wild.
    la t0, __bss_start
    la t1, __bss_end
1:  bgeu t0, t1, 2f
    sd zero, (t0)
    addi t0, t0, 8
    j 1b
2:  la sp, __stack_top
    # Floating point on, in its initial state: the compiler may use its registers.
    li t0, 0x2000
    csrs sstatus, t0
    # Nothing else uses the thread pointer: it keeps the hart's number.
    mv tp, a0
    # The last frame of every backtrace.
    mv s0, zero
    call kernel_entry
3:  wfi
    j 3b

# Another CPU, started by the firmware: its number in a0, what it is to become (`Arriving` of cpus.rs) in a1.
.global start_other
start_other:
    csrw sie, zero
    csrci sstatus, 2
    ld t0, 0(a1)
    ld sp, 8(a1)
    sfence.vma
    csrw satp, t0
    sfence.vma
    li t0, 0x2000
    csrs sstatus, t0
    mv tp, a0
    mv s0, zero
    mv a0, a1
    call cpu_entry
4:  wfi
    j 4b
.text
