# Where the CPU goes with a trap, in its vectored mode: with an exception to the start, with interrupt N to the Nth word
# after it. An exception leaves everything as it was on the stack for faults, whose top is in `sscratch`, and hands its
# address to `exception_entry`, which does not return.

.text
.balign 256
.global trap_vectors
trap_vectors:
.rept 16
    .option push
    .option norvc
    j exception_stub
    .option pop
.endr

exception_stub:
    csrrw sp, sscratch, sp
    addi sp, sp, -288
    sd ra, 8(sp)
    sd gp, 24(sp)
    sd tp, 32(sp)
    sd t0, 40(sp)
    sd t1, 48(sp)
    sd t2, 56(sp)
    sd s0, 64(sp)
    sd s1, 72(sp)
    sd a0, 80(sp)
    sd a1, 88(sp)
    sd a2, 96(sp)
    sd a3, 104(sp)
    sd a4, 112(sp)
    sd a5, 120(sp)
    sd a6, 128(sp)
    sd a7, 136(sp)
    sd s2, 144(sp)
    sd s3, 152(sp)
    sd s4, 160(sp)
    sd s5, 168(sp)
    sd s6, 176(sp)
    sd s7, 184(sp)
    sd s8, 192(sp)
    sd s9, 200(sp)
    sd s10, 208(sp)
    sd s11, 216(sp)
    sd t3, 224(sp)
    sd t4, 232(sp)
    sd t5, 240(sp)
    sd t6, 248(sp)
    # The stack as it was; an exception while this one is reported begins again at the top.
    addi t1, sp, 288
    csrrw t0, sscratch, t1
    sd t0, 16(sp)
    csrr t0, sepc
    sd t0, 0(sp)
    csrr t0, sstatus
    sd t0, 256(sp)
    csrr t0, scause
    sd t0, 264(sp)
    csrr t0, stval
    sd t0, 272(sp)
    mv a0, sp
    call exception_entry
6:  wfi
    j 6b
