//! Why a guest did not pass, in words.

use std::fmt;

use super::End;
use crate::process::Ended;

/// Why a guest did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Not one line came.
    NothingPrinted,
    /// There was text, but no `@@ start`.
    NoStart,
    /// A second `@@ start`.
    StartTwice,
    /// `@@ start` has another version or architecture; the line.
    WrongStart(String),
    /// An `@@` line before `@@ start`; the line.
    BeforeStart(String),
    /// No `@@ plan`.
    NoPlan,
    /// A second `@@ plan`.
    PlanTwice,
    /// An `@@` line of no known kind; the line.
    UnknownLine(String),
    /// An `@@` line of a known kind that cannot be read; the line.
    MalformedLine(String),
    /// A name of a check that came before.
    DuplicateCheck(String),
    /// A name of a value that came before.
    DuplicateValue(String),
    /// More or fewer checks than planned.
    CheckCount {
        /// As the plan says.
        planned: u64,
        /// As they came.
        seen: u64,
    },
    /// A check that failed.
    FailedCheck {
        /// Its name.
        name: String,
        /// What the guest says about it.
        detail: String,
    },
    /// No `@@ end`.
    NoEnd,
    /// An `@@` line after `@@ end`; the line.
    AfterEnd(String),
    /// `@@ end FAIL`.
    EndFail,
    /// `@@ end PASS` in spite of a failed check.
    PassWithFailedCheck,
    /// The guest panicked or met an exception; what it printed about it.
    Panicked(String),
    /// QEMU ended in a way that does not fit what the guest said.
    WrongStatus {
        /// How it ended.
        ended: Ended,
        /// What the guest said, and the status that fits it.
        expected: Option<(End, i32)>,
    },
    /// QEMU was killed because time, or patience with its output, had run out.
    Killed(Ended),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NothingPrinted => write!(f, "the guest printed nothing"),
            Self::NoStart => write!(f, "the guest printed no `@@ start`"),
            Self::StartTwice => write!(f, "the guest started twice"),
            Self::WrongStart(line) => write!(f, "another version or architecture than expected: `{line}`"),
            Self::BeforeStart(line) => write!(f, "`{line}` came before `@@ start`"),
            Self::NoPlan => write!(f, "the guest printed no `@@ plan`"),
            Self::PlanTwice => write!(f, "the guest planned twice"),
            Self::UnknownLine(line) => write!(f, "unknown line `{line}`"),
            Self::MalformedLine(line) => write!(f, "malformed line `{line}`"),
            Self::DuplicateCheck(name) => write!(f, "check {name} came twice"),
            Self::DuplicateValue(name) => write!(f, "value {name} came twice"),
            Self::CheckCount { planned, seen } => write!(f, "{planned} checks were planned, {seen} came"),
            Self::FailedCheck { name, detail } => write!(f, "check {name}: {detail}"),
            Self::NoEnd => write!(f, "the guest stopped without `@@ end`"),
            Self::AfterEnd(line) => write!(f, "`{line}` came after `@@ end`"),
            Self::EndFail => write!(f, "the guest ended with FAIL"),
            Self::PassWithFailedCheck => write!(f, "the guest ended with PASS in spite of a failed check"),
            Self::Panicked(place) if place.is_empty() => {
                write!(f, "the guest panicked and did not say where")
            }
            Self::Panicked(place) => f.write_str(place),
            Self::WrongStatus { ended, expected } => {
                write!(f, "QEMU {ended}")?;
                match (expected, ended) {
                    (Some((End::Pass, status)), _) => write!(f, " instead of {status} after PASS"),
                    (Some((End::Fail, status)), _) => write!(f, " instead of {status} after FAIL"),
                    (None, Ended::Exit(0)) => write!(f, ", as after a triple fault or a power-off"),
                    (None, _) => write!(f, " before the guest had ended"),
                }
            }
            Self::Killed(ended) => write!(f, "QEMU {ended}"),
        }
    }
}
