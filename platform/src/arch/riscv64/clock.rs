//! The monotonic clock: the `time` register, whose rate the device tree says.

use core::arch::asm;

use spin::Once;

use crate::firmware::device_tree::DeviceTree;

/// Rates outside of this are not believed.
const PLAUSIBLE_HZ: core::ops::RangeInclusive<u64> = 1_000..=100_000_000_000;

struct Clock {
    ticks_at_start: u64,
    hz: u64,
}

static CLOCK: Once<Option<Clock>> = Once::new();

/// Takes the rate from the tree: `timebase-frequency`, of 32 or 64 bits, of the node of all CPUs.
pub(super) fn find(tree: &DeviceTree<'_>) {
    CLOCK.call_once(|| {
        let hz = match *tree.at(&["cpus"])?.cells("timebase-frequency")? {
            [hz] => u64::from(hz),
            [high, low] => u64::from(high) << 32 | u64::from(low),
            _ => return None,
        };
        PLAUSIBLE_HZ.contains(&hz).then(|| Clock { ticks_at_start: ticks(), hz })
    });
}

/// Nanoseconds since the tree was read; `None` before it, or when the rate is not known.
pub fn now_ns() -> Option<u64> {
    let clock = CLOCK.get()?.as_ref()?;
    let ticks = ticks().wrapping_sub(clock.ticks_at_start);
    Some((u128::from(ticks) * 1_000_000_000 / u128::from(clock.hz)) as u64)
}

/// The value of [`ticks`] at a time of [`now_ns`], rounded up.
pub(super) fn ticks_at(time_ns: u64) -> Option<u64> {
    let clock = CLOCK.get()?.as_ref()?;
    let ticks = (u128::from(time_ns) * u128::from(clock.hz)).div_ceil(1_000_000_000);
    Some(clock.ticks_at_start.wrapping_add(u64::try_from(ticks).unwrap_or(u64::MAX)))
}

/// The counter's rate.
pub fn tick_hz() -> Option<u64> {
    Some(CLOCK.get()?.as_ref()?.hz)
}

/// The counter itself.
#[inline(always)]
pub fn ticks() -> u64 {
    let ticks: u64;
    // SAFETY: reads a counter, which the firmware lets S-mode do.
    unsafe { asm!("rdtime {}", out(reg) ticks, options(nomem, nostack, preserves_flags)) };
    ticks
}
