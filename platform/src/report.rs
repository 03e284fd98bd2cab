//! The line protocol by which the kernel tells the host what it checked.
//!
//! ```text
//! @@ start 1 x86_64          protocol version, architecture
//! @@ plan 3                  how many checks will follow
//! @@ check heap ok 1024 bytes written and read back
//! @@ check edu FAIL liveness register reads 0x0 instead of 0xfffffffe
//! @@ value boot_ns 1200345 ns
//! @@ ask plug                what the host is to do now
//! @@ end FAIL
//! ```
//!
//! The verdict is PASS only when exactly the planned number of checks ran and every one passed: a check that was skipped
//! by mistake fails the run. All other lines on the serial port are text for people.

use core::fmt::{self, Write};

use crate::console::Console;
use crate::power::{self, ExitCode};

/// The version of the protocol, in the `start` line.
const PROTOCOL_VERSION: u32 = 1;

/// How one check, or a whole run, went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Pass,
    /// Not as it should.
    Fail,
}

impl From<bool> for Outcome {
    /// [`Outcome::Pass`] for a condition that holds.
    fn from(condition: bool) -> Self {
        if condition { Self::Pass } else { Self::Fail }
    }
}

/// One run's checks, written to `W`.
///
/// In the kernel that is the [`Console`].
#[derive(Debug)]
pub struct Report<W: Write = Console> {
    out: W,
    planned: usize,
    passed: usize,
    failed: usize,
}

impl Report<Console> {
    /// Starts a run of `planned` checks on the console.
    pub fn start(planned: usize) -> Self {
        Self::start_on(Console, crate::arch::NAME, planned)
    }

    /// Prints the verdict and ends the machine with its code.
    pub fn end(self) -> ! {
        match self.finish() {
            Outcome::Pass => power::exit(ExitCode::Pass),
            Outcome::Fail => power::exit(ExitCode::Fail),
        }
    }
}

impl<W: Write> Report<W> {
    /// Starts a run of `planned` checks on any writer.
    pub fn start_on(mut out: W, arch: &str, planned: usize) -> Self {
        // A writer that fails leaves the host without an `end` line, which is a failure there.
        let _ = writeln!(out, "@@ start {PROTOCOL_VERSION} {arch}\n@@ plan {planned}");
        Self { out, planned, passed: 0, failed: 0 }
    }

    /// Reports a check with a detail, and gives back its outcome, which may be given as a condition that should hold.
    ///
    /// In `name`, which the host looks for, white space becomes `-`.
    pub fn check(&mut self, name: &str, outcome: impl Into<Outcome>, detail: impl fmt::Display) -> Outcome {
        let outcome = outcome.into();
        let (word, mark, counter) = match outcome {
            Outcome::Pass => ("ok", " ok ", &mut self.passed),
            Outcome::Fail => ("FAIL", "FAIL", &mut self.failed),
        };
        *counter += 1;
        let (name, detail) = (Word(&name), OneLine(&detail));
        let _ = writeln!(self.out, "  {mark}  {name}: {detail}\n@@ check {name} {word} {detail}");
        outcome
    }

    /// Reports a check that produced a value or an error, and gives the value back.
    ///
    /// `detail` words what was found in the good case.
    pub fn check_result<T, E: fmt::Display, D: fmt::Display>(
        &mut self,
        name: &str,
        result: Result<T, E>,
        detail: impl FnOnce(&T) -> D,
    ) -> Option<T> {
        match result {
            Ok(value) => {
                self.check(name, Outcome::Pass, detail(&value));
                Some(value)
            }
            Err(error) => {
                self.check(name, Outcome::Fail, error);
                None
            }
        }
    }

    /// Reports a measured number.
    ///
    /// In `name` and `unit` white space becomes `-`.
    pub fn value(&mut self, name: &str, number: u64, unit: &str) {
        let (name, unit) = (Word(&name), Word(&unit));
        let _ = writeln!(self.out, "  {name} = {number} {unit}\n@@ value {name} {number} {unit}");
    }

