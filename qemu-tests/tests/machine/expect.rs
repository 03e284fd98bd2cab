//! How a case may end.

use std::fs;
use std::path::Path;

use qemu_tests::bench::{Asked, asked};
use qemu_tests::boot::Outcome;
use qemu_tests::protocol::{End, Reason};

/// The only end that a case accepts.
pub(crate) enum Expect {
    /// PASS, and neither QEMU's trace nor the disk speaks against it.
    Pass,
    /// PASS as above, and one line of the guest that holds each of these.
    PassNaming(&'static [&'static str]),
    /// PASS as above, and one line of QEMU's trace that holds each of these.
    PassTracing(&'static [&'static str]),
    /// PASS as above, of a guest that measured, with nothing to say against what it asked of the device.
    Counts(fn(&[Asked]) -> Result<(), String>),
    /// An orderly FAIL with exactly this failed check, all planned checks being there.
    OnlyFailedCheck(&'static str),
    /// An orderly FAIL, and one line that holds each of these, in any case of letters.
    FailNaming(&'static [&'static str]),
    /// The status of a panic, and for each of these a line that holds it.
    Panic(&'static [&'static str]),
    /// A guest that misbehaves towards the harness: this must be among the reasons.
    Because(fn(&Reason) -> bool, &'static str),
}

impl Expect {
    /// Says what is not as it must be.
    pub(crate) fn check(&self, outcome: &Outcome, trace: &Path) -> Result<(), String> {
        let reasons = &outcome.verdict.reasons;
        match self {
            Self::Pass if outcome.passed() => Ok(()),
            Self::Pass => Err("it must pass".to_owned()),
            Self::PassNaming(words) if outcome.passed() => {
                let names = |line: &String| words.iter().all(|word| line.contains(word));
                let named = outcome.lines.iter().any(names);
                named.then_some(()).ok_or_else(|| format!("it must print a line that names {words:?}"))
            }
            Self::PassTracing(words) if outcome.passed() => {
                let log = fs::read(trace).map_err(|error| format!("QEMU's trace: {error}"))?;
                let log = String::from_utf8_lossy(&log);
                let traced = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
                traced.then_some(()).ok_or_else(|| format!("QEMU's trace must have a line with {words:?}"))
            }
            Self::PassNaming(_) | Self::PassTracing(_) => Err("it must pass".to_owned()),
            Self::Counts(_) if !outcome.passed() => Err("it must pass".to_owned()),
            Self::Counts(judge) => {
                let asked = asked(&outcome.verdict.values, trace).map_err(|error| format!("{error:#}"))?;
                judge(&asked)
            }
            Self::OnlyFailedCheck(name) => {
                let orderly =
                    |reason: &Reason| matches!(reason, Reason::FailedCheck { .. } | Reason::EndFail);
                let fits = outcome.verdict.end == Some(End::Fail)
                    && outcome.verdict.failed_checks() == [*name]
                    && reasons.iter().all(orderly);
                fits.then_some(())
                    .ok_or_else(|| format!("it must end FAIL with {name} as its only failed check"))
            }
            Self::FailNaming(words) => {
                let orderly = reasons.contains(&Reason::EndFail)
                    && !reasons
                        .iter()
                        .any(|reason| matches!(reason, Reason::WrongStatus { .. } | Reason::Killed(_)));
                let names = |line: &String| {
                    let line = line.to_lowercase();
                    words.iter().all(|word| line.contains(&word.to_lowercase()))
                };
                let fits = orderly && outcome.lines.iter().any(names);
                fits.then_some(())
                    .ok_or_else(|| format!("it must end FAIL in order, with a line that names {words:?}"))
            }
            Self::Panic(words) => {
                let panicked = reasons.iter().any(|reason| matches!(reason, Reason::Panicked(_)));
                let missing =
                    words.iter().find(|word| !outcome.lines.iter().any(|line| line.contains(**word)));
                match (panicked, missing) {
                    (false, _) => Err("it must end with the status of a panic".to_owned()),
                    (true, Some(word)) => Err(format!("no line holds {word:?}")),
                    (true, None) => Ok(()),
                }
            }
            Self::Because(fits, what) if reasons.iter().any(fits) => {
                let _ = what;
                Ok(())
            }
            Self::Because(_, what) => Err(format!("the harness must report: {what}")),
        }
    }
}
