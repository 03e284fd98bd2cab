//! The monotonic clock: the generic timer's virtual counter, whose rate firmware or the VMM states.

use core::arch::asm;

use spin::Once;

/// Rates outside of this are not believed.
const PLAUSIBLE_HZ: core::ops::RangeInclusive<u64> = 1_000_000..=100_000_000_000;

struct Clock {
    count_at_start: u64,
    hz: u64,
}

static CLOCK: Once<Option<Clock>> = Once::new();

/// Reads the counter's rate.
pub fn init() {
    CLOCK.call_once(|| {
        let hz: u64;
        // SAFETY: reads a register that every CPU has.
        unsafe { asm!("mrs {}, cntfrq_el0", out(reg) hz, options(nomem, nostack, preserves_flags)) };
        PLAUSIBLE_HZ.contains(&hz).then(|| Clock { count_at_start: ticks(), hz })
    });
}

/// Nanoseconds since [`init`]; `None` before it, or when the rate is not known.
pub fn now_ns() -> Option<u64> {
    let clock = CLOCK.get()?.as_ref()?;
    let count = ticks().wrapping_sub(clock.count_at_start);
    Some((u128::from(count) * 1_000_000_000 / u128::from(clock.hz)) as u64)
}

/// The counter's value at a time, or the last one it has.
pub(super) fn count_at(ns: u64) -> Option<u64> {
    let clock = CLOCK.get()?.as_ref()?;
    let count = u128::from(ns) * u128::from(clock.hz) / 1_000_000_000 + u128::from(clock.count_at_start);
    Some(u64::try_from(count).unwrap_or(u64::MAX))
}

/// The counter's rate.
pub fn tick_hz() -> Option<u64> {
    Some(CLOCK.get()?.as_ref()?.hz)
}

/// The counter itself, read after all that came before.
#[inline(always)]
pub fn ticks() -> u64 {
    let count: u64;
    // SAFETY: a barrier, and a register that every CPU has.
    unsafe { asm!("isb", "mrs {}, cntvct_el0", out(reg) count, options(nostack, preserves_flags)) };
    count
}
