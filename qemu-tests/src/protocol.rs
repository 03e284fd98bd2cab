//! The lines with which a guest says what it found.
//!
//! ```text
//! @@ start 1 ARCH                      once, first; 1 is the version of the protocol
//! @@ plan N                            once: how many checks there will be
//! @@ check NAME ok|FAIL DETAIL         N times, each name once; a failed one says why
//! @@ value NAME NUMBER UNIT            any number of times, each name once
//! @@ ask plug|unplug                   any number of times: the host is to do this (see `hot_plug`)
//! @@ end PASS|FAIL                     once, last
//! ```
//!
//! Everything else is text for people. A guest fails unless all of that holds and QEMU ended with the status that fits the
//! verdict, so that silence, a hang, a crash half-way and a harness that misreads are all failures.

mod reader;
mod reason;
#[cfg(test)]
mod tests;

pub use self::reason::Reason;

use self::reader::Reader;
use crate::machine::Arch;
use crate::process::Ended;

/// The version of the protocol.
pub const VERSION: &str = "1";

/// The statuses with which a guest makes QEMU end. They differ between machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statuses {
    /// After a guest that passed.
    pub pass: i32,
    /// After a guest that failed in order.
    pub fail: i32,
    /// After a panic or an exception of the guest.
    pub panic: i32,
}

/// A check that the guest made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Its name.
    pub name: String,
    /// What came of it.
    pub result: CheckResult,
    /// What the guest says about it.
    pub detail: String,
}

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckResult {
    /// `ok`.
    Ok,
    /// `FAIL`.
    Fail,
}

/// A number that the guest stated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// The number.
    pub number: u64,
    /// Its unit.
    pub unit: String,
}

/// What the guest said at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// `@@ end PASS`.
    Pass,
    /// `@@ end FAIL`.
    Fail,
}

/// What is known about a guest once QEMU has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The checks, in their order.
    pub checks: Vec<Check>,
    /// The values, in their order.
    pub values: Vec<Value>,
    /// What the guest said at its end.
    pub end: Option<End>,
    /// Why it did not pass, the most telling first. Empty if it passed.
    pub reasons: Vec<Reason>,
}

impl Verdict {
    /// Reads what a guest printed. `ended` is how its QEMU ended.
    pub fn read<'a>(lines: impl IntoIterator<Item = &'a str>, arch: Arch, ended: Ended) -> Self {
        let mut reader = Reader::new(arch);
        for line in lines {
            reader.line(line);
        }
        reader.finish(ended)
    }

    /// Whether the guest passed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.reasons.is_empty()
    }

    /// The names of the checks that failed.
    #[must_use]
    pub fn failed_checks(&self) -> Vec<&str> {
        let failed = self.checks.iter().filter(|check| check.result == CheckResult::Fail);
        failed.map(|check| check.name.as_str()).collect()
    }
}
