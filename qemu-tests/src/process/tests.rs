//! Shell scripts as children.

use nix::sys::signal::killpg;
use nix::unistd::Pid;

use super::*;

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

fn run(script: &str, limit_ms: u64) -> (Ended, Vec<String>, String) {
    let mut lines = Vec::new();
    let mut process = Process::start(&mut shell(script)).unwrap();
    let ended =
        process.follow(Some(Duration::from_millis(limit_ms)), &mut |line| lines.push(line.to_owned()));
    (ended, lines, process.into_stderr())
}

#[test]
fn lines_status_and_stderr_arrive() {
    let (ended, lines, stderr) = run("printf 'one\\r\\ntwo\\n\\nlast'; echo oops >&2; exit 33", 10_000);
    assert_eq!(ended, Ended::Exit(33));
    assert_eq!(lines, ["one", "two", "", "last"]);
    assert_eq!(stderr, "oops\n");
}

#[test]
fn what_talks_to_the_user_itself_ends_in_time_too() {
    let limit = Some(Duration::from_millis(300));
    assert_eq!(super::run(&mut shell("exit 3"), None).unwrap().code(), Some(3));
    let since = Instant::now();
    let error = super::run(&mut shell("trap '' TERM; sleep 1000"), limit).unwrap_err();
    assert!(since.elapsed() < Duration::from_secs(5));
    assert_eq!(error.to_string(), "sh was killed at its deadline of 0.3 s");
}

#[test]
fn a_child_that_ignores_sigterm_dies_at_its_deadline_with_its_own_children() {
    let since = Instant::now();
    let (ended, lines, _) = run("trap '' TERM; echo $$; sleep 1000 & while :; do sleep 1; done", 400);
    assert_eq!(ended, Ended::Deadline(Duration::from_millis(400)));
    assert!(since.elapsed() < Duration::from_secs(5));
    let group = Pid::from_raw(lines[0].parse().unwrap());
    // Its orphan may need a moment to be reaped by init.
    for _ in 0..100 {
        if killpg(group, None).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("group {group} still exists");
}

#[test]
fn a_grandchild_that_keeps_the_output_open_dies_with_its_parent() {
    let since = Instant::now();
    let (ended, lines, _) = run("sleep 20 & echo done; exit 35", 10_000);
    assert_eq!((ended, lines.len()), (Ended::Exit(35), 1));
    assert!(since.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_flood_is_stopped() {
    let (ended, _, _) = run("yes $(printf '%01000d' 0)", 60_000);
    assert_eq!(ended, Ended::Flood);
}

#[test]
fn a_signal_is_told_apart() {
    let (ended, _, _) = run("kill -9 $$", 10_000);
    assert_eq!(ended, Ended::Signal(9));
}

#[test]
fn capture_has_a_deadline() {
    let error = capture(&mut shell("sleep 20"), Duration::from_millis(200)).unwrap_err();
    assert!(error.to_string().contains("deadline"), "{error}");
}
