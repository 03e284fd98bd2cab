//! One test for each way in which a guest can fail, and a few for those in which it passes.

use std::time::Duration;

use super::*;

const GOOD: &str = "\
kernel 0.1.0
@@ start 1 x86_64
@@ plan 2
text for people
@@ check disk.digest ok 1 MiB
@@ check edu.copy ok
@@ value map 12 requests
@@ end PASS
bye";

fn read(text: &str, status: i32) -> Verdict {
    Verdict::read(text.lines(), Arch::X86_64, Ended::Exit(status))
}

fn reasons(text: &str, status: i32) -> Vec<Reason> {
    read(text, status).reasons
}

fn line(text: &str) -> String {
    text.to_owned()
}

#[test]
fn a_complete_guest_passes() {
    let verdict = read(GOOD, 33);
    assert_eq!(verdict.reasons, []);
    assert!(verdict.passed());
    assert_eq!(verdict.end, Some(End::Pass));
    assert_eq!(verdict.checks.len(), 2);
    assert_eq!(verdict.checks[0].detail, "1 MiB");
    assert_eq!(verdict.values, [Value { name: line("map"), number: 12, unit: line("requests") }]);
}

#[test]
fn a_guest_asks_for_what_there_is() {
    let asking = |what: &str| GOOD.replace("text for people", &format!("@@ ask {what}"));
    assert!(read(&asking("plug"), 33).passed() && read(&asking("unplug"), 33).passed());
    assert_eq!(reasons(&asking("reset"), 33), [Reason::MalformedLine(line("@@ ask reset"))]);
}

#[test]
fn silence_fails() {
    assert_eq!(reasons("", 33)[0], Reason::NothingPrinted);
    assert_eq!(reasons("\n  \n", 33)[0], Reason::NothingPrinted);
    let killed = Ended::Deadline(Duration::from_secs(5));
    let verdict = Verdict::read([], Arch::X86_64, killed);
    assert_eq!(verdict.reasons, [Reason::NothingPrinted, Reason::Killed(killed)]);
}

#[test]
fn no_start_fails() {
    let text = GOOD.replace("@@ start 1 x86_64\n", "");
    let reasons = reasons(&text, 33);
    assert!(reasons.contains(&Reason::NoStart));
    assert!(reasons.contains(&Reason::BeforeStart(line("@@ plan 2"))));
}

#[test]
fn text_alone_fails() {
    let reasons = reasons("hello\n", 33);
    assert!(reasons.contains(&Reason::NoStart) && reasons.contains(&Reason::NoEnd));
}

#[test]
fn a_second_start_fails() {
    let text = GOOD.replace("@@ plan 2", "@@ plan 2\n@@ start 1 x86_64");
    assert_eq!(reasons(&text, 33), [Reason::StartTwice]);
}

#[test]
fn another_version_or_architecture_fails() {
    for other in ["@@ start 2 x86_64", "@@ start 1 riscv64", "@@ start 1", "@@ start"] {
        let text = GOOD.replace("@@ start 1 x86_64", other);
        assert_eq!(reasons(&text, 33), [Reason::WrongStart(line(other))]);
    }
}

#[test]
fn no_plan_or_two_fail() {
    assert_eq!(reasons(&GOOD.replace("@@ plan 2\n", ""), 33), [Reason::NoPlan]);
    assert_eq!(reasons(&GOOD.replace("@@ plan 2", "@@ plan 2\n@@ plan 2"), 33), [Reason::PlanTwice]);
}

#[test]
fn unknown_lines_fail() {
    for unknown in ["@@ chekc a ok", "@@", "@@check a ok x", "@@  check a ok x", "@@ ", "@@@ end PASS"] {
        let text = GOOD.replace("text for people", unknown);
        assert_eq!(reasons(&text, 33), [Reason::UnknownLine(line(unknown))]);
    }
}

#[test]
fn malformed_lines_fail() {
    let lines = [
        "@@ check",
        "@@ check a",
        "@@ check a OK fine",
        "@@ check a FAIL",
        "@@ check a/b ok fine",
        "@@ value",
        "@@ value a",
        "@@ value a 1",
        "@@ value a one requests",
        "@@ value a -1 requests",
        "@@ value a +1 requests",
        "@@ value a 99999999999999999999 requests",
        "@@ value a 1 requests more",
        "@@ plan",
        "@@ plan many",
        "@@ end",
        "@@ end pass",
    ];
    for malformed in lines {
        let text = GOOD.replace("text for people", malformed);
        assert_eq!(reasons(&text, 33), [Reason::MalformedLine(line(malformed))]);
    }
}

#[test]
fn a_name_that_comes_twice_fails() {
    let text = GOOD.replace("edu.copy", "disk.digest");
    assert_eq!(reasons(&text, 33), [Reason::DuplicateCheck(line("disk.digest"))]);
    let text = GOOD.replace("@@ end", "@@ value map 12 requests\n@@ end");
    assert_eq!(reasons(&text, 33), [Reason::DuplicateValue(line("map"))]);
}