    /// Asks the host to do something with the machine: `plug` or `unplug`.
    pub fn ask(&mut self, what: &str) {
        let what = Word(&what);
        let _ = writeln!(self.out, "@@ ask {what}");
    }

    /// The number of checks so far.
    pub fn checked(&self) -> usize {
        self.passed + self.failed
    }

    /// Prints the verdict and gives it back.
    pub fn finish(mut self) -> Outcome {
        let complete = self.checked() == self.planned;
        if !complete {
            let _ = writeln!(self.out, "  {} checks were planned, {} ran", self.planned, self.checked());
        }
        let (outcome, word) =
            if complete && self.failed == 0 { (Outcome::Pass, "PASS") } else { (Outcome::Fail, "FAIL") };
        let _ = writeln!(self.out, "  {} of {} checks passed\n@@ end {word}", self.passed, self.planned);
        outcome
    }
}

/// Shows its content with white space replaced by `-`, and an empty content as `-`: one word of a protocol line.
struct Word<'a>(&'a dyn fmt::Display);

/// Shows its content with control characters replaced by spaces, so that a detail cannot begin a line of its own.
struct OneLine<'a>(&'a dyn fmt::Display);

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut filter =
            Filter { out: f, replace: |c| c.is_whitespace() || c.is_control(), by: '-', written: false };
        write!(filter, "{}", self.0)?;
        if filter.written { Ok(()) } else { f.write_char('-') }
    }
}

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Filter { out: f, replace: char::is_control, by: ' ', written: false }, "{}", self.0)
    }
}

struct Filter<'a, 'b> {
    out: &'a mut fmt::Formatter<'b>,
    replace: fn(char) -> bool,
    by: char,
    written: bool,
}

impl Write for Filter<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.written |= !text.is_empty();
        text.chars().try_for_each(|c| self.out.write_char(if (self.replace)(c) { self.by } else { c }))
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::String;
    use alloc::vec::Vec;

    use super::*;

    fn protocol(text: &str) -> Vec<&str> {
        text.lines().filter(|line| line.starts_with("@@")).collect()
    }

    #[test]
    fn a_run_with_every_planned_check_passes() {
        let mut text = String::new();
        let mut report = Report::start_on(&mut text, "x86_64", 2);
        report.check("heap", Outcome::Pass, "fine");
        assert_eq!(report.check_result("id", Ok::<_, fmt::Error>(7), |n| *n), Some(7));
        report.value("time", 12, "ns");
        assert_eq!(report.finish(), Outcome::Pass);
        assert_eq!(
            protocol(&text),
            [
                "@@ start 1 x86_64",
                "@@ plan 2",
                "@@ check heap ok fine",
                "@@ check id ok 7",
                "@@ value time 12 ns",
                "@@ end PASS"
            ]
        );
    }

    #[test]
    fn a_failed_missing_or_surplus_check_fails_the_run() {
        for (planned, outcomes) in
            [(1, &[Outcome::Fail][..]), (2, &[Outcome::Pass]), (1, &[Outcome::Pass; 2]), (1, &[])]
        {
            let mut text = String::new();
            let mut report = Report::start_on(&mut text, "x86_64", planned);
            for outcome in outcomes {
                report.check("c", *outcome, "");
            }
            assert_eq!(report.finish(), Outcome::Fail, "{planned} planned, {outcomes:?}");
            assert!(text.ends_with("@@ end FAIL\n"));
        }
    }

    #[test]
    fn names_and_details_cannot_forge_lines() {
        let mut text = String::new();
        let mut report = Report::start_on(&mut text, "x86_64", 1);
        report.check("two words", Outcome::Fail, "a\n@@ end PASS\r\nb");
        report.value("", 1, "a b");
        let lines = protocol(&text);
        assert_eq!(lines[2..], ["@@ check two-words FAIL a @@ end PASS  b", "@@ value - 1 a-b"]);
    }
}
