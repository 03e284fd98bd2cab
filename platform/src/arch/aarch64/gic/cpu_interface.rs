//! The GIC's part in each CPU: system registers.

use core::arch::asm;

/// Numbers from here on name no interrupt: nothing was pending.
const SPECIAL: u32 = 1020;
const SPECIAL_LAST: u32 = 1023;

/// Lets this CPU take every interrupt that is enabled elsewhere. Its mask (DAIF) stays as it is.
pub(super) fn init() {
    // SAFETY: the GIC's registers, which this CPU has: its redistributor was found. ICC_SRE_EL1.SRE first, without which
    // the others are not there; then ICC_PMR_EL1 (every priority), ICC_BPR1_EL1 (no grouping), ICC_CTLR_EL1 (one write ends
    // an interrupt) and ICC_IGRPEN1_EL1.
    unsafe {
        asm!(
            "mrs {scratch}, S3_0_C12_C12_5",
            "orr {scratch}, {scratch}, #1",
            "msr S3_0_C12_C12_5, {scratch}",
            "isb",
            "msr S3_0_C4_C6_0, {all}",
            "msr S3_0_C12_C12_3, xzr",
            "msr S3_0_C12_C12_4, xzr",
            "msr S3_0_C12_C12_7, {one}",
            "isb",
            scratch = out(reg) _,
            all = in(reg) 0xffu64,
            one = in(reg) 1u64,
            options(nostack, preserves_flags),
        );
    }
}

/// Takes the most urgent pending interrupt; `None` when there is none. It has to be ended by [`end`].
pub(crate) fn acknowledge() -> Option<u32> {
    let number: u64;
    // SAFETY: ICC_IAR1_EL1. The barrier orders the acknowledgement before whatever the handler asks the device.
    unsafe { asm!("mrs {}, S3_0_C12_C12_0", "dsb sy", out(reg) number, options(nostack, preserves_flags)) };
    let number = number as u32;
    (!(SPECIAL..=SPECIAL_LAST).contains(&number)).then_some(number)
}

/// Ends an interrupt that was taken.
pub(crate) fn end(number: u32) {
    // SAFETY: ICC_EOIR1_EL1, with a number that `acknowledge` gave. The barrier is for what the handler told the device.
    unsafe {
        asm!("dsb sy", "msr S3_0_C12_C12_1, {}", "isb", in(reg) u64::from(number), options(nostack, preserves_flags))
    };
}