#[test]
fn more_or_fewer_checks_than_planned_fail() {
    let count = |planned| Reason::CheckCount { planned, seen: 2 };
    assert_eq!(reasons(&GOOD.replace("plan 2", "plan 3"), 33), [count(3)]);
    assert_eq!(reasons(&GOOD.replace("plan 2", "plan 1"), 33), [count(1)]);
}

#[test]
fn no_end_fails() {
    let text = GOOD.replace("@@ end PASS\n", "");
    for status in [0, 33, 35] {
        let reasons = reasons(&text, status);
        assert!(reasons.contains(&Reason::NoEnd));
        assert!(reasons.contains(&Reason::WrongStatus { ended: Ended::Exit(status), expected: None }));
    }
}

#[test]
fn protocol_after_the_end_fails() {
    let text = format!("{GOOD}\n@@ check late ok x");
    assert_eq!(reasons(&text, 33), [Reason::AfterEnd(line("@@ check late ok x"))]);
    let text = format!("{GOOD}\n@@ end PASS");
    assert_eq!(reasons(&text, 33), [Reason::AfterEnd(line("@@ end PASS"))]);
}

#[test]
fn pass_with_a_failed_check_fails() {
    let text = GOOD.replace("edu.copy ok", "edu.copy FAIL byte 3");
    let failed = Reason::FailedCheck { name: line("edu.copy"), detail: line("byte 3") };
    assert_eq!(reasons(&text, 33), [failed, Reason::PassWithFailedCheck]);
}

#[test]
fn fail_in_order_names_the_check() {
    let text = GOOD.replace("edu.copy ok", "edu.copy FAIL byte 3").replace("PASS", "FAIL");
    let verdict = read(&text, 35);
    assert_eq!(verdict.failed_checks(), ["edu.copy"]);
    let failed = Reason::FailedCheck { name: line("edu.copy"), detail: line("byte 3") };
    assert_eq!(verdict.reasons, [failed, Reason::EndFail]);
    assert_eq!(verdict.reasons[0].to_string(), "check edu.copy: byte 3");
}

#[test]
fn fail_without_a_failed_check_fails() {
    assert_eq!(reasons(&GOOD.replace("PASS", "FAIL"), 35), [Reason::EndFail]);
}

#[test]
fn a_status_that_does_not_fit_fails() {
    for status in [0, 1, 35, 139] {
        let wrong = Reason::WrongStatus { ended: Ended::Exit(status), expected: Some((End::Pass, 33)) };
        assert_eq!(reasons(GOOD, status), [wrong]);
    }
    let wrong = Reason::WrongStatus { ended: Ended::Exit(33), expected: Some((End::Fail, 35)) };
    assert_eq!(reasons(&GOOD.replace("PASS", "FAIL"), 33), [wrong, Reason::EndFail]);
    let signal = Ended::Signal(11);
    let verdict = Verdict::read(GOOD.lines(), Arch::X86_64, signal);
    assert_eq!(verdict.reasons, [Reason::WrongStatus { ended: signal, expected: Some((End::Pass, 33)) }]);
}

#[test]
fn a_hang_after_the_end_fails() {
    let killed = Ended::Deadline(Duration::from_secs(60));
    let verdict = Verdict::read(GOOD.lines(), Arch::X86_64, killed);
    assert_eq!(verdict.reasons, [Reason::Killed(killed)]);
}

#[test]
fn a_panic_fails_and_its_place_comes_first() {
    let text = "@@ start 1 x86_64\n@@ plan 2\npanic at platform/src/main.rs:7:9: no\nbacktrace";
    let reasons = reasons(text, 37);
    assert_eq!(reasons[0], Reason::Panicked(line("panic at platform/src/main.rs:7:9: no")));
    assert!(reasons.contains(&Reason::NoEnd));
    assert_eq!(read("@@ start 1 x86_64\n", 37).reasons[0], Reason::Panicked(String::new()));
    // A guest cannot pass by printing a whole protocol before it panics.
    assert_eq!(read(GOOD, 37).reasons, [Reason::Panicked(String::new())]);
}

#[test]
fn a_triple_fault_is_named() {
    let reasons = reasons("@@ start 1 x86_64\n", 0);
    assert!(reasons[0].to_string().contains("triple fault"), "{}", reasons[0]);
}

#[test]
fn odd_bytes_do_no_harm() {
    for odd in
        ["\u{fffd}\u{fffd}", "@@ \u{fffd}", "@@ check \u{fffd} ok x", "@@ value \u{0} 1 x", "@@ plan 1 2"]
    {
        assert!(!reasons(&GOOD.replace("@@ end PASS", odd), 33).is_empty());
    }
}
