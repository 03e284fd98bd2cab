//! The monotonic clock: the time-stamp counter, its rate measured at boot.
//!
//! The rate comes from the programmable interval timer: from its channel 2, whose output can be polled at port 0x61, or,
//! where that port is missing, from channel 0, whose count can be read. Several short measurements are made, since a busy
//! host may stop the machine in the middle of one. Where there is no timer, it comes from the CPU's or the hypervisor's own
//! statement. Where nothing states it, there is no clock.

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Once;
use x86_64::instructions::port::Port;

use super::cpuid;

/// The timer's input frequency.
const PIT_HZ: u64 = 1_193_182;
/// How long a measurement lasts, in periods of the timer: about 1 ms.
const MEASURED_PERIODS: u16 = 1_193;
const MEASUREMENTS: usize = 10;
/// The most polls of the timer's output, and the most ticks of the counter meanwhile: ten times of what a fast machine
/// needs, as the counter may tick once for each instruction.
const MAX_POLLS: u32 = 100_000_000;
const MAX_TICKS: u64 = 1 << 30;
/// How often the timer's count may be the same before it is taken to stand still. A period of the timer is about 1 us.
const MAX_EQUAL_COUNTS: u32 = 10_000;

/// Bits of port 0x61.
const GATE: u8 = 1;
const SPEAKER: u8 = 2;
const OUTPUT: u8 = 0x20;

/// Rates outside of this are not believed.
const PLAUSIBLE_HZ: core::ops::RangeInclusive<u64> = 10_000_000..=100_000_000_000;

/// The counter's rate, once it was measured, where that could be done.
static HZ: Once<Option<u64>> = Once::new();
/// The counter's value then.
static START: AtomicU64 = AtomicU64::new(0);
/// What a tick lasts, in nanoseconds by 2^32: a clock that divides takes longer to read. 0 before it is known.
static TICK: AtomicU64 = AtomicU64::new(0);

/// Measures the counter's rate. Takes about 10 ms.
pub fn init() {
    HZ.call_once(|| {
        let hz = least(measure_by_output).or_else(|| least(measure_by_count));
        let hz = hz.or_else(stated_by_cpu).or_else(stated_by_hypervisor);
        let hz = hz.filter(|hz| PLAUSIBLE_HZ.contains(hz))?;
        START.store(read_tsc(), Ordering::Relaxed);
        // Release: whoever sees it sees the start.
        TICK.store((1_000_000_000 << 32) / hz, Ordering::Release);
        Some(hz)
    });
}

/// Nanoseconds since [`init`]; `None` before it, or when the rate is not known.
pub fn now_ns() -> Option<u64> {
    let tick = TICK.load(Ordering::Acquire);
    if tick == 0 {
        return None;
    }
    let ticks = read_tsc().wrapping_sub(START.load(Ordering::Relaxed));
    Some(((u128::from(ticks) * u128::from(tick)) >> 32) as u64)
}

/// The counter's rate.
pub fn tick_hz() -> Option<u64> {
    *HZ.get()?
}

/// The counter itself. Under QEMU's `-icount shift=0` it ticks once for each instruction.
#[inline(always)]
pub fn ticks() -> u64 {
    read_tsc()
}

#[inline(always)]
fn read_tsc() -> u64 {
    // SAFETY: every x86_64 CPU has the instruction, and the kernel runs at the most privileged level.
    unsafe { _rdtsc() }
}

/// The least of several measurements: whatever holds one up makes it larger. The first one that finds no timer is the last.
fn least(measure: fn() -> Result<Option<u64>, NoTimer>) -> Option<u64> {
    (0..MEASUREMENTS).map_while(|_| measure().ok()).flatten().min()
}

/// The timer, or what it takes to read it, is missing.
struct NoTimer;

