//! How a stretch of code is measured: its instructions by the counter, or, in runs of their own, its requests by QEMU's
//! trace or its functions by a debugger that steps through it.

use alloc::format;
use alloc::string::String;

use crate::arch::{clock, diagnostic};
use crate::boot::BootInfo;
use crate::report::Report;

/// Empty stretches that are timed to know what the timing itself costs.
const EMPTY_STRETCHES: u64 = 1_000;

/// What a run finds out. The first is the only one whose instructions count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Instructions, by the counter.
    Time,
    /// Each stretch is marked in QEMU's trace: its section's number at port 0x80 before it, and 0 after it.
    Count,
    /// One operation after the warm-up is marked by calls of [`bench_mark`].
    Profile,
}

/// The measuring of one run.
pub(super) struct Meter {
    pub report: Report,
    mode: Mode,
    warm_up: u64,
    operations: u64,
    /// The counter's ticks in an empty stretch.
    overhead: u64,
    sections: u8,
}

impl Meter {
    /// Takes `bench=time|count|profile`, `operations=N` and `warm-up=N` from the command line.
    pub(super) fn new(info: &BootInfo, report: Report) -> Result<Self, (Report, String)> {
        let number = |key, default| info.command_line.number(key).map(|number| number.unwrap_or(default));
        let numbers = || Ok((number("warm-up", 1_000)?, number("operations", 10_000)?.max(1)));
        let (warm_up, operations) = match numbers() {
            Ok(numbers) => numbers,
            Err(error) => return Err((report, super::text::<crate::command_line::NotANumber<'_>>(error))),
        };
        let mode = match info.command_line.get("bench").unwrap_or("time") {
            "time" => Mode::Time,
            "count" => Mode::Count,
            "profile" => Mode::Profile,
            other => return Err((report, format!("bench={other} is not time, count or profile"))),
        };
        let mut meter = Self { report, mode: Mode::Time, warm_up, operations, overhead: 0, sections: 0 };
        let mut empty = Laps::<1>::new(&meter, [""]);
        (0..EMPTY_STRETCHES).for_each(|_| empty.time(0, || ()));
        meter.overhead = empty.ticks[0] / EMPTY_STRETCHES;
        meter.mode = mode;
        Ok(meter)
    }

    /// The ticks that are taken off each stretch.
    pub(super) fn overhead(&self) -> u64 {
        self.overhead
    }

    /// The operations that only warm up.
    #[cfg(feature = "contexts")]
    pub(super) fn warm_up(&self) -> u64 {
        self.warm_up
    }

    /// Whether this run is about requests, and not about instructions.
    pub(super) fn counts_requests(&self) -> bool {
        self.mode == Mode::Count
    }

    /// Runs `work`, first to warm up, and reports what its stretches took: `NAME.instructions` in all, for
    /// `NAME.operations`. A stretch holds `each` operations.
    pub(super) fn measure<const N: usize>(
        &mut self,
        names: [&'static str; N],
        each: u64,
        mut work: impl FnMut(&mut Laps<N>) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut laps = Laps::new(self, names);
        let mode = core::mem::replace(&mut laps.mode, Mode::Time);
        for _ in 0..self.warm_up.div_ceil(each) {
            work(&mut laps)?;
        }
        laps = Laps::new(self, names);
        self.sections += N as u8;
        let rounds = if mode == Mode::Profile { 1 } else { self.operations.div_ceil(each) };
        for _ in 0..rounds {
            work(&mut laps)?;
        }
        for (index, name) in names.into_iter().enumerate() {
            let mut value = |what, number, unit| self.report.value(&format!("{name}.{what}"), number, unit);
            value("operations", rounds * each, "operations");
            match mode {
                Mode::Time => value("instructions", laps.ticks[index], "instructions"),
                Mode::Count => value("section", u64::from(laps.first_section) + index as u64, "code"),
                Mode::Profile => {}
            }
        }
        Ok(())
    }
}

/// The stretches of an operation, each timed by itself.
pub(super) struct Laps<const N: usize> {
    mode: Mode,
    overhead: u64,
    names: [&'static str; N],
    first_section: u8,
    ticks: [u64; N],
}

impl<const N: usize> Laps<N> {
    fn new(meter: &Meter, names: [&'static str; N]) -> Self {
        let Meter { mode, overhead, sections, .. } = *meter;
        Self { mode, overhead, names, first_section: sections + 1, ticks: [0; N] }
    }

    /// Runs a stretch. Inlined, so that only the stretch lies between the two readings.
    #[inline(always)]
    pub(super) fn time<R>(&mut self, index: usize, stretch: impl FnOnce() -> R) -> R {
        match self.mode {
            Mode::Time => {}
            Mode::Count => diagnostic::write(self.first_section + index as u8),
            Mode::Profile => mark(self.names[index]),
        }
        let start = clock::ticks();
        let result = stretch();
        let ticks = clock::ticks().wrapping_sub(start);
        match self.mode {
            Mode::Time => {}
            Mode::Count => diagnostic::write(0),
            Mode::Profile => mark(""),
        }
        self.ticks[index] += ticks.saturating_sub(self.overhead);
        result
    }
}

fn mark(name: &str) {
    bench_mark(name.as_ptr(), name.len());
}

/// Where `cargo xtask bench --profile` stops the machine: what follows is the stretch of this name, until a mark without
/// one.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn bench_mark(name: *const u8, len: usize) {
    core::hint::black_box((name, len));
}
