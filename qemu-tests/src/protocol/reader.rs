//! Reads the protocol line by line and remembers all that is wrong with it.

use super::{Check, CheckResult, End, Reason, VERSION, Value, Verdict};
use crate::machine::Arch;
use crate::process::Ended;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Never,
    Once,
}

/// Takes the lines one by one.
pub(super) struct Reader {
    arch: Arch,
    started: Seen,
    plan: Option<u64>,
    /// The line that tells where the guest panicked.
    place: Option<String>,
    any: bool,
    verdict: Verdict,
}

impl Reader {
    pub(super) fn new(arch: Arch) -> Self {
        Self { arch, started: Seen::Never, plan: None, place: None, any: false, verdict: Verdict::default() }
    }

    /// Takes the next line.
    pub(super) fn line(&mut self, line: &str) {
        self.any |= !line.trim().is_empty();
        let Some(rest) = line.strip_prefix("@@") else {
            let tells_a_place = ["panic at ", "panic: ", "exception ", "exception: "]
                .iter()
                .any(|word| line.starts_with(word));
            if tells_a_place && self.place.is_none() {
                self.place = Some(line.trim().to_owned());
            }
            return;
        };
        let own = || line.to_owned();
        if self.verdict.end.is_some() {
            return self.reason(Reason::AfterEnd(own()));
        }
        let Some((kind, rest)) =
            rest.strip_prefix(' ').map(|rest| rest.split_once(' ').unwrap_or((rest, "")))
        else {
            return self.reason(Reason::UnknownLine(own()));
        };
        let known = match kind {
            "start" => return self.start(line, rest),
            "plan" => self.plan(rest),
            "check" => self.check(rest),
            "value" => self.value(rest),
            "ask" => ["plug", "unplug"].contains(&rest).then_some(()),
            "end" => self.end(rest),
            _ => return self.reason(Reason::UnknownLine(own())),
        };
        if known.is_none() {
            self.reason(Reason::MalformedLine(own()));
        }
        if self.started == Seen::Never {
            self.reason(Reason::BeforeStart(own()));
        }
    }

    fn reason(&mut self, reason: Reason) {
        self.verdict.reasons.push(reason);
    }

    fn start(&mut self, line: &str, rest: &str) {
        let expected = rest.split_once(' ') == Some((VERSION, self.arch.name()));
        match (self.started, expected) {
            (Seen::Once, _) => self.reason(Reason::StartTwice),
            (Seen::Never, false) => self.reason(Reason::WrongStart(line.to_owned())),
            (Seen::Never, true) => {}
        }
        self.started = Seen::Once;
    }

    fn plan(&mut self, rest: &str) -> Option<()> {
        let planned = number(rest)?;
        match self.plan {
            Some(_) => self.reason(Reason::PlanTwice),
            None => self.plan = Some(planned),
        }
        Some(())
    }

    fn check(&mut self, rest: &str) -> Option<()> {
        let (name, rest) = rest.split_once(' ')?;
        let name = name_of(name)?;
        let (result, detail) = rest.split_once(' ').unwrap_or((rest, ""));
        let result = match result {
            "ok" => CheckResult::Ok,
            "FAIL" if !detail.is_empty() => CheckResult::Fail,
            _ => return None,
        };
        if self.verdict.checks.iter().any(|check| check.name == name) {
            self.reason(Reason::DuplicateCheck(name.to_owned()));
        }
        if result == CheckResult::Fail {
            self.reason(Reason::FailedCheck { name: name.to_owned(), detail: detail.to_owned() });
        }
        self.verdict.checks.push(Check { name: name.to_owned(), result, detail: detail.to_owned() });
        Some(())
    }

    fn value(&mut self, rest: &str) -> Option<()> {
        let mut words = rest.split(' ');
        let (name, number, unit) = (name_of(words.next()?)?, number(words.next()?)?, words.next()?);
        if unit.is_empty() || words.next().is_some() {
            return None;
        }
        if self.verdict.values.iter().any(|value| value.name == name) {
            self.reason(Reason::DuplicateValue(name.to_owned()));
        }
        self.verdict.values.push(Value { name: name.to_owned(), number, unit: unit.to_owned() });
        Some(())
    }

    fn end(&mut self, rest: &str) -> Option<()> {
        self.verdict.end = match rest {
            "PASS" => Some(End::Pass),
            "FAIL" => Some(End::Fail),
            _ => return None,
        };
        Some(())
    }

    /// Says what is missing now that nothing more will come.
    pub(super) fn finish(mut self, ended: Ended) -> Verdict {
        let end = self.verdict.end;
        let statuses = self.arch.statuses();
        match ended {
            Ended::Exit(status) if status == statuses.panic => {
                let place = self.place.take().unwrap_or_default();
                self.verdict.reasons.insert(0, Reason::Panicked(place));
            }
            Ended::Deadline(_) | Ended::Flood => self.reason(Reason::Killed(ended)),
            Ended::Exit(_) | Ended::Signal(_) => {
                let expected = end.map(|end| match end {
                    End::Pass => (end, statuses.pass),
                    End::Fail => (end, statuses.fail),
                });
                if expected.is_none_or(|(_, status)| ended != Ended::Exit(status)) {
                    self.reason(Reason::WrongStatus { ended, expected });
                }
            }
        }
        if !self.any {
            self.verdict.reasons.insert(0, Reason::NothingPrinted);
            return self.verdict;
        }
        if self.started == Seen::Never {
            self.reason(Reason::NoStart);
        }
        let seen = self.verdict.checks.len() as u64;
        match self.plan {
            None => self.reason(Reason::NoPlan),
            Some(planned) if planned != seen => self.reason(Reason::CheckCount { planned, seen }),
            Some(_) => {}
        }
        match end {
            None => self.reason(Reason::NoEnd),
            Some(End::Fail) => self.reason(Reason::EndFail),
            Some(End::Pass) if !self.verdict.failed_checks().is_empty() => {
                self.reason(Reason::PassWithFailedCheck)
            }
            Some(End::Pass) => {}
        }
        self.verdict
    }
}

/// A name: letters, digits, and `.`, `-`, `_`.
fn name_of(word: &str) -> Option<&str> {
    let fits = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    (!word.is_empty() && word.chars().all(fits)).then_some(word)
}

/// A plain decimal number, without a sign.
fn number(word: &str) -> Option<u64> {
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok())?
}