/// `None` where the machine stood still while the timer was started, so that the counter would be read too late.
fn measure_by_output() -> Result<Option<u64>, NoTimer> {
    let mut control = Port::<u8>::new(0x61);
    let mut mode = Port::<u8>::new(0x43);
    let mut count = Port::<u8>::new(0x42);
    // SAFETY: the timer's channel 2 and the port that gates it. They drive nothing but the speaker, which stays off; on
    // a machine without them writes go nowhere and reads give all ones.
    unsafe {
        let before = control.read();
        control.write(before & !(GATE | SPEAKER));
        // Channel 2, low byte then high byte, mode 0: the output rises when the count has run down.
        mode.write(0b1011_0000);
        let [low, high] = MEASURED_PERIODS.to_le_bytes();
        count.write(low);
        count.write(high);
        let asked = read_tsc();
        control.write((before & !SPEAKER) | GATE);
        let start = read_tsc();
        // Programmed in mode 0 the output is low at first; one that is high already is not there.
        if control.read() & OUTPUT != 0 {
            control.write(before);
            return Err(NoTimer);
        }
        let elapsed = || read_tsc().wrapping_sub(start);
        let output =
            (0..MAX_POLLS).take_while(|_| elapsed() < MAX_TICKS).find(|_| control.read() & OUTPUT != 0);
        let ticks = elapsed();
        control.write(before);
        let at_once = start.wrapping_sub(asked) <= ticks / 16;
        Ok(output.filter(|_| at_once).and_then(|_| rate(ticks, MEASURED_PERIODS.into())))
    }
}

/// `None` where reading the timer took so long that it is not known which count belongs to which tick.
fn measure_by_count() -> Result<Option<u64>, NoTimer> {
    let mut mode = Port::<u8>::new(0x43);
    let mut count = Port::<u8>::new(0x40);
    // SAFETY: the timer's channel 0, whose interrupt is masked; on a machine without it writes go nowhere and reads give all
    // ones.
    let mut read_count = || unsafe {
        // The count as it is now, low byte then high byte.
        mode.write(0);
        u16::from_le_bytes([count.read(), count.read()])
    };
    // SAFETY: as above. Low byte then high byte, mode 2: from 65536 down, again and again.
    unsafe {
        Port::<u8>::new(0x43).write(0b0011_0100);
        Port::<u8>::new(0x40).write(0);
        Port::<u8>::new(0x40).write(0);
    }
    let first = read_count();
    if (0..MAX_EQUAL_COUNTS).all(|_| read_count() == first) {
        return Err(NoTimer);
    }
    let asked = read_tsc();
    let from = read_count();
    let start = read_tsc();
    let elapsed = || read_tsc().wrapping_sub(start);
    let mut periods = 0;
    let done = (0..MAX_POLLS).take_while(|_| elapsed() < MAX_TICKS).any(|_| {
        periods = from.wrapping_sub(read_count());
        periods >= MEASURED_PERIODS
    });
    let ticks = elapsed();
    let at_once = start.wrapping_sub(asked) <= ticks / 16;
    Ok((done && at_once).then(|| rate(ticks, periods.into())).flatten())
}

fn rate(ticks: u64, periods: u64) -> Option<u64> {
    u64::try_from(u128::from(ticks) * u128::from(PIT_HZ) / u128::from(periods)).ok()
}

/// Leaf 0x15: the counter's rate as a fraction of a crystal's.
fn stated_by_cpu() -> Option<u64> {
    if cpuid::highest(0) < 0x15 {
        return None;
    }
    let leaf = cpuid::read(0x15);
    let hz = u64::from(leaf.ecx).checked_mul(leaf.ebx.into())?.checked_div(leaf.eax.into())?;
    (hz != 0).then_some(hz)
}

/// Hypervisor leaf 0x4000_0010, of VMware's making and KVM's too: the counter's rate in kHz.
fn stated_by_hypervisor() -> Option<u64> {
    let hypervisor_present = cpuid::read(1).ecx & (1 << 31) != 0;
    if !hypervisor_present || cpuid::highest(0x4000_0000) < 0x4000_0010 {
        return None;
    }
    let khz = cpuid::read(0x4000_0010).eax;
    (khz != 0).then_some(u64::from(khz) * 1000)
}
